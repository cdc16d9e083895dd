"""Sources of text: files, packages, TFDS; each yields documents, one after the other, in order.

- `SourceConfig` names a source; `documents` streams it, `rows` also gives rows without a text.
- `files` lists what a source reads, so that a change of it can be noticed.
- `SCHEMES` lists the kinds of location; everything else is a path.
"""

import dataclasses
import glob
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pydantic

from jaxllm.config import Config
from jaxllm.data import catalogs, readers
from jaxllm.data.catalogs import package_available as package_available
from jaxllm.data.readers import File, Row


class SourceConfig(Config):
  """One source of documents."""

  location: str
  """A file, directory or glob, 'package:NAME' for texts inside an installed package, 'stdlib' for
  Python's own library, or 'tfds:NAME[/CONFIG][:VERSION][?split=train&data_dir=...]'."""
  format: Literal['text', 'markdown', 'jsonl', 'csv', 'parquet'] | None = None
  """How files are read; None goes by their suffix, and takes unknown suffixes for text. 'markdown'
  is text without its emphasis, heading and line break marks."""
  text_field: str = 'text'
  """The field of a row that holds the text."""
  separator: str | None = None
  """Splits a text file into documents; None makes each file one document, held in memory whole."""
  slice: tuple[float, float] = (0.0, 1.0)
  """The part of each file to use, as fractions of its characters (text) or of its rows."""
  encoding_errors: Literal['strict', 'replace'] = 'strict'
  """Whether invalid UTF-8 is an error or becomes U+FFFD."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'SourceConfig':
    start, stop = self.slice
    if not 0 <= start < stop <= 1:
      raise ValueError(f'slice={self.slice}: expected 0 <= start < stop <= 1')
    if self.separator == '':
      raise ValueError("separator='': expected None or some text")
    return self


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, where it came from, and what else its row held."""

  text: str
  source: str
  """The file, or the dataset's name."""
  index: int
  """Which document of that file it is, from 0."""
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def documents(source: SourceConfig) -> Iterator[Document]:
  """Yield the documents of a source; each call starts anew, and the order never changes.

  Raises:
    ValueError: nothing is there, a file is damaged, or a row has no text; the message names the
      file, the place in it, and what is there instead.
  """
  name, index = None, 0
  for row in rows(source):
    name, index = row.source, index + 1 if row.source == name else 0
    text = row.fields.pop(source.text_field, None)
    if not isinstance(text, str):
      found = 'missing or null' if text is None else type(text).__name__
      others = ', '.join(map(repr, row.fields)) or 'none'
      raise ValueError(f'{row.source}, {row.place}: field {source.text_field!r} is {found}, '
                       f'expected text; other fields, for text_field: {others}')
    if not text.isascii():
      _check_unicode(text, f'{row.source}, {row.place}, field {source.text_field!r}')
    yield Document(text, row.source, index, row.fields)


def _check_unicode(text: str, where: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{where}: character {error.start} is half of a surrogate pair '
                     f'({text[error.start]!r}), which is not text') from None


def rows(source: SourceConfig) -> Iterator[Row]:
  """Yield the rows of a source with all their fields; a text file gives its text as one field.

  Raises:
    ValueError: as in `documents`.
  """
  yield from _scheme(source).rows(source)


def files(source: SourceConfig) -> list[File]:
  """List the files that a source reads, in order.

  Raises:
    ValueError: there are none.
  """
  return _scheme(source).files(source)


class _Scheme(NamedTuple):
  """A kind of location: lists its files and yields its rows."""

  files: Callable[[SourceConfig], list[File]]
  rows: Callable[[SourceConfig], Iterator[Row]]


def has_scheme(source: SourceConfig) -> bool:
  """Return whether the location names something, rather than being a path."""
  return source.location.partition(':')[0] in SCHEMES


def _scheme(source: SourceConfig) -> _Scheme:
  return SCHEMES.get(source.location.partition(':')[0], _PATH)


def _rest(source: SourceConfig) -> str:
  return source.location.partition(':')[2]


def _path_files(source: SourceConfig) -> list[File]:
  location = pathlib.Path(source.location)
  if location.is_file():
    return [File(location.name, location)]
  if location.is_dir():
    found = catalogs.visible_files(location)
  elif glob.has_magic(source.location):
    fixed = itertools.takewhile(lambda name: not glob.has_magic(name), location.parts)
    root = pathlib.Path(*fixed)
    paths = map(pathlib.Path, glob.glob(source.location, recursive=True))
    found = sorted(File(p.relative_to(root).as_posix(), p) for p in paths if p.is_file())
  else:
    raise ValueError(f'no such file: {source.location!r} (a source of config.data)')
  if not found:
    raise ValueError(f'no files in {source.location!r} (a source of config.data)')
  return found


def _path_rows(source: SourceConfig) -> Iterator[Row]:
  for file in _path_files(source):
    yield from _file_rows(source, file.path, source.format)


def _package_rows(source: SourceConfig) -> Iterator[Row]:
  found, known_format = catalogs.package_files(_rest(source))
  for file in found:
    yield from _file_rows(source, file.path, source.format or known_format)


def _file_rows(source: SourceConfig, path: pathlib.Path, format_: str | None) -> Iterator[Row]:
  format_ = format_ or readers.SUFFIXES.get(path.suffix.lower(), 'text')
  errors = source.encoding_errors
  if format_ in readers.TEXTS:
    texts = readers.TEXTS[format_](path, errors, source.separator, source.slice)
    items = ((f'text {i}', {source.text_field: text}) for i, text in enumerate(texts, 1))
  else:
    read = readers.ROWS[format_]
    items = (item for item, _ in readers.part(lambda: read(path, errors), source.slice, _one))
  for place, fields in items:
    yield Row(str(path), place, fields)


def _stdlib_rows(source: SourceConfig) -> Iterator[Row]:
  pieces = readers.part(lambda: catalogs.stdlib_rows(source.text_field), source.slice, _one)
  return (row for row, _ in pieces)


def _one(_: Any) -> int:
  return 1


_PATH = _Scheme(_path_files, _path_rows)

SCHEMES = {
  'package': _Scheme(lambda source: catalogs.package_files(_rest(source))[0], _package_rows),
  'stdlib': _Scheme(lambda _: catalogs.stdlib_files(), _stdlib_rows),
  'tfds': _Scheme(lambda source: catalogs.tfds_files(_rest(source)),
                  lambda source: catalogs.tfds_rows(_rest(source), source.slice)),
}
