"""GGUF files: metadata and tensors, every count checked against the file before it is believed.

The format is a header with two counts, key-value metadata, the name, shape, type and place of each
tensor, and the bytes. Numbers are little-endian; strings and arrays begin with their length.

By hand: `gguf.GGUFReader` believes counts and lengths, and makes an array of every string.

Reference:
  docs/gguf.md in github.com/ggml-org/ggml.
"""

import math
import mmap
import pathlib
import re
import struct
from typing import Any

import numpy as np

from jaxllm import mistakes
from jaxllm.interop.tensorfile import Tensor

_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q',
            12: 'd'}
_STRING, _ARRAY = 8, 9

MAX_KEYS, MAX_TENSORS, MAX_ELEMENTS = 10_000, 100_000, 2**40
MAX_STRING_BYTES, MAX_ITEMS = 2**26, 2**22  # Items of all arrays together.
# The name of one of several files of a model.
_PART = re.compile(r'(.*)-\d{5}-of-(\d{5})\.gguf')


def data(tensor: Tensor) -> np.ndarray:
  """Return the numbers of a tensor, float32."""
  gguf = mistakes.package('gguf')
  # One row of blocks per row.
  rows = tensor.raw().reshape(*tensor.shape[:-1], -1)
  return gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])


def find(directory: pathlib.Path) -> pathlib.Path:
  """Return the GGUF file of a directory, the first of several parts; refuse several models."""
  found = {_PART.sub(r'\1', path.name): path for path in sorted(directory.glob('*.gguf'))[::-1]}
  if len(found) != 1:
    raise ValueError(f'{directory} holds {len(found)} GGUF models; name the file of one: '
                     f'{", ".join(sorted(path.name for path in found.values()))}')
  return next(iter(found.values()))


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Return the metadata and the tensors of a file, and of those that go on with its model.

  Raises:
    ValueError: one is missing, damaged, cut off, something else, or of a type that cannot be read.
  """
  metadata, tensors = _read_file(path)
  count = metadata.get('split.count', 1)
  if not isinstance(count, int) or count <= 1:
    return metadata, tensors
  named = _PART.fullmatch(path.name)
  if named is None or int(named[2]) != count:
    raise ValueError(f'{path} is one of {count} files of a model (split.count); its name has to '
                     f'end like -00001-of-{count:05}.gguf')
  paths = [path.with_name(f'{named[1]}-{i + 1:05}-of-{count:05}.gguf') for i in range(count)]
  if missing := [part.name for part in paths if not part.is_file()]:
    raise ValueError(f'{path} is one of {count} files of a model; fetch the missing ones too: '
                     f'{", ".join(missing[:5])}')
  read = [_read_file(part) for part in paths]
  places = [(content.get('split.no'), content.get('split.count')) for content, _ in read]
  tensors = {name: tensor for _, found in read for name, tensor in found.items()}
  lengths = {len(tensors), sum(len(found) for _, found in read)}
  lengths |= {read[0][0].get('split.tensors.count', len(tensors))}
  if places != [(i, count) for i in range(count)] or len(lengths) != 1:
    raise ValueError(f'{paths[0]} and the {count - 1} files after it are not of one model '
                     f'(split.no and split.count {places}, tensors {sorted(lengths)})')
  return read[0][0], tensors


def _read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  if not path.is_file():
    raise ValueError(f'{path} is not a file')
  with path.open('rb') as file:
    if path.stat().st_size < 24:
      raise ValueError(f'{path} is cut off: {path.stat().st_size} bytes')
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      try:
        return _read(path, content)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _read(path: pathlib.Path, content: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
  cursor = _Cursor(content)
  if cursor.take(4) != b'GGUF':
    raise ValueError('not a GGUF file')
  version = cursor.number('I')
  if version not in (2, 3):
    raise ValueError(f'GGUF version {version}; little-endian files of versions 2 and 3 are read')
  num_tensors, num_keys = cursor.number('Q'), cursor.number('Q')
  # A key takes at least 13 bytes, a tensor 24.
  cursor.check(num_keys, 13, 'keys', MAX_KEYS)
  cursor.check(num_tensors, 24, 'tensors', MAX_TENSORS)
  metadata: dict[str, Any] = {}
  for _ in range(num_keys):
    key = cursor.string()
    if key in metadata:
      raise ValueError(f'key {key!r} stands twice')
    metadata[key] = _value(cursor, cursor.number('I'), key)
  entries = [_entry(cursor) for _ in range(num_tensors)]
  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
    raise ValueError(f'general.alignment={alignment!r}; a multiple of 8 is needed')
  start = -(-cursor.at // alignment) * alignment
  tensors: dict[str, Tensor] = {}
  for name, shape, kind, offset in entries:
    if name in tensors:
      raise ValueError(f'tensor {name!r} stands twice')
    if offset % alignment:
      raise ValueError(f'tensor {name!r} begins at {offset}, no multiple of {alignment}')
    kind_name, size = _size(name, shape, kind)
    tensors[name] = Tensor(name, path, kind_name, shape, start + offset, size)
  end = 0
  for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
    if tensor.offset < end:
      raise ValueError(f'tensor {tensor.name!r} overlaps the one before it')
    end = tensor.offset + tensor.num_bytes
  if end > len(content):
    raise ValueError(f'cut off: tensor {tensor.name!r} ends at {end}, the file at {len(content)}')
  return metadata, tensors


class _Cursor:
  """A place in the file, which never moves past its end."""

  def __init__(self, content: mmap.mmap):
    self.content, self.at, self.items_left = content, 0, MAX_ITEMS

  def take(self, size: int) -> bytes:
    if size > len(self.content) - self.at:
      raise ValueError(f'cut off: {size} bytes are needed at {self.at}, the file ends at '
                       f'{len(self.content)}')
    self.at += size
    return self.content[self.at - size : self.at]

  def number(self, form: str) -> Any:
    (value,) = struct.unpack('<' + form, self.take(struct.calcsize('<' + form)))
    return value

  def string(self) -> str:
    size = self.number('Q')
    self.check(size, 1, 'bytes of a string', MAX_STRING_BYTES)
    return self.take(size).decode('utf-8', errors='strict')

  def check(self, count: int, least_bytes: int, what: str, most: int) -> None:
    left = len(self.content) - self.at
    if count > most or count * least_bytes > left:
      raise ValueError(f'claims {count} {what}; {left} bytes follow, and at most {most} are read')


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
  if kind in _SCALARS:
    return cursor.number(_SCALARS[kind])
  if kind == _STRING:
    return cursor.string()
  if kind != _ARRAY:
    raise ValueError(f'key {key!r} has the unknown type {kind}')
  inner, count = cursor.number('I'), cursor.number('Q')
  if inner != _STRING and inner not in _SCALARS:
    raise ValueError(f'key {key!r} is an array of the type {inner}, which is not read')
  form = f'<{count}{_SCALARS.get(inner, "Q")}'
  cursor.check(count, struct.calcsize('<' + form[-1]), f'items in {key!r}', cursor.items_left)
  cursor.items_left -= count
  if inner == _STRING:
    return [cursor.string() for _ in range(count)]
  return [*struct.unpack(form, cursor.take(struct.calcsize(form)))]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
  name, num_axes = cursor.string(), cursor.number('I')
  if not 1 <= num_axes <= 4:
    raise ValueError(f'tensor {name!r} has {num_axes} axes; 1 to 4 are read')
  shape = tuple(reversed([cursor.number('Q') for _ in range(num_axes)]))
  if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS:
    raise ValueError(f'tensor {name!r} claims the shape {shape}')
  return name, shape, cursor.number('I'), cursor.number('Q')


def _size(name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
  """Return the name of a type and the bytes of such a tensor."""
  gguf = mistakes.package('gguf')
  try:
    quantization = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    gguf.dequantize(np.zeros((1, block_bytes), np.uint8), quantization)
  except (ValueError, KeyError, NotImplementedError):
    raise ValueError(f'tensor {name!r} has the type {kind}, which cannot be read') from None
  if shape[-1] % block:
    raise ValueError(f'tensor {name!r}: rows of {shape[-1]} do not divide into blocks of {block} '
                     f'({quantization.name})')
  return quantization.name, math.prod(shape) // block * block_bytes
