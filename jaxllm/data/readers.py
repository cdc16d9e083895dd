"""Files to texts or rows, one function per format; everything streams.

- `ROWS` and `TEXTS` list the formats, `SUFFIXES` says which file names mean which.
- `part` cuts a fraction out of any stream.
"""

import codecs
import csv
import io
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_BLOCK_BYTES = 1 << 20

# Text between runs of * or _ that open before and close after a word.
_EMPHASIS = re.compile(r'(?<![\w\\*_])[*_]+(?![\s*_])(.{1,1000}?)(?<!\s)[*_]+(?!\w)', re.DOTALL)


class File(NamedTuple):
  """A file that a source reads, by a name that does not change when its directory moves."""

  name: str
  path: pathlib.Path


class Row(NamedTuple):
  """The fields of one row, and where it stands: a file or dataset, and 'line 3' in it."""

  source: str
  place: str
  fields: dict[str, Any]


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
  path: pathlib.Path, errors: str, separator: str | None, fractions: tuple[float, float]
) -> Iterator[str]:
  r"""Yield the texts of a UTF-8 file.

  A byte order mark is dropped, and CRLF and CR become \n; all else stays, NUL included.

  Args:
    path: the file.
    errors: 'strict' or 'replace', for bytes that are not UTF-8.
    separator: splits the file into texts; the separator itself and empty texts are dropped.
    fractions: which part of the characters to take.

  Raises:
    ValueError: a byte is not UTF-8; the message holds the file and the offset.
  """
  pieces = part(lambda: _decoded_blocks(path, errors), fractions, len)
  blocks = (block[span] for block, span in pieces)
  if separator is None:
    yield ''.join(blocks)
    return
  rest = ''
  for block in blocks:
    *complete, rest = (rest + block).split(separator)
    yield from filter(None, complete)
  if rest:
    yield rest


def read_markdown(
  path: pathlib.Path, errors: str, separator: str | None, fractions: tuple[float, float]
) -> Iterator[str]:
  """Like `read_text`, without Markdown's marks for headings, emphasis and line breaks."""
  return map(strip_markdown, read_text(path, errors, separator, fractions))


def strip_markdown(text: str) -> str:
  """Return the plain text of simple Markdown: no code, lists or links, as in books and plays."""
  text = re.sub(r'(?m)^#{1,6} +', '', text)
  text = re.sub(r'(?m)[ \t]+$', '', text)
  text = '\n\n'.join(_EMPHASIS.sub(r'\1', paragraph) for paragraph in text.split('\n\n'))
  return re.sub(r'\\([!-/:-@\[-`{-~])', r'\1', text).lstrip('\n')


def _decoded_blocks(path: pathlib.Path, errors: str) -> Iterator[str]:
  newlines = io.IncrementalNewlineDecoder(None, translate=True)
  offset, pending = 0, b''
  with path.open('rb') as file:
    while True:
      block = file.read(_BLOCK_BYTES)
      data = pending + block
      text, used = _decode(data, errors, not block, path, offset)
      if offset == 0:
        text = text.removeprefix('\ufeff')
      yield newlines.decode(text, final=not block)
      if not block:
        return
      offset, pending = offset + used, data[used:]


def _decoded_lines(path: pathlib.Path, errors: str) -> Iterator[str]:
  offset = 0
  with path.open('rb') as file:
    for line in file:
      text, _ = _decode(line, errors, True, path, offset)
      yield text.removeprefix('\ufeff') if offset == 0 else text
      offset += len(line)


def _decode(
  data: bytes, errors: str, final: bool, path: pathlib.Path, offset: int
) -> tuple[str, int]:
  try:
    return codecs.utf_8_decode(data, errors, final)
  except UnicodeDecodeError as error:
    where = offset + error.start
    raise ValueError(
      f'{path}: byte {where} (0x{data[error.start]:02x}) is not UTF-8; convert the file, or set '
      "encoding_errors='replace' for this source") from None


def read_jsonl(path: pathlib.Path, errors: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield ('line N', object) of a file with one JSON object a line; blank lines are skipped."""
  for number, line in enumerate(_decoded_lines(path, errors), 1):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}, line {number}: not JSON: {error}') from None
    if not isinstance(fields, dict):
      raise ValueError(f'{path}, line {number}: expected a JSON object, got '
                       f'{type(fields).__name__}')
    yield f'line {number}', fields


def read_csv(path: pathlib.Path, errors: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield ('line N', fields) of a file whose first row names the columns; .tsv is cut at tabs."""
  csv.field_size_limit(2**31 - 1)  # The default refuses texts over 128 kB.
  delimiter = '\t' if path.suffix.lower() == '.tsv' else ','
  reader = csv.reader(_decoded_lines(path, errors), strict=True, delimiter=delimiter)
  names: list[str] | None = None
  try:
    for values in reader:
      if not values:
        continue
      if names is None:
        names = values
        continue
      if len(values) != len(names):
        raise ValueError(f'{path}, line {reader.line_num}: {len(values)} columns, but the first '
                         f'row names {len(names)}')
      yield f'line {reader.line_num}', dict(zip(names, values, strict=True))
  except csv.Error as error:
    raise ValueError(f'{path}, line {reader.line_num}: not CSV: {error}') from None


def read_parquet(path: pathlib.Path, errors: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield ('row N', fields) of a Parquet file."""
  import pyarrow
  from pyarrow import parquet

  number = itertools.count(1)
  try:
    with parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=1024):
        for fields in batch.to_pylist():
          yield f'row {next(number)}', fields
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise ValueError(f'{path}, after row {next(number) - 1}: not readable as Parquet: '
                     f'{error}') from None


TEXTS = {'text': read_text, 'markdown': read_markdown}

ROWS = {'jsonl': read_jsonl, 'csv': read_csv, 'parquet': read_parquet}

SUFFIXES = {
  '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.csv': 'csv', '.tsv': 'csv', '.parquet': 'parquet',
}
