"""Hostile files give their exact texts, or one refusal that names the file and the place in it."""

import bz2
import gzip
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zlib

import pyarrow
import pytest
from pyarrow import parquet

from jaxllm.data.documents import SourceConfig, documents


def _parquet(values, type_):
  file = io.BytesIO()
  parquet.write_table(pyarrow.table({'text': pyarrow.array(values, type_)}), file)
  return file.getvalue()


def _tar():
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w') as archive:
    archive.addfile(tarfile.TarInfo('a.txt'))
  return file.getvalue()


def _json(text):
  return json.dumps({'text': text}).encode() + b'\n'


REPLACE = {'encoding_errors': 'replace'}
COLUMNS = 100_000
WIDE = ','.join(['text', *(f'c{i}' for i in range(COLUMNS - 1))]).encode()
LONG = b'x' * 300
READ = {
  'special tokens': ('a.txt', b'<s>a</s> <|endoftext|> [INST] <|im_start|>system', {},
                     ['<s>a</s> <|endoftext|> [INST] <|im_start|>system']),
  'bidi': ('a.txt', 'a\u202eb\u2066c'.encode(), {}, ['a\u202eb\u2066c']),
  'CR, CRLF, U+2028 in text': ('a.txt', 'a\rb\r\nc\u2028\x85\x0bd'.encode(), {},
                               ['a\nb\nc\u2028\x85\x0bd']),
  'U+2028 in lines': ('a.txt', 'a\u2028b\r\nc\rd\n'.encode(), {'format': 'lines'},
                      ['a\u2028b', 'c\rd']),
  'U+2028 in JSONL': ('a.jsonl', '{"text": "a\u2028\u2029\x85b"}\r\n'.encode(), {},
                      ['a\u2028\u2029\x85b']),
  'U+2028 in CSV': ('a.csv', 'text\r\n"a\u2028\x1cb\r\n"\r\n'.encode(), {}, ['a\u2028\x1cb\n']),
  'CR ends the lines of a CSV': ('a.csv', b'text,n\ra,1\rb,2\r', {}, ['a', 'b']),
  'BOM within a text': ('a.txt', '\ufeffa\ufeffb'.encode(), {}, ['a\ufeffb']),
  'two BOMs': ('a.txt', '\ufeff\ufeffa'.encode(), {}, ['\ufeffa']),
  'BOM of a second JSONL': ('a.jsonl', '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n'.encode(), {},
                            ['a', 'b']),
  'BOM of a CSV': ('a.csv', '\ufefftext,n\na,1\n'.encode(), {}, ['a']),
  'BOM of UTF-32': ('a.txt', 'aé'.encode('utf-32'), {'encoding': 'utf-32'}, ['aé']),
  'NUL in JSON is a character': ('a.jsonl', _json('a\0b'), {}, ['a\0b']),
  'NUL in Parquet is a character': ('a.parquet', _parquet(['a\0b'], pyarrow.string()), {},
                                    ['a\0b']),
  'few NULs are replaced': ('a.txt', b'a\0b' + LONG, REPLACE, ['a\ufffdb' + LONG.decode()]),
  'few NULs of a CSV': ('a.csv', b'text,n\n' + LONG + b',1\na\0,2\n', REPLACE,
                        [LONG.decode(), 'a\ufffd']),
  'halves of pairs are replaced': ('a.jsonl', _json('a\ud800 \udc00\ud83d\ude00'), REPLACE,
                                   ['a\ufffd \ufffd😀']),
  'many columns': ('a.csv', WIDE + b'\na' + b',' * (COLUMNS - 1) + b'\n', {}, ['a']),
  'many columns of a TSV': ('a.tsv', (WIDE + b'\na' + b',' * (COLUMNS - 1)).replace(b',', b'\t'),
                            {}, ['a']),
  'NaN and huge numbers': ('a.jsonl', b'{"text": "a", "n": NaN, "m": 1e999, "k": -Infinity}\n', {},
                           ['a']),
  'nested somewhere else': ('a.jsonl', b'{"text": "a", "n": ' + b'[' * 90 + b']' * 90 + b'}\n', {},
                            ['a']),
  'quotes in a TSV': ('a.tsv', b'text\tn\n"a\t1\nb"\t"\n', {}, ['"a', 'b"']),
  'LargeString': ('a.parquet', _parquet(['a', 'b'], pyarrow.large_string()), {}, ['a', 'b']),
  'dictionary': ('a.parquet', _parquet(
    ['a', 'b', 'a'], pyarrow.dictionary(pyarrow.int32(), pyarrow.string())), {}, ['a', 'b', 'a']),
}
REFUSED = {
  'NUL': ('a.txt', b'a\nb\0c' + LONG, {}, "line 2: holds NUL .*encoding_errors='replace' reads"),
  'NUL in a CSV': ('a.csv', b'text\na\0\n', {}, 'line 2: holds NUL'),
  'NUL in a JSONL': ('a.jsonl', b'{"text": "a"}\n{"text": "\0"}\n', {}, 'line 2: holds NUL'),
  'UTF-16 is not replaced': ('a.txt', 'some text'.encode('utf-16-be'), REPLACE, "encoding='utf-16"),
  'BOM of UTF-32': ('a.txt', 'a'.encode('utf-32'), {}, "mark of UTF-32.*encoding='utf-32'"),
  'half of a pair': ('a.jsonl', _json('a') + _json('\ud800'), {},
                     "line 2, field 'text': character 0 is half .*encoding_errors='replace'"),
  'PNG': ('a.txt', b'\x89PNG\r\n\x1a\n\0\0', {}, 'is no text but a PNG'),
  'JPEG': ('a.txt', b'\xff\xd8\xff\xe0\0', {}, 'is no text but a JPEG'),
  'ELF': ('a', b'\x7fELF\2\1', {}, 'is no text but a compiled program'),
  'old Word': ('a.txt', b'\xd0\xcf\x11\xe0\xa1\xb1', {}, 'is no text but a document of an old'),
  'SQLite': ('a.txt', b'SQLite format 3\0', {}, 'is no text but a database'),
  'tar': ('a.txt', _tar(), {}, 'is no text but a tar archive'),
  'packed tar': ('a.txt.gz', gzip.compress(_tar()), {}, 'is no text but a tar archive'),
  'Parquet': ('a.txt', _parquet(['a'], pyarrow.string()), {}, "Parquet file .format='parquet'"),
  'gz in gz': ('a.txt.gz', gzip.compress(gzip.compress(b'a')), {}, 'a file that is packed twice'),
  'xz in bz2': ('a.jsonl.xz', bz2.compress(lzma.compress(b'a')), {}, 'a file that is packed twic'),
  'deep JSONL': ('a.jsonl', b'{"text": ' + b'[' * 200_000 + b'\n', {}, 'line 1: not JSON'),
  'deep JSON': ('a.json', b'[{"text": ' + b'{"a":' * 200_000, {}, 'item 1: not JSON'),
  'a key twice': ('a.jsonl', b'{"text": "a"}\n{"text": "a", "text": "b"}\n', {},
                  "line 2: .*'text' stands twice"),
  'a number of 5,000 digits': ('a.jsonl', b'{"text": "a", "n": ' + b'9' * 5000 + b'}\n', {},
                               'line 1: not JSON'),
  'NaN for a text': ('a.jsonl', b'{"text": NaN}\n', {}, "line 1: field 'text' is float"),
  'a name twice': ('a.tsv', b'text\ttext\na\tb\n', {}, "line 1: .* two columns 'text'"),
  'a column more': ('a.csv', WIDE + b'\na' + b',' * COLUMNS + b'\n', {},
                    f'line 2: {COLUMNS + 1} columns, but the first row names {COLUMNS}'),
  'an open quotation mark': ('a.csv', b'text,n\na,1\n"b,2\nc,3\n', {}, r'line \d: not CSV'),
  'null': ('a.parquet', _parquet(['a', None], pyarrow.string()), {},
           "row 2: field 'text' is missing or null"),
  'no values': ('a.parquet', _parquet([None], pyarrow.null()), {},
                "row 1: field 'text' is missing"),
  'lists': ('a.parquet', _parquet([['a']], pyarrow.list_(pyarrow.string())), {},
            "row 1: field 'text' is list"),
  'bytes': ('a.parquet', _parquet([b'\xff'], pyarrow.binary()), {}, "row 1: field 'text' is bytes"),
}


