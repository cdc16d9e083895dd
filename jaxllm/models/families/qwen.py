"""Qwen 2, 2.5 and 3: Llama with biases on queries, keys and values (2) or with their norms (3).

Reference:
  Yang et al., "Qwen2 Technical Report", arXiv 2407.10671, and "Qwen3 Technical Report", arXiv
  2505.09388; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions

_QWEN2 = llama.LLAMA2.replace(
  vocab_size=151936, max_length=32768, norm=NormConfig(epsilon=1e-6), biases=('qkv',),
  positions=RotaryPositions(base=1_000_000.0), tied_head=True,
)
_QWEN3 = _QWEN2.replace(
  max_length=40960, num_kv_heads=8, head_dim=128, query_key_norm='head', biases=()
)

PRESETS = {
  'qwen2_0.5b': llama.sized(_QWEN2, 896, 24, 14, 4864, num_kv_heads=2),
  'qwen2_1.5b': llama.sized(_QWEN2, 1536, 28, 12, 8960, num_kv_heads=2),
  'qwen2_7b': llama.sized(
    _QWEN2, 3584, 28, 28, 18944, num_kv_heads=4, vocab_size=152064, tied_head=False),
  'qwen3_0.6b': llama.sized(_QWEN3, 1024, 28, 16, 3072),
  'qwen3_4b': llama.sized(_QWEN3, 2560, 36, 32, 9728),
  'qwen3_8b': llama.sized(_QWEN3, 4096, 36, 32, 12288, tied_head=False),
}


def _layers(keys: hf.Keys) -> dict[str, Any]:
  """Layers from `max_window_layers` on have the window, where it is switched on."""
  depth = hf.size(keys, 'num_hidden_layers', limit=hf.MAX_LAYERS)
  windowed = hf.flag(keys, 'use_sliding_window') and keys.get('sliding_window') is not None
  first = keys.get('max_window_layers', 28) if windowed else depth
  default = ['sliding_attention' if i >= first else 'full_attention' for i in range(depth)]
  kinds = hf.layer_types(keys, default)
  if 'local' not in kinds:
    return {}
  return {'layer_pattern': hf.pattern(kinds), 'window': hf.size(keys, 'sliding_window')}


def _encode(config: DecoderConfig) -> dict[str, Any]:
  first = [*config.layer_kinds, 'local'].index('local')
  return hf.rms_config(
    config, use_sliding_window=config.window is not None, sliding_window=config.window,
    max_window_layers=first, layer_types=hf.layer_type_names(config),
  )


HUGGINGFACE = hf.Format(
  'qwen2', 'Qwen2ForCausalLM', llama.NAMES, encode=_encode,
  decode=lambda keys: hf.rms_decoder(keys, biases=('qkv',), **_layers(keys)),
)
QWEN3 = hf.Format(
  'qwen3', 'Qwen3ForCausalLM', llama.NAMES | llama.QUERY_KEY_NORMS,
  decode=lambda keys: hf.rms_decoder(
    hf.with_defaults(keys, {'head_dim': 128}), query_key_norm='head', **_layers(keys)),
  encode=lambda config: _encode(config) | {'attention_bias': 'qkv' in config.biases},
)
