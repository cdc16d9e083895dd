"""LoRA adapters in PEFT's form: a directory with adapter_config.json and adapter_model.safetensors.

Names of modules come from the table that the family declares for its weights. Where a family fuses
several of our kernels into one matrix, its adapter is shared out on import and made block-diagonal
on export; what they compute is the same.

Axis letters: I inputs, O outputs of a stored matrix. PEFT's A is (R, I), its B (O, R).
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import storage
from jaxllm.adapters import lora as lora_lib
from jaxllm.checkpoints import tree
from jaxllm.interop import tensorfile, weights
from jaxllm.mistakes import parse_json
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.families.huggingface import Format
from jaxllm.models.linear import num_inputs

CONFIG_FILE, WEIGHTS_FILE = 'adapter_config.json', 'adapter_model.safetensors'

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
# Initialisations that leave the base model as it is.
_PLAIN = (True, False, None, 'gaussian', 'orthogonal', 'eva', 'mica')
_KINDS = {'rank_pattern': dict, 'alpha_pattern': dict, 'modules_to_save': list,
          'base_model_name_or_path': str, 'revision': str}
# A whole matrix that takes the place of the base model's.
_WHOLE = 'whole'

Matrices = dict[str, dict[str, np.ndarray]]


def merge(
  directory: str | os.PathLike[str], form: Format, config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[DecoderConfig, dict[str, Any]]:
  """Return the config and the parameters of a base model with the adapters of a directory in them.

  Of embedding and head it also reads whole matrices. Where these two are one array and only one of
  them changes, they become two, as in PEFT.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors, as PEFT wrote them.
    form: how the base model's family stores its weights.

  Raises:
    ValueError: the files are missing or damaged, or use something that has no counterpart here.
  """
  keys, matrices = read(pathlib.Path(directory))
  params = dict(params)
  changed = {path: name for path in ('embed/embedding', 'head/kernel')
             if (name := _find(form, form.names[path], matrices)) is not None}
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
    table = (table_VD.T if is_head else table_VD).astype(old.dtype)
    table = jax.device_put(table, getattr(old, 'sharding', None))
    params[part] = {**params[part], leaf: table}
  if not matrices:
    return config, params
  return config, lora_lib.merge(params, collect(keys, matrices, form, config))


def base_model(directory: str | os.PathLike[str]) -> tuple[str, str | None] | None:
  """Return the model that an adapter directory names and its revision; None: it names none."""
  path = pathlib.Path(directory).expanduser() / CONFIG_FILE
  keys = _read_config(path) if path.is_file() else {}
  name = keys.get('base_model_name_or_path')
  return None if name is None else (name, keys.get('revision'))


def save(
  directory: str | os.PathLike[str], lora: dict[str, Any], form: Format, config: DecoderConfig,
  base_model: str | None = None,
) -> None:
  """Write adapters as a directory that PEFT reads, whole or not at all per file.

  Args:
    directory: is created.
    form: how the base model's family stores its weights.
    base_model: its name or path, for those who look for it in adapter_config.json.
  """
  adapters = dict(lora_lib.adapters(jax.device_get(lora)))
  arrays: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  # One alpha / rank for all; another factor goes into B.
  scale = float(np.ravel(next(iter(adapters.values()))['scale'])[0])
  torch_form = dataclasses.replace(form, kernels='out_in')
  shapes = weights.parameter_shapes(config)
  for slot in weights.slots(torch_form, config):
    if not {target.removesuffix('/kernel') for target in slot.targets} & adapters.keys():
      continue
    module = slot.name.removesuffix('.weight')
    a_RI, b_OR = _join(torch_form, slot, shapes, adapters, scale)
    arrays[f'base_model.model.{module}.lora_A.weight'] = a_RI
    arrays[f'base_model.model.{module}.lora_B.weight'] = b_OR
    # The end by which PEFT finds the module in every layer, and no other.
    suffix = '.'.join(module.rpartition(f'.{slot.layer}.')[2].split('.')[-2:])
    ranks[suffix] = len(a_RI)
  rank = min(ranks.values())
  others = {module: r for module, r in ranks.items() if r != rank}
  keys = {
    'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base_model,
    'r': rank, 'lora_alpha': scale * rank, 'lora_dropout': 0.0, 'bias': 'none',
    'target_modules': list(ranks), 'fan_in_fan_out': form.kernels == 'in_out',
    'rank_pattern': {re.escape(module): r for module, r in others.items()},
    'alpha_pattern': {re.escape(module): scale * r for module, r in others.items()},
    'use_rslora': False, 'use_dora': False, 'inference_mode': True, 'modules_to_save': None,
    'init_lora_weights': True}
  directory = storage.path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with storage.replaced(directory / WEIGHTS_FILE) as partial:
    tensorfile.write(partial, arrays)
  storage.write_file(directory / CONFIG_FILE, json.dumps(keys, indent=2) + '\n')


def collect(
  keys: Mapping[str, Any], matrices: Matrices, form: Format, config: DecoderConfig
) -> dict[str, Any]:
  """Return the `lora` collection of what `read` returns; zeros where a layer has no adapter."""
  form = dataclasses.replace(form, kernels='out_in')
  shapes = weights.parameter_shapes(config)
  layers: dict[str, dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, float]]] = {}
  for slot in weights.slots(form, config):
    name = _find(form, slot.name, matrices)
    if name is None or not slot.targets[0].endswith('/kernel'):
      continue
    a_RI, b_OR = _pair(name, matrices.pop(name))
    scale = _scale(keys, name, len(a_RI))
    outputs, inputs = slot.shape
    if len(b_OR) != outputs:
      raise ValueError(f'{name}: lora_B has {len(b_OR)} rows, but the module of this model has '
                       f'{outputs} outputs')
    if a_RI.shape[1] != inputs:
      raise ValueError(f'{name}: lora_A has {a_RI.shape[1]} columns, but the module of this model '
                       f'has {inputs} inputs')
    of_b = {target: _b_shape(target, shapes[target], len(a_RI)) for target in slot.targets}
    for target, b in weights.split(form, slot, b_OR, of_b).items():
      layers.setdefault(target.removesuffix('/kernel'), {})[slot.place] = a_RI.T, b, scale
  if matrices:
    raise ValueError(f'{WEIGHTS_FILE}: belongs to no matrix of this model: '
                     f'{", ".join(sorted(matrices))}')
  abstract, _ = decoder.abstract(config)
  kernels = dict(lora_lib.kernels_of(abstract['params']))
  return tree.nest({path: _stack(path, kernels[path].shape, found)
                    for path, found in layers.items()})


def _find(form: Format, tensor: str, matrices: Matrices) -> str | None:
  """Return the name of a tensor's module among those of the file, with or without its prefix."""
  module = tensor.removesuffix('.weight')
  return next((name for name in (module, module.removeprefix(form.prefix)) if name in matrices),
              None)


