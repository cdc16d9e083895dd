"""A file is read as what it is, whatever packs it, or refused by name; nothing of it is guessed."""

import bz2
import gzip
import lzma
import time

import pyarrow
import pytest

from jaxllm.config import ConfigError
from jaxllm.data import files, readers
from jaxllm.data.documents import SourceConfig, documents
from jaxllm.tasks import records


def _texts(path, content, **fields):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return [*documents(SourceConfig(location=str(path), **fields))]


def _zstd(content):
  return pyarrow.Codec('zstd').compress(content).to_pybytes()


PACKERS = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': _zstd}


@pytest.mark.parametrize('suffix', PACKERS)
def test_packed_files_are_read_as_what_they_hold(tmp_path, suffix):
  pack = PACKERS[suffix]
  assert _texts(tmp_path / f'a.txt{suffix}', pack('é\r\nb'.encode())) == ['é\nb']
  assert _texts(tmp_path / f'a{suffix}', pack(b'plain')) == ['plain']
  assert _texts(tmp_path / f'a.jsonl{suffix}', pack(b'{"text": "row"}\n')) == ['row']
  assert _texts(tmp_path / f'a.tsv{suffix}', pack(b'text\tn\n"row\t1\n')) == ['"row']
  assert _texts(tmp_path / 'renamed.txt', pack(b'packed')) == ['packed']
  assert _texts(tmp_path / f'unpacked.txt{suffix}', 'plain') == ['plain']
  assert _texts(tmp_path / f'two.txt{suffix}', pack(b'one ') + pack(b'two')) == ['one two']
  with pytest.raises(ValueError, match=r'cut\.txt.*: the compressed data are damaged'):
    _texts(tmp_path / f'cut.txt{suffix}', pack(bytes(range(1, 128)) * 50)[:-9])


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MAX_UNPACKED', 5000)
  monkeypatch.setattr(files, '_BLOCK_BYTES', 1000)
  bomb = gzip.compress(b'a' * 6000)
  for name in ('a.txt.gz', 'a.jsonl.gz', 'a.json.gz', 'a.tsv.gz'):
    with pytest.raises(ValueError, match=r'gz, (line|text) 1: .* 5,000 characters in a compressed'):
      _texts(tmp_path / name, bomb)
  with pytest.raises(ValueError, match='line 2501: a line or text of more than 5,000 characters'):
    _texts(tmp_path / 'a.csv.gz', gzip.compress(b'text\n"' + b'a\n' * 3000 + b'"\n'))
  with monkeypatch.context() as patch, pytest.raises(ValueError, match='more than 5,500 char.*spl'):
    patch.setattr(files, 'MAX_TEXT', 5500)
    _texts(tmp_path / 'b.txt', 'a' * 6000)
  assert _texts(tmp_path / 'b.txt', 'a' * 6000) == ['a' * 6000]
  lines = _texts(tmp_path / 'a.txt.gz', gzip.compress(b'abc\n' * 3000), separator='\n')
  assert lines == ['abc'] * 3000


@pytest.mark.parametrize('name', [
  'a.pdf', 'a.zip', 'a.docx', 'a.png', 'a.tar.gz', 'a.tgz', 'a.foo', 'a.pkl', 'a.parquet.crc'])
def test_unknown_endings_are_refused_with_the_list(tmp_path, name):
  with pytest.raises(ValueError, match=r"known are array_record csv .*\.gz .*format='text'"):
    _texts(tmp_path / name, 'looks like text')
  assert _texts(tmp_path / name, 'is text', format='text') == ['is text']


@pytest.mark.parametrize('name', ['README', 'a.TXT', 'a.py', 'a.txt.003', 'a.html', 'wiki_00'])
def test_text_has_many_endings(tmp_path, name):
  assert _texts(tmp_path / name, 'text') == ['text']


@pytest.mark.parametrize('content, message', [
  (b'%PDF-1.4 text', 'is no text but a PDF'),
  (b'PK\x03\x04rest', 'is no text but a zip archive'),
  (b'abc\0def', r'holds NUL characters.*utf-16'),
  ('hello'.encode('utf-16'), "mark of UTF-16.*encoding='utf-16'"),
  ('hello'.encode('utf-16-le'), 'holds NUL characters'),
])
@pytest.mark.parametrize('errors', ['strict', 'replace'])
def test_what_is_no_text_is_refused_under_any_name(tmp_path, content, message, errors):
  for name in ('a.txt', 'a.csv'):
    with pytest.raises(ValueError, match=message):
      _texts(tmp_path / name, content, encoding_errors=errors)


@pytest.mark.parametrize('encoding', ['gb18030', 'utf-16', 'cp1252', 'shift_jis', 'utf-8-sig'])
@pytest.mark.parametrize('block_bytes', [1, 3, 1 << 20])
def test_other_encodings_are_read_by_their_names(tmp_path, monkeypatch, encoding, block_bytes):
  monkeypatch.setattr(files, '_BLOCK_BYTES', block_bytes)
  text = 'naïve “quotes”\nline' if encoding == 'cp1252' else '日本中文 text\nline'
  content = text.encode(encoding)
  assert _texts(tmp_path / 'a.txt', content, encoding=encoding) == [text]
  rows = _texts(tmp_path / 'a.tsv', content, encoding=encoding, column_names=('text',))
  assert rows == text.split('\n')


