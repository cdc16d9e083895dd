"""Files as characters: decompressed, decoded, in blocks or lines. All of it streams."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxllm import storage

_BLOCK_BYTES = 1 << 20

# Characters of a line or text, so that none fills the memory; fewer of a compressed file, of which
# a few kB may hold any number.
MAX_TEXT = 1 << 30
MAX_UNPACKED = 1 << 28


class File(NamedTuple):
  """A file that a source reads, by a name that does not change when its directory moves.

  One that lies elsewhere has no `path` before it is read: `fetched` has.
  """

  name: str
  path: pathlib.Path
  remote: storage.Remote | None = None

  @property
  def where(self) -> str:
    """Its path, or its location elsewhere."""
    return self.remote.location if self.remote else str(self.path)

  @property
  def size(self) -> int:
    """Its bytes; 0 where that is not known before it is read."""
    return (self.remote.size or 0) if self.remote else self.path.stat().st_size

  def digest(self, known: dict[str, Any]) -> str:
    """Return what tells its content; `known` as in `storage.file_digest`."""
    return self.remote.version if self.remote else storage.file_digest(self.path, known)

  def fetched(self) -> pathlib.Path:
    """Return its path on this machine, copying it here if need be."""
    return storage.local(self.remote.location) if self.remote else self.path


class TextFile(NamedTuple):
  """A file and how it is read; the fields are those of `File` and `documents.SourceConfig`."""

  path: pathlib.Path
  encoding: str = 'utf-8'
  errors: str = 'strict'
  separator: str | None = None
  slice: tuple[float, float] = (0.0, 1.0)
  text_field: str = 'text'
  column_names: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()
  """The only columns of a Parquet file that are wanted, where they are there; (): all."""
  name: str = ''


def _zstd(file: Any) -> Any:
  import pyarrow
  return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode='r'), 'zstd')


# A file's first bytes tell it, not its name: browsers and mirrors unpack or pack without renaming.
COMPRESSIONS: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
  '.gz': (b'\x1f\x8b', lambda file: gzip.GzipFile(fileobj=file)),
  '.bz2': (b'BZh', bz2.BZ2File),
  '.xz': (b'\xfd7zXZ\0', lzma.LZMAFile),
  '.zst': (b'\x28\xb5\x2f\xfd', _zstd),
}
"""Ending -> (first bytes, opener)."""

_NOT_TEXT = {
  b'%PDF-': 'PDF', b'PK\x03\x04': 'zip archive or office document', b'{\\rtf': 'RTF',
  b'\xd0\xcf\x11\xe0': 'document of an old office program', b'\x89PNG': 'PNG picture',
  b'\xff\xd8\xff': 'JPEG picture', b'\x7fELF': 'compiled program', b'7z\xbc\xaf': '7z archive',
  b'Rar!\x1a': 'RAR archive', b'SQLite format 3\0': 'database of SQLite', b'ARROW1\0': 'Arrow file',
  b'PAR1\x15': "Parquet file (format='parquet' reads it)",
  **{mark: 'file that is packed twice' for mark, _ in COMPRESSIONS.values()},
}
# That of UTF-32 begins with that of UTF-16.
_MARKS = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
          codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}


def ending(path: pathlib.Path) -> str:
  """Return the last ending of a file's name in small letters; compression and numbers are none."""
  endings = [re.sub(r'-\d+-of-\d+$', '', part.lower()) for part in path.suffixes]
  while endings and (endings[-1] in COMPRESSIONS or endings[-1][1:].isdigit()):
    endings.pop()
  return endings[-1] if endings else ''


def check_unpacked(path: pathlib.Path) -> None:
  """Refuse a packed file where its format is read from its middle and packs by itself."""
  with path.open('rb') as file:
    if _opener(file):
      raise ValueError(f'{path}: is packed, but {ending(path)[1:] or "its format"} packs by itself;'
                       ' unpack it first')


@contextlib.contextmanager
def open_bytes(path: pathlib.Path) -> Iterator[Any]:
  """Open a file for reading, unpacked where it is compressed; refuse damaged data."""
  with path.open('rb') as file:
    opener = _opener(file)
    try:
      yield opener(file) if opener else file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
      if opener is None:
        raise
      raise ValueError(f'{path}: the compressed data are damaged: {error}') from None


def _opener(file: Any) -> Callable[[Any], Any] | None:
  start = file.read(6)
  file.seek(0)
  return next((open_ for mark, open_ in COMPRESSIONS.values() if start.startswith(mark)), None)