def _b_shape(target: str, kernel: tuple[int, ...], rank: int) -> tuple[int, ...]:
  """Return the shape of `b` as of a kernel with R inputs."""
  inputs = num_inputs(target)
  return (rank, *[1] * (inputs - 1), *kernel[inputs:])


def _stack(
  path: str, kernel: tuple[int, ...],
  places: Mapping[tuple[int, ...], tuple[np.ndarray, np.ndarray, float]],
) -> dict[str, Any]:
  """Return the adapter of one module from those of its layers and experts, in our shapes."""
  rank = max(a_IR.shape[1] for a_IR, _, _ in places.values())
  a, b, scale = (np.zeros(shape, np.float32) for shape in lora_lib.shapes(path, kernel, rank))
  scale += 1
  for place, (a_IR, b_found, factor) in places.items():
    b_RO = b_found.reshape(a_IR.shape[1], -1)
    a.reshape(*scale.shape, -1, rank)[place][:, : len(b_RO)] = a_IR
    # The vocabulary of the head may be padded.
    b.reshape(*scale.shape, rank, -1)[place][: len(b_RO), : b_RO.shape[1]] = b_RO
    scale[place] = factor
  return {'a': jnp.asarray(a), 'b': jnp.asarray(b), 'scale': jnp.asarray(scale)}


