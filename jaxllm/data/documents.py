"""Sources of rows: files, packages, TFDS, Hugging Face; each in an order that never changes.

- `SourceConfig` names a source; `documents` streams its texts, `parts` gives them part by part,
  `find` its files and rows.
- `survey` counts and hashes the files of all sources, and lets none be read twice.
- `SCHEMES` lists the kinds of location; everything else is a path.
"""

import codecs
import functools
import glob
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
from absl import logging

from jaxllm import storage
from jaxllm.config import Config
from jaxllm.data import code, packages, readers
from jaxllm.data.files import File, TextFile, ending
from jaxllm.data.packages import package_available as package_available
from jaxllm.data.readers import Row


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
  """A file, directory or glob; 'package:NAME[/PART]' for a data set of `packages.PACKAGES`, or
  'package:MODULE/GLOB' for files inside an installed package; 'stdlib' for Python's own library;
  `tfds:NAME[/CONFIG][:VERSION][?split=train&data_dir=...]`; or `hf:NAME[:CONFIG]?split=SPLIT`, of
  which NAME may be a directory of `save_to_disk`. Files may lie wherever fsspec reads."""
  format: Literal[
    'text', 'markdown', 'html', 'code', 'lines', 'jsonl', 'json', 'csv', 'tsv', 'parquet',
    'array_record'] | None = None
  """How files are read: as 'text', 'markdown' (text without its emphasis, heading and line break
  marks), 'html' (the text of a page's article; needs the extra clean), 'code' (the programs of a
  source tree that somebody wrote, with their `path` and `language`; `data/code.py` says what is
  skipped), 'lines' (each a text), 'jsonl', 'json', 'csv' (with quotation marks), 'tsv' (where they
  are text), 'parquet' or 'array_record' (of texts, JSON objects or tf.train.Examples); None goes by
  their names, and refuses unknown endings. Files packed as .gz, .bz2, .xz or .zst are unpacked as
  they are read."""
  text_field: str = 'text'
  """The field of a row that holds the text."""
  separator: str | None = None
  """Splits a text file into documents; None makes each file one document, held in memory whole."""
  slice: tuple[float, float] = (0.0, 1.0)
  """The part of each file to use, as fractions of its characters where it is one text, else of its
  rows or texts."""
  encoding: Encoding = 'utf-8'
  """The encoding of the files, by its name in Python, such as 'gb18030', 'cp1252' or 'utf-16'."""
  encoding_errors: Literal['strict', 'replace'] = 'strict'
  """Whether bytes that are invalid in this encoding, few NULs in a file of text, and halves of
  surrogate pairs in a text are an error or become U+FFFD."""
  column_names: tuple[str, ...] = ()
  """Names of the columns of a CSV or TSV; () where its first row names them."""
  weight: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
  """The share of the training records that this source gives, beside the weights of the others. It
  is visited as often as that needs, and goes on where it was if a resumed run has other weights."""
  epochs: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
  """Without weights: how often this source is visited while the others are visited as often as
  their `epochs` say, so that its share goes by its size. With a weight: how often at most; a run
  that would visit it more often is refused."""

  only_text: ClassVar[bool] = True
  """Whether nothing of a row is wanted but its text."""
  plain_text: ClassVar[str] = 'text'
  """The format in which files of text without a separator are read."""

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


def mixed(sources: Sequence[SourceConfig]) -> bool:
  """Return whether sources are mixed by weights or epochs; refuse to mix some of them alone."""
  name = 'weight' if any(source.weight for source in sources) else 'epochs'
  given = [getattr(source, name) for source in sources]
  if any(given) and None in given:
    raise ValueError(f'sources[{given.index(None)}].{name}=None, but other sources have one: give '
                     'one to each, or to none')
  return any(given)


def documents(source: SourceConfig) -> Iterator[str]:
  """Yield the texts of a source, as `located` does."""
  return (text for text, _ in located(source))


def located(source: SourceConfig) -> Iterator[tuple[str, Row]]:
  """Yield the texts of a source with their rows; each call starts anew, always in the same order.

  Raises:
    ValueError: nothing is there, a file is damaged, or a row has no text; the message names the
      file, the place in it, and what is there instead.
  """
  for part in parts(source):
    yield from part()


def parts(source: SourceConfig) -> list[Callable[[], Iterator[tuple[str, Row]]]]:
  """Return functions that yield the texts of `located` part by part; they can be pickled.

  A part is a file; what is no file is one part.
  """
  return [functools.partial(_texts, source, rows) for rows in find(source).parts]


