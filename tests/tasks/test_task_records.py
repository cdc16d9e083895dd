"""Records: every format reads, splits are exact, disjoint and independent of order."""

import gzip
import json
import random

import fsspec
import pytest

from jaxllm.tasks import predict, records
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.records import RecordsConfig, RecordSource


def _config(*sources, **fields):
  return RecordsConfig(sources=sources, **fields)


def _file(tmp_path, name, text):
  path = tmp_path / name
  path.write_text(text, encoding='utf-8')
  return str(path)


WHOLE = (('train', 1.0),)


def test_what_another_slice_holds_out_is_not_trained_on(tmp_path, caplog):
  # Each row twice, in both halves, under other numbers.
  rows = [{'id': i, 'text': f'row {i % 10}', 'label': 1} for i in range(20)]
  path = _file(tmp_path, 'a.jsonl', '\n'.join(map(json.dumps, rows[:10] + rows[13:])))
  parts = [RecordSource(location=path, slice=part, split=split) for split, part in (
    ('train', (0, 0.6)), ('test', (0.6, 1)))]
  train, test = (records.load(_config(*parts), split) for split in ('train', 'test'))
  assert not {row['text'] for row in train} & {row['text'] for row in test}
  assert {row['text'] for row in train + test} == {row['text'] for row in rows}
  assert 'rows are held out too, and not trained on' in caplog.text
  with pytest.raises(ValueError, match='sources: only what is trained on is mixed'):
    _config(parts[0], parts[1].replace(weight=1.0))
  with pytest.raises(ValueError, match=r'sources\[1\]\.weight=None, but other sources'):
    _config(parts[0].replace(weight=1.0), parts[0], parts[1])


@pytest.mark.parametrize(
  'name, text',
  [
    ('a.jsonl', '{"text": "x, y", "label": 1}\n\n{"text": "z", "label": 0}\n'),
    ('a.json', '[{"text": "x, y", "label": 1}, {"text": "z", "label": 0}]'),
    ('b.json', '{"data": [{"text": "x, y", "label": 1}, {"text": "z", "label": 0}]}'),
    ('a.csv', 'text,label\n"x, y",1\nz,0\n'),
    ('a.tsv', 'text\tlabel\nx, y\t1\nz\t0\n'),
  ],
)
def test_formats_give_the_same_rows(tmp_path, name, text):
  source = RecordSource(location=_file(tmp_path, name, text))
  rows = records.load(_config(source, fractions=WHOLE), 'train')
  assert [(row['text'], str(row['label'])) for row in rows] == [('x, y', '1'), ('z', '0')]


