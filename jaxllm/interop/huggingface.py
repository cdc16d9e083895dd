"""Hugging Face directories: `open_model` checks one, and `weights.load` then reads it.

Nothing from outside is run: weights are safetensors, config.json is read by an allow-list of keys,
and everything is checked before anything is allocated or written.
"""

import collections
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.interop import (
  layout,
  reference,
  tensorfile,
  tokenizer_directory,
  tokenizer_files,
  weights,
)
from jaxllm.interop.weights import Source
from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import HUGGINGFACE
from jaxllm.models.families.huggingface import Format

MAX_CONFIG_BYTES = 10_000_000


def open_model(directory: str | os.PathLike[str], ignore_auto_map: bool = False) -> Source:
  """Check everything about a model but its numbers; nothing is allocated.

  Args:
    directory: holds config.json and model.safetensors, or its shards and their index.
    ignore_auto_map: read a model whose config.json names code, which is not run.

  Raises:
    ValueError: a file is missing, damaged, hostile, or of a model that is not supported.
  """
  path = pathlib.Path(directory).expanduser()
  if not path.is_dir():
    raise ValueError(f'{path} is not a directory')
  keys = Reading(read_config(path, ignore_auto_map))
  form = find_format(keys, path)
  try:
    config = form.decode(keys)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  found = tensorfile.read_headers(tensorfile.find(path))
  slots = layout.slots(form, config)
  match = layout.match(form, slots, config.tied_head, found)
  tensors = {name: weights.stored(found[original]) for name, original in match.names.items()}
  weights.check_shapes(tuple(slots), tensors)
  ignored = dict(match.ignored)
  if match.head is not None:
    ignored[match.head] = 'equal to the embedding, to which it is tied'
    _check_tied(form, tensors, weights.stored(found[match.head]))
  files = _checked_files(path, keys.data, config, ignore_auto_map)

  def logits(ids: list[int], dtype: np.dtype) -> np.ndarray:
    return reference.logits(keys.data, lambda name: tensors[name].array().astype(dtype), ids)

  unread = tuple(sorted(set(keys.data) - keys.read))
  return Source(str(path), form, config, keys.data, tuple(slots), tensors, ignored, unread,
                files, logits)


def read_keys(directory: pathlib.Path) -> dict[str, Any]:
  """Return config.json.

  Raises:
    ValueError: it is missing or damaged.
  """
  path = directory / 'config.json'
  if not path.is_file():
    raise ValueError(f'{directory} holds no config.json; is it a Hugging Face model?')
  if path.stat().st_size > MAX_CONFIG_BYTES:
    raise ValueError(f'{path}: larger than {MAX_CONFIG_BYTES} bytes')
  keys = tensorfile.parse_json(path.read_bytes(), path)
  if not isinstance(keys, dict):
    raise ValueError(f'{path}: {type(keys).__name__}, an object is needed')
  return keys


def read_config(directory: pathlib.Path, ignore_auto_map: bool = False) -> dict[str, Any]:
  """Return config.json of a model that can be read.

  Raises:
    ValueError: it is missing or damaged, or asks for code or quantisation that we do not have.
  """
  path, keys = directory / 'config.json', read_keys(directory)
  _refuse_code(keys, path, ignore_auto_map)
  if keys.get('quantization_config'):
    raise ValueError(f'{path}: quantization_config: quantised weights are not read; take the '
                     'original, or a GGUF file')
  return keys


def find_format(keys: Mapping[str, Any], where: object) -> Format:
  """Return how the family that config.json names is stored.

  Raises:
    ValueError: it is not supported; the message lists those that are.
  """
  model_type = keys.get('model_type')
  if not isinstance(model_type, str) or model_type not in HUGGINGFACE:
    raise ValueError(f'{where}: model_type {model_type!r} is not supported (supported: '
                     f'{", ".join(sorted(HUGGINGFACE))})')
  return HUGGINGFACE[model_type]


class Reading(collections.UserDict[str, Any]):
  """A mapping that remembers which of its keys were asked for."""

  def __init__(self, data: dict[str, Any]):
    super().__init__(data)
    self.read: set[str] = set()

  def __getitem__(self, key: str) -> Any:
    self.read.add(key)
    return self.data[key]


def _refuse_code(keys: Mapping[str, Any], where: object, ignore_auto_map: bool) -> None:
  if keys.get('auto_map') and not ignore_auto_map:
    raise ValueError(
      f'{where}: auto_map names code that comes with the model; jaxllm never runs such code. Where '
      'its own decoder for this model_type is meant anyway, say ignore_auto_map=True '
      '(--ignore_auto_map)'
    )


def _check_tied(
  form: Format, tensors: Mapping[str, weights.Stored], head: weights.Stored
) -> None:
  embedding = tensors[form.names['embed/embedding']]
  same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
  if not same or not np.array_equal(head.raw(), embedding.raw()):
    raise ValueError(f'config.json ties the head to the embedding, but {head.name} differs from '
                     f'{embedding.name}; set tie_word_embeddings to false')


def _checked_files(
  path: pathlib.Path, keys: Mapping[str, Any], config: DecoderConfig, ignore_auto_map: bool
) -> dict[str, bytes]:
  files = tokenizer_files.check(tokenizer_files.read(path), config.vocab_size, path)
  if 'tokenizer_config.json' in files:
    _refuse_code(json.loads(files['tokenizer_config.json']), path / 'tokenizer_config.json',
                 ignore_auto_map)
  for what, value in tokenizer_files.special_ids(keys, 'config.json').items():
    if not isinstance(value, int) or not 0 <= value < config.vocab_size:
      raise ValueError(f'{path}: {what}={value!r}, but the model has {config.vocab_size} tokens')
  return tokenizer_directory.complete(files, keys, config.vocab_size)