def _texts(
  source: SourceConfig, rows: Callable[[], Iterator[Row]]
) -> Iterator[tuple[str, Row]]:
  for row in rows():
    text = row.fields.pop(source.text_field, None)
    if not isinstance(text, str):
      raise ValueError(_no_text(source, row, text))
    try:
      if not text.isascii():
        text.encode()
    except UnicodeEncodeError as error:
      if source.encoding_errors == 'strict':
        raise ValueError(
          f'{row.where}, field {source.text_field!r}: character {error.start} is half of a '
          f"surrogate pair ({text[error.start]!r}), which is not text; encoding_errors='replace' "
          'reads it as U+FFFD') from None
      text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    yield text, row


def _no_text(source: SourceConfig, row: Row, value: Any) -> str:
  found = 'missing or null' if value is None else type(value).__name__
  others = ', '.join(map(repr, row.fields)) or 'none'
  message = (f'{row.where}: field {source.text_field!r} is {found}, expected text; '
             f'other fields, for text_field: {others}')
  format_ = source.format or readers.ENDINGS.get(ending(pathlib.Path(row.source)))
  if value is None and len(row.fields) == 1 and ';' in others:
    message += '. Columns are cut at commas (.csv) or tabs (.tsv), not at semicolons'
  elif value is None and not source.column_names and format_ in ('csv', 'tsv'):
    message += ('. The first row of the file was taken for the names of its columns; if it is '
                f'data, name them: column_names=({source.text_field!r}, ...) for this source, or '
                'in a new first row')
  return message


class Found(NamedTuple):
  """What a location stands for.

  Attributes:
    files: files, in order.
    parts: functions that read the rows of one file each, or all; they can be pickled.
    shared: whether other locations may be other parts of the same files.
    skipped: how many files of a source tree are not read, by the reason.
  """

  files: list[File]
  parts: Sequence[Callable[[], Iterator[Row]]]
  shared: bool = False
  skipped: Mapping[str, int] = {}

  @property
  def rows(self) -> Iterator[Row]:
    """The rows of all parts; they are read when they are iterated."""
    return (row for part in self.parts for row in part())


Scheme = Callable[[SourceConfig, str], Found]


def find(source: SourceConfig) -> Found:
  """Find what a source reads; refuse one where there is nothing."""
  scheme, _, rest = source.location.partition(':')
  named = scheme in SCHEMES and not rest.startswith('//')  # hf://datasets/... are files.
  return SCHEMES[scheme](source, rest) if named else _path(source)


def _path(source: SourceConfig) -> Found:
  location = storage.listed(source.location, 'config.data.sources: ')
  if isinstance(location, list):
    names = [file.name or storage.file_name(file.location) for file in location]
    found = [File(name, pathlib.Path(name), file)
             for name, file in zip(names, location, strict=True) if '/.' not in f'/{name}']
  elif location.is_file():
    found = [File(location.name, location)]
  elif packages.is_saved(location):
    return SCHEMES['hf'](source, str(location))
  elif location.is_dir():
    found = packages.visible_files(location)
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
  return _files(source, found, source.format)


def _files(source: SourceConfig, files: list[File], format_: str | None) -> Found:
  skipped: Mapping[str, int] = {}
  if format_ == 'code':
    files, skipped = code.choose(files, source.encoding)
    reasons = ', '.join(f'{reason} {count}' for reason, count in sorted(skipped.items())) or 'none'
    if not files:
      raise ValueError(f'no programs in {source.location!r} (a source of data); files that are '
                       f'skipped: {reasons}')
    _say_once(f'{source.location}: {len(files)} programs are read; files that are skipped: '
              f'{reasons}')
  parts = [functools.partial(_rows, source, file, format_) for file in files]
  return Found(files, parts, skipped=skipped)


@functools.cache
def _say_once(sentence: str) -> None:
  logging.warning(sentence)


def _rows(source: SourceConfig, found: File, format_: str | None) -> Iterator[Row]:
  name = format_ or readers.format_of(found.path)
  if name == 'text' and source.separator is None:
    name = source.plain_text
  file = TextFile(
    found.fetched(), source.encoding, source.encoding_errors, source.separator, source.slice,
    source.text_field, source.column_names, (source.text_field,) if source.only_text else (),
    found.name)
  read = functools.partial(readers.FORMATS[name], file)
  # Texts are cut at characters.
  rows = read() if name in readers.TEXTS else (
    row for row, _ in readers.part(read, file.slice))
  return (Row(found.where, *row) for row in rows)