def test_the_advice_never_destroys_characters(tmp_path):
  with pytest.raises(ValueError, match='byte 1 .0xd6. is not UTF-8; name.*gb18030') as error:
    _texts(tmp_path / 'a.txt', 'a中'.encode('gbk'))
  assert 'replace' not in str(error.value)
  with pytest.raises(ValueError, match='byte 0 .0x81. is not cp1252'):
    _texts(tmp_path / 'a.txt', b'\x81', encoding='cp1252')
  for name in ('nosuch', 'rot13', 'base64'):
    with pytest.raises(ConfigError, match=f"encoding='{name}': expected the name of a text encod"):
      SourceConfig(location='a', encoding=name)


def test_in_tsv_quotation_marks_are_text(tmp_path):
  rows = 'text\tn\nthe "best" film\t1\n"unclosed\t0\n""\t5" long\nlast\u2028\x0b\x85\x0c\rline\t2\n'
  expected = ['the "best" film', '"unclosed', '""', 'last\u2028\x0b\x85\x0c\rline']
  assert _texts(tmp_path / 'a.tsv', rows) == expected
  assert _texts(tmp_path / 'a.tsv', rows.replace('\n', '\r\n')) == expected
  assert _texts(tmp_path / 'a.tsv', 'n\ttext\r\n1\tlast\r\n') == ['last']
  assert _texts(tmp_path / 'a.txt', rows, format='tsv') == expected


def test_a_table_without_a_header_takes_names(tmp_path):
  assert _texts(tmp_path / 'a.csv', 'one,1\ntwo,2\n', column_names=('text', 'n')) == ['one', 'two']
  with pytest.raises(ValueError, match='line 1: 2 columns, but column_names has 1'):
    _texts(tmp_path / 'a.csv', 'one,1\n', column_names=('text',))
  with pytest.raises(ConfigError, match='a name stands twice'):
    SourceConfig(location='a', column_names=('text', 'text'))


@pytest.mark.parametrize('content, texts', [
  ('[]', []), ('[{"text": "a"},\n{"text": "b"}]\n', ['a', 'b']), ('{"text": "a"}', ['a']),
  ('{"text": "a"}\n{"text": "b\u2028"}\n', ['a', 'b\u2028']), ('', []),
  ('{\n"text": "a"\n}', ['a']),
])
def test_json_holds_an_array_or_objects(tmp_path, content, texts):
  assert _texts(tmp_path / 'a.json', content) == texts


@pytest.mark.parametrize('separator', ['\n', '<|end|>', '\n\n'])
@pytest.mark.parametrize('block_bytes', [1, 2, 5, 64])
def test_splitting_is_that_of_the_whole_text(tmp_path, monkeypatch, separator, block_bytes):
  monkeypatch.setattr(files, '_BLOCK_BYTES', block_bytes)
  text = 'a\n\n\nb\x0c<|end|><|end|><|end\u2028|>c\n\n'
  expected = [part for part in text.split(separator) if part]
  assert _texts(tmp_path / 'a.txt', text, separator=separator) == expected


def test_paths_may_hold_brackets_and_a_tilde(tmp_path, monkeypatch):
  (tmp_path / 'texts [v2]').mkdir()
  _texts(tmp_path / 'texts [v2]' / 'a.txt', 'x')
  monkeypatch.setenv('HOME', str(tmp_path))
  for location in (tmp_path / 'texts [v2]', tmp_path / 'texts [v2]' / '*.txt', '~/texts [v2]/a.txt',
                   '~/texts [v2]/**/*.txt'):
    assert [*documents(SourceConfig(location=str(location)))] == ['x'], location


def test_few_bytes_of_parquet_stay_few(tmp_path, monkeypatch):
  from pyarrow import parquet
  path, long = tmp_path / 'a.parquet', 'a' * 300_000
  table = pyarrow.table({'text': [long] * 40, 'other': ['b' * 1_000_000] * 40})
  parquet.write_table(table.select(['text']), path, compression='zstd')
  assert path.stat().st_size < 2000
  # A dictionary says it once: rows are unpacked a few at a time, of the wanted column alone.
  group = parquet.ParquetFile(path).metadata.row_group(0)
  assert readers._rows_at_once([group.column(0)], 40) < 1000
  assert sum(map(len, documents(SourceConfig(location=str(path))))) == 40 * len(long)
  parquet.write_table(table, path, compression='zstd', use_dictionary=['text'])
  monkeypatch.setattr(files, 'MAX_UNPACKED', 10_000_000)
  with pytest.raises(ValueError, match=r'a.parquet, after row 0: .*unpacks to 4\d,\d+,\d+ bytes'):
    list(documents(SourceConfig(location=str(path), text_field='other')))
  parquet.write_table(table.select(['text']), path, compression='zstd')
  with pytest.raises(ValueError, match=r'after row \d+: .*bytes unpack to more than 10,000,000'):
    records.load(records.RecordsConfig(sources=(
      records.RecordSource(location=str(path)),)), 'train')


@pytest.mark.parametrize('text', [' ' * 300_000 + 'a', '# ' * 100_000, '*' * 200_000 + 'a'])
def test_markdown_takes_linear_time(text):
  start = time.process_time()
  readers.strip_markdown(text)
  assert time.process_time() - start < 1
