"""SmolLM: small Llamas with a tied head (2), and with every fourth layer unrotated (3).

Reference:
  Ben Allal et al., "SmolLM2", arXiv 2502.02737; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions


def _smollm2(*sizes: int, num_kv_heads: int, base: float) -> DecoderConfig:
  return llama.sized(
    llama.LLAMA2, *sizes, num_kv_heads=num_kv_heads, vocab_size=49152, max_length=8192,
    positions=RotaryPositions(base=base), tied_head=True,
  )


PRESETS = {
  'smollm2_135m': _smollm2(576, 30, 9, 1536, num_kv_heads=3, base=100_000.0),
  'smollm2_360m': _smollm2(960, 32, 15, 2560, num_kv_heads=5, base=100_000.0),
  'smollm2_1.7b': _smollm2(2048, 24, 32, 8192, num_kv_heads=32, base=130_000.0),
  'smollm3_3b': llama.sized(
    llama.LLAMA2, 2048, 36, 16, 11008, num_kv_heads=4, vocab_size=128256, max_length=65536,
    positions=RotaryPositions(base=5_000_000.0), norm=NormConfig(epsilon=1e-6), tied_head=True,
    layer_pattern=('global', 'global', 'global', 'global_nope'),
  ),
}


def _decode(keys: hf.Keys) -> DecoderConfig:
  hf.refuse(keys, 'use_sliding_window', False)
  depth = hf.size(keys, 'num_hidden_layers')
  every = hf.size(keys, 'no_rope_layer_interval', 4)
  rotated = keys.get('no_rope_layers') or [(i + 1) % every != 0 for i in range(depth)]
  if not isinstance(rotated, list) or len(rotated) < depth:
    raise ValueError(f'config.json: no_rope_layers={rotated!r}; a list with one 0 (not rotated) '
                     f'or 1 for each of {depth} layers is needed')
  kinds = ['global' if turned else 'global_nope' for turned in rotated[:depth]]
  return hf.rms_decoder(
    hf.with_defaults(keys, {'tie_word_embeddings': True}), layer_pattern=hf.pattern(kinds),
    positions=hf.rotary(keys, base=2_000_000.0),
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return llama.encode(config) | {
    'no_rope_layers': [int(kind != 'global_nope') for kind in config.layer_kinds],
    'layer_types': ['full_attention'] * config.num_layers,
    'use_sliding_window': False,
  }


HUGGINGFACE = hf.Format('smollm3', 'SmolLM3ForCausalLM', llama.NAMES, _decode, _encode)
