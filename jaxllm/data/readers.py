"""Files to rows, one function per format; all but .json streams.

- `FORMATS` lists the formats, `ENDINGS` says which file names mean which, `format_of` looks a file
  up there.
- `part` cuts a fraction out of any stream.
"""

import csv
import functools
import io
import itertools
import json
import logging
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm import mistakes
from jaxllm.data import code, files
from jaxllm.data.files import TextFile

Fields = dict[str, Any]
Rows = Iterator[tuple[str, Fields]]
"""(place, such as 'line 3'; fields) of each row."""

# Text between runs of * or _ that open before and close after a word.
_EMPHASIS = re.compile(r'(?<![\w\\*_])[*_]+(?![\s*_])(.{1,1000}?)(?<!\s)[*_]+(?!\w)', re.DOTALL)
# How many times longer than the file its content can be, at most.
_MOST_PACKED = {'UNCOMPRESSED': 1, 'SNAPPY': 22, 'LZ4': 256, 'GZIP': 1040}
_CHARSET = re.compile(
  rb'(?i)<meta[^>]+charset\s*=[\s"\']*((?:iso-8859|windows|koi8|euc|shift|big5|gb)[\w-]*)')
# Its tree takes a hundred times the memory.
_LONGEST_PAGE = 1 << 24
_JSON_SPACE = re.compile(r'[ \t\n\r]*')


class Row(NamedTuple):
  """The fields of one row, and where it stands: a file or dataset, 'line 3' in it; its source."""

  source: str
  place: str
  fields: Fields
  number: int = 0

  @property
  def where(self) -> str:
    """Source and place, for messages."""
    return f'{self.source}, {self.place}'


def part(
  items: Callable[[], Iterator[Any]], fractions: tuple[float, float],
  size: Callable[[Any], int] = lambda _: 1,
) -> Iterator[tuple[Any, slice]]:
  """Yield (item, slice of it) for what lies between two fractions of a stream's total size.

  `items` starts the stream; it is called twice unless the whole of it is wanted.
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


def plain(value: Any) -> Any:
  """Turn arrays and NumPy's numbers into those of Python, tuples into lists, bytes into text."""
  if isinstance(value, bytes):
    try:
      return value.decode('utf-8')
    except UnicodeDecodeError:  # A picture, for example.
      return value
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  return plain(value.tolist()) if hasattr(value, 'tolist') else value


def read_text(file: TextFile) -> Rows:
  r"""Yield ('text N', text) of a file, cut at `file.separator`; empty texts between are dropped.

  A byte order mark is dropped, and CRLF and CR become \n; all else stays.
  """
  if file.separator is None:
    pieces = part(lambda: _translated(file), file.slice, len)
    texts: Iterable[str] = [files.whole(file, (block[span] for block, span in pieces))]
  else:
    split = functools.partial(files.split, file, separator=file.separator)
    texts = (text for text, _ in part(
      lambda: filter(None, split(_translated(file))), file.slice))
  return ((f'text {i}', {file.text_field: text}) for i, text in enumerate(texts, 1))


def _translated(file: TextFile) -> Iterator[str]:
  newlines = io.IncrementalNewlineDecoder(None, translate=True)
  for block in files.blocks(file):
    yield newlines.decode(block)
  yield newlines.decode('', final=True)


def read_markdown(file: TextFile) -> Rows:
  """Like `read_text`, without Markdown's marks for headings, emphasis and line breaks."""
  return ((place, {name: strip_markdown(text) for name, text in fields.items()})
          for place, fields in read_text(file))


def read_lines(file: TextFile) -> Rows:
  """Yield ('line N', text) of each line that is not blank, stripped."""
  return ((f'line {i}', {file.text_field: line.strip()})
          for i, line in enumerate(files.lines(file), 1) if line.strip())


def read_code(file: TextFile) -> Rows:
  """Yield the text of a program, its path in the source tree, and its language."""
  language = code.LANGUAGES.get(files.ending(file.path), '')
  return ((place, {'path': file.name, 'language': language, **fields})
          for place, fields in read_text(file._replace(separator=None)))


