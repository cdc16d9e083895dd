"""Hugging Face directories: `open_model` checks one, and `weights.load` then reads it; `save`.

Nothing from outside is run: weights are safetensors, config.json is read by an allow-list of keys,
and everything is checked before anything is allocated or written.

What is written `transformers` loads without a warning. The family is found, not told: the first one
whose config.json can say all of the config. Weights go tensor by tensor into one file or shards;
the padding of the vocabulary is cut. The directory appears whole or not at all.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm import config as config_lib
from jaxllm import storage
from jaxllm.checkpoints import tree
from jaxllm.interop import reference, tensorfile, tokenizer_export, tokenizer_files, weights
from jaxllm.interop.weights import Slot, Source
from jaxllm.mistakes import parse_json
from jaxllm.models.config import DecoderConfig, ExpertsConfig
from jaxllm.models.families import HUGGINGFACE
from jaxllm.models.families.huggingface import Format, pattern
from jaxllm.models.positions import YarnScaling

MAX_CONFIG_BYTES = 10_000_000
SHARD_BYTES = 5_000_000_000
# A family that we read the text model of.
_NOT_WRITTEN = ('gemma3',)
# What says how a model is run or trained, not what it is.
_RUN_FIELDS = ('vocab_multiple', 'dropout_rate', 'attention_dropout_rate', 'initializer', 'dtype',
               'attention', 'scan_layers', 'remat')
_RUN_FIELDS_OF_EXPERTS = ('capacity_factor', 'balance_loss', 'z_loss')


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
  keys = Reading(read_keys(path))
  file = path / 'config.json'
  _refuse_code(keys.data, file, ignore_auto_map)
  if keys.data.get('quantization_config'):
    raise ValueError(f'{file}: quantization_config: quantised weights are not read; take the '
                     'original, or a GGUF file')
  model_type = keys.get('model_type')
  if not isinstance(model_type, str) or model_type not in HUGGINGFACE:
    raise ValueError(f'{path}: model_type {model_type!r} is not supported (supported: '
                     f'{", ".join(sorted(HUGGINGFACE))})')
  form = HUGGINGFACE[model_type]
  try:
    config = form.decode(keys)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  found = tensorfile.read_headers(tensorfile.find(path))
  slots, tensors, ignored, head = weights.locate(form, config, found)
  if head is not None:
    ignored[head] = 'equal to the embedding, to which it is tied'
    _check_tied(form, tensors, found[head])
  files = _checked_files(path, keys.data, config, ignore_auto_map)

  def logits(ids: list[int], rounded: Any, dtype: Any = np.float32) -> np.ndarray:
    return reference.logits(
      keys.data, lambda name: tensors[name].array().astype(rounded), ids, dtype)

  unread = tuple(sorted(set(keys.data) - keys.read))
  return Source(
    str(path), form, config, keys.data, slots, tensors, ignored, unread, files, logits)


def read_keys(directory: pathlib.Path) -> dict[str, Any]:
  """Return config.json; refuse one that is missing or damaged."""
  path = directory / 'config.json'
  if not path.is_file():
    raise ValueError(f'{directory} holds no config.json; is it a Hugging Face model?')
  if path.stat().st_size > MAX_CONFIG_BYTES:
    raise ValueError(f'{path}: larger than {MAX_CONFIG_BYTES} bytes')
  keys = parse_json(path.read_bytes(), path)
  if not isinstance(keys, dict):
    raise ValueError(f'{path}: {type(keys).__name__}, an object is needed')
  return keys


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
      '(--ignore_auto_map)')


def _check_tied(
  form: Format, tensors: Mapping[str, tensorfile.Tensor], head: tensorfile.Tensor
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
  return tokenizer_files.complete(files, keys, config.vocab_size)


def save(
  directory: str | os.PathLike[str], config: DecoderConfig, variables: Mapping[str, Any],
  files: Mapping[str, bytes] | None = None, dtype: str | None = None, model_type: str | None = None,
  shard_bytes: int = SHARD_BYTES, add_bos: bool | None = None,
) -> Format:
  """Write a Hugging Face directory; return how the model is stored in it.

  Args:
    directory: must not exist, or be empty.
    variables: {'params': ...}, layers stacked; a 'lora' collection must be merged before.
    files: of the tokenizer; None writes none.
    dtype: of the stored weights, 'float32' or 'bfloat16'; None: that of the parameters.
    model_type: the family; None: the first that can say all of the config.
    shard_bytes: weights larger than this go into several files.
    add_bos: whether prompts begin with BOS; None: as the files say.

  Raises:
    ValueError: no family can say all of the config (the message tells what stands in the way), the
      directory is in use, or a parameter is not finite.
    OSError: the disk is full; nothing is left behind.
  """
  path = pathlib.Path(directory).expanduser()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'{path} is not empty; choose another target')
  if 'lora' in variables:
    raise ValueError('variables hold adapters; merge them into the parameters first')
  form = choose_format(config, model_type)
  params = tree.flatten(variables['params'])
  _check_params(params)
  extra, keys = tokenizer_export.huggingface_files(files or {}, config, add_bos)
  stored = {name: weights.DTYPES[dtype] if dtype else np.dtype(leaf.dtype)
            for name, leaf in params.items()}
  kept = next(iter(stored.values())).name
  keys = {'architectures': [form.architecture], 'model_type': form.model_type,
          **form.encode(config), **keys, 'torch_dtype': kept}
  with storage.replaced(path) as partial:
    partial.mkdir()
    (partial / 'config.json').write_bytes(tokenizer_export.json_bytes(keys))
    for name, content in extra.items():
      (partial / name).write_bytes(content)
    _write_weights(partial, form, config, params, stored, shard_bytes)
  return form


def choose_format(config: DecoderConfig, model_type: str | None = None) -> Format:
  """Return a family whose config.json says all of a config.

  Raises:
    ValueError: none does, or not the one asked for; the message lists what it cannot say.
  """
  if model_type is not None and model_type not in HUGGINGFACE:
    raise ValueError(f'model_type={model_type!r} is not supported (supported: '
                     f'{", ".join(sorted(HUGGINGFACE))})')
  # One that was read as part of a larger model is written as what it is.
  model_type = {'gemma3': 'gemma3_text'}.get(model_type or '', model_type)
  names = [name for name in HUGGINGFACE if name not in _NOT_WRITTEN]
  lost = {name: _lost(HUGGINGFACE[name], config) for name in [model_type or '', *names]
          if name in HUGGINGFACE}
  for name, fields in lost.items():
    if not fields and model_type in (None, name):
      return HUGGINGFACE[name]
  nearest = model_type or min(lost, key=lambda name: len(lost[name]))
  raise ValueError(
    f'{"no Hugging Face family" if model_type is None else model_type} can say all of this config; '
    f'what {nearest} cannot say: {"; ".join(lost[nearest])}')


def _lost(form: Format, config: DecoderConfig) -> list[str]:
  """Return the fields that do not survive a config.json of this family."""
  try:
    again = form.decode(form.encode(config))
  except (ValueError, AttributeError) as error:
    return [str(error)] * len(DecoderConfig.model_fields)
  return [
    f'{path} ({before!r} would be read as {after!r})'
    for path, before, after in config_lib.diff(normal(config), normal(again))]


def normal(config: DecoderConfig) -> DecoderConfig:
  """Return the same model with every default spelled out, and as it would be run by default."""
  fields, of_experts = DecoderConfig.model_fields, ExpertsConfig.model_fields
  scaling = getattr(config.positions, 'scaling', None)
  # A context shorter than its scaling reaches has no words of its own.
  reach = 0
  if isinstance(scaling, YarnScaling):
    reach = int(scaling.original_length * scaling.factor)
  local = config.local_positions
  return config.replace(
    max_length=max(config.max_length, reach),
    num_kv_heads=config.kv_heads,
    head_dim=config.head_size,
    attention_scale=config.query_scale,
    layer_pattern=pattern(config.layer_kinds),
    local_positions=None if local == config.positions else local,
    biases=tuple(sorted(config.biases)),
    experts=config.experts and config.experts.replace(
      **{name: of_experts[name].get_default() for name in _RUN_FIELDS_OF_EXPERTS}),
    **{name: fields[name].get_default() for name in _RUN_FIELDS},
  )


def _check_params(params: Mapping[str, Any]) -> None:
  for name, leaf in params.items():
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(f'{name} is split over several processes; restore the checkpoint in one '
                       'process to write it')
    if not np.isfinite(np.asarray(leaf, np.float32)).all():
      raise ValueError(f'{name} holds NaN or infinite numbers; nothing was written')


def _write_weights(
  directory: pathlib.Path, form: Format, config: DecoderConfig, params: Mapping[str, Any],
  stored: Mapping[str, np.dtype], shard_bytes: int,
) -> None:
  sizes, filled, total = weights.parameter_shapes(config), 0, 0
  shards: list[list[Slot]] = [[]]
  for slot in weights.slots(form, config):
    size = math.prod(slot.shape) * stored[slot.targets[0]].itemsize
    if shards[-1] and filled + size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(slot)
    filled, total = filled + size, total + size

  def join(slot: Slot) -> np.ndarray:
    parts = {}
    for target in slot.targets:
      leaf = params[target][slot.place]
      whole = np.asarray(leaf)[tuple(map(slice, sizes[target]))]
      parts[target] = whole.astype(stored[target], copy=False)
    return weights.join(form, slot, parts)

  files: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    several = f'-{number:05}-of-{len(shards):05}' if len(shards) > 1 else ''
    name = f'model{several}.safetensors'
    tensorfile.write(directory / name, {slot.name: join(slot) for slot in shard})
    files |= {slot.name: name for slot in shard}
  if len(shards) > 1:
    (directory / 'model.safetensors.index.json').write_bytes(tokenizer_export.json_bytes(
      {'metadata': {'total_size': total}, 'weight_map': files}))