def _join(
  form: Format, slot: weights.Slot, shapes: Mapping[str, tuple[int, ...]],
  adapters: Mapping[str, Any], scale: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Return A (R, I) and B (O, R) of one matrix; the ranks of fused kernels add up."""
  leaves = 'a', 'b', 'scale'
  found = {target: [np.asarray(adapter[leaf][slot.place], np.float32) for leaf in leaves]
           for target in slot.targets
           if (adapter := adapters.get(target.removesuffix('/kernel'))) is not None}
  total, rank = sum(a.shape[-1] for a, _, _ in found.values()), 0
  parts = {target: np.zeros(_b_shape(target, shapes[target], total), np.float32)
           for target in slot.targets}
  for target, (a, b, factor) in found.items():
    block = parts[target][rank : rank + a.shape[-1]]
    num_outputs = math.prod(block.shape[1:])
    block[:] = (b.reshape(len(block), -1)[:, :num_outputs] * (factor / scale)).reshape(block.shape)
    rank += len(block)
  a_RI = np.concatenate([a.reshape(-1, a.shape[-1]).T for a, _, _ in found.values()])
  return a_RI, weights.join(form, slot, parts)


def read(directory: pathlib.Path) -> tuple[dict[str, Any], Matrices]:
  """Return the config and the weights of an adapter directory, by module."""
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
    keys = parse_json(path.read_bytes(), 'damaged')
  except (OSError, ValueError) as error:
    raise ValueError(f'{path}: cannot be read as the config of an adapter: {error}') from None
  if not isinstance(keys, dict) or keys.get('peft_type') != 'LORA':
    found = keys.get('peft_type') if isinstance(keys, dict) else type(keys).__name__
    raise ValueError(f"{path}: peft_type {found!r}; only 'LORA' is read")
  for name, value in keys.items():
    if value and name not in _KNOWN:
      raise ValueError(f'{path}: {name}={value!r} has no counterpart here')
  begun = keys.get('init_lora_weights')
  if (begun.lower() if isinstance(begun, str) else begun) not in _PLAIN:
    raise ValueError(
      f'{path}: init_lora_weights={begun!r} changes the base model, and how is not in the files; '
      'write the adapter again as a plain one, by PEFT: '
      'model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=INITIAL)')
  if keys.get('bias', 'none') != 'none':
    raise ValueError(f"{path}: bias={keys['bias']!r}; only 'none' is read")
  for name, kind in _KINDS.items():
    if not isinstance(keys.get(name), kind | None):
      raise ValueError(f'{path}: {name}={keys[name]!r}; expected {kind.__name__}')
  numbers = [('r', keys.get('r')), ('lora_alpha', keys.get('lora_alpha'))]
  for name in ('rank_pattern', 'alpha_pattern'):
    for pattern, value in (keys.get(name) or {}).items():
      numbers.append((f'{name}[{pattern!r}]', value))
      _check_pattern(f'{path}: {name}', pattern)
  for name, value in numbers:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**20:
      raise ValueError(f'{path}: {name}={value!r}; a positive number is needed')
  return keys


def _check_pattern(where: str, pattern: str) -> None:
  """Refuse a regular expression that is damaged, or could look at a name for ever."""
  try:
    re.compile(pattern)
  except (re.error, OverflowError, RecursionError) as error:
    raise ValueError(f'{where}: {pattern!r:.60} is no regular expression: {error}') from None
  if len(pattern) > 1000 or re.search(r'\)[*+{]|([*+{].*){4}', pattern):
    raise ValueError(f'{where}: {pattern!r:.60} repeats too much; name the modules')


def _read_weights(path: pathlib.Path) -> Matrices:
  """Return module -> {'A': ..., 'B': ...} or a whole matrix, float32."""
  modules: Matrices = {}
  for name, tensor in tensorfile.read_header(path).items():
    match = re.fullmatch(
      r'(?:base_model\.model\.)?(.+?)(?:\.lora_(?:embedding_)?([AB])|\.base_layer|\.modules_to_save)?'
      r'(?:\.default)?(?:\.weight)?', name)
    if not match or len(tensor.shape) != 2:
      raise ValueError(f'{path}: {name!r} of shape {tensor.shape} is no part of a LoRA adapter of '
                       'a matrix')
    array = tensor.array().astype(np.float32)
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
    return next((float(value) for key, value in (keys.get(pattern) or {}).items()
                 if re.fullmatch(rf'(.*\.)?({key})', module)), float(keys[default]))

  if setting('rank_pattern', 'r') != rank:
    raise ValueError(f'{module}: the adapter has rank {rank}, but {CONFIG_FILE} says '
                     f'{setting("rank_pattern", "r"):g}')
  alpha = setting('alpha_pattern', 'lora_alpha')
  return alpha / (math.sqrt(rank) if keys.get('use_rslora') else rank)