def blocks(file: TextFile) -> Iterator[str]:
  """Yield the characters of a file in blocks, without a byte order mark.

  Raises:
    ValueError: the file is no text in its encoding; the message holds the offset and the fix.
  """
  decoder = codecs.getincrementaldecoder(file.encoding)(file.errors)
  offset, line, length, nuls, block = 0, 1, 0, 0, b' '
  with open_bytes(file.path) as stream:
    while block:
      block = stream.read(_BLOCK_BYTES)
      if not offset:
        _check_kind(file, block)
      start = offset - len(decoder.getstate()[0])
      try:
        text = decoder.decode(block, final=not block)
      except UnicodeError as error:
        raise ValueError(_undecodable(file, start, error)) from None
      first, offset, length = not length, offset + len(block), length + len(text)
      text = text.removeprefix('\ufeff') if first else text
      if '\0' in text:
        nuls += text.count('\0')
        if file.errors == 'strict' or nuls * 100 > length:
          line += text.count('\n', 0, text.index('\0'))
          raise ValueError(
            f'{file.path}, line {line}: holds NUL characters, so it is no text in {file.encoding}; '
            "if it is UTF-16, set encoding='utf-16' for this source; if few have slipped in, "
            "encoding_errors='replace' reads them as U+FFFD")
        text = text.replace('\0', '\ufffd')
      line += text.count('\n')
      if text:
        yield text


def _check_kind(file: TextFile, block: bytes) -> None:
  kinds = [kind for mark, kind in _NOT_TEXT.items() if block.startswith(mark)]
  kinds += ['tar archive'] if block[257:262] == b'ustar' else []
  if kinds:
    raise ValueError(f'{file.path}: is no text but a {kinds[0]}; take its text out of it first')
  encoding = next((name for mark, name in _MARKS.items() if block.startswith(mark)), None)
  if encoding and codecs.lookup(file.encoding).name == 'utf-8':
    raise ValueError(f'{file.path}: begins with the mark of {encoding.upper()}, so it is not UTF-8;'
                     f' set encoding={encoding!r} for this source')


def _undecodable(file: TextFile, start: int, error: UnicodeError) -> str:
  where = str(error)
  if isinstance(error, UnicodeDecodeError):
    where = f'byte {start + error.start} (0x{error.object[error.start]:02x})'
  name = {'utf-8': 'UTF-8'}.get(codecs.lookup(file.encoding).name, file.encoding)
  return (f"{file.path}: {where} is not {name}; name the file's own encoding for this source, as "
          "in encoding='gb18030' (Chinese), 'shift_jis' (Japanese) or 'cp1252' (Western European)")


def lines(file: TextFile) -> Iterator[str]:
  r"""Yield the lines of a file without their \n.

  They end at \n alone: U+2028, form feeds and lone CR, which others take for the end of a line,
  stay inside.
  """
  return split(file, blocks(file), '\n')


def split(file: TextFile, pieces: Iterable[str], separator: str) -> Iterator[str]:
  """Yield the texts between separators; what follows the last one only where it is not empty."""
  held: list[str] = []
  size, tail, number = 0, '', 1
  for piece in pieces:
    if separator in tail + piece:
      *complete, rest = ''.join([*held, piece]).split(separator)
      yield from complete
      number += len(complete)
      held, size, piece = [], 0, rest
    held.append(piece)
    size += len(piece)
    check_size(file, size, f'{"line" if separator == chr(10) else "text"} {number}')
    tail = (tail + piece)[-(len(separator) - 1):] if separator[1:] else ''
  if rest := ''.join(held):
    yield rest


def whole(file: TextFile, pieces: Iterable[str]) -> str:
  """Return all pieces as one text."""
  text = io.StringIO()
  for piece in pieces:
    text.write(piece)
    check_size(file, text.tell(), 'text 1')
  return text.getvalue()


def check_size(file: TextFile, size: int, place: str) -> None:
  """Refuse a line or text, at `place`, that has more characters than memory should hold."""
  if size <= MAX_UNPACKED:
    return
  with file.path.open('rb') as raw:
    most, fix, kind = ((MAX_UNPACKED, 'unpack it first', ' in a compressed file') if _opener(raw)
                       else (MAX_TEXT, 'split it', ''))
  if size > most:
    raise ValueError(f'{file.path}, {place}: a line or text of more than {most:,} characters{kind};'
                     f' {fix}, or set a separator for this source')
