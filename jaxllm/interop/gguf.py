"""GGUF models: dequantised, and read as the Hugging Face model that they were made from.

Metadata becomes the keys of a config.json, tensors get their Hugging Face names, and what
llama.cpp's converter did to them is undone: rows of queries and keys are put back in order (llama),
1 is taken from norm scales again (gemma).
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from jaxllm.interop import gguf_config, gguf_file, gguf_vocabulary, layout, reference, weights
from jaxllm.interop import tokenizer_files as files_lib
from jaxllm.interop.huggingface import Reading
from jaxllm.interop.tensorfile import Tensor
from jaxllm.interop.weights import Source, Stored
from jaxllm.models.families import HUGGINGFACE

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


def open_model(path: str | os.PathLike[str]) -> Source:
  """Check everything about a GGUF model but its numbers; nothing is allocated.

  Raises:
    ValueError: the file is damaged, hostile, or of an architecture that is not supported.
  """
  path = pathlib.Path(path).expanduser()
  content, found = gguf_file.read(path)
  metadata = Reading(content)
  kind = metadata.get('general.architecture')
  if kind not in ARCHITECTURES:
    raise ValueError(f'{path}: general.architecture {kind!r} is not supported (supported: '
                     f'{", ".join(sorted(ARCHITECTURES))})')
  architecture = ARCHITECTURES[kind]
  if kind == 'llama' and {'blk.0.attn_q.bias', 'blk.0.attn_output.bias'} & set(found) == {
    'blk.0.attn_q.bias'
  }:
    architecture = dataclasses.replace(architecture, model_type='qwen2')
  try:
    keys = gguf_config.keys(metadata, found, architecture.model_type)
    form = HUGGINGFACE[architecture.model_type]
    config = form.decode(keys)
    slots = tuple(layout.slots(form, config))
    names = _names(architecture, config.num_layers)
    ignored = {name: 'part of the config' for name in [gguf_config.ROPE_DIVISORS] if name in found}
    renamed = {names.get(name, name): name for name in found if name not in ignored}
    match = layout.match(form, slots, config.tied_head, renamed)
    tensors = {
      name: _stored(found[renamed[original]], name, keys, architecture)
      for name, original in match.names.items()
    }
    weights.check_shapes(slots, tensors)
    files = gguf_vocabulary.tokenizer_files(metadata)
    unread = tuple(gguf_config.unread(metadata))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  files = files_lib.check(files, config.vocab_size, path)
  if unread:
    logging.warning('%s: nothing is made of %s', path, ', '.join(unread))

  def logits(ids: list[int], dtype: np.dtype) -> np.ndarray:
    return reference.logits(
      content, lambda name: gguf_file.data(found[name]).astype(dtype), ids, gguf=True
    )

  return Source(str(path), form, config, keys, slots, tensors, ignored, unread, files, logits)


def _names(architecture: _Architecture, depth: int) -> dict[str, str]:
  """Return name in the file -> Hugging Face name."""
  return {
    'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight',
    'output.weight': 'lm_head.weight',
    **{f'blk.{layer}.{ours}.{leaf}': f'model.layers.{layer}.{theirs}.{leaf}'
       for layer in range(depth) for ours, theirs in (_LAYER | dict(architecture.norms)).items()
       for leaf in ('weight', 'bias')}}


def _stored(
  tensor: Tensor, name: str, keys: Mapping[str, Any], architecture: _Architecture
) -> Stored:
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

  return Stored(tensor.name, tensor.kind, np.dtype(np.float32), tensor.shape, array,
                lambda: gguf_file.raw(tensor))
