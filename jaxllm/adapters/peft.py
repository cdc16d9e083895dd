"""LoRA adapters in PEFT's form: a directory with adapter_config.json and adapter_model.safetensors.

Names of modules come from the table that the family declares for its weights. Where a family fuses
several of our kernels into one matrix, its adapter is shared out on import and made block-diagonal
on export; what they compute is the same.

Axis letters: I inputs, O outputs of a stored matrix. PEFT's A is (R, I), its B (O, R).
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters.lora import LoraConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.families.huggingface import Format

CONFIG_FILE, WEIGHTS_FILE = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'

# Keys of adapter_config.json that are read here, and that only say how the adapter was trained or
# which modules have one, as the weights do; any other one has to be unset.
_KNOWN = (
  'peft_type', 'r', 'lora_alpha', 'lora_dropout', 'bias', 'rank_pattern', 'alpha_pattern',
  'use_rslora', 'modules_to_save', 'init_lora_weights', 'base_model_name_or_path', 'revision',
  'ensure_weight_tying', 'target_modules', 'exclude_modules', 'layers_to_transform',
  'layers_pattern', 'task_type', 'auto_mapping', 'peft_version', 'inference_mode', 'fan_in_fan_out',
  'megatron_core', 'loftq_config', 'eva_config', 'corda_config', 'lora_ga_config',
  'qalora_group_size', 'runtime_config',
)
# Ways to begin that leave the base model as it is.
_BEGINNINGS = (True, False, None, 'gaussian', 'orthogonal', 'eva', 'mica')
# A whole matrix that takes the place of the base model's.
_WHOLE = 'whole'


class _Stored(NamedTuple):
  """One matrix of the base model.

  Attributes:
    module: its name, in which {} stands for the layer.
    paths: our modules that it holds.
    columns: of each of these, which outputs are its own.
  """

  module: str
  paths: tuple[str, ...]
  columns: tuple[np.ndarray, ...]


def load(
  directory: str | os.PathLike[str], form: Format, config: DecoderConfig
) -> tuple[dict[str, Any], LoraConfig]:
  """Read an adapter directory that PEFT wrote.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors.
    form: how the base model's family stores its weights.
    config: the base model.

  Returns:
    The `lora` collection, and a config with its rank, alpha, dropout and targets. Layers without an
    adapter have zeros; where ranks differ, the smaller ones are filled up with zeros.

  Raises:
    ValueError: the files are missing or damaged, or use something that has no counterpart here.
  """
  keys, matrices = _read(pathlib.Path(directory))
  return _collect(keys, matrices, form, config)


def merge(
  directory: str | os.PathLike[str], form: Format, config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[DecoderConfig, dict[str, Any]]:
  """Return the config and the parameters of a base model with the adapters of a directory in them.

  Unlike `load` it also reads adapters to the embedding, and whole matrices for embedding and head.
  Where these two are one array and only one of them changes, they become two, as in PEFT.

  Args:
    directory: as in `load`.
    form: how the base model's family stores its weights.
    config: the base model.
    params: its parameters.

  Raises:
    ValueError: as in `load`.
  """
  keys, matrices = _read(pathlib.Path(directory))
  params = dict(params)
  changed = {}
  for path in ('embed/embedding', 'head/kernel'):
    module = form.names[path].removesuffix('.weight')
    for name in {module, module.removeprefix(form.prefix)} & set(matrices):
      changed[path] = name
  if config.tied_head and changed:
    if keys.get('ensure_weight_tying'):
      raise ValueError(f'{directory}: ensure_weight_tying=True has no counterpart here where '
                       f'{", ".join(changed)} has an adapter; merge it with PEFT')
    config = config.replace(tied_head=False)
    params['head'] = {'kernel': params['embed']['embedding'].T}
  for path, name in changed.items():
    part, leaf = path.split('/')
    found, is_head, old = matrices.pop(name), part == 'head', params[part][leaf]
    table_VD = np.array(old.T if is_head else old, np.float32)
    rows_VD = table_VD[: config.vocab_size]
    whole_VD = found.pop(_WHOLE, rows_VD)
    delta_VD = np.zeros_like(whole_VD)
    if found:
      a, b = _pair(name, found)
      product = _scale(keys, name, len(a)) * (b @ a)
      delta_VD = product if is_head else product.T
    for made in (whole_VD, delta_VD):
      if made.shape != rows_VD.shape:
        raise ValueError(f'{name}: made for (tokens, size) = {made.shape}, but the base model has '
                         f'{rows_VD.shape}; resize that, save it and name it as the base model')
    rows_VD[:] = whole_VD + delta_VD
    table = jnp.asarray(table_VD.T if is_head else table_VD, old.dtype)
    params[part] = {**params[part], leaf: table}
  if not matrices:
    return config, params
  return config, lora_lib.merge(params, _collect(keys, matrices, form, config)[0])


def _collect(
  keys: Mapping[str, Any], matrices: dict[str, dict[str, np.ndarray]], form: Format,
  config: DecoderConfig,
) -> tuple[dict[str, Any], LoraConfig]:
  parts: dict[str, dict[int, tuple[np.ndarray, np.ndarray, float]]] = {}
  for stored in _stored_matrices(form, config):
    for layer in range(config.num_layers if '{}' in stored.module else 1):
      module = stored.module.format(layer)
      names = [name for name in (module, module.removeprefix(form.prefix)) if name in matrices]
      for name in names[:1]:
        a_RI, b_OR = _pair(name, matrices.pop(name))
        scale = _scale(keys, name, a_RI.shape[0])
        if b_OR.shape[0] != sum(map(len, stored.columns)):
          raise ValueError(f'{name}: lora_B has {b_OR.shape[0]} rows, but the module of this model '
                           f'has {sum(map(len, stored.columns))} outputs')
        for path, columns in zip(stored.paths, stored.columns, strict=True):
          parts.setdefault(path, {})[layer] = a_RI.T, b_OR.T[:, columns], scale
  if matrices:
    raise ValueError(f'{WEIGHTS_FILE}: belongs to no matrix of this model: '
                     f'{", ".join(sorted(matrices))}')
  lora = lora_lib.from_modules(
    {path: _stack(path, layers, config) for path, layers in parts.items()})
  shapes, _ = decoder.abstract(config)
  lora_lib.check(lora, shapes['params'])
  return lora, LoraConfig(
    rank=int(keys['r']), alpha=float(keys['lora_alpha']), targets=tuple(map(re.escape, parts)),
    dropout_rate=float(keys.get('lora_dropout') or 0.0),
  )


def base_model(directory: str | os.PathLike[str]) -> tuple[str, str | None] | None:
  """Return the model that an adapter directory names and its revision; None: it names none."""
  path = pathlib.Path(directory).expanduser() / CONFIG_FILE
  keys = _read_config(path) if path.is_file() else {}
  name = keys.get('base_model_name_or_path')
  return None if name is None else (name, keys.get('revision'))


def save(
  directory: str | os.PathLike[str],
  lora: dict[str, Any],
  form: Format,
  config: DecoderConfig,
  base_model: str | None = None,
) -> None:
  """Write adapters as a directory that PEFT reads, whole or not at all per file.

  Args:
    directory: is created.
    lora: the adapters.
    form: how the base model's family stores its weights.
    config: the base model.
    base_model: its name or path, for those who look for it in adapter_config.json.
  """
  from safetensors.numpy import save_file

  adapters = dict(lora_lib.adapters(lora))
  arrays: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  # One alpha / rank for all; what differs from it goes into B.
  scale = float(np.ravel(next(iter(adapters.values()))['scale'])[0])
  for stored in _stored_matrices(form, config):
    present = [path for path in stored.paths if path in adapters]
    if not present:
      continue
    ranks[_suffix(stored.module)] = sum(adapters[path]['a'].shape[-1] for path in present)
    for layer in range(config.num_layers if '{}' in stored.module else 1):
      a_RI, b_OR = _join(stored, adapters, layer, scale)
      name = _PREFIX + stored.module.format(layer)
      arrays[f'{name}.lora_A.weight'], arrays[f'{name}.lora_B.weight'] = a_RI, b_OR
  rank = min(ranks.values())
  others = {module: r for module, r in ranks.items() if r != rank}
  keys = {
    'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base_model,
    'r': rank, 'lora_alpha': scale * rank, 'lora_dropout': 0.0, 'bias': 'none',
    'target_modules': list(ranks), 'fan_in_fan_out': form.kernels == 'in_out',
    'rank_pattern': {re.escape(module): r for module, r in others.items()},
    'alpha_pattern': {re.escape(module): scale * r for module, r in others.items()},
    'use_rslora': False, 'use_dora': False, 'inference_mode': True, 'modules_to_save': None,
    'init_lora_weights': True,
  }
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / f'.{WEIGHTS_FILE}.partial'
  save_file(arrays, partial, metadata={'format': 'pt'})
  os.replace(partial, directory / WEIGHTS_FILE)
  partial = directory / f'.{CONFIG_FILE}.partial'
  partial.write_text(json.dumps(keys, indent=2) + '\n', encoding='utf-8')
  os.replace(partial, directory / CONFIG_FILE)


def _stored_matrices(form: Format, config: DecoderConfig) -> list[_Stored]:
  """Return the matrices that the base model has, with what each holds."""
  shapes, _ = decoder.abstract(config.replace(vocab_multiple=1))
  kernels = dict(lora_lib.kernels_of(shapes['params']))
  found = []
  for key, name in form.names.items():
    paths = tuple(
      path.removesuffix('/kernel') for path in ((key,) if isinstance(key, str) else key)
    )
    if not set(paths) <= set(kernels):
      continue
    outputs = []
    for path in paths:
      stacked, num_inputs = lora_lib.layout(path, len(kernels[path].shape))
      outputs.append(kernels[path].shape[stacked + num_inputs :])
    columns = _columns(form, outputs)
    found.append(_Stored(name.removesuffix('.weight'), paths, columns))
  return found


def _columns(form: Format, outputs: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, ...]:
  """Return which outputs of a matrix belong to each of the kernels fused in it."""
  sizes = [math.prod(shape) for shape in outputs]
  index_O = np.arange(sum(sizes))
  if len(sizes) > 1 and form.fused == 'per_head':
    heads, dim = outputs[0]
    by_head = index_O.reshape(heads, len(sizes), dim)
    return tuple(by_head[:, i].reshape(-1) for i in range(len(sizes)))
  return tuple(np.split(index_O, np.cumsum(sizes)[:-1]))


def _stack(
  path: str, layers: Mapping[int, tuple[np.ndarray, np.ndarray, float]], config: DecoderConfig
) -> dict[str, Any]:
  """Return the adapter of one module from those of its layers, in our shapes."""
  shapes, _ = decoder.abstract(config)
  kernel = dict(lora_lib.kernels_of(shapes['params']))[path].shape
  stacked, num_inputs = lora_lib.layout(path, len(kernel))
  num_layers = kernel[0] if stacked else 1
  inputs, outputs = kernel[stacked : stacked + num_inputs], kernel[stacked + num_inputs :]
  rank = max(a_IR.shape[1] for a_IR, _, _ in layers.values())
  a = np.zeros((num_layers, math.prod(inputs), rank), np.float32)
  b = np.zeros((num_layers, rank, math.prod(outputs)), np.float32)
  scale = np.ones(num_layers, np.float32)
  for layer, (a_IR, b_RO, factor) in layers.items():
    if a_IR.shape[0] != a.shape[1]:
      raise ValueError(f'{path}: lora_A has {a_IR.shape[0]} columns, but the module of this model '
                       f'has {a.shape[1]} inputs')
    a[layer, :, : a_IR.shape[1]] = a_IR
    # The vocabulary of the head may be padded.
    b[layer, : b_RO.shape[0], : b_RO.shape[1]] = b_RO
    scale[layer] = factor
  lead = kernel[:stacked]
  return {
    'a': jnp.asarray(a.reshape(*lead, *inputs, rank)),
    'b': jnp.asarray(b.reshape(*lead, rank, *outputs)),
    'scale': jnp.asarray(scale.reshape(lead)),
  }


def _join(
  stored: _Stored, adapters: Mapping[str, Any], layer: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
  """Return A (R, I) and B (O, R) of one matrix; the ranks of what is fused add up."""
  rows: list[np.ndarray] = []
  blocks: list[np.ndarray] = []
  for path, columns in zip(stored.paths, stored.columns, strict=True):
    if path not in adapters:
      continue
    adapter = adapters[path]
    a, b, factor = (
      np.asarray(adapter[name][layer] if adapter['scale'].ndim else adapter[name], np.float32)
      for name in ('a', 'b', 'scale')
    )
    rank = a.shape[-1]
    b_RO = b.reshape(rank, -1)[:, : len(columns)] * (factor / scale)
    block_RO = np.zeros((rank, sum(map(len, stored.columns))), np.float32)
    block_RO[:, columns] = b_RO
    rows.append(a.reshape(-1, rank).T)
    blocks.append(block_RO.T)
  # safetensors writes the bytes as they lie.
  return (np.ascontiguousarray(np.concatenate(rows)),
          np.ascontiguousarray(np.concatenate(blocks, axis=1)))


def _suffix(module: str) -> str:
  """Return the end of a module's name by which PEFT finds it in every layer, and no other."""
  return '.'.join(module.rpartition('{}.')[2].split('.')[-2:])


