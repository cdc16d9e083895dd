"""From stored tensors to variables on devices: checked first, then read one by one.

A `Source` is a model on disk whose names, shapes and sizes fit together; nothing of it is allocated
yet. `load` looks for NaN and puts every parameter straight into its sharding: each
device's part is cut from the mapped files, so that a model larger than one host's memory loads.

Axis letters beyond the usual: I, O, the flattened inputs and outputs of a kernel.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxllm.checkpoints import tree
from jaxllm.interop import layout, tensorfile
from jaxllm.interop.layout import Slot
from jaxllm.models import decoder
from jaxllm.models.config import DecoderConfig
from jaxllm.models.families.huggingface import Format
from jaxllm.models.linear import num_inputs
from jaxllm.sharding import Placement

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor of a source.

  Attributes:
    name: in the file.
    kind: how its numbers are stored, such as 'BF16' or 'Q4_1'.
    dtype: of what `array` returns.
    shape: of what `array` returns.
    array: reads it, in the layout of the format.
    raw: returns its bytes in the file.
  """

  name: str
  kind: str
  dtype: np.dtype
  shape: tuple[int, ...]
  array: Callable[[], np.ndarray]
  raw: Callable[[], np.ndarray]


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
  tensors: Mapping[str, Stored]
  ignored: Mapping[str, str]
  unread: tuple[str, ...]
  files: Mapping[str, bytes]
  reference: Callable[..., np.ndarray]


def stored(tensor: tensorfile.Tensor) -> Stored:
  """Describe a tensor of a safetensors file."""
  return Stored(
    tensor.name, tensor.kind, tensor.dtype, tensor.shape,
    lambda: tensorfile.data(tensor), lambda: tensorfile.data(tensor).view(np.uint8),
  )


def check_shapes(slots: tuple[Slot, ...], tensors: Mapping[str, Stored]) -> None:
  """Raise a ValueError that lists tensors of another shape than the config says, or no floats."""
  problems = [
    f'{tensors[slot.name].name}: {list(tensors[slot.name].shape)}, expected {list(slot.shape)}'
    for slot in slots if tensors[slot.name].shape != slot.shape
  ]
  problems += [
    f'{tensor.name}: {tensor.kind}; F32, F16, BF16 and F64 are read, quantised formats are not'
    for tensor in tensors.values() if tensor.dtype not in tensorfile.FLOATS
  ]
  if problems:
    raise ValueError(f'tensors do not fit config.json:\n{tree.listing(problems)}')


def load(
  source: Source, dtype: str | None = 'float32', placement: Placement | None = None
) -> dict[str, Any]:
  """Return the variables of a source, {'params': ...}, layers stacked on axis 0.

  Args:
    source: an open model.
    dtype: of the parameters, 'float32' or 'bfloat16'; None: as they are stored.
    placement: the devices that they are split over; None: the first local one.

  Raises:
    ValueError: a tensor has NaN or infinite numbers, or the mesh does not divide a dimension.
  """
  for tensor in source.tensors.values():
    if not tensorfile.is_finite(tensor.array()):
      raise ValueError(f'{source.path}: {tensor.name} holds NaN or infinite numbers; the file is '
                       'damaged, or the training it comes from has diverged')
  shapes, axes = (each['params'] for each in decoder.abstract(source.config))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = (placement.shardings(axes, shapes) if placement
            else jax.tree.map(lambda leaf: device, shapes))
  unpadded = layout.parameter_shapes(source.config)

  def read(target: str, shape: tuple[int, ...], where: jax.sharding.Sharding) -> jax.Array:
    slots = [slot for slot in source.slots if target in slot.targets]
    kind = _dtype(source, slots, dtype)
    return jax.make_array_from_callback(
      shape, where, _reader(source, slots, target, shape, unpadded, kind))

  flat = tree.flatten(places)
  return {'params': tree.nest({
    target: read(target, leaf.shape, flat[target])
    for target, leaf in tree.flatten(shapes).items()})}


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
  layered = target.startswith(layout.LAYERS)

  def one(slot: Slot, index: tuple[slice, ...], out: np.ndarray) -> None:
    array = source.tensors[slot.name].array()
    part = layout.split(source.form, slot, array, unpadded)[target][index]
    # What lies beyond it is the padding of the vocabulary.
    _copy(out[tuple(map(slice, part.shape))], part, num_inputs(target))

  def callback(index: tuple[slice, ...]) -> np.ndarray:
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
    out = _aligned_zeros(sizes, dtype)
    if not layered:
      one(slots[0], index, out)
      return out
    for row, layer in enumerate(range(*index[0].indices(shape[0]))):
      one(slots[layer], index[1:], out[row])
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
