"""Files to texts or rows, one function per format; all but .json streams.

- `ROWS` and `TEXTS` list the formats, `ENDINGS` says which file names mean which, `format_of` looks
  a file up there.
- `part` cuts a fraction out of any stream.
"""

import csv
import io
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.data import files
from jaxllm.data.files import TextFile

Rows = Iterator[tuple[str, dict[str, Any]]]

# Text between runs of * or _ that open before and close after a word.
_EMPHASIS = re.compile(r'(?<![\w\\*_])[*_]+(?![\s*_])(.{1,1000}?)(?<!\s)[*_]+(?!\w)', re.DOTALL)
_JSON_SPACE = re.compile(r'[ \t\n\r]*')


class File(NamedTuple):
  """A file that a source reads, by a name that does not change when its directory moves."""

  name: str
  path: pathlib.Path


class Row(NamedTuple):
  """The fields of one row, and where it stands: a file or dataset, and 'line 3' in it."""

  source: str
  place: str
  fields: dict[str, Any]

  @property
  def where(self) -> str:
    """Source and place, for messages."""
    return f'{self.source}, {self.place}'


def part(
  items: Callable[[], Iterator[Any]], fractions: tuple[float, float], size: Callable[[Any], int]
) -> Iterator[tuple[Any, slice]]:
  """Yield (item, slice of it) for what lies between two fractions of a stream's total size.

  Args:
    items: starts the stream; called twice unless the whole of it is wanted.
    fractions: (0.0, 1.0) is all.
    size: an item's size.
  """
  if fractions == (0.0, 1.0):
    yield from ((item, slice(None)) for item in items())
    return
  total = sum(size(item) for item in items())
  first, last = (int(total * fraction) for fraction in fractions)
  for item in items():
    start, stop = max(first, 0), min(last, size(item))
    if last <= 0:
      return
    if start < stop:
      yield item, slice(start, stop)
    first, last = first - size(item), last - size(item)


def read_text(
  file: TextFile, separator: str | None, fractions: tuple[float, float]
) -> Iterator[str]:
  r"""Yield the texts of a file.

  A byte order mark is dropped, and CRLF and CR become \n; all else stays.

  Args:
    file: the file.
    separator: splits the file into texts; the separator itself and empty texts are dropped.
    fractions: which part of the characters to take.

  Raises:
    ValueError: the file is no text; see `files.blocks`.
  """
  pieces = part(lambda: _translated(file), fractions, len)
  blocks = (block[span] for block, span in pieces)
  if separator is None:
    yield files.whole(file, blocks)
  else:
    yield from filter(None, files.split(file, blocks, separator))


def _translated(file: TextFile) -> Iterator[str]:
  newlines = io.IncrementalNewlineDecoder(None, translate=True)
  for block in files.blocks(file):
    yield newlines.decode(block)
  yield newlines.decode('', final=True)


def read_markdown(
  file: TextFile, separator: str | None, fractions: tuple[float, float]
) -> Iterator[str]:
  """Like `read_text`, without Markdown's marks for headings, emphasis and line breaks."""
  return map(strip_markdown, read_text(file, separator, fractions))


def strip_markdown(text: str) -> str:
  """Return the plain text of simple Markdown: no code, lists or links, as in books and plays."""
  text = re.sub(r'(?m)^#{1,6} +', '', text)
  text = re.sub(r'(?m)[ \t]+$', '', text)
  text = '\n\n'.join(_EMPHASIS.sub(r'\1', paragraph) for paragraph in text.split('\n\n'))
  return re.sub(r'\\([!-/:-@\[-`{-~])', r'\1', text).lstrip('\n')


def read_jsonl(file: TextFile, column_names: Sequence[str] = ()) -> Rows:
  """Yield ('line N', object) of a file with one JSON object a line; blank lines are skipped."""
  for number, line in enumerate(files.lines(file), 1):
    if not line.strip():
      continue
    where = f'{file.path}, line {number}'
    try:
      fields = _JSON.decode(line)
    except (ValueError, RecursionError) as error:
      hint = "; for one JSON array, set format='json'" if line[0] == '[' else ''
      raise ValueError(f'{where}: not JSON: {error}{hint}') from None
    yield f'line {number}', _object(fields, where)


