"""Qwen 2, 2.5 and 3: Llama with biases on queries, keys and values (2) or with their norms (3).

Reference:
  Yang et al., "Qwen2 Technical Report", arXiv 2407.10671, and "Qwen3 Technical Report", arXiv
  2505.09388; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import llama
from jaxllm.models.families.huggingface import (
  MAX_LAYERS,
  Format,
  Keys,
  flag,
  layer_type_names,
  layer_types,
  pattern,
  rms_config,
  rms_decoder,
  size,
  with_defaults,
)
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions

_QWEN = llama.PRESETS['llama2_7b'].replace(
  norm=NormConfig(kind='rmsnorm', epsilon=1e-6), positions=RotaryPositions(base=1_000_000.0)
)


def _qwen2(
  vocab_size: int, embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int,
  mlp_dim: int, tied_head: bool,
) -> DecoderConfig:
  return _QWEN.replace(
    vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
    num_kv_heads=num_kv_heads, mlp_dim=mlp_dim, max_length=32768, tied_head=tied_head,
    biases=('qkv',),
  )


def _qwen3(
  embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int, tied_head: bool
) -> DecoderConfig:
  return _QWEN.replace(
    vocab_size=151936, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
    num_kv_heads=8, head_dim=128, mlp_dim=mlp_dim, max_length=40960, tied_head=tied_head,
    query_key_norm='head',
  )


PRESETS = {
  'qwen2_0.5b': _qwen2(151936, 896, 24, 14, 2, 4864, True),
  'qwen2_1.5b': _qwen2(151936, 1536, 28, 12, 2, 8960, True),
  'qwen2_7b': _qwen2(152064, 3584, 28, 28, 4, 18944, False),
  'qwen3_0.6b': _qwen3(1024, 28, 16, 3072, True),
  'qwen3_4b': _qwen3(2560, 36, 32, 9728, True),
  'qwen3_8b': _qwen3(4096, 36, 32, 12288, False),
}


def _layers(keys: Keys) -> dict[str, Any]:
  """Layers from `max_window_layers` on have the window, where it is switched on."""
  depth = size(keys, 'num_hidden_layers', limit=MAX_LAYERS)
  windowed = flag(keys, 'use_sliding_window') and keys.get('sliding_window') is not None
  first = keys.get('max_window_layers', 28) if windowed else depth
  default = ['sliding_attention' if i >= first else 'full_attention' for i in range(depth)]
  kinds = layer_types(keys, default)
  if 'local' not in kinds:
    return {}
  return {'layer_pattern': pattern(kinds), 'window': size(keys, 'sliding_window')}


def _window_keys(config: DecoderConfig) -> dict[str, Any]:
  return {
    'use_sliding_window': config.window is not None,
    'sliding_window': config.window,
    'max_window_layers': next(
      (i for i, kind in enumerate(config.layer_kinds) if kind == 'local'), config.num_layers
    ),
    'layer_types': layer_type_names(config),
  }


def _decode2(keys: Keys) -> DecoderConfig:
  return rms_decoder(keys, biases=('qkv',), **_layers(keys))


def _encode2(config: DecoderConfig) -> dict[str, Any]:
  return rms_config(config, **_window_keys(config))


def _decode3(keys: Keys) -> DecoderConfig:
  keys = with_defaults(keys, {'head_dim': 128})
  return rms_decoder(keys, query_key_norm='head', **_layers(keys))


def _encode3(config: DecoderConfig) -> dict[str, Any]:
  return rms_config(config, attention_bias='qkv' in config.biases, **_window_keys(config))


HUGGINGFACE = Format('qwen2', 'Qwen2ForCausalLM', llama.NAMES, _decode2, _encode2)
QWEN3 = Format(
  'qwen3', 'Qwen3ForCausalLM', decode=_decode3, encode=_encode3,
  names={
    **llama.NAMES,
    'layers/attention/query_norm/scale': 'model.layers.{}.self_attn.q_norm.weight',
    'layers/attention/key_norm/scale': 'model.layers.{}.self_attn.k_norm.weight',
  },
)
