"""Mistral: Llama with grouped heads and, in its first version, a sliding window in every layer.

Reference:
  Jiang et al., "Mistral 7B", arXiv 2310.06825; the released configurations.
"""

from typing import Any, NoReturn

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama
from jaxllm.models.positions import RotaryPositions

_V3 = llama.LLAMA3.replace(
  vocab_size=32768, max_length=32768, positions=RotaryPositions(base=1_000_000.0)
)

PRESETS = {
  'mistral_7b_v0.1': _V3.replace(
    vocab_size=32000, positions=RotaryPositions(), layer_pattern=('local',), window=4096
  ),
  'mistral_7b_v0.3': _V3,
}


def decode(keys: hf.Keys, **fields: Any) -> DecoderConfig:
  """Translate the keys of a family whose every layer may have the window of config.json."""
  if keys.get('sliding_window') is not None:
    fields |= {'layer_pattern': ('local',), 'window': hf.size(keys, 'sliding_window')}
  return hf.rms_decoder(keys, **fields)


def _no_experts(_: Any) -> NoReturn:
  raise ValueError("model_type 'mixtral' is a mixture of experts, which the decoder does not have "
                   'yet')


HUGGINGFACE = hf.Format(
  'mistral', 'MistralForCausalLM', llama.NAMES, decode,
  lambda config: hf.rms_config(config, sliding_window=config.window))
MIXTRAL = hf.Format('mixtral', 'MixtralForCausalLM', {}, _no_experts, _no_experts)
