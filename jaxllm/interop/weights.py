"""From stored tensors to variables on devices, and back: checked first, then read one by one.

A `Source` is a model on disk whose names, shapes and sizes fit together; nothing of it is allocated
yet. `load` puts every parameter straight into its sharding and looks for NaN there: each device's
part is cut from the mapped files, so that a model larger than one host's memory loads.

One table says which stored tensor holds which parameters, and how. The `Format` of a family names
the tensors; `slots` lists those of a config, `match` finds them in a file, `split` cuts a
stored tensor into our parameters, `join` makes it from them again. Paths of parameters are written
'layers/attention/query/kernel'; shapes are those of one layer, without the vocabulary's padding.

Axis letters beyond the usual: I, O, the flattened inputs and outputs of a kernel.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.checkpoints import tree
from jaxllm.interop import tensorfile
from jaxllm.interop.tensorfile import Tensor
from jaxllm.models import decoder
from jaxllm.models.config import DecoderConfig
from jaxllm.models.families.huggingface import Format
from jaxllm.models.linear import num_inputs, num_stacked
from jaxllm.sharding import Placement

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Slot:
  """One stored tensor.

  Attributes:
    name: as the format calls it.
    targets: paths of the parameters that it holds.
    layer: whose parameters, or None.
    shape: as stored.
    expert: whose parameters in the layer, or None.
  """

  name: str
  targets: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]
  expert: int | None = None

  @property
  def place(self) -> tuple[int, ...]:
    """The index of layer and expert in a stacked parameter."""
    return tuple(index for index in (self.layer, self.expert) if index is not None)


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Return the shape of every parameter of the published model, of one layer and one expert."""
  shapes, _ = decoder.abstract(config.replace(vocab_multiple=1))
  return {
    path: leaf.shape[num_stacked(path) :]
    for path, leaf in tree.flatten(shapes['params']).items()}


def slots(form: Format, config: DecoderConfig) -> list[Slot]:
  """Return all tensors of a model of this config; refuse a format that cannot name one."""
  shapes = parameter_shapes(config)
  found, named = [], set()
  for key, name in form.names.items():
    targets = (key,) if isinstance(key, str) else key
    if not set(targets) <= set(shapes):
      continue
    named |= set(targets)
    shape = _stored_shape(form, targets, [shapes[target] for target in targets])
    sizes = (config.num_layers, config.experts.num_experts if config.experts else 0)
    for place in np.ndindex(*sizes[: num_stacked(targets[0])]):
      layer, expert, *_ = *place, None, None
      found.append(Slot(name.format(*place), targets, layer, shape, expert))
  nameless = sorted(set(shapes) - named)
  if nameless:
    raise ValueError(f'{form.model_type} has no tensor for {nameless}')
  return found


def locate(
  form: Format, config: DecoderConfig, stored: Mapping[str, Tensor]
) -> tuple[tuple[Slot, ...], dict[str, Tensor], dict[str, str], str | None]:
  """Find every slot of a model among the tensors of a file, whatever stands before their names.

  Returns:
    The slots; name of a slot -> its tensor; name in the file -> why it holds nothing that we need;
    the name of a stored head that is also the embedding, if there is one.

  Raises:
    ValueError: tensors are missing, belong to nothing, have another shape than the config says, or
      are no floats; the message lists them.
  """
  wanted = tuple(slots(form, config))
  candidates = [_renamed(form, prefix, stored) for prefix in (form.prefix, *form.other_prefixes)]
  names = {slot.name for slot in wanted}
  found = max(candidates, key=lambda renamed: len(names & set(renamed)))
  left = {name: original for name, original in found.items() if name not in names}
  head = left.pop(form.names.get('head/kernel', ''), None) if config.tied_head else None
  ignored, problems = {}, [f'{name}: missing' for name in sorted(names - set(found))]
  for original in sorted(left.values()):
    reason = next((why for rule, why in form.ignored.items() if re.fullmatch(rule, original)), None)
    if reason is None:
      problems.append(f'{original!r}: belongs to nothing in this model')
    else:
      ignored[original] = reason
  tensors = {name: stored[found[name]] for name in names & set(found)}
  for slot in wanted if not problems else ():
    tensor = tensors[slot.name]
    if tensor.shape != slot.shape:
      problems.append(f'{tensor.name}: {list(tensor.shape)}, expected {list(slot.shape)}')
    if tensor.dtype not in tensorfile.FLOATS:
      problems.append(f'{tensor.name}: {tensor.kind}; F32, F16, BF16 and F64 are read, quantised '
                      'formats are not')
  if problems:
    raise ValueError(f'the tensors do not fit model_type {form.model_type!r} with this '
                     f'config.json:\n{tree.listing(problems)}')
  return wanted, tensors, ignored, head


def split(
  form: Format, slot: Slot, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """Return the parameters in a stored tensor, as views of it.

  Args:
    array: the tensor, of the slot's shape.
    shapes: from `parameter_shapes`.
  """
  if _is_transposed(form, slot.targets[0]):
    array = array.T
  if len(slot.targets) > 1 and form.fused == 'per_head':
    heads, dim = shapes[slot.targets[0]][-2:]
    parts = array.reshape(*array.shape[:-1], heads, len(slot.targets), dim)
    return {
      target: parts[..., i, :].reshape(shapes[target]) for i, target in enumerate(slot.targets)}
  sizes = [_outputs(target, shapes[target]) for target in slot.targets]
  pieces = np.split(array, np.cumsum(sizes)[:-1], axis=-1)
  return {
    target: piece.reshape(shapes[target])
    for target, piece in zip(slot.targets, pieces, strict=True)}


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
      for target, part in zip(slot.targets, arrays, strict=True)]
    array = np.concatenate(flat, axis=1) if len(flat) > 1 else flat[0]
  else:
    array = arrays[0] if arrays[0].shape == slot.shape else np.concatenate(
      [part.reshape(-1) for part in arrays])
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