def test_directories_globs_and_compressed_files(tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  with gzip.open(folder / 'b.jsonl.gz', 'wt') as file:
    file.write('{"text": "b", "label": 0}\n\n{"text": null, "label": 1}\n')
  _file(folder, 'a.csv', 'text,label\na,1\n')
  for location, expected in ((folder, ['a', 'b', None]), (folder / '*.csv', ['a']),
                             (folder / '*.gz', ['b', None]), (folder / 'b.jsonl.gz', ['b', None])):
    config = _config(RecordSource(location=str(location)), fractions=WHOLE)
    assert [row['text'] for row in records.load(config, 'train')] == expected
  with pytest.raises(ValueError, match=r"b.jsonl.gz, line 3: field 'text' is null"):
    predict.examples(Sentiment(data=config, labels=(('0', 'a'), ('1', 'b'))), 'train')
  with pytest.raises(ValueError, match='no files in'):
    records.load(_config(RecordSource(location=str(folder / '*.x')), fractions=WHOLE), 'train')


def test_columns_may_be_named(tmp_path):
  source = RecordSource(location=_file(tmp_path, 'a.csv', 'x,1\n'), column_names=('text', 'label'))
  assert records.load(_config(source, fractions=WHOLE), 'train') == [{'text': 'x', 'label': '1'}]


def test_lines_with_constants(tmp_path):
  sources = [
    RecordSource(location=_file(tmp_path, name, text), constants=(('label', name),))
    for name, text in (('neg', 'bad\n\n awful \n'), ('pos', 'good'))
  ]
  rows = records.load(_config(*sources, fractions=WHOLE), 'train')
  assert rows == [{'text': 'bad', 'label': 'neg'}, {'text': 'awful', 'label': 'neg'},
                  {'text': 'good', 'label': 'pos'}]


def test_aligned_columns(tmp_path):
  english, german = _file(tmp_path, 'x.en', 'a\nb\n'), _file(tmp_path, 'x.de', 'ä\n\n')
  columns = (('source', english), ('target', german))
  rows = records.load(_config(RecordSource(columns=columns, split='test')), 'test')
  assert rows == [{'source': 'a', 'target': 'ä'}, {'source': 'b', 'target': ''}]
  _file(tmp_path, 'x.de', 'ä\nö\nü')
  with pytest.raises(ValueError, match='equally many lines'):
    records.load(_config(RecordSource(columns=columns, split='test')), 'test')


def test_lines_end_at_line_feeds_alone(tmp_path):
  odd = 'one\u2028still\x85one\x0b\x0c\x1cof\rit'
  path = tmp_path / 'x.en.gz'
  path.write_bytes(gzip.compress(f'{odd}\r\ntwo\n'.encode('utf-16')))
  columns = (('source', str(path)), ('target', _file(tmp_path, 'x.de', '1\n2\n')))
  (tmp_path / 'x.de').write_bytes('1\n2\n'.encode('utf-16'))
  source = RecordSource(columns=columns, encoding='utf-16', split='test')
  assert records.load(_config(source), 'test') == [
    {'source': odd, 'target': '1'}, {'source': 'two', 'target': '2'}]
  source = RecordSource(location=str(path), format='text', encoding='utf-16', split='test')
  assert records.load(_config(source), 'test') == [{'text': odd}, {'text': 'two'}]


@pytest.mark.parametrize('name', ['x.en', 'x.pdf', 'x.docx', 'x.zip'])
def test_unknown_endings_are_refused_unless_called_text(tmp_path, name):
  path = _file(tmp_path, name, 'a line\n')
  with pytest.raises(ValueError, match="set format='text'"):
    records.load(_config(RecordSource(location=path, split='test')), 'test')
  source = RecordSource(location=path, format='text', split='test')
  assert records.load(_config(source), 'test') == [{'text': 'a line'}]


def test_squad(tmp_path):
  question = {'id': '1', 'question': 'q?', 'answers': [{'text': 'b', 'answer_start': 2}]}
  content = {'data': [{'title': 't', 'paragraphs': [{'context': 'a b', 'qas': [question]}]}]}
  source = RecordSource(location=_file(tmp_path, 's.json', json.dumps(content)))
  assert records.load(_config(source, fractions=WHOLE), 'train') == [
    {'id': '1', 'title': 't', 'context': 'a b', 'question': 'q?', 'answers': ['b'],
     'answer_starts': [2]}
  ]


def test_fields_are_renamed_and_reached_into(tmp_path):
  path = _file(tmp_path, 'a.jsonl', '{"q": "x", "a": {"text": ["y"]}}')
  config = _config(
    RecordSource(location=path), fields=(('question', 'q'), ('answers', 'a.text')), fractions=WHOLE
  )
  row, = records.load(config, 'train')
  assert row['question'] == 'x' and row['answers'] == ['y']


def _numbers(tmp_path, numbers, name='n.jsonl'):
  lines = [json.dumps({'text': f't{n}', 'group': n // 10}) for n in numbers]
  return RecordSource(location=_file(tmp_path, name, '\n'.join(lines)))


def test_splits_are_exact_disjoint_and_complete(tmp_path):
  source = _numbers(tmp_path, range(500))
  config = _config(source, fractions=(('train', 0.8), ('test', 0.2)))
  parts = [{row['text'] for row in records.load(config, s)} for s in ('train', 'test')]
  assert list(map(len, parts)) == [400, 100]
  assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 500


def test_splits_do_not_depend_on_order_or_repetition(tmp_path):
  numbers = list(range(100))
  config = _config(_numbers(tmp_path, numbers))
  before = {s: {row['text'] for row in records.load(config, s)} for s in ('validation', 'test')}
  numbers += numbers[:50]
  random.Random(0).shuffle(numbers)
  config = _config(_numbers(tmp_path, numbers))
  after = {s: {row['text'] for row in records.load(config, s)} for s in ('validation', 'test')}
  assert after == before
  other = {row['text'] for row in records.load(config.replace(seed=1), 'test')}
  assert other != before['test']


def test_groups_stay_together(tmp_path):
  config = _config(_numbers(tmp_path, range(200)), group='group')
  groups = [{row['group'] for row in records.load(config, s)}
            for s in ('train', 'validation', 'test')]
  assert [len(g) for g in groups] == [16, 2, 2]
  assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.mark.parametrize('name', ['id', 'Unnamed: 0', 'idx'])
def test_rows_that_differ_in_a_number_alone_share_a_split(tmp_path, name):
  rows = [{name: i, 'text': f'text {i % 20}'} for i in range(100)]
  path = _file(tmp_path, 'a.jsonl', '\n'.join(map(json.dumps, rows)))
  config = _config(RecordSource(location=path))
  parts = [records.load(config, split) for split in ('train', 'validation', 'test')]
  assert list(map(len, parts)) == [80, 10, 10]
  texts = [{row['text'] for row in part} for part in parts]
  assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_limit_keeps_a_fixed_subset_in_order(tmp_path):
  config = _config(_numbers(tmp_path, range(100)), fractions=WHOLE, limit=10)
  found = [int(row['text'][1:]) for row in records.load(config, 'train')]
  assert len(found) == 10 and found == sorted(found) and found != list(range(10))
  assert found == [int(row['text'][1:]) for row in records.load(config, 'train')]


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('a.jsonl', '{"text": 1}\n{', 'line 2: not JSON'),
    ('a.json', '[1]', 'a.json, item 1: expected a JSON object'),
    ('a.json', '{"data": [{"paragraphs": [{}]}]}', r'item 1, data\[0\]: not in the form'),
    ('a.csv', 'text,label\nx\n', 'a.csv'),
  ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
  config = _config(RecordSource(location=_file(tmp_path, name, text)), fractions=WHOLE)
  with pytest.raises(ValueError, match=message):
    records.load(config, 'train')


@pytest.mark.parametrize(
  'build, message',
  [
    (lambda p: _config(RecordSource(location='nowhere.jsonl')), "no such file: 'nowhere.jsonl'"),
    (lambda p: _config(RecordSource(location='package:nope')), 'package:nope.*one of'),
    (lambda p: _config(_numbers(p, range(3)), fields=(('x', 'y.z'),)), "no field 'y.z'"),
    (lambda p: _config(RecordSource(location='x', columns=(('a', 'b'),))), 'set one of them'),
    (lambda p: _config(_numbers(p, range(3)), fractions=(('a', 0.9), ('b', 0.2))), 'add up to'),
    (lambda p: _config(), 'at least one source'),
    (lambda p: _config(_numbers(p, range(3))), 'has no records; splits: test, train, validation'),
  ],
)
def test_bad_configs_are_named(tmp_path, build, message):
  with pytest.raises(ValueError, match=message):
    records.load(build(tmp_path), 'dev')


def test_a_missing_field_says_how_to_name_it(tmp_path):
  config = Sentiment(data=_config(_numbers(tmp_path, range(3)), fractions=WHOLE))
  with pytest.raises(ValueError, match=r"n.jsonl, line 1: there is no field 'label'.*data.fields"):
    predict.examples(config, 'train')


@pytest.mark.parity
def test_hugging_face_datasets(tmp_path, monkeypatch):
  pytest.importorskip('datasets')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  _file(tmp_path, 'train.jsonl', '{"text": "a"}\n{"text": "b"}\n')
  source = RecordSource(location=f'hf:{tmp_path}?split=train', split='train')
  assert records.load(_config(source), 'train') == [{'text': 'a'}, {'text': 'b'}]


def test_columns_may_lie_elsewhere(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  fsspec.filesystem('memory').pipe({'/pairs/a.en': b'one\ntwo\n', '/pairs/a.de.gz': gzip.compress(
    b'eins\nzwei\n')})
  source = RecordSource(columns=(('x', 'memory://pairs/a.en'), ('y', 'memory://pairs/a.de.gz')),
                        split='train')
  assert records.load(_config(source), 'train') == [
    {'x': 'one', 'y': 'eins'}, {'x': 'two', 'y': 'zwei'}]
