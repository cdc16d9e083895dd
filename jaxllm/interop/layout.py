"""Which stored tensor holds which parameters, and how: one table, read in both directions.

A `Format` of a family names the tensors. `slots` lists those of a config, `match` finds them in a
file, `split` cuts a stored tensor into our parameters, `join` makes it from them again. Paths of
parameters are written 'layers/attention/query/kernel'; shapes are those of one layer, without the
padding of the vocabulary.

Axis letters beyond the usual: I, O, the flattened inputs and outputs of a kernel.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from jaxllm.checkpoints import tree
from jaxllm.models import decoder
from jaxllm.models.config import DecoderConfig
from jaxllm.models.families.huggingface import Format
from jaxllm.models.linear import num_inputs

LAYERS = 'layers/'


@dataclasses.dataclass(frozen=True)
class Slot:
  """One stored tensor.

  Attributes:
    name: as the format calls it.
    targets: paths of the parameters that it holds.
    layer: whose parameters, or None.
    shape: as stored.
  """

  name: str
  targets: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Return the shape of every parameter of the published model, of one layer where there are L."""
  shapes, _ = decoder.abstract(config.replace(vocab_multiple=1))
  return {
    path: leaf.shape[path.startswith(LAYERS) :]
    for path, leaf in tree.flatten(shapes['params']).items()
  }


def slots(form: Format, config: DecoderConfig) -> list[Slot]:
  """Return all tensors that a model of this config has.

  Raises:
    ValueError: the format has no name for some parameter.
  """
  shapes = parameter_shapes(config)
  found, named = [], set()
  for key, name in form.names.items():
    targets = (key,) if isinstance(key, str) else key
    if not set(targets) <= set(shapes):
      continue
    named |= set(targets)
    shape = _stored_shape(form, targets, [shapes[target] for target in targets])
    layered = targets[0].startswith(LAYERS)
    for layer in range(config.num_layers) if layered else (None,):
      found.append(Slot(name.format(layer), targets, layer, shape))
  nameless = sorted(set(shapes) - named)
  if nameless:
    raise ValueError(f'{form.model_type} has no tensor for {nameless}')
  return found


@dataclasses.dataclass(frozen=True)
class Match:
  """What was found in a file.

  Attributes:
    names: name of a slot -> name in the file.
    ignored: name in the file -> why it holds nothing that we need.
    head: name in the file of a head that is also the embedding, if there is one.
  """

  names: Mapping[str, str]
  ignored: Mapping[str, str]
  head: str | None


def match(
  form: Format, wanted: Sequence[Slot], tied_head: bool, stored: Collection[str]
) -> Match:
  """Find every slot among the names of a file, whatever stands before them.

  Raises:
    ValueError: tensors are missing, or some belong to nothing; the message lists them.
  """
  candidates = [
    _renamed(form, prefix, stored) for prefix in (form.prefix, *form.other_prefixes)
  ]
  names = {slot.name for slot in wanted}
  found = max(candidates, key=lambda renamed: len(names & set(renamed)))
  missing = sorted(names - set(found))
  left = {name: original for name, original in found.items() if name not in names}
  head = left.pop(form.names.get('head/kernel', ''), None) if tied_head else None
  ignored, unused = {}, []
  for original in left.values():
    reason = next((why for rule, why in form.ignored.items() if re.fullmatch(rule, original)), None)
    if reason is None:
      unused.append(original)
    else:
      ignored[original] = reason
  problems = [f'{name}: missing' for name in missing]
  problems += [f'{name!r}: belongs to nothing in this model' for name in sorted(unused)]
  if problems:
    raise ValueError(f'the tensors do not fit model_type {form.model_type!r} with this '
                     f'config.json:\n{tree.listing(problems)}')
  return Match({name: found[name] for name in names}, ignored, head)


def split(
  form: Format, slot: Slot, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """Return the parameters in a stored tensor, as views of it.

  Args:
    form: the layout.
    slot: which tensor.
    array: the tensor, of the slot's shape.
    shapes: from `parameter_shapes`.
  """
  if _is_transposed(form, slot.targets[0]):
    array = array.T
  if len(slot.targets) == 1:
    (target,) = slot.targets
    return {target: array.reshape(shapes[target])}
  if form.fused == 'per_head':
    heads, dim = shapes[slot.targets[0]][-2:]
    parts = array.reshape(*array.shape[:-1], heads, len(slot.targets), dim)
    return {
      target: parts[..., i, :].reshape(shapes[target]) for i, target in enumerate(slot.targets)
    }
  sizes = [_outputs(target, shapes[target]) for target in slot.targets]
  pieces = np.split(array, np.cumsum(sizes)[:-1], axis=-1)
  return {
    target: piece.reshape(shapes[target])
    for target, piece in zip(slot.targets, pieces, strict=True)
  }


def join(form: Format, slot: Slot, parts: Mapping[str, np.ndarray]) -> np.ndarray:
  """Return the stored tensor of parameters: the inverse of `split`."""
  kernel = slot.targets[0].endswith('/kernel')
  arrays = [parts[target] for target in slot.targets]
  if len(arrays) > 1 and form.fused == 'per_head':
    array = np.stack(arrays, axis=-2)
    array = array.reshape(array.shape[0], -1) if kernel else array.reshape(-1)
  elif kernel:
    flat = [
      part.reshape(-1, _outputs(target, part.shape))
      for target, part in zip(slot.targets, arrays, strict=True)
    ]
    array = np.concatenate(flat, axis=1) if len(flat) > 1 else flat[0]
  else:
    array = arrays[0] if arrays[0].shape == slot.shape else np.concatenate(
      [part.reshape(-1) for part in arrays]
    )
  return array.T if _is_transposed(form, slot.targets[0]) else array


def _is_transposed(form: Format, target: str) -> bool:
  """Whether a tensor is stored (out, in); a head always is, as the embedding that it may be."""
  if form.kernels == 'in_out':
    return target == 'head/kernel'
  return target.endswith('/kernel')


def _outputs(target: str, shape: tuple[int, ...]) -> int:
  """O of a kernel, the size of anything else."""
  return math.prod(shape[num_inputs(target) if target.endswith('/kernel') else 0 :])


def _stored_shape(
  form: Format, targets: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
  if targets[0].endswith('/embedding'):
    return shapes[0]
  outputs = sum(map(_outputs, targets, shapes))
  if not targets[0].endswith('/kernel'):
    return (outputs,)
  inputs = math.prod(shapes[0][: num_inputs(targets[0])])
  return (outputs, inputs) if _is_transposed(form, targets[0]) else (inputs, outputs)


def _renamed(form: Format, prefix: str, stored: Collection[str]) -> dict[str, str]:
  """Return canonical name -> name in the file, if what stands before the names is `prefix`."""
  without_prefix = {name for name in form.names.values() if not name.startswith(form.prefix)}
  renamed: dict[str, str] = {}
  for name in stored:
    canonical = form.aliases.get(name, name)
    if canonical not in without_prefix and name.startswith(prefix):
      canonical = form.prefix + name.removeprefix(prefix)
    # Two names of one tensor: the second stays what it is, and will belong to nothing.
    renamed[name if canonical in renamed else canonical] = name
  return renamed