@dataclasses.dataclass(frozen=True)
class Source:
  """A model on disk, everything about it checked but its numbers.

  Attributes:
    path: directory or file.
    form: how its family is stored.
    config: the model.
    keys: its config.json, or what takes its place.
    slots: the tensors of the model.
    tensors: name of a slot -> where it is found.
    ignored: name in the file -> why it is not needed.
    unread: keys of config.json that nothing was taken from.
    files: file name -> content, of the tokenizer, the chat template and the generation config.
    reference: independent logits (T, V), from the tensors as they are stored: takes token ids, the
      dtype to which tensors are rounded, and that of the computation, float32 by default.
  """

  path: str
  form: Format
  config: DecoderConfig
  keys: Mapping[str, Any]
  slots: tuple[Slot, ...]
  tensors: Mapping[str, Tensor]
  ignored: Mapping[str, str]
  unread: tuple[str, ...]
  files: Mapping[str, bytes]
  reference: Callable[..., np.ndarray]


def load(
  source: Source, dtype: str | None = 'float32', placement: Placement | None = None
) -> dict[str, Any]:
  """Return the variables of a source, {'params': ...}, layers stacked on axis 0.

  Args:
    dtype: of the parameters, 'float32' or 'bfloat16'; None: as they are stored.
    placement: the devices that they are split over; None: the first local one.

  Raises:
    ValueError: a tensor has NaN or infinite numbers, or the mesh does not divide a dimension.
  """
  shapes, axes = (each['params'] for each in decoder.abstract(source.config))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = (placement.shardings(axes, shapes) if placement
            else jax.tree.map(lambda leaf: device, shapes))
  unpadded = parameter_shapes(source.config)

  def read(target: str, shape: tuple[int, ...], where: jax.sharding.Sharding) -> jax.Array:
    slots = [slot for slot in source.slots if target in slot.targets]
    kind = _dtype(source, slots, dtype)
    leaf = jax.make_array_from_callback(
      shape, where, _reader(source, slots, target, shape, unpadded, kind))
    if not _is_finite(leaf):
      stored = [source.tensors[slot.name] for slot in slots]
      name = next((one.name for one in stored if not np.isfinite(one.array()).all()), target)
      raise ValueError(f'{source.path}: {name} holds NaN or infinite numbers; the file is damaged, '
                       'or the training it comes from has diverged')
    return leaf

  flat = tree.flatten(places)
  return {'params': tree.nest({
    target: read(target, leaf.shape, flat[target])
    for target, leaf in tree.flatten(shapes).items()})}


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
  return jnp.isfinite(leaf).all()


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Convert, rounding to nearest; bfloat16 to float32 by its bits, which is much faster."""
  if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  return array.astype(dtype, copy=False)


def _dtype(source: Source, slots: Sequence[Slot], dtype: str | None) -> np.dtype:
  if dtype is not None:
    if dtype not in DTYPES:
      raise ValueError(f'dtype={dtype!r}: one of {", ".join(DTYPES)} or None is needed')
    return DTYPES[dtype]
  found = {source.tensors[slot.name].dtype for slot in slots}
  return found.pop() if found == {DTYPES['bfloat16']} else DTYPES['float32']


def _reader(
  source: Source, slots: Sequence[Slot], target: str, shape: tuple[int, ...],
  unpadded: Mapping[str, tuple[int, ...]], dtype: np.dtype,
) -> Callable[[Any], np.ndarray]:
  """Return the function that reads one part of a parameter, asked for by its index."""
  stacked = num_stacked(target)
  by_place = dict(zip(np.ndindex(*shape[:stacked]), slots, strict=True))

  def one(slot: Slot, index: tuple[slice, ...], out: np.ndarray) -> None:
    array = source.tensors[slot.name].array()
    part = split(source.form, slot, array, unpadded)[target][index]
    # What lies beyond it is the padding of the vocabulary.
    _copy(out[tuple(map(slice, part.shape))], part, num_inputs(target))

  def callback(index: tuple[slice, ...]) -> np.ndarray:
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
    out = _aligned_zeros(sizes, dtype)
    ranges = [range(*part.indices(size))
              for part, size in zip(index[:stacked], shape[:stacked], strict=True)]
    for row, place in zip(
      np.ndindex(*sizes[:stacked]), itertools.product(*ranges), strict=True
    ):
      one(by_place[place], index[stacked:], out[row])
    return out

  return callback


def _aligned_zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """Return zeros whose memory a CPU device takes over as it is, without a copy."""
  size = math.prod(shape) * dtype.itemsize
  buffer = np.zeros(size + 64, np.uint8)
  begin = -buffer.ctypes.data % 64
  return buffer[begin : begin + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, part: np.ndarray, inputs: int) -> None:
  """Copy `part` into `out`; a transposed matrix in strips, six times faster than at once."""
  transposed = part.ndim > 1 and part.strides[0] < part.strides[-1]
  if not transposed:
    out[...] = cast(part, out.dtype)
    return
  rows = math.prod(part.shape[:inputs])
  part_IO = part.reshape(rows, -1)
  # A part of a larger array (before the vocabulary's padding) is a matrix already.
  out_IO = out if out.ndim == 2 else out.reshape(rows, -1)
  for begin in range(0, part_IO.shape[1], 16):
    strip_OI = part_IO[:, begin : begin + 16].T
    out_IO[:, begin : begin + 16] = cast(strip_OI, out.dtype).T
