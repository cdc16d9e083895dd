"""GGUF models: dequantised, and read as the Hugging Face model that they were made from.

Metadata becomes the keys of a config.json, tensors get their Hugging Face names, and what
llama.cpp's converter did to them is undone: rows of queries and keys are put back in order (llama),
1 is taken from norm scales again (gemma). llama.cpp defines the meaning of metadata: its defaults
hold here, and a key of its that is neither read nor known to change nothing is refused.

Reference:
  src/llama-model.cpp, src/llama-context.cpp and gguf-py/gguf/constants.py in
  github.com/ggml-org/llama.cpp.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from jaxllm import mistakes
from jaxllm.interop import gguf_file, gguf_vocabulary, reference, weights
from jaxllm.interop import tokenizer_files as files_lib
from jaxllm.interop.huggingface import Reading
from jaxllm.interop.tensorfile import Tensor
from jaxllm.interop.weights import Source
from jaxllm.models.families import HUGGINGFACE
from jaxllm.models.families.huggingface import MAX_LAYERS

_LAYER = {
  'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
  'ffn_gate_inp': 'mlp.gate', 'ffn_gate_inp_shexp': 'mlp.shared_expert_gate',
  **{f'ffn_{part}_shexp': f'mlp.shared_expert.{part}_proj' for part in ('gate', 'up', 'down')},
}
# One tensor of all experts -> the name of each of them.
_EXPERTS = {f'ffn_{part}_exps': f'mlp.experts.{{}}.{part}_proj' for part in ('gate', 'up', 'down')}
# Mixtral is an architecture 'llama' with experts.
_MIXTRAL = {
  'ffn_gate_inp': 'block_sparse_moe.gate', 'ffn_gate_exps': 'block_sparse_moe.experts.{}.w1',
  'ffn_up_exps': 'block_sparse_moe.experts.{}.w3',
  'ffn_down_exps': 'block_sparse_moe.experts.{}.w2',
}
_PRE = {'ffn_norm': 'post_attention_layernorm'}
_SANDWICH = {
  'ffn_norm': 'pre_feedforward_layernorm', 'post_attention_norm': 'post_attention_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
  """How one `general.architecture` becomes a Hugging Face model."""

  model_type: str
  norms: Mapping[str, str]
  interleaved: bool = False
  norms_plus_one: bool = False


ARCHITECTURES = {
  'llama': _Architecture('llama', _PRE, interleaved=True),
  'qwen2': _Architecture('qwen2', _PRE),
  'qwen3': _Architecture('qwen3', _PRE),
  'qwen2moe': _Architecture('qwen2_moe', _PRE),
  'qwen3moe': _Architecture('qwen3_moe', _PRE),
  'olmoe': _Architecture('olmoe', _PRE),
  'gemma': _Architecture('gemma', _PRE, norms_plus_one=True),
  'gemma2': _Architecture('gemma2', _SANDWICH, norms_plus_one=True),
  'gemma3': _Architecture('gemma3_text', _SANDWICH, norms_plus_one=True),
}


def open_model(path: str | os.PathLike[str]) -> Source:
  """Check everything about a GGUF model but its numbers; nothing is allocated.

  Raises:
    ValueError: the file is damaged, hostile, or of an architecture that is not supported.
  """
  path = pathlib.Path(path).expanduser()
  content, found = gguf_file.read(path)
  metadata = Reading(content)
  kind = str(metadata.get('general.architecture'))
  if kind not in ARCHITECTURES:
    raise ValueError(f'{path}: general.architecture {kind!r} is not supported (supported: '
                     f'{", ".join(sorted(ARCHITECTURES))})')
  architecture = ARCHITECTURES[kind]
  if kind == 'llama' and {'blk.0.attn_q.bias', 'blk.0.attn_output.bias'} & set(found) == {
    'blk.0.attn_q.bias'
  }:
    architecture = dataclasses.replace(architecture, model_type='qwen2')
  elif kind == 'llama' and metadata.get('llama.expert_count', 0):
    architecture = dataclasses.replace(
      architecture, model_type='mixtral', norms=_PRE | _MIXTRAL)
  try:
    keys = config_keys(metadata, found, architecture.model_type)
    form = HUGGINGFACE[architecture.model_type]
    config = form.decode(keys)
    names = _names(architecture, config.num_layers)
    ignored = {name: 'part of the config' for name in [ROPE_DIVISORS] if name in found}
    slots, tensors, _, _ = weights.locate(form, config, {
      named: _stored(part, named, keys, architecture)
      for name, tensor in found.items() if name not in ignored
      for named, part in _parts(names.get(name), tensor)})
    files = gguf_vocabulary.tokenizer_files(metadata)
    unread = tuple(unread_keys(metadata))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  files = files_lib.check(files, config.vocab_size, path)
  if unread:
    logging.warning('%s: nothing is made of %s', path, ', '.join(unread))

  def logits(ids: list[int], rounded: Any, dtype: Any = np.float32) -> np.ndarray:
    return reference.logits(
      content, lambda name: gguf_file.data(found[name]).astype(rounded), ids, dtype, gguf=True)

  return Source(str(path), form, config, keys, slots, tensors, ignored, unread, files, logits)


def _names(architecture: _Architecture, depth: int) -> dict[str, str]:
  """Return name in the file -> Hugging Face name."""
  return {
    'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight',
    'output.weight': 'lm_head.weight',
    **{f'blk.{layer}.{ours}.{leaf}': f'model.layers.{layer}.{theirs}.{leaf}'
       for layer in range(depth)
       for ours, theirs in (_LAYER | _EXPERTS | dict(architecture.norms)).items()
       for leaf in ('weight', 'bias')}}


def _parts(name: str | None, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
  """Yield (Hugging Face name, tensor), of a tensor of all experts for each of them."""
  if name is None or '{}' not in name or len(tensor.shape) != 3:
    is_row = (name or '').endswith('shared_expert_gate.weight')
    yield name or tensor.name, dataclasses.replace(
      tensor, shape=(1, *tensor.shape) if is_row else tensor.shape)
    return
  size = tensor.num_bytes // max(1, tensor.shape[0])
  for expert in range(tensor.shape[0]):
    yield name.format(expert), dataclasses.replace(
      tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * size, num_bytes=size)


def _stored(
  tensor: Tensor, name: str, keys: Mapping[str, Any], architecture: _Architecture
) -> Tensor:
  """Describe a tensor as it was before the converter changed it."""
  heads = next((keys[count] for part, count in (
    ('.q_proj.', 'num_attention_heads'), ('.k_proj.', 'num_key_value_heads')) if part in name), 0)

  def array() -> np.ndarray:
    found = gguf_file.data(tensor)
    if architecture.norms_plus_one and 'norm' in name:
      return found - np.float32(1)
    if not architecture.interleaved or not heads:
      return found
    # Rows are pairs (2i, 2i + 1) of each head, which belong at i and i + P.
    pairs = found.reshape(heads, -1, 2, *found.shape[1:])
    return pairs.swapaxes(1, 2).reshape(found.shape)

  return dataclasses.replace(tensor, read=array)


# Divisors of the frequencies of Llama 3.1 and later, stored as a tensor.
ROPE_DIVISORS = 'rope_freqs.weight'

Get = Callable[..., Any]
# Keys of an architecture that change no logits, and values that are the default anyway.
_HARMLESS = ('vocab_size', 'tensor_data_layout', 'rope.scaling.finetuned', 'pooling_type',
             'attention.layer_norm_epsilon')
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  'attention.causal': (True,), 'logit_scale': (0, 1), 'residual_scale': (0, 1),
  'embedding_scale': (0, 1), 'expert_gating_func': (0, 1), 'expert_weights_scale': (0, 1),
  'rope.scaling.yarn_attn_factor': (0, 1),
}
_HEAD_SIZES = ('attention.value_length', 'attention.key_length_swa', 'attention.value_length_swa',
               'rope.dimension_count', 'rope.dimension_count_swa')
# The same of the tokenizer; ids of single tokens are named *_token_id.
_TOKENIZER = tuple(f'tokenizer.ggml.{name}' for name in (
  'pre', 'merges', 'scores', 'token_type', 'token_type_count'))
_TOKENIZER += ('tokenizer.huggingface.json', 'tokenizer.rwkv.world', 'tokenizer.chat_template')
_CHANGES_TEXT = ('remove_extra_whitespaces', 'precompiled_charsmap', 'normalizer')


def config_keys(
  metadata: Reading, found: Mapping[str, Tensor], model_type: str
) -> dict[str, Any]:
  """Return the config.json that the metadata stand for; refuse what the decoder lacks."""
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
    **_expert_keys(get, kind, found),
  }
  if kind in ('gemma2', 'gemma3'):
    made['query_pre_attn_scalar'] = query_dim
    usual = 30.0 if kind == 'gemma2' else 0
    made['final_logit_softcapping'] = get('final_logit_softcapping', usual) or None
  if kind == 'gemma2':
    made['attn_logit_softcapping'] = get('attn_logit_softcapping', 50.0)
  return {key: value for key, value in made.items() if value is not None}


def _expert_keys(get: Get, kind: str, found: Mapping[str, Tensor]) -> dict[str, Any]:
  """Return the keys of experts; llama.cpp takes their widths from the tensors, as we do."""
  if not get('expert_count', 0):
    return {}
  normalized = kind in ('llama', 'qwen3moe')
  if get('expert_weights_norm', normalized) != normalized:
    raise ValueError(f'{kind}.expert_weights_norm={not normalized} is not supported')
  widths = {name: found[tensor].shape[-2] for name, tensor in (
    ('moe_intermediate_size', 'blk.0.ffn_up_exps.weight'),
    ('shared_expert_intermediate_size', 'blk.0.ffn_up_shexp.weight'))
    if tensor in found and len(found[tensor].shape) > 1}
  for name in ('expert_feed_forward_length', 'expert_shared_feed_forward_length'):
    get(name)
  return {'num_experts': get('expert_count'), 'num_experts_per_tok': get('expert_used_count'),
          'norm_topk_prob': normalized, **widths}


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
      'attention_factor': None if sharpness == 1 else sharpness * (0.1 * math.log(factor) + 1)}
  if divided or sharpness != 1:
    return {
      'rope_type': 'longrope', 'short_factor': divisors.tolist(), 'long_factor': divisors.tolist(),
      'factor': 1.0, 'attention_factor': sharpness, 'original_max_position_embeddings': length}
  if factor == 1:
    return None
  scaling = {'rope_type': 'linear', 'factor': factor}
  return scaling | ({'original_max_position_embeddings': original} if original else {})


def unread_keys(metadata: Reading) -> Iterator[str]:
  """Yield the keys that nothing was taken from and that are not known to change nothing.

  Raises:
    ValueError: one changes what the model computes, or how text is cut.
  """
  kind = metadata['general.architecture']
  known = set(_constants(mistakes.package('gguf').Keys))
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
