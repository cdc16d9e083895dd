"""safetensors files: read lazily once everything they claim is checked, written as a stream.

The format is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and byte
range, and the bytes. `read_headers` believes none of it: it refuses duplicate names, ranges that
overlap, leave holes or reach past the end of the file, and other files in disguise, before anything
is allocated. `Tensor.array` then maps one, `is_finite` looks for NaN in it.

By hand, because the library accepts duplicate names and 100,000 empty tensors, does not say which
tensor is wrong, and writes only tensors that all lie in memory.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

# Name in the header -> dtype. Weights must be floats; the others hold masks and the like.
DTYPES = {
  'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16), 'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2), 'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32), 'I16': np.dtype(np.int16), 'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64), 'U32': np.dtype(np.uint32), 'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8), 'BOOL': np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = tuple(DTYPES[name] for name in ('F64', 'F32', 'F16', 'BF16'))

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
MAX_INDEX_BYTES = 100_000_000

_DISGUISES = (
  (b'PK\x03\x04', 'a zip archive, such as a PyTorch pickle'),
  (b'\x80', 'a pickle'),
  (b'GGUF', 'a GGUF file; give it the suffix .gguf'),
  (b'\x89HDF', 'an HDF5 file'),
  (b'version https://git-lfs', 'a Git LFS pointer, not the weights; run git lfs pull'),
)
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tensor:
  """The place of one stored tensor.

  Attributes:
    name: its name in the file.
    path: the file.
    kind: its type, such as 'BF16', or 'Q4_1' in a GGUF file.
    shape: rows first.
    offset: of its first byte in the file.
    num_bytes: its size in the file.
    read: returns its numbers, float32, where they are not what the file holds.
  """

  name: str
  path: pathlib.Path
  kind: str
  shape: tuple[int, ...]
  offset: int
  num_bytes: int
  read: Callable[[], np.ndarray] | None = None

  @property
  def dtype(self) -> np.dtype:
    """The type of its numbers."""
    return DTYPES['F32' if self.read else self.kind]

  def array(self) -> np.ndarray:
    """Return its numbers; those that the file holds are mapped, and read when touched."""
    return self.read() if self.read else self.raw().view(self.dtype).reshape(self.shape)

  def raw(self) -> np.ndarray:
    """Map its bytes into memory."""
    return np.memmap(self.path, np.uint8, 'r', self.offset, (self.num_bytes,))


def find(directory: pathlib.Path) -> list[pathlib.Path]:
  """Return the weight files of a model directory: one, or the shards that the index names.

  Raises:
    ValueError: there are none (or only pickles), or the index names a file outside the directory
      or a missing one.
  """
  single, index = directory / 'model.safetensors', directory / 'model.safetensors.index.json'
  if index.is_file():
    names = sorted(set(_read_index(index).values()))
    for name in names:
      if not re.fullmatch(r'[\w-][\w.-]*\.safetensors', name):
        raise ValueError(f'{index}: names the file {name!r}; only names of .safetensors files in '
                         'the same directory are read')
      if not (directory / name).is_file():
        raise ValueError(f'{index}: names {name!r}, which is missing; fetch it')
    return [directory / name for name in names]
  if single.is_file():
    return [single]
  others = sorted(directory.glob('*.safetensors'))
  if others:
    shown = ', '.join(path.name for path in others[:4])
    raise ValueError(f'{directory} holds {shown} but neither model.safetensors nor '
                     'model.safetensors.index.json, which says which of them belong together')
  pickles = sorted(path.name for pattern in ('*.bin', '*.pt', '*.pth', '*.ckpt')
                   for path in directory.glob(pattern))
  if pickles:
    raise ValueError(f'{directory} holds {pickles[0]}, a pickle, which can run code when it is '
                     'read; only safetensors are: save the model again with safe_serialization')
  raise ValueError(f'{directory} holds no model.safetensors')


def read_headers(paths: Iterable[pathlib.Path]) -> dict[str, Tensor]:
  """Return the tensors of several files by name, all about them checked, or refuse them."""
  tensors: dict[str, Tensor] = {}
  for path in paths:
    for name, tensor in read_header(path).items():
      if name in tensors:
        raise ValueError(f'{path}: tensor {name!r} is also in {tensors[name].path.name}')
      tensors[name] = tensor
  return tensors


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Return the tensors of one file by name; see `read_headers`."""
  if not path.is_file():
    raise ValueError(f'{path} is not a file')
  size = path.stat().st_size
  with path.open('rb') as file:
    header, start = _read_json_header(path, file, size)
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict):
    raise ValueError(f'{path}: __metadata__ is {type(metadata).__name__}, not an object')
  if len(header) > MAX_TENSORS:
    raise ValueError(f'{path}: {len(header)} tensors; at most {MAX_TENSORS} are read')
  tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
  end = start
  for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
    if tensor.offset != end:
      what = 'overlaps the one before it' if tensor.offset < end else 'leaves a hole before it'
      raise ValueError(f'{path}: tensor {tensor.name!r} {what}')
    end += tensor.num_bytes
  if end != size:
    what = 'is cut off' if end > size else 'has bytes that belong to no tensor'
    raise ValueError(f'{path} {what}: the header speaks of {end} bytes, there are {size}')
  return tensors


