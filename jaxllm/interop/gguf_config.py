"""The metadata of a GGUF file as the keys of a config.json.

llama.cpp defines their meaning: its defaults hold here, and a key of its that is neither read nor
known to change nothing is refused.

Reference:
  src/llama-model.cpp, src/llama-context.cpp and gguf-py/gguf/constants.py in
  github.com/ggml-org/llama.cpp.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.interop import gguf_file
from jaxllm.interop.huggingface import Reading
from jaxllm.interop.tensorfile import Tensor
from jaxllm.models.families.huggingface import MAX_LAYERS

# Divisors of the frequencies of Llama 3.1 and later, stored as a tensor.
ROPE_DIVISORS = 'rope_freqs.weight'

Get = Callable[..., Any]
# Keys of an architecture that change no logits, and values that are the default anyway.
_HARMLESS = ('vocab_size', 'tensor_data_layout', 'rope.scaling.finetuned', 'pooling_type',
             'attention.layer_norm_epsilon')
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  'attention.causal': (True,), 'logit_scale': (0, 1), 'residual_scale': (0, 1),
  'embedding_scale': (0, 1), 'rope.scaling.yarn_attn_factor': (0, 1),
}
_HEAD_SIZES = ('attention.value_length', 'attention.key_length_swa', 'attention.value_length_swa',
               'rope.dimension_count', 'rope.dimension_count_swa')
# The same of the tokenizer; ids of single tokens are named *_token_id.
_TOKENIZER = tuple(f'tokenizer.ggml.{name}' for name in (
  'pre', 'merges', 'scores', 'token_type', 'token_type_count'))
_TOKENIZER += ('tokenizer.huggingface.json', 'tokenizer.rwkv.world', 'tokenizer.chat_template')
_CHANGES_TEXT = ('remove_extra_whitespaces', 'precompiled_charsmap', 'normalizer')


def keys(
  metadata: Reading, found: Mapping[str, Tensor], model_type: str
) -> dict[str, Any]:
  """Return the keys of the config.json that the metadata stand for.

  Raises:
    ValueError: a key is missing, or says something that the decoder does not have.
  """
  kind = metadata['general.architecture']

  def get(name: str, default: Any = None) -> Any:
    value = metadata.get(f'{kind}.{name}', default)
    if isinstance(value, list):
      if len(set(value)) != 1:
        raise ValueError(f'{kind}.{name} differs from layer to layer, which is not supported')
      value = value[0]
    if isinstance(value, str) and name != 'rope.scaling.type':
      raise ValueError(f'{kind}.{name}={value!r}; a number is needed')
    # A 32-bit float says 1e-5 as 9.999999747e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  if get('expert_count', 0):
    raise ValueError(f'{kind}.expert_count={get("expert_count")}: a mixture of experts, which the '
                     'decoder does not have yet')
  if 'token_embd.weight' not in found:
    raise ValueError('token_embd.weight is missing')
  for name in ('embedding_length', 'feed_forward_length', 'block_count', 'context_length',
               'attention.layer_norm_rms_epsilon'):
    if get(name) is None:
      raise ValueError(f'{kind}.{name} is missing')
  vocab_size, width = found['token_embd.weight'].shape
  heads = get('attention.head_count')
  if not isinstance(heads, int) or heads < 1:
    raise ValueError(f'{kind}.attention.head_count={heads!r}; a positive number is needed')
  head_dim = get('attention.key_length', width // heads)
  for name in _HEAD_SIZES:
    if get(name, head_dim) != head_dim:
      raise ValueError(f'{kind}.{name}={get(name)} differs from the head dimension {head_dim}, '
                       'which is not supported')
  # The 27B models divide by the square root of width / heads, not of the head dimension.
  wide = (kind, get('block_count')) in (('gemma2', 46), ('gemma3', 62))
  query_dim = width // heads if wide else head_dim
  if scale := get('attention.scale', 0):
    if not math.isclose(scale, query_dim**-0.5, rel_tol=1e-4):
      raise ValueError(f'{kind}.attention.scale={scale} is not supported (only {query_dim}**-0.5)')
  base = get('rope.freq_base', 1e6 if kind == 'gemma3' else 1e4)
  made = {
    'model_type': model_type,
    'vocab_size': vocab_size,
    'hidden_size': get('embedding_length'),
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': get('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'max_position_embeddings': get('context_length'),
    'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
    'rope_theta': base,
    'rope_scaling': _scaling(get, kind, found, head_dim),
    'tie_word_embeddings': 'output.weight' not in found,
    'attention_bias': 'blk.0.attn_output.bias' in found,
    'mlp_bias': 'blk.0.ffn_up.bias' in found,
    **_windows(metadata, get, kind, base),
  }
  if kind in ('gemma2', 'gemma3'):
    made['query_pre_attn_scalar'] = query_dim
    usual = 30.0 if kind == 'gemma2' else 0
    made['final_logit_softcapping'] = get('final_logit_softcapping', usual) or None
  if kind == 'gemma2':
    made['attn_logit_softcapping'] = get('attn_logit_softcapping', 50.0)
  return {key: value for key, value in made.items() if value is not None}


def _windows(metadata: Reading, get: Get, kind: str, base: float) -> dict[str, Any]:
  """Return the keys of layers with a window and of their rotation."""
  window = get('attention.sliding_window', 4096 if kind == 'gemma2' else 0)
  local_base = get('rope.freq_base_swa', 1e4 if kind == 'gemma3' else base)
  if kind != 'gemma3' and local_base != base:
    raise ValueError(f'{kind}.rope.freq_base_swa={local_base} differs from rope.freq_base={base}')
  if kind not in ('gemma2', 'gemma3'):
    if 0 < window < get('context_length'):
      raise ValueError(f'{kind}.attention.sliding_window={window} is not supported')
    return {}
  cycle = metadata.get(f'{kind}.attention.sliding_window_pattern', 2 if kind == 'gemma2' else 6)
  depth = min(get('block_count'), MAX_LAYERS)
  if not isinstance(cycle, list):
    every = get('attention.sliding_window_pattern', cycle)
    cycle = [not every or i % every < every - 1 for i in range(depth)]
  local = [bool(window and one) for one in cycle][:depth]
  made = {'layer_types': [('full_attention', 'sliding_attention')[one] for one in local],
          'sliding_window': window or None}
  return made | ({'rope_local_base_freq': local_base} if kind == 'gemma3' else {})


def _scaling(
  get: Get, kind: str, found: Mapping[str, Tensor], head_dim: int
) -> dict[str, Any] | None:
  """Return `rope_scaling`: a factor without a type is linear."""
  way, length = get('rope.scaling.type', 'linear'), get('context_length')
  if way not in ('none', 'linear', 'yarn'):
    raise ValueError(f'rope.scaling.type {way!r} is not supported (supported: none, linear, yarn)')
  factor = get('rope.scaling.factor', get('rope.scale_linear', 0)) or 1.0
  factor = 1.0 if way == 'none' else factor
  original = get('rope.scaling.original_context_length')
  fast, slow = (get(f'rope.scaling.yarn_beta_{name}', usual)
                for name, usual in (('fast', 32.0), ('slow', 1.0)))
  sharpness, blend = get('rope.scaling.attn_factor', 1.0), get('rope.scaling.yarn_ext_factor', -1)
  yarn, divided = way == 'yarn', ROPE_DIVISORS in found
  if blend not in (-1, int(yarn)) or yarn and divided or kind == 'gemma3' and (
    yarn or sharpness != 1
  ):
    raise ValueError(f'{kind}: rope.scaling.type {way!r} with attn_factor={sharpness}, '
                     f'yarn_ext_factor={blend} or {ROPE_DIVISORS} is not supported')
  divisors = np.full(head_dim // 2, factor)
  if divided:
    tensor = found[ROPE_DIVISORS]
    found_P = gguf_file.data(tensor)
    if tensor.shape != divisors.shape or not ((found_P > 0) & (found_P < np.inf)).all():
      raise ValueError(f'{ROPE_DIVISORS} has the shape {tensor.shape}, expected '
                       f'{divisors.shape} finite numbers above 0')
    divisors = divisors * found_P
  if yarn:
    return {
      'rope_type': 'yarn', 'factor': factor, 'beta_fast': fast, 'beta_slow': slow,
      'original_max_position_embeddings': original or length,
      'attention_factor': None if sharpness == 1 else sharpness * (0.1 * math.log(factor) + 1),
    }
  if divided or sharpness != 1:
    return {
      'rope_type': 'longrope', 'short_factor': divisors.tolist(), 'long_factor': divisors.tolist(),
      'factor': 1.0, 'attention_factor': sharpness, 'original_max_position_embeddings': length,
    }
  if factor == 1:
    return None
  scaling = {'rope_type': 'linear', 'factor': factor}
  return scaling | ({'original_max_position_embeddings': original} if original else {})


def unread(metadata: Reading) -> Iterator[str]:
  """Yield the keys that nothing was taken from and that are not known to change nothing.

  Raises:
    ValueError: one changes what the model computes, or how text is cut.
  """
  kind = metadata['general.architecture']
  known = set(_constants(gguf_file.library().Keys))
  for key, value in metadata.data.items():
    name = key.removeprefix(f'{kind}.').removeprefix('tokenizer.ggml.')
    empty = not any(value) if isinstance(value, list) else not value
    if key in metadata.read or (value in _NEUTRAL[name] if name in _NEUTRAL else empty):
      continue
    shown = f'{key}={str(value)[:40]}'
    if key.startswith(f'{kind}.') and name not in _HARMLESS:
      if f'{{arch}}.{name}' in known or name.startswith(('rope.', 'attention.')):
        raise ValueError(f'{shown} changes what the model computes, and is not supported')
      yield key
    if key.startswith('tokenizer.') and not name.endswith('_token_id'):
      if name.startswith(_CHANGES_TEXT):
        raise ValueError(f'{shown} changes how text is cut, and is not supported')
      if not key.startswith(_TOKENIZER):
        yield key


def _constants(group: Any) -> Iterator[str]:
  for value in vars(group).values():
    if isinstance(value, str):
      yield value
    elif isinstance(value, type):
      yield from _constants(value)
