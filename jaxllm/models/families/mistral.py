"""Mistral: Llama with grouped heads and, in its first version, a sliding window in every layer.

Reference:
  Jiang et al., "Mistral 7B", arXiv 2310.06825; the released configurations.
"""

from typing import Any, NoReturn

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import llama
from jaxllm.models.families.huggingface import Format, Keys, rms_config, rms_decoder, size
from jaxllm.models.positions import RotaryPositions

_V3 = llama.PRESETS['llama3_8b'].replace(
  vocab_size=32768, max_length=32768, positions=RotaryPositions(base=1_000_000.0)
)

PRESETS = {
  'mistral_7b_v0.1': _V3.replace(
    vocab_size=32000, positions=RotaryPositions(), layer_pattern=('local',), window=4096
  ),
  'mistral_7b_v0.3': _V3,
}


def window_in_all_layers(keys: Keys) -> dict[str, Any]:
  """Return the fields of a config whose every layer has the window of config.json, if any."""
  if keys.get('sliding_window') is None:
    return {}
  return {'layer_pattern': ('local',), 'window': size(keys, 'sliding_window')}


def _decode(keys: Keys) -> DecoderConfig:
  return rms_decoder(keys, **window_in_all_layers(keys))


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return rms_config(config, sliding_window=config.window)


def _no_experts(_: Any) -> NoReturn:
  raise ValueError("model_type 'mixtral' is a mixture of experts, which the decoder does not have "
                   'yet')


HUGGINGFACE = Format('mistral', 'MistralForCausalLM', llama.NAMES, _decode, _encode)
MIXTRAL = Format('mixtral', 'MixtralForCausalLM', {}, _no_experts, _no_experts)