def is_finite(array: np.ndarray) -> bool:
  """Return whether no number is NaN or infinite; reads in pieces, so that little is held."""
  flat = array.reshape(-1)
  if array.dtype.kind not in 'fV' and array.dtype not in FLOATS:
    return True
  for begin in range(0, flat.size, _CHUNK):
    piece = flat[begin : begin + _CHUNK]
    if array.dtype == ml_dtypes.bfloat16:
      # The exponent is all ones; much faster than through float32.
      if ((piece.view(np.uint16) & 0x7F80) == 0x7F80).any():
        return False
    elif not np.isfinite(piece).all():
      return False
  return True


def write(
  path: pathlib.Path, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  produce: Callable[[str], np.ndarray],
) -> None:
  """Write a file, one tensor at a time.

  `layout` says name -> (shape, dtype); `produce` returns the tensor of a name, and is called once
  for each, in the order of the file.
  """
  order = sorted(layout, key=lambda name: (-layout[name][1].itemsize, name))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name in order:
    shape, dtype = layout[name]
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': DTYPE_NAMES[dtype], 'shape': [*shape], 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in order:
      array = produce(name)
      if (array.shape, array.dtype) != layout[name]:
        raise AssertionError(f'{name}: {array.shape} {array.dtype}, expected {layout[name]}')
      file.write(np.ascontiguousarray(array).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def parse_json(text: bytes, where: object) -> Any:
  """Parse JSON from outside; refuse damage, absurd nesting, and keys that stand twice."""
  def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in items]
    if len(set(keys)) != len(keys):
      twice = next(key for key in keys if keys.count(key) > 1)
      raise ValueError(f'{twice!r} stands twice')
    return dict(items)

  try:
    return json.loads(text.decode(), object_pairs_hook=pairs)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: {str(error) or type(error).__name__}') from None


def _read_index(path: pathlib.Path) -> dict[str, str]:
  if path.stat().st_size > MAX_INDEX_BYTES:
    raise ValueError(f'{path}: larger than {MAX_INDEX_BYTES} bytes')
  index = parse_json(path.read_bytes(), path)
  names = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(names, dict) or not names or {*map(type, names.values())} != {str}:
    raise ValueError(f'{path}: weight_map is missing or no object of file names')
  return names


def _read_json_header(path: pathlib.Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
  """Return the header and the offset of the data."""
  first = file.read(32)
  for magic, what in _DISGUISES:
    if first.startswith(magic) and first[8:9] != b'{':
      raise ValueError(f'{path} is not a safetensors file but {what}')
  length = int.from_bytes(first[:8], 'little')
  if len(first) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
    raise ValueError(f'{path} is no safetensors file, or cut off: its header would have {length} '
                     f'bytes, the file has {size}')
  file.seek(8)
  header = parse_json(file.read(length), f'{path}: the header')
  if not isinstance(header, dict):
    raise ValueError(f'{path}: the header is {type(header).__name__}, not an object')
  return header, 8 + length


def _tensor(path: pathlib.Path, name: str, entry: Any, start: int) -> Tensor:
  where = f'{path}: tensor {name!r}'
  if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{where}: dtype, shape and data_offsets are needed, and nothing else')
  dtype = DTYPES.get(str(entry['dtype']))
  if dtype is None:
    raise ValueError(f'{where} has dtype {entry["dtype"]!r} (known: {", ".join(DTYPES)})')
  shape, offsets = entry['shape'], entry['data_offsets']
  if not _counts(shape) or len(shape) > 8 or 0 in shape:
    raise ValueError(f'{where} has shape {str(shape)[:80]}; up to 8 positive numbers are needed')
  if not _counts(offsets) or len(offsets) != 2:
    raise ValueError(f'{where} has data_offsets {str(offsets)[:80]}; two numbers are needed')
  num_bytes = math.prod(shape) * dtype.itemsize
  if offsets[1] - offsets[0] != num_bytes:
    raise ValueError(f'{where} of shape {shape} takes {num_bytes} bytes, but data_offsets '
                     f'{offsets} give it {offsets[1] - offsets[0]}')
  return Tensor(name, path, entry['dtype'], tuple(shape), start + offsets[0], num_bytes)


def _counts(value: Any) -> bool:
  return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