def read_json(file: TextFile, column_names: Sequence[str] = ()) -> Rows:
  """Yield ('item N', object) of a file with an array of objects, or with objects in a row."""
  text = files.whole(file, files.blocks(file))

  def skip(position: int) -> int:
    return _JSON_SPACE.match(text, position).end()  # type: ignore[union-attr]

  position = skip(0)
  end = ']' if text[position:position + 1] == '[' else ''
  position = skip(position + len(end))
  for number in itertools.count(1):
    if text[position:position + 1] == end:
      break
    where = f'{file.path}, item {number}'
    try:
      fields, position = _JSON.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{where}: not JSON: {error}') from None
    yield f'item {number}', _object(fields, where)
    position = skip(position)
    if end and text[position:position + 1] == ',':
      position = skip(position + 1)
    elif text[position:position + 1] != end and end:
      raise ValueError(f"{where}: not JSON: ',' or ']' expected after it")
  if skip(position + len(end)) != len(text):
    raise ValueError(f'{file.path}: not JSON: something follows the array')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'the key {twice!r} stands twice in an object')
  return fields


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _object(value: Any, where: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise ValueError(f'{where}: expected a JSON object, got {type(value).__name__}')
  return value


def read_csv(file: TextFile, column_names: Sequence[str] = ()) -> Rows:
  r"""Yield ('line N', fields) of a file with quoted values, cut at tabs where its name says .tsv.

  CRLF and CR become \n, as in texts.

  Args:
    file: the file.
    column_names: names of the columns; () where the first row names them.
  """
  return _table(file, _csv_rows(file), column_names)


def _csv_rows(file: TextFile) -> Iterator[tuple[int, list[str]]]:
  csv.field_size_limit(files.MAX_UNPACKED)  # The default refuses texts over 128 kB.
  delimiter = '\t' if files.ending(file.path) == '.tsv' else ','
  lines = (f'{line}\n' for line in files.split(file, _translated(file), '\n'))
  reader = csv.reader(lines, strict=True, delimiter=delimiter)
  try:
    for values in reader:
      yield reader.line_num, values
  except csv.Error as error:
    raise ValueError(f'{file.path}, line {reader.line_num}: not CSV: {error}') from None


def read_tsv(file: TextFile, column_names: Sequence[str] = ()) -> Rows:
  r"""Yield ('line N', fields) of a file that is cut at \n and tabs; quotation marks are text."""
  rows = enumerate((line.removesuffix('\r') for line in files.lines(file)), 1)
  return _table(file, ((i, line.split('\t') if line else []) for i, line in rows), column_names)


def _table(
  file: TextFile, rows: Iterator[tuple[int, list[str]]], column_names: Sequence[str]
) -> Rows:
  names = list(column_names)
  named_by = 'column_names has' if names else 'the first row names'
  for number, values in rows:
    if not values:
      continue
    where = f'{file.path}, line {number}'
    if not names:
      names = values
      if '\r' in ''.join(names):
        raise ValueError(f'{where}: a name of a column holds CR; end the lines with line feeds')
      if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f'{where}: the first row names two columns {twice[0]!r}; rename one, or, '
                         'where that row is data, set column_names for this source')
      continue
    if len(values) != len(names):
      raise ValueError(f'{where}: {len(values)} columns, but {named_by} {len(names)}')
    yield f'line {number}', dict(zip(names, values, strict=True))


def read_parquet(file: TextFile, columns: Sequence[str] = ()) -> Rows:
  """Yield ('row N', fields) of a Parquet file."""
  import pyarrow
  from pyarrow import parquet

  number = itertools.count(1)
  try:
    with parquet.ParquetFile(file.path) as table:
      for batch in table.iter_batches(batch_size=1024):
        for fields in batch.to_pylist():
          yield f'row {next(number)}', fields
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise ValueError(f'{file.path}, after row {next(number) - 1}: not readable as Parquet: '
                     f'{error}') from None


def format_of(path: pathlib.Path) -> str:
  """Return the format that a file's name says.

  Raises:
    ValueError: it says none that is known.
  """
  ending = files.ending(path)
  if ending not in ENDINGS:
    known = ' '.join(sorted(set(ENDINGS.values()) - {'text'}))
    raise ValueError(
      f'{path}: files ending in {ending} are not read as they are; known are {known} and text '
      f'(.txt and the like, program sources), also as {" ".join(files.COMPRESSIONS)}. Convert or '
      "unpack it, name the wanted files (DIR/**/*.txt), or, if it is plain text, set format='text' "
      'for this source')
  return ENDINGS[ending]


TEXTS = {'text': read_text, 'markdown': read_markdown}

ROWS: dict[str, Callable[[TextFile, Sequence[str]], Rows]] = {
  'jsonl': read_jsonl, 'json': read_json, 'csv': read_csv, 'tsv': read_tsv,
  'parquet': read_parquet,
}

ENDINGS = {
  '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'json', '.csv': 'csv', '.tsv': 'tsv',
  '.parquet': 'parquet',
  **dict.fromkeys((
    '', *('.txt .text .md .markdown .rst .adoc .org .tex .bib .log .srt .vtt .po .htm .html .xhtml '
          '.xml .css .yaml .yml .toml .ini .cfg .conf .py .pyi .c .h .cc .hh .cpp .hpp .cu .cs .go '
          '.rs .zig .java .kt .scala .clj .swift .m .js .mjs .jsx .ts .tsx .vue .rb .php .pl .lua '
          '.sh .bash .ps1 .bat .r .jl .hs .ml .ex .erl .lisp .el .scm .f90 .sql .proto').split()),
    'text'),
}