Open = Callable[[str], tuple[list[File], Callable[..., readers.Rows] | str | None]]


def _named(open_: Open, source: SourceConfig, name: str) -> Found:
  files, read = open_(name)
  if not callable(read):
    return _files(source, files, source.format or read)
  return Found(files, [functools.partial(_named_rows, open_, source, name)], shared=True)


def _named_rows(open_: Open, source: SourceConfig, name: str) -> Iterator[Row]:
  read: Any = open_(name)[1]
  title = source.location.partition('?')[0]
  return (Row(title, where, readers.plain(fields)) for where, fields in read(source.slice))


SCHEMES: Mapping[str, Scheme] = {
  'package': functools.partial(_named, packages.find),
  'stdlib': lambda source, name: _named(packages.find, source, 'python-source'),
  'tfds': functools.partial(_named, packages.tfds),
  'hf': functools.partial(_named, packages.hugging_face),
}
"""What a location begins with, which is not a path -> function of the source and the rest of it."""


class SourceCounts(Config):
  """What one source gave."""

  location: str
  """The source's location."""
  files: int
  """Files it read."""
  file_bytes: int
  """Their size."""
  sha256: str
  """SHA-256 over the names and contents of these files."""
  documents: int
  """Documents it held."""
  dropped: int
  """Documents that cleaning dropped, or that were empty."""
  characters: int = 0
  """Characters of all its documents; 0 in older records."""
  skipped: dict[str, int] = {}
  """Files of a source tree that are not read, by the reason."""
  cleaning: dict[str, int] = {}
  """What each step of cleaning did, as `cleaning.cleaner` counts it: the characters that are left
  are `characters` less the sum of all 'STEP.characters'."""


def survey(
  train: Sequence[SourceConfig], validation: Sequence[SourceConfig], hashes: dict[str, Any]
) -> list[SourceCounts]:
  """Count and hash the files of every source; `hashes` are those of `storage.file_digest`.

  Raises:
    ValueError: there are no files, or texts of `validation` are trained on.
  """
  sources = []
  read: dict[Any, list[_Read]] = {}  # By path, and by (SHA-256, whether it is trained on).
  for number, source in enumerate([*train, *validation]):
    digest, size, found = hashlib.sha256(), 0, find(source)
    for file in found.files:
      content = file.digest(hashes)
      _check_overlap(read, content, _Read(file, source, number < len(train), found.shared))
      digest.update(f'{file.name}\0{content}\0'.encode())
      size += file.size
    sources.append(SourceCounts(location=source.location, files=len(found.files), file_bytes=size,
                                sha256=digest.hexdigest(), documents=0, dropped=0,
                                skipped=dict(found.skipped)))
  return sources


class _Read(NamedTuple):
  """A file, the source that reads it, whether for training, and whether maybe only a part."""

  file: File
  source: SourceConfig
  train: bool
  shared: bool

  @property
  def place(self) -> str:
    """Where it lies, whatever links lead there."""
    return os.path.realpath(self.file.where)


def _check_overlap(read: dict[Any, list[_Read]], content: str, new: _Read) -> None:
  """Refuse a file that is read before, and for validation a copy of what is trained on."""
  for old in [*read.get(new.place, ()), *read.get((content, not new.train), ())]:
    starts, stops = zip(old.source.slice, new.source.slice, strict=True)
    common = max(starts) < min(stops) and old.source.text_field == new.source.text_field
    if new.shared:
      common = common and old.source.location == new.source.location
    if common and new.file.size:
      fields = ['config.data.' + ('sources' if who.train else 'validation') for who in (old, new)]
      verb = 'is' if old.place == new.place else 'has the content of'
      names = old.file.where, new.file.where
      other = '' if names[0] == names[1] else f' {verb} {names[1]!r}'
      raise ValueError(
        f'{fields[0]} ({old.source.location!r}) and {fields[1]} ({new.source.location!r}) read the '
        f'same texts: {names[0]!r}{other}; name them once, or give slices that do not overlap')
  read.setdefault(new.place, []).append(new)
  copies = read.setdefault((content, new.train), [])
  if not copies or copies[-1].source != new.source:
    copies.append(new)