def _read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
  """Return the config and the weights of a directory."""
  keys = _read_config(directory / CONFIG_FILE)
  matrices = _read_weights(directory / WEIGHTS_FILE)
  for saved in keys.get('modules_to_save') or []:
    if not any(_WHOLE in found and f'.{name}'.endswith(f'.{saved}')
               for name, found in matrices.items()):
      raise ValueError(f'{directory}: modules_to_save names {saved!r}, of which {WEIGHTS_FILE} '
                       'holds no matrix')
  return keys, matrices


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    keys = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'{path}: cannot be read as the config of an adapter: {error}') from None
  if not isinstance(keys, dict) or keys.get('peft_type') != 'LORA':
    found = keys.get('peft_type') if isinstance(keys, dict) else type(keys).__name__
    raise ValueError(f"{path}: peft_type {found!r}; only 'LORA' is read")
  for name, value in keys.items():
    if value and name not in _KNOWN:
      raise ValueError(f'{path}: {name}={value!r} has no counterpart here')
  begun = keys.get('init_lora_weights')
  if (begun.lower() if isinstance(begun, str) else begun) not in _BEGINNINGS:
    raise ValueError(
      f'{path}: init_lora_weights={begun!r} changes the base model, and how is not in the files; '
      'write the adapter again as a plain one, by PEFT: '
      'model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=INITIAL)')
  if keys.get('bias', 'none') != 'none':
    raise ValueError(f"{path}: bias={keys['bias']!r}; only 'none' is read")
  for name, accepted in (('r', int), ('lora_alpha', int | float)):
    value = keys.get(name)
    if not isinstance(value, accepted) or isinstance(value, bool) or not 0 < value < 2**20:
      raise ValueError(f'{path}: {name}={value!r}; a positive number is needed')
  return keys


