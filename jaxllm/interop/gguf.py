"""GGUF models: dequantised, and read as the Hugging Face model that they were made from.

Metadata becomes the keys of a config.json, tensors get their Hugging Face names, and what
llama.cpp's converter did to them is undone: rows of queries and keys are put back in order (llama),
1 is taken from norm scales again (gemma).
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.interop import gguf_file, gguf_vocabulary, huggingface, layout, reference, weights
from jaxllm.interop import tokenizer_files as files_lib
from jaxllm.interop.huggingface import Loaded
from jaxllm.interop.weights import Source, Stored
from jaxllm.models.families import HUGGINGFACE
from jaxllm.sharding import MeshConfig

_LAYER = {
  'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
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
  'gemma': _Architecture('gemma', _PRE, norms_plus_one=True),
  'gemma2': _Architecture('gemma2', _SANDWICH, norms_plus_one=True),
  'gemma3': _Architecture('gemma3_text', _SANDWICH, norms_plus_one=True),
}

# Divisors of the frequencies of Llama 3.1 and later, stored as a tensor.
ROPE_DIVISORS = 'rope_freqs.weight'


def load(
  path: str | os.PathLike[str],
  dtype: str | None = 'float32',
  mesh: jax.sharding.Mesh | None = None,
  mesh_config: MeshConfig | None = None,
) -> Loaded:
  """Load a model from a GGUF file; arguments as in `huggingface.load`.

  Raises:
    ValueError: the file is damaged, hostile, or of an architecture that is not supported.
  """
  return huggingface.load_source(open_model(path), dtype, mesh, mesh_config)


def open_model(path: str | os.PathLike[str]) -> Source:
  """Check everything about a GGUF model but its numbers; nothing is allocated.

  Raises:
    ValueError: as in `load`.
  """
  path = pathlib.Path(path).expanduser()
  metadata, found = gguf_file.read(path)
  kind = metadata.get('general.architecture')
  if kind not in ARCHITECTURES:
    raise ValueError(f'{path}: general.architecture {kind!r} is not supported (supported: '
                     f'{", ".join(sorted(ARCHITECTURES))})')
  architecture = ARCHITECTURES[kind]
  try:
    keys = _keys(metadata, found, kind, architecture)
    form = HUGGINGFACE[architecture.model_type]
    config = form.decode(keys)
    slots = tuple(layout.slots(form, config))
    names = _names(architecture, config.num_layers)
    ignored = {ROPE_DIVISORS: 'part of the config'} if ROPE_DIVISORS in found else {}
    renamed = {names.get(name, name): name for name in found if name not in ignored}
    match = layout.match(form, slots, config.tied_head, renamed)
    tensors = {
      name: _stored(found[renamed[original]], name, keys, architecture)
      for name, original in match.names.items()
    }
    weights.check_shapes(slots, tensors)
    files = gguf_vocabulary.tokenizer_files(metadata)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  files_lib.check(files, config.vocab_size, path)

  def logits(ids: list[int], dtype: np.dtype) -> np.ndarray:
    return reference.logits(
      metadata, lambda name: gguf_file.data(found[name]).astype(dtype), ids, gguf=True
    )

  return Source(str(path), form, config, keys, slots, tensors, ignored, (), files, logits)


def _names(architecture: _Architecture, depth: int) -> dict[str, str]:
  """Return name in the file -> Hugging Face name."""
  names = {'token_embd.weight': 'model.embed_tokens.weight',
           'output_norm.weight': 'model.norm.weight', 'output.weight': 'lm_head.weight'}
  parts = _LAYER | dict(architecture.norms)
  for layer in range(depth):
    for ours, theirs in parts.items():
      for leaf in ('weight', 'bias'):
        names[f'blk.{layer}.{ours}.{leaf}'] = f'model.layers.{layer}.{theirs}.{leaf}'
  return names


def _stored(
  tensor: gguf_file.Tensor, name: str, keys: Mapping[str, Any], architecture: _Architecture
) -> Stored:
  """Describe a tensor, undoing what the converter did to it."""
  undo: Callable[[np.ndarray], np.ndarray] = lambda array: array  # noqa: E731
  if architecture.norms_plus_one and 'norm' in name:
    undo = lambda array: array - np.float32(1)  # noqa: E731
  for part, heads in (('q_proj', 'num_attention_heads'), ('k_proj', 'num_key_value_heads')):
    if architecture.interleaved and f'.{part}.' in name:
      undo = functools.partial(_uninterleave, heads=keys[heads])
  return Stored(
    tensor.name, tensor.kind, np.dtype(np.float32), tensor.shape,
    lambda: undo(gguf_file.data(tensor)), lambda: gguf_file.raw(tensor),
  )


def _uninterleave(array: np.ndarray, heads: int) -> np.ndarray:
  """Put rows (pairs 2i, 2i + 1 of each head) back in the order i, i + P."""
  pairs = array.reshape(heads, -1, 2, *array.shape[1:])
  return pairs.swapaxes(1, 2).reshape(array.shape)


def _keys(
  metadata: Mapping[str, Any], found: Mapping[str, gguf_file.Tensor], kind: str,
  architecture: _Architecture,
) -> dict[str, Any]:
  """Return the keys of the config.json that the metadata stand for."""
  def get(name: str, default: Any = None) -> Any:
    value = metadata.get(f'{kind}.{name}', default)
    if isinstance(value, list):
      if len(set(value)) != 1:
        raise ValueError(f'{kind}.{name} differs from layer to layer, which is not supported')
      value = value[0]
    # A 32-bit float says 1e-5 as 9.999999747e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  if get('expert_count', 0):
    raise ValueError(f'{kind}.expert_count={get("expert_count")}: a mixture of experts, which the '
                     'decoder does not have yet')
  if 'token_embd.weight' not in found:
    raise ValueError('token_embd.weight is missing')
  vocab_size, width = found['token_embd.weight'].shape
  heads = get('attention.head_count')
  if not isinstance(heads, int) or heads < 1:
    raise ValueError(f'{kind}.attention.head_count={heads!r}; a positive number is needed')
  head_dim = get('attention.key_length', width // heads)
  keys = {
    'model_type': architecture.model_type,
    'vocab_size': vocab_size,
    'hidden_size': get('embedding_length'),
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': get('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'max_position_embeddings': get('context_length'),
    'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
    'rope_theta': get('rope.freq_base', 1e6 if kind == 'gemma3' else 1e4),
    'rope_scaling': _scaling(get, found, head_dim),
    'tie_word_embeddings': 'output.weight' not in found,
    'attention_bias': 'blk.0.attn_output.bias' in found,
  }
  if kind in ('gemma2', 'gemma3'):
    # The 27B models divide by the square root of width / heads, not of the head dimension.
    wide = (kind, get('block_count')) in (('gemma2', 46), ('gemma3', 62))
    keys |= {
      'query_pre_attn_scalar': width // heads if wide else head_dim,
      'sliding_window': get('attention.sliding_window', 4096),
    }
  if kind == 'gemma2':
    keys |= {'attn_logit_softcapping': get('attn_logit_softcapping', 50.0),
             'final_logit_softcapping': get('final_logit_softcapping', 30.0)}
  return {key: value for key, value in keys.items() if value is not None}


def _scaling(
  get: Callable[..., Any], found: Mapping[str, gguf_file.Tensor], head_dim: int
) -> dict[str, Any] | None:
  kind, length = get('rope.scaling.type'), get('context_length')
  if get('rope.dimension_count', head_dim) != head_dim:
    raise ValueError('rope.dimension_count differs from the head dimension, which is not supported')
  if ROPE_DIVISORS in found:
    tensor = found[ROPE_DIVISORS]
    if tensor.shape != (head_dim // 2,) or not np.isfinite(gguf_file.data(tensor)).all():
      raise ValueError(f'{ROPE_DIVISORS} has the shape {tensor.shape}, expected '
                       f'{(head_dim // 2,)} finite numbers')
    divisors = [float(value) for value in gguf_file.data(tensor)]
    return {
      'rope_type': 'longrope', 'short_factor': divisors, 'long_factor': divisors, 'factor': 1.0,
      'attention_factor': 1.0, 'original_max_position_embeddings': length,
    }
  if kind in (None, 'none'):
    return None
  if kind not in ('linear', 'yarn'):
    raise ValueError(f'rope.scaling.type {kind!r} is not supported (supported: linear, yarn)')
  scaling = {'rope_type': kind, 'factor': get('rope.scaling.factor')}
  if kind == 'yarn':
    original = get('rope.scaling.original_context_length', length)
    scaling['original_max_position_embeddings'] = original
  return scaling
