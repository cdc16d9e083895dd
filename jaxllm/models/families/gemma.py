"""Gemma 1, 2 and 3 (text): GeGLU, 1 + scale norms, scaled embeddings, a large tied vocabulary.

Gemma 2 adds norms after attention and MLP, soft-caps, and a window in every other layer; Gemma 3
replaces the soft-caps by norms of queries and keys, and rotates its windowed layers (five of six)
by another base.

Reference:
  Gemma Team, arXiv 2403.08295 (1), 2408.00118 (2), 2503.19786 (3); the released configurations.
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import LinearScaling, RotaryPositions

_GEMMA: dict[str, Any] = {
  'norm': NormConfig(epsilon=1e-6, scale_plus_one=True), 'head_dim': 256, 'tied_head': True,
  'max_length': 8192, 'vocab_size': 256000, 'activation': 'gelu_tanh',
}
_GEMMA2: dict[str, Any] = _GEMMA | {
  'attention_scale': 256**-0.5, 'norm_placement': 'sandwich', 'window': 4096,
  'layer_pattern': ('local', 'global'), 'attention_softcap': 50.0, 'logit_softcap': 30.0,
}
_GEMMA3: dict[str, Any] = _GEMMA | {
  'norm_placement': 'sandwich', 'query_key_norm': 'head',
  'layer_pattern': ('local',) * 5 + ('global',), 'local_positions': RotaryPositions(),
}


def _preset(
  shared: dict[str, Any], embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int,
  mlp_dim: int, **fields: Any,
) -> DecoderConfig:
  return DecoderConfig(**{
    **shared, 'embed_dim': embed_dim, 'num_layers': num_layers, 'num_heads': num_heads,
    'num_kv_heads': num_kv_heads, 'mlp_dim': mlp_dim, 'embedding_scale': embed_dim**0.5, **fields})


PRESETS = {
  'gemma_2b': _preset(_GEMMA, 2048, 18, 8, 1, 16384),
  'gemma_7b': _preset(_GEMMA, 3072, 28, 16, 16, 24576),
  'gemma2_2b': _preset(_GEMMA2, 2304, 26, 8, 4, 9216),
  'gemma2_9b': _preset(_GEMMA2, 3584, 42, 16, 8, 14336),
  'gemma2_27b': _preset(
    _GEMMA2, 4608, 46, 32, 16, 36864, head_dim=128, attention_scale=144**-0.5),
  'gemma3_1b': _preset(
    _GEMMA3, 1152, 26, 4, 1, 6912, vocab_size=262144, max_length=32768, window=512,
    positions=RotaryPositions(base=1_000_000.0)),
  'gemma3_4b': _preset(
    _GEMMA3, 2560, 34, 8, 4, 10240, vocab_size=262208, max_length=131072, window=1024,
    positions=RotaryPositions(base=1_000_000.0, scaling=LinearScaling(factor=8.0))),
}

# What config.json of this family may leave out.
_DEFAULTS = {'head_dim': 256, 'tie_word_embeddings': True, 'max_position_embeddings': 8192}
_DEFAULTS3 = {
  **_DEFAULTS, 'vocab_size': 262208, 'num_attention_heads': 8, 'num_key_value_heads': 4,
  'max_position_embeddings': 131072, 'sliding_window': 4096,
}


def _common(keys: hf.Keys) -> dict[str, Any]:
  hf.refuse(keys, 'use_bidirectional_attention', False)
  # Gemma 1 was released with 'gelu' for what is its approximation by tanh.
  kind = hf.activation(keys, 'hidden_activation', keys.get('hidden_act') or 'gelu_pytorch_tanh')
  return {
    'norm': NormConfig(
      kind='rmsnorm', epsilon=hf.number(keys, 'rms_norm_eps', 1e-6), scale_plus_one=True),
    'activation': 'gelu_tanh' if kind == 'gelu' else kind,
    'embedding_scale': hf.size(keys, 'hidden_size') ** 0.5,
  }


def _layers(keys: hf.Keys, every: int) -> dict[str, Any]:
  """Every `every`-th layer sees everything, the others a window."""
  depth = hf.size(keys, 'num_hidden_layers', limit=hf.MAX_LAYERS)
  default = ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(depth)]
  kinds = hf.layer_types(keys, default)
  return {
    'layer_pattern': hf.pattern(kinds),
    'window': hf.size(keys, 'sliding_window', 4096) if 'local' in kinds else None,
    'norm_placement': 'sandwich',
    'attention_scale': hf.number(keys, 'query_pre_attn_scalar', 256, 0) ** -0.5,
  }


def _softcap(keys: hf.Keys, name: str, default: float | None) -> float | None:
  return None if keys.get(name, default) is None else hf.number(keys, name, default)


def _decode3(keys: hf.Keys) -> DecoderConfig:
  hf.refuse(keys, 'attn_logit_softcapping')
  keys = hf.with_defaults(keys, _DEFAULTS3)
  ropes = keys.get('rope_parameters') or {}
  if not isinstance(ropes, Mapping):
    raise ValueError(f'config.json: rope_parameters={ropes!r}; an object is needed')
  everywhere = ropes.get('full_attention') or keys.get('rope_scaling') or {}
  local_base = hf.number(keys, 'rope_local_base_freq', 10_000.0)
  fields = _layers(keys, every=hf.size(keys, 'sliding_window_pattern', 6))
  local = None
  if fields['window']:
    base = hf.number(ropes.get('sliding_attention') or {}, 'rope_theta', local_base)
    local = RotaryPositions(base=base)
  positions = hf.rotary(keys, base=1_000_000.0, rope=everywhere)
  if isinstance(positions.scaling, LinearScaling):
    # Published as the length that the scaling reaches.
    fields['max_length'] = hf.size(keys, 'max_position_embeddings')
  return hf.rms_decoder(
    keys, **_common(keys), **fields,
    query_key_norm='head',
    logit_softcap=_softcap(keys, 'final_logit_softcapping', None),
    positions=positions,
    local_positions=local)


def _decode3_multimodal(keys: hf.Keys) -> DecoderConfig:
  text = keys.get('text_config')
  if not isinstance(text, Mapping):
    raise ValueError(f"config.json: text_config={text!r}; model_type 'gemma3' needs an object")
  return _decode3(text)


def _encode1(config: DecoderConfig) -> dict[str, Any]:
  keys = hf.rms_config(config, attention_bias='qkv' in config.biases)
  return keys | {'hidden_activation': keys['hidden_act']}


def _encode2(config: DecoderConfig) -> dict[str, Any]:
  keys = _encode1(config) | {
    'query_pre_attn_scalar': round(config.query_scale**-2),
    'sliding_window': config.window,
    'layer_types': hf.layer_type_names(config),
    'attn_logit_softcapping': config.attention_softcap,
    'final_logit_softcapping': config.logit_softcap,
  }
  del keys['hidden_act']
  return keys


def _encode3(config: DecoderConfig) -> dict[str, Any]:
  keys = _encode2(config)
  local = config.local_positions or RotaryPositions()
  scaling = getattr(config.positions, 'scaling', None)
  if isinstance(scaling, LinearScaling):
    keys['max_position_embeddings'] = config.max_length
  keys['rope_scaling'] = hf.scaling_keys(config, scaling)
  return keys | {'rope_local_base_freq': local.base}


_SANDWICH = {
  **llama.NAMES,
  'layers/attention_post_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  'layers/mlp_norm/scale': 'model.layers.{}.pre_feedforward_layernorm.weight',
  'layers/mlp_post_norm/scale': 'model.layers.{}.post_feedforward_layernorm.weight',
}
_NAMES3 = _SANDWICH | llama.QUERY_KEY_NORMS

GEMMA = hf.Format(
  'gemma', 'GemmaForCausalLM', llama.NAMES, encode=_encode1,
  decode=lambda keys: hf.rms_decoder(hf.with_defaults(keys, _DEFAULTS), **_common(keys)))
GEMMA2 = hf.Format(
  'gemma2', 'Gemma2ForCausalLM', _SANDWICH, encode=_encode2,
  decode=lambda keys: hf.rms_decoder(
    hf.with_defaults(keys, _DEFAULTS), **_common(keys), **_layers(keys, every=2),
    attention_softcap=_softcap(keys, 'attn_logit_softcapping', 50.0),
    logit_softcap=_softcap(keys, 'final_logit_softcapping', 30.0)))
GEMMA3 = hf.Format('gemma3_text', 'Gemma3ForCausalLM', _NAMES3, _decode3, _encode3)
GEMMA3_MULTIMODAL = hf.Format(
  'gemma3', 'Gemma3ForConditionalGeneration', _NAMES3, _decode3_multimodal, _encode3,
  other_prefixes=('language_model.model.', 'model.language_model.'),
  aliases={'language_model.lm_head.weight': 'lm_head.weight'},
  ignored={
    rf'(model\.)?{part}\..*': 'vision, of which we read the text model only'
    for part in ('vision_tower', 'multi_modal_projector')})
