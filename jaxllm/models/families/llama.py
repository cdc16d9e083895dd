"""Llama, and the families that are Llama with other switches: SmolLM, Mistral, OLMo, Phi, Qwen.

Rotary positions, RMSNorm, SwiGLU, biases in a few families, grouped heads in later and larger ones.

Reference:
  The released configurations, and: Llama 1 and 2, Touvron et al., arXiv 2302.13971 and 2307.09288;
  Llama 3, Dubey et al., 2407.21783; SmolLM 2, Ben Allal et al., 2502.02737; Mistral 7B, Jiang et
  al., 2310.06825; OLMo 2, Team OLMo, 2501.00656; Phi-3, Abdin et al., 2404.14219; Qwen 2 and 3,
  Yang et al., 2407.10671 and 2505.09388.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import Llama3Scaling, LongRopeScaling, RotaryPositions

_LLAMA2 = DecoderConfig(
  vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32, mlp_dim=11008, max_length=4096,
  initializer=InitializerConfig(stddev=0.02, scale_residual=False))
_LLAMA1 = _LLAMA2.replace(max_length=2048, norm=NormConfig(epsilon=1e-6))
_LLAMA3 = _LLAMA2.replace(
  vocab_size=128256, num_kv_heads=8, mlp_dim=14336, max_length=8192,
  positions=RotaryPositions(base=500_000.0))


def _sized(
  config: DecoderConfig, embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int,
  **fields: Any,
) -> DecoderConfig:
  return config.replace(embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
                        mlp_dim=mlp_dim, **fields)


def _stretched(factor: float, **fields: Any) -> DecoderConfig:
  """Llama 3.1 and 3.2 stretch the 8,192 tokens of Llama 3."""
  positions = RotaryPositions(base=500_000.0, scaling=Llama3Scaling(factor=factor))
  return _LLAMA3.replace(max_length=131072, positions=positions, **fields)


def _smollm2(*sizes: int, num_kv_heads: int, base: float) -> DecoderConfig:
  return _sized(
    _LLAMA2, *sizes, num_kv_heads=num_kv_heads, vocab_size=49152, max_length=8192,
    positions=RotaryPositions(base=base), tied_head=True)


_MISTRAL = _LLAMA3.replace(
  vocab_size=32768, max_length=32768, positions=RotaryPositions(base=1_000_000.0))
_OLMO2 = _LLAMA2.replace(
  vocab_size=100352, norm=NormConfig(epsilon=1e-6), norm_placement='post', query_key_norm='width',
  positions=RotaryPositions(base=500_000.0))
_QWEN2 = _LLAMA2.replace(
  vocab_size=151936, max_length=32768, norm=NormConfig(epsilon=1e-6), biases=('qkv',),
  positions=RotaryPositions(base=1_000_000.0), tied_head=True)
_QWEN3 = _QWEN2.replace(
  max_length=40960, num_kv_heads=8, head_dim=128, query_key_norm='head', biases=())

PRESETS = {
  'llama1_7b': _LLAMA1,
  'llama1_13b': _sized(_LLAMA1, 5120, 40, 40, 13824),
  'llama1_33b': _sized(_LLAMA1, 6656, 60, 52, 17920),
  'llama1_65b': _sized(_LLAMA1, 8192, 80, 64, 22016, norm=NormConfig()),
  'llama2_7b': _LLAMA2,
  'llama2_13b': _sized(_LLAMA2, 5120, 40, 40, 13824),
  'llama2_70b': _sized(_LLAMA2, 8192, 80, 64, 28672, num_kv_heads=8),
  'llama3_8b': _LLAMA3,
  'llama3_70b': _sized(_LLAMA3, 8192, 80, 64, 28672),
  'llama3.1_8b': _stretched(8.0),
  'llama3.1_70b': _sized(_stretched(8.0), 8192, 80, 64, 28672),
  'llama3.1_405b': _sized(_stretched(8.0), 16384, 126, 128, 53248),
  'llama3.2_1b': _sized(_stretched(32.0, tied_head=True), 2048, 16, 32, 8192),
  'llama3.2_3b': _sized(_stretched(32.0, tied_head=True), 3072, 28, 24, 8192),
  'smollm2_135m': _smollm2(576, 30, 9, 1536, num_kv_heads=3, base=100_000.0),
  'smollm2_360m': _smollm2(960, 32, 15, 2560, num_kv_heads=5, base=100_000.0),
  'smollm2_1.7b': _smollm2(2048, 24, 32, 8192, num_kv_heads=32, base=130_000.0),
  'smollm3_3b': _sized(
    _LLAMA2, 2048, 36, 16, 11008, num_kv_heads=4, vocab_size=128256, max_length=65536,
    positions=RotaryPositions(base=5_000_000.0), norm=NormConfig(epsilon=1e-6), tied_head=True,
    layer_pattern=('global', 'global', 'global', 'global_nope')),
  'mistral_7b_v0.1': _MISTRAL.replace(
    vocab_size=32000, positions=RotaryPositions(), layer_pattern=('local',), window=4096),
  'mistral_7b_v0.3': _MISTRAL,
  'olmo2_1b': _sized(_OLMO2, 2048, 16, 16, 8192),
  'olmo2_7b': _OLMO2,
  'olmo2_13b': _sized(_OLMO2, 5120, 40, 40, 13824),
  'phi3_mini_4k': _sized(
    _LLAMA2, 3072, 32, 32, 8192, vocab_size=32064, layer_pattern=('local',), window=2047),
  'qwen2_0.5b': _sized(_QWEN2, 896, 24, 14, 4864, num_kv_heads=2),
  'qwen2_1.5b': _sized(_QWEN2, 1536, 28, 12, 8960, num_kv_heads=2),
  'qwen2_7b': _sized(
    _QWEN2, 3584, 28, 28, 18944, num_kv_heads=4, vocab_size=152064, tied_head=False),
  'qwen3_0.6b': _sized(_QWEN3, 1024, 28, 16, 3072),
  'qwen3_4b': _sized(_QWEN3, 2560, 36, 32, 9728),
  'qwen3_8b': _sized(_QWEN3, 4096, 36, 32, 12288, tied_head=False),
}


def _decode(keys: hf.Keys) -> DecoderConfig:
  hf.refuse(keys, 'sliding_window')
  hf.refuse(keys, 'rope_interleaved', False)
  return hf.rms_decoder(keys)


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return hf.rms_config(
    config, attention_bias='qkv' in config.biases, mlp_bias='mlp' in config.biases)


# Most families have taken over these names.
_LAYER = 'model.layers.{}.'
NAMES = {
  'embed/embedding': 'model.embed_tokens.weight',
  'layers/attention_norm/scale': _LAYER + 'input_layernorm.weight',
  'layers/mlp_norm/scale': _LAYER + 'post_attention_layernorm.weight',
  'final_norm/scale': 'model.norm.weight',
  'head/kernel': 'lm_head.weight',
  **{
    f'layers/{ours}/{leaf}': f'{_LAYER}{theirs}_proj.{kind}'
    for ours, theirs in {
      'attention/query': 'self_attn.q', 'attention/key': 'self_attn.k',
      'attention/value': 'self_attn.v', 'attention/out': 'self_attn.o',
      'mlp/gate': 'mlp.gate', 'mlp/up': 'mlp.up', 'mlp/down': 'mlp.down',
    }.items()
    for leaf, kind in (('kernel', 'weight'), ('bias', 'bias'))},
}
QUERY_KEY_NORMS = {
  'layers/attention/query_norm/scale': _LAYER + 'self_attn.q_norm.weight',
  'layers/attention/key_norm/scale': _LAYER + 'self_attn.k_norm.weight',
}

LLAMA = hf.Format('llama', 'LlamaForCausalLM', NAMES, _decode, _encode)


def _decode_smollm3(keys: hf.Keys) -> DecoderConfig:
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
    positions=hf.rotary(keys, base=2_000_000.0))


def _encode_smollm3(config: DecoderConfig) -> dict[str, Any]:
  return _encode(config) | {
    'no_rope_layers': [int(kind != 'global_nope') for kind in config.layer_kinds],
    'layer_types': ['full_attention'] * config.num_layers,
    'use_sliding_window': False,
  }


SMOLLM3 = hf.Format('smollm3', 'SmolLM3ForCausalLM', NAMES, _decode_smollm3, _encode_smollm3)


def window(keys: hf.Keys) -> dict[str, Any]:
  """Return the fields of a family whose every layer may have the window of config.json."""
  if keys.get('sliding_window') is None:
    return {}
  return {'layer_pattern': ('local',), 'window': hf.size(keys, 'sliding_window')}


MISTRAL = hf.Format(
  'mistral', 'MistralForCausalLM', NAMES,
  lambda keys: hf.rms_decoder(keys, **window(keys)),
  lambda config: hf.rms_config(config, sliding_window=config.window))

OLMO2 = hf.Format(
  'olmo2', 'Olmo2ForCausalLM',
  decode=lambda keys: hf.rms_decoder(
    hf.with_defaults(keys, {'rms_norm_eps': 1e-5}), norm_placement='post', query_key_norm='width'),
  encode=lambda config: hf.rms_config(config, attention_bias='qkv' in config.biases),
  names={
    **{path: name for path, name in NAMES.items() if not path.endswith('_norm/scale')},
    **QUERY_KEY_NORMS,
    'final_norm/scale': 'model.norm.weight',
    'layers/attention_post_norm/scale': _LAYER + 'post_attention_layernorm.weight',
    'layers/mlp_post_norm/scale': _LAYER + 'post_feedforward_layernorm.weight',
  })


def _encode_phi(config: DecoderConfig) -> dict[str, Any]:
  keys = hf.rms_config(config, sliding_window=config.window)
  scaling = getattr(config.positions, 'scaling', None)
  if isinstance(scaling, LongRopeScaling):
    keys['original_max_position_embeddings'] = scaling.original_length
  if config.head_size * config.num_heads == config.embed_dim:
    del keys['head_dim']
  return keys


_QKV = hf.qkv_names(_LAYER + 'self_attn.qkv_proj', leaves={'kernel': 'weight'})
_GATE_UP = ('layers/mlp/gate/kernel', 'layers/mlp/up/kernel')
_FUSED = [path for paths in (*_QKV, _GATE_UP) for path in paths]

PHI3 = hf.Format(
  'phi3', 'Phi3ForCausalLM', encode=_encode_phi,
  decode=lambda keys: hf.rms_decoder(
    hf.with_defaults(keys, {'rms_norm_eps': 1e-5}), partial=True, **window(keys)),
  names={
    **{path: name for path, name in NAMES.items()
       if path not in _FUSED and not path.endswith('/bias')},
    **_QKV,
    _GATE_UP: _LAYER + 'mlp.gate_up_proj.weight',
  })


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


def _encode_qwen(config: DecoderConfig) -> dict[str, Any]:
  first = [*config.layer_kinds, 'local'].index('local')
  return hf.rms_config(
    config, use_sliding_window=config.window is not None, sliding_window=config.window,
    max_window_layers=first, layer_types=hf.layer_type_names(config))


QWEN2 = hf.Format(
  'qwen2', 'Qwen2ForCausalLM', NAMES, encode=_encode_qwen,
  decode=lambda keys: hf.rms_decoder(keys, biases=('qkv',), **_layers(keys)))
QWEN3 = hf.Format(
  'qwen3', 'Qwen3ForCausalLM', NAMES | QUERY_KEY_NORMS,
  decode=lambda keys: hf.rms_decoder(
    hf.with_defaults(keys, {'head_dim': 128}), query_key_norm='head', **_layers(keys)),
  encode=lambda config: _encode_qwen(config) | {'attention_bias': 'qkv' in config.biases})