def read_html(file: TextFile) -> Rows:
  """Yield the text of a page's article, without menus and the like, and its title."""
  import trafilatura

  page = files.whole(file, _translated(file._replace(encoding=_charset(file))))
  if len(page) > _LONGEST_PAGE:
    raise ValueError(f'{file.path}, text 1: a page of {len(page):,} characters, more than '
                     f'{_LONGEST_PAGE:,}; split it, or leave it out')
  logging.getLogger('trafilatura').setLevel(logging.CRITICAL)  # Pages without text are counted.
  found: Any = trafilatura.bare_extraction(page, include_comments=False, with_metadata=True)
  text, title = (found.text or '', found.title or '') if found else ('', '')
  start, stop = (int(len(text) * fraction) for fraction in file.slice)
  yield 'text 1', {'title': title, file.text_field: text[start:stop]}


def _charset(file: TextFile) -> str:
  """Return the encoding that a page names, where its source names none but UTF-8."""
  with files.open_bytes(file.path) as stream:
    named = _CHARSET.search(stream.read(1024)) if file.encoding == 'utf-8' else None
  name = named[1].decode().lower() if named else file.encoding
  name = {'iso-8859-1': 'cp1252', 'gb2312': 'gb18030'}.get(name, name)  # The standard of HTML.
  try:
    b' '.decode(name)
  except LookupError:
    return file.encoding
  return name


def strip_markdown(text: str) -> str:
  """Return the plain text of simple Markdown: no code, lists or links, as in books and plays."""
  text = re.sub(r'(?m)^#{1,6} +', '', text)
  text = re.sub(r'(?m)(?<![ \t])[ \t]+$', '', text)
  text = '\n\n'.join(_EMPHASIS.sub(r'\1', paragraph) for paragraph in text.split('\n\n'))
  return re.sub(r'\\([!-/:-@\[-`{-~])', r'\1', text).lstrip('\n')


def read_jsonl(file: TextFile) -> Rows:
  """Yield ('line N', object) of a file with one JSON object a line; blank lines are skipped."""
  for number, line in enumerate(files.lines(file), 1):
    if not line.strip():
      continue
    where = f'{file.path}, line {number}'
    try:
      fields = _JSON.decode(line.removeprefix('\ufeff'))
    except (ValueError, RecursionError) as error:
      hint = "; for one JSON array, set format='json'" if line[0] == '[' else ''
      raise ValueError(f'{where}: not JSON: {error}{hint}') from None
    yield f'line {number}', _object(fields, where)


def read_json(file: TextFile) -> Rows:
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


_JSON = json.JSONDecoder(object_pairs_hook=mistakes.unique)


