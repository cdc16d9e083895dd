"""safetensors files: read lazily once everything they claim is checked.

The library checks sizes, types and ranges; `read_header` refuses besides what it accepts: names
that stand twice, empty tensors by the thousand, other files in disguise. `Tensor.array` maps one.
"""

import dataclasses
import errno
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxllm import mistakes

# Name in the header -> dtype. Weights must be floats; the others hold masks and the like.
DTYPES = {
  'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16), 'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2), 'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32), 'I16': np.dtype(np.int16), 'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64), 'U32': np.dtype(np.uint32), 'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8), 'BOOL': np.dtype(np.bool_),
}
FLOATS = tuple(DTYPES[name] for name in ('F64', 'F32', 'F16', 'BF16'))

MAX_TENSORS = 200_000
MAX_INDEX_BYTES = 100_000_000

_DISGUISES = (
  (b'PK\x03\x04', 'a zip archive, such as a PyTorch pickle'),
  (b'\x80', 'a pickle'),
  (b'GGUF', 'a GGUF file; give it the suffix .gguf'),
  (b'\x89HDF', 'an HDF5 file'),
  (b'version https://git-lfs', 'a Git LFS pointer, not the weights; run git lfs pull'),
)


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
    ValueError: there are none (or only pickles), or the index names a file elsewhere or nowhere.
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
  with path.open('rb') as file:
    first = file.read(32)
    for magic, what in _DISGUISES:
      if first.startswith(magic) and first[8:9] != b'{':
        raise ValueError(f'{path} is not a safetensors file but {what}')
    try:
      with safetensors.safe_open(path, 'np'):
        length = int.from_bytes(first[:8], 'little')
    except safetensors.SafetensorError as error:
      raise ValueError(f'{path} is damaged, cut off or no safetensors file: {error}') from None
    file.seek(8)
    header = mistakes.parse_json(file.read(length), f'{path}: the header')
  header.pop('__metadata__', None)
  if len(header) > MAX_TENSORS:
    raise ValueError(f'{path}: {len(header)} tensors; at most {MAX_TENSORS} are read')
  tensors = {}
  for name, entry in header.items():
    kind, shape, (begin, end) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
    if kind not in DTYPES or 0 in shape or len(shape) > 8:
      raise ValueError(f'{path}: tensor {name!r} has dtype {kind!r} and shape {shape}; one of '
                       f'{", ".join(DTYPES)} and up to 8 positive numbers are needed')
    tensors[name] = Tensor(name, path, kind, shape, 8 + length + begin, end - begin)
  return tensors


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Write a file; an OSError says why it cannot be."""
  # The library writes the bytes as they lie.
  plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  try:
    safetensors.numpy.save_file(plain, path, {'format': 'pt'})
    with path.open('rb') as file:
      os.fsync(file.fileno())
  except safetensors.SafetensorError as error:
    raise OSError(errno.EIO, str(error), str(path)) from error


def _read_index(path: pathlib.Path) -> dict[str, str]:
  if path.stat().st_size > MAX_INDEX_BYTES:
    raise ValueError(f'{path}: larger than {MAX_INDEX_BYTES} bytes')
  index = mistakes.parse_json(path.read_bytes(), path)
  names = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(names, dict) or not names or {*map(type, names.values())} != {str}:
    raise ValueError(f'{path}: weight_map is missing or no object of file names')
  return names
