"""Sources of text: files, packages, TFDS; each yields documents, one after the other, in order.

- `SourceConfig` names a source; `documents` streams it, `rows` also gives rows without a text.
- `files` lists what a source reads, so that a change of it can be noticed.
- `SCHEMES` lists the kinds of location; everything else is a path.
"""

import codecs
import dataclasses
import glob
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from jaxllm.config import Config
from jaxllm.data import catalogs, readers
from jaxllm.data.catalogs import package_available as package_available
from jaxllm.data.files import TextFile, ending
from jaxllm.data.readers import File, Row


def _known_encoding(name: str) -> str:
  try:
    codecs.lookup(name).incrementaldecoder().decode(b'').encode()  # type: ignore[misc]
  except (LookupError, TypeError, AttributeError):
    raise ValueError("expected the name of a text encoding, such as 'utf-8', 'gb18030' or "
                     "'cp1252'") from None
  return name


Encoding = Annotated[str, pydantic.AfterValidator(_known_encoding)]
"""The encoding of files, by its name in Python."""


class SourceConfig(Config):
  """One source of documents."""

  location: str
  """A file, directory or glob, 'package:NAME' for texts inside an installed package, 'stdlib' for
  Python's own library, or 'tfds:NAME[/CONFIG][:VERSION][?split=train&data_dir=...]'."""
  format: Literal['text', 'markdown', 'jsonl', 'json', 'csv', 'tsv', 'parquet'] | None = None
  """How files are read; None goes by their names, and refuses unknown endings. 'markdown' is text
  without its emphasis, heading and line break marks; 'csv' has quotation marks, in 'tsv' they are
  text. Files packed as .gz, .bz2, .xz or .zst are unpacked as they are read."""
  text_field: str = 'text'
  """The field of a row that holds the text."""
  separator: str | None = None
  """Splits a text file into documents; None makes each file one document, held in memory whole."""
  slice: tuple[float, float] = (0.0, 1.0)
  """The part of each file to use, as fractions of its characters (text) or of its rows."""
  encoding: Encoding = 'utf-8'
  """The encoding of the files, by its name in Python, such as 'gb18030', 'cp1252' or 'utf-16'."""
  encoding_errors: Literal['strict', 'replace'] = 'strict'
  """Whether bytes that are invalid in this encoding are an error or become U+FFFD."""
  column_names: tuple[str, ...] = ()
  """Names of the columns of a CSV or TSV; () where its first row names them."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'SourceConfig':
    start, stop = self.slice
    if not 0 <= start < stop <= 1:
      raise ValueError(f'slice={self.slice}: expected 0 <= start < stop <= 1')
    if self.separator == '':
      raise ValueError("separator='': expected None or some text")
    if len(set(self.column_names)) < len(self.column_names):
      raise ValueError(f'column_names={self.column_names}: a name stands twice')
    return self


def _as_sources(value: Any) -> Any:
  """Read a path, or several with commas between them, as sources."""
  if isinstance(value, str):
    exists = os.path.exists(os.path.expanduser(value))
    value = [value] if exists else [part.strip() for part in value.split(',') if part.strip()]
  elif isinstance(value, Mapping | SourceConfig):
    value = [value]
  if not isinstance(value, list | tuple):
    raise ValueError("expected paths with commas between them, as in 'texts/*.txt,more', or a list "
                     'of sources')
  return tuple({'location': item} if isinstance(item, str) else item for item in value)


Sources = Annotated[tuple[SourceConfig, ...], pydantic.BeforeValidator(_as_sources)]
"""Sources, each a `SourceConfig` or its location; also one text with commas between locations."""


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
      raise ValueError(_no_text(source, row, text))
    if not text.isascii():
      _check_unicode(text, f'{row.source}, {row.place}, field {source.text_field!r}')
    yield Document(text, row.source, index, row.fields)


def _no_text(source: SourceConfig, row: Row, value: Any) -> str:
  found = 'missing or null' if value is None else type(value).__name__
  others = ', '.join(map(repr, row.fields)) or 'none'
  message = (f'{row.source}, {row.place}: field {source.text_field!r} is {found}, expected text; '
             f'other fields, for text_field: {others}')
  format_ = source.format or readers.ENDINGS.get(ending(pathlib.Path(row.source)))
  if value is None and len(row.fields) == 1 and ';' in others:
    message += '. Columns are cut at commas (.csv) or tabs (.tsv), not at semicolons'
  elif value is None and not source.column_names and format_ in ('csv', 'tsv'):
    message += ('. The first row of the file was taken for the names of its columns; if it is '
                f'data, name them: column_names=({source.text_field!r}, ...) for this source, or '
                'in a new first row')
  return message


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
  location = pathlib.Path(source.location).expanduser()
  if location.is_file():
    found = [File(location.name, location)]
  elif location.is_dir():
    found = catalogs.visible_files(location)
  elif glob.has_magic(source.location):
    # Brackets in the name of a directory that exists are part of it.
    root = next(parent for parent in location.parents if parent.is_dir())
    pattern = os.path.join(glob.escape(str(root)), location.relative_to(root))
    paths = map(pathlib.Path, glob.glob(pattern, recursive=True))
    found = sorted(File(p.relative_to(root).as_posix(), p) for p in paths if p.is_file())
  else:
    raise ValueError(f'no such file: {source.location!r} (a source of data)')
  if not found:
    raise ValueError(f'no files in {source.location!r} (a source of data)')
  for file in found if source.format is None else ():
    readers.format_of(file.path)
  return found


def _path_rows(source: SourceConfig) -> Iterator[Row]:
  for file in _path_files(source):
    yield from _file_rows(source, file.path, source.format)


def _package_rows(source: SourceConfig) -> Iterator[Row]:
  found, known_format = catalogs.package_files(_rest(source))
  for file in found:
    yield from _file_rows(source, file.path, source.format or known_format)


def _file_rows(source: SourceConfig, path: pathlib.Path, format_: str | None) -> Iterator[Row]:
  format_ = format_ or readers.format_of(path)
  file = TextFile(path, source.encoding, source.encoding_errors)
  if format_ in readers.TEXTS:
    texts = readers.TEXTS[format_](file, source.separator, source.slice)
    items = ((f'text {i}', {source.text_field: text}) for i, text in enumerate(texts, 1))
  else:
    read = readers.ROWS[format_]
    pieces = readers.part(lambda: read(file, source.column_names), source.slice, _one)
    items = (item for item, _ in pieces)
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
