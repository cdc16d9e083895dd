"""SmolLM: small Llamas with a tied head (2), and with every fourth layer unrotated (3).

Reference:
  Ben Allal et al., "SmolLM2", arXiv 2502.02737; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import llama
from jaxllm.models.families.huggingface import (
  Format,
  Keys,
  pattern,
  refuse,
  rms_config,
  rms_decoder,
  rotary,
  size,
  with_defaults,
)
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions


def _preset(
  embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_dim: int, base: float
) -> DecoderConfig:
  return llama.PRESETS['llama2_7b'].replace(
    vocab_size=49152,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    mlp_dim=mlp_dim,
    max_length=8192,
    positions=RotaryPositions(base=base),
    tied_head=True,
  )


PRESETS = {
  'smollm2_135m': _preset(576, 30, 9, 3, 1536, 100_000.0),
  'smollm2_360m': _preset(960, 32, 15, 5, 2560, 100_000.0),
  'smollm2_1.7b': _preset(2048, 24, 32, 32, 8192, 130_000.0),
  'smollm3_3b': llama.PRESETS['llama2_7b'].replace(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=4,
    mlp_dim=11008,
    max_length=65536,
    positions=RotaryPositions(base=5_000_000.0),
    layer_pattern=('global', 'global', 'global', 'global_nope'),
    norm=NormConfig(kind='rmsnorm', epsilon=1e-6),
    tied_head=True,
  ),
}


def _decode(keys: Keys) -> DecoderConfig:
  refuse(keys, 'use_sliding_window', False)
  depth = size(keys, 'num_hidden_layers')
  every = size(keys, 'no_rope_layer_interval', 4)
  rotated = keys.get('no_rope_layers') or [(i + 1) % every != 0 for i in range(depth)]
  if not isinstance(rotated, list) or len(rotated) < depth:
    raise ValueError(f'config.json: no_rope_layers={rotated!r}; a list with one 0 (not rotated) '
                     f'or 1 for each of {depth} layers is needed')
  kinds = ['global' if turned else 'global_nope' for turned in rotated[:depth]]
  return rms_decoder(
    with_defaults(keys, {'tie_word_embeddings': True}), layer_pattern=pattern(kinds),
    positions=rotary(keys, base=2_000_000.0),
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return rms_config(
    config,
    attention_bias='qkv' in config.biases,
    mlp_bias='mlp' in config.biases,
    no_rope_layers=[int(kind != 'global_nope') for kind in config.layer_kinds],
    layer_types=['full_attention'] * config.num_layers,
    use_sliding_window=False,
  )


HUGGINGFACE = Format('smollm3', 'SmolLM3ForCausalLM', llama.NAMES, _decode, _encode)