def _object(value: Any, where: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise ValueError(f'{where}: expected a JSON object, got {type(value).__name__}')
  return value


def read_csv(file: TextFile) -> Rows:
  r"""Yield ('line N', fields) of a file with quoted values, cut at tabs where its name says .tsv.

  CRLF and CR become \n, as in texts.
  """
  return _table(file, _csv_rows(file))


def _csv_rows(file: TextFile) -> Iterator[tuple[int, list[str]]]:
  csv.field_size_limit(files.MAX_TEXT)  # The default refuses texts over 128 kB.
  delimiter = '\t' if files.ending(file.path) == '.tsv' else ','
  held = 0

  def lines() -> Iterator[str]:
    nonlocal held
    for number, line in enumerate(files.split(file, _translated(file), '\n'), 1):
      held += len(line) + 1
      files.check_size(file, held, f'line {number}')
      yield f'{line}\n'

  reader = csv.reader(lines(), strict=True, delimiter=delimiter)
  try:
    for values in reader:
      held = 0
      yield reader.line_num, values
  except csv.Error as error:
    raise ValueError(f'{file.path}, line {reader.line_num}: not CSV: {error}') from None


def read_tsv(file: TextFile) -> Rows:
  r"""Yield ('line N', fields) of a file that is cut at \n and tabs; quotation marks are text."""
  rows = enumerate((line.removesuffix('\r') for line in files.lines(file)), 1)
  return _table(file, ((i, line.split('\t') if line else []) for i, line in rows))


def _table(file: TextFile, rows: Iterator[tuple[int, list[str]]]) -> Rows:
  names = list(file.column_names)
  named_by = 'column_names has' if names else 'the first row names'
  for number, values in rows:
    if not values:
      continue
    where = f'{file.path}, line {number}'
    if not names:
      names = values
      if '\r' in ''.join(names):
        raise ValueError(f'{where}: a name of a column holds CR; end the lines with line feeds')
      if (twice := mistakes.twice(names)) is not None:
        raise ValueError(f'{where}: the first row names two columns {twice!r}; rename one, or, '
                         'where that row is data, set column_names for this source')
      continue
    if len(values) != len(names):
      raise ValueError(f'{where}: {len(values)} columns, but {named_by} {len(names)}')
    yield f'line {number}', dict(zip(names, values, strict=True))


def read_parquet(file: TextFile) -> Rows:
  """Yield ('row N', fields) of a Parquet file."""
  import pyarrow
  from pyarrow import parquet

  files.check_unpacked(file.path)
  number, size = itertools.count(1), file.path.stat().st_size
  left = most = max(files.MAX_UNPACKED, 1000 * size)
  try:
    with parquet.ParquetFile(file.path) as table:
      columns = [*file.columns] if {*file.columns} <= {*table.schema_arrow.names} else []
      for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        if group.total_byte_size > most:
          raise ValueError(f'it unpacks to {group.total_byte_size:,} bytes; make groups smaller')
        # Damaged metadata of a column ends the process when they are looked at, but not here.
        next(table.iter_batches(1, [i], columns or None), None)
        rows = _rows_at_once([group.column(j) for j in range(group.num_columns) if not columns or (
          table.schema.column(j).path.partition('.')[0] in columns)], group.num_rows)
        for batch in table.iter_batches(rows, [i], columns or None):
          # A few values of a dictionary may be those of any number of rows.
          if (left := left - batch.nbytes) < 0:
            raise ValueError(f'its {size:,} bytes unpack to more than {most:,}')
          step = 1 if batch.nbytes > 2**26 else rows
          for start in range(0, batch.num_rows, step):
            for fields in batch.slice(start, step).to_pylist():
              yield f'row {next(number)}', fields
  except (pyarrow.ArrowException, ValueError, OSError) as error:
    raise ValueError(f'{file.path}, after row {next(number) - 1}: not readable as Parquet: '
                     f'{error}') from None


def read_array_record(file: TextFile) -> Rows:
  """Yield ('entry N', fields) of an ArrayRecord of texts, JSON objects or tf.train.Examples.

  Which of these they are is said by the first.
  """
  from array_record.python import array_record_module

  files.check_unpacked(file.path)
  _check_chunks(file.path)
  # Reading ahead would hold many chunks at once.
  reader = array_record_module.ArrayRecordReader(
    str(file.path), 'readahead_buffer_size:0,max_parallelism:0')
  number, kind = 0, ''
  try:
    # The reader of a damaged file has no records, but says why when it is asked for one.
    for number in range(1, (reader.num_records() if reader.ok() else 1) + 1):
      entry = reader.read()
      kind = kind or next(kind for kind in _ENTRIES if _entry(file, kind, entry))
      if (fields := _entry(file, kind, entry)) is None:
        raise ValueError(f'is not what the first entry is: {kind}')
      yield f'entry {number}', fields
  except (ValueError, RuntimeError, IndexError) as error:
    raise ValueError(f'{file.path}, entry {number}: {error}') from None


def _check_chunks(path: pathlib.Path) -> None:
  """Refuse an ArrayRecord with a small chunk that unpacks to more than memory should hold.

  The layout is that of Riegeli: blocks of 64 KiB with 24 bytes in front, chunks with 40.
  """
  block, head = 2**16, 24
  position, size = 0, path.stat().st_size
  with path.open('rb') as file:
    while position < size:
      file.seek(position)
      start = file.read(40 + head)
      if (cut := -position % block) < 40:
        start = start[:cut] + start[cut + head:]
      data, _, kind, unpacked = struct.unpack('<8xQQQQ', start[:40].ljust(40, b'\0'))
      if kind & 255 not in b'smprt':  # Damage, of which the reader tells.
        return
      if unpacked > max(files.MAX_UNPACKED, 100 * data):
        raise ValueError(f'{path}, byte {position}: {data:,} bytes unpack to {unpacked:,} at once; '
                         'write it with fewer entries in a group')
      end = position + (kind >> 8)  # A chunk takes a byte for each entry at least.
      length = 40 + data
      length += (length + (position - head - 1) % block) // (block - head) * head
      position = max(position + length, end + max(0, -end % block - (block - head - 1)))


_ENTRIES = ('a tf.train.Example', 'a JSON object', 'a text')


def _entry(file: TextFile, kind: str, entry: bytes) -> Fields | None:
  """Return the fields of an entry of an ArrayRecord; None: it is not of this kind."""
  from google.protobuf import message
  from tensorflow_datasets.proto import tf_example_generated_pb2
  try:
    if kind == 'a tf.train.Example':
      features = tf_example_generated_pb2.Example.FromString(entry).features.feature
      values = {name: [*getattr(one, one.WhichOneof('kind') or 'int64_list').value]
                for name, one in features.items()}
      return {name: plain(all_[0] if len(all_) == 1 else all_) for name, all_ in values.items()}
    if kind == 'a JSON object':
      return _object(_JSON.decode(entry.decode()), kind)
  except (ValueError, RecursionError, message.DecodeError):
    return None
  return {file.text_field: entry.decode(file.encoding, file.errors)}


def _rows_at_once(chunks: Sequence[Any], num_rows: int) -> int:
  """Return how many rows of columns may be unpacked together, so that few bytes stay few."""
  size = sum(chunk.total_uncompressed_size for chunk in chunks)
  # All rows may be the longest value of a dictionary, which is as long as its page at most.
  longest = sum(
    min(chunk.total_uncompressed_size, _MOST_PACKED.get(chunk.compression, 2**15)
        * (chunk.data_page_offset - chunk.dictionary_page_offset))
    for chunk in chunks if chunk.has_dictionary_page)
  return min(max(min(2**28 * num_rows // max(size, 1), 2**28 // max(longest, 1)), 1), 1024)


def format_of(path: pathlib.Path) -> str:
  """Return the format that a file's name says; refuse one that says none that is known."""
  ending = files.ending(path)
  if ending not in ENDINGS:
    known = ' '.join(sorted(set(ENDINGS.values()) - {'text'}))
    hint = '; what save_to_disk wrote is hf:DIR?split=SPLIT' if ending == '.arrow' else ''
    raise ValueError(
      f'{path}: files ending in {ending} are not read as they are; known are {known} and text '
      f'(.txt and the like, program sources), also as {" ".join(files.COMPRESSIONS)}. Convert or '
      "unpack it, name the wanted files (DIR/**/*.txt), or, if it is plain text, set format='text' "
      f'for this source{hint}')
  return ENDINGS[ending]


TEXTS = ('text', 'markdown', 'html', 'code')
"""Formats that cut a slice of the text; the others are cut between rows."""
FORMATS: dict[str, Callable[[TextFile], Rows]] = {
  'text': read_text, 'markdown': read_markdown, 'lines': read_lines, 'jsonl': read_jsonl,
  'json': read_json, 'csv': read_csv, 'tsv': read_tsv, 'parquet': read_parquet,
  'array_record': read_array_record, 'html': read_html, 'code': read_code,
}

ENDINGS = {
  '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'json', '.csv': 'csv', '.tsv': 'tsv',
  '.parquet': 'parquet', '.array_record': 'array_record', '.arrayrecord': 'array_record',
  **dict.fromkeys((
    '', *('.txt .text .md .markdown .rst .adoc .org .tex .bib .log .srt .vtt .po .htm .html .xhtml '
          '.xml .yaml .yml .toml .ini .cfg .conf').split(), *code.LANGUAGES),
    'text'),
}
