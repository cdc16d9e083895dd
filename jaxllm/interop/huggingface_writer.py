"""Write a model as a complete Hugging Face directory, which `transformers` loads without a warning.

The family is found, not told: the first one whose config.json can say all of the config. Weights go
tensor by tensor into one file or shards; the padding of the vocabulary is cut. The directory
appears whole or not at all.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm import config as config_lib
from jaxllm import storage
from jaxllm.checkpoints import tree
from jaxllm.interop import layout, tensorfile, tokenizer_export, weights
from jaxllm.interop.layout import Slot
from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import HUGGINGFACE
from jaxllm.models.families.huggingface import Format, pattern
from jaxllm.models.positions import DynamicScaling, YarnScaling

SHARD_BYTES = 5_000_000_000
# A mixture of experts, and a family that we read the text model of.
_NOT_WRITTEN = ('mixtral', 'gemma3')
# What says how a model is run or trained, not what it is.
_RUN_FIELDS = ('vocab_multiple', 'dropout_rate', 'attention_dropout_rate', 'initializer', 'dtype',
               'attention', 'scan_layers', 'remat')


def save(
  directory: str | os.PathLike[str],
  config: DecoderConfig,
  variables: Mapping[str, Any],
  files: Mapping[str, bytes] | None = None,
  dtype: str | None = None,
  model_type: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  add_bos: bool | None = None,
) -> Format:
  """Write a Hugging Face directory.

  Args:
    directory: must not exist, or be empty.
    config: of the model.
    variables: {'params': ...}, layers stacked; a 'lora' collection must be merged before.
    files: of the tokenizer; None writes none.
    dtype: of the stored weights, 'float32' or 'bfloat16'; None: that of the parameters.
    model_type: the family; None: the first that can say all of the config.
    shard_bytes: weights larger than this go into several files.
    add_bos: whether prompts begin with BOS; None: as the files say.

  Returns:
    How the model is stored.

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
    f'what {nearest} cannot say: {"; ".join(lost[nearest])}'
  )


def _lost(form: Format, config: DecoderConfig) -> list[str]:
  """Return the fields that do not survive a config.json of this family."""
  try:
    again = form.decode(form.encode(config))
  except (ValueError, AttributeError) as error:
    return [str(error)] * len(DecoderConfig.model_fields)
  return [
    f'{path} ({before!r} would be read as {after!r})'
    for path, before, after in config_lib.diff(normal(config), normal(again))
  ]


def normal(config: DecoderConfig) -> DecoderConfig:
  """Return the same model with every default spelled out, and as it would be run by default."""
  fields = DecoderConfig.model_fields
  scaling = getattr(config.positions, 'scaling', None)
  # A context shorter than its scaling reaches has no words of its own.
  reach = 0
  if isinstance(scaling, YarnScaling | DynamicScaling):
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
  slots = {slot.name: slot for slot in layout.slots(form, config)}
  sizes = layout.parameter_shapes(config)

  def produce(name: str) -> np.ndarray:
    slot = slots[name]
    parts = {}
    for target in slot.targets:
      leaf = params[target] if slot.layer is None else params[target][slot.layer]
      whole = np.asarray(leaf)[tuple(map(slice, sizes[target]))]
      parts[target] = whole.astype(stored[target], copy=False)
    return layout.join(form, slot, parts)

  def describe(slot: Slot) -> tuple[tuple[int, ...], np.dtype]:
    return slot.shape, stored[slot.targets[0]]

  shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
  filled = total = 0
  for name, slot in slots.items():
    shape, kind = describe(slot)
    size = int(np.prod(shape)) * kind.itemsize
    if shards[-1] and filled + size > shard_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = shape, kind
    filled, total = filled + size, total + size
  if len(shards) == 1:
    tensorfile.write(directory / 'model.safetensors', shards[0], produce)
    return
  index: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    tensorfile.write(directory / file, shard, produce)
    index |= dict.fromkeys(shard, file)
  (directory / 'model.safetensors.index.json').write_bytes(tokenizer_export.json_bytes(
    {'metadata': {'total_size': total}, 'weight_map': index}))