def _read_weights(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """Return module -> {'A': ..., 'B': ...} or a whole matrix, float32."""
  import ml_dtypes  # noqa: F401  # Lets NumPy hold bfloat16.
  import safetensors
  from safetensors.numpy import load_file

  if not path.is_file():
    raise ValueError(f'no file {str(path)!r}')
  try:
    arrays = load_file(path)
  except (safetensors.SafetensorError, TypeError, KeyError) as error:
    raise ValueError(f'{path}: {error}') from None
  modules: dict[str, dict[str, np.ndarray]] = {}
  for name, array in arrays.items():
    match = re.fullmatch(
      r'(?:base_model\.model\.)?(.+?)(?:\.lora_(?:embedding_)?([AB])|\.base_layer|\.modules_to_save)?'
      r'(?:\.default)?(?:\.weight)?', name)
    if not match or array.ndim != 2:
      raise ValueError(f'{path}: {name!r} of shape {array.shape} is no part of a LoRA adapter of a '
                       'matrix')
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{path}: {name!r} is not finite')
    modules.setdefault(match[1], {})[match[2] or _WHOLE] = array
  return modules


def _pair(name: str, found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  if _WHOLE in found:
    raise ValueError(f'{name}: a whole matrix is read of the embedding and the head alone, and '
                     'only together with the base model: jaxllm.load')
  if set(found) != {'A', 'B'} or found['A'].shape[0] != found['B'].shape[1]:
    shapes = {key: array.shape for key, array in found.items()}
    raise ValueError(f'{name}: lora_A and lora_B of one rank are needed; found {shapes}')
  return found['A'], found['B']


def _scale(keys: Mapping[str, Any], module: str, rank: int) -> float:
  """Return the factor of one module's product, as PEFT takes it."""

  def setting(pattern: str, default: str) -> float:
    for key, value in (keys.get(pattern) or {}).items():
      if re.fullmatch(rf'(.*\.)?({key})', module):
        return float(value)
    return float(keys[default])

  if setting('rank_pattern', 'r') != rank:
    raise ValueError(f'{module}: the adapter has rank {rank}, but {CONFIG_FILE} says '
                     f'{setting("rank_pattern", "r"):g}')
  alpha = setting('alpha_pattern', 'lora_alpha')
  return alpha / (math.sqrt(rank) if keys.get('use_rslora') else rank)