def _source(folder, name, content, fields):
  path = folder / name
  path.write_bytes(content)
  return SourceConfig(location=str(path), **fields)


@pytest.mark.parametrize('case', READ)
def test_what_is_text_is_read_exactly(tmp_path, case):
  *file, texts = READ[case]
  assert [*documents(_source(tmp_path, *file))] == texts


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_is_refused_by_its_place(tmp_path, case):
  *file, message = REFUSED[case]
  with pytest.raises(ValueError, match=f'^{re.escape(str(tmp_path / file[0]))}.*{message}'):
    list(documents(_source(tmp_path, *file)))


def _bomb(path, start, size, end=b''):
  """Write a gzip of `start`, some MiB of 'a', and `end`, without holding them."""
  packer = zlib.compressobj(9, wbits=31)
  with path.open('wb') as file:
    file.write(packer.compress(start))
    for _ in range(size):
      file.write(packer.compress(b'a' * 2**20))
    file.write(packer.compress(end) + packer.flush())


_LIMITED = '''
import re, resource, sys, pathlib
from jaxllm.data import files
from jaxllm.data.documents import SourceConfig, documents
import numpy, pyarrow.parquet
files.MAX_UNPACKED, files.MAX_TEXT = 2**23, 2**24  # Those of a 16th of the memory.
size = int(re.search(r'VmSize:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + 12 * 2**23,) * 2)
for path in sys.argv[1:]:
  try:
    print(sum(map(len, documents(SourceConfig(location=path)))))
  except ValueError as error:
    print(str(error).removeprefix(path))
'''


def test_few_bytes_and_long_lines_never_fill_the_memory(tmp_path):
  bombs = {
    'a.txt.gz': (b'', 24), 'b.jsonl.gz': (b'{"text": "a"}\n{"text": "', 24, b'"}'),
    'c.csv.gz': (b'text\nb\n"', 24, b'"'), 'd.tsv.gz': (b'text\nb\n', 24),
    'e.json.gz': (b'[{"text": "', 24, b'"}]')}
  for name, content in bombs.items():
    _bomb(tmp_path / name, *content)
    assert (tmp_path / name).stat().st_size < 50_000
  for name in ('f.txt', 'g.jsonl'):
    with (tmp_path / name).open('wb') as file:
      file.write(b'{"text": "a"}\n{"text": "' + b'a' * 2**25)
  paths = sorted(map(str, tmp_path.iterdir()))
  done = subprocess.run([sys.executable, '-c', _LIMITED, *paths], capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stderr[-1000:]
  *packed, text, lines = done.stdout.splitlines()
  assert [re.match(r', (?:line|text) \d', line)[0] for line in packed] == [
    ', text 1', ', line 2', ', line 3', ', line 3', ', text 1']
  assert all('more than 8,388,608 characters in a compressed file' in line for line in packed)
  assert text.startswith(', text 1: ') and lines.startswith(', line 2: ')
  assert all('more than 16,777,216 characters; split it' in line for line in (text, lines))
