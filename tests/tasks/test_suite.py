"""Which tasks are scored: by kind, from JSON, on data of one's own, in the form of the run."""

import json
import pathlib

import pytest

from jaxllm.tasks import TASKS, suite
from jaxllm.tasks.classification import CHINESE, Classification, Sentiment
from jaxllm.tasks.records import load

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'tasks.md'
SPAM = {'kind': 'classification', 'data': {'sources': [{'location': 'spam.tsv'}]},
        'labels': [['0', 'ham'], ['1', 'spam']]}


def test_kinds_are_those_of_the_run_or_the_defaults():
  found = suite.select('sentiment,translation', 'test')
  assert [*found] == ['sentiment', 'translation'] and found['sentiment'] == Sentiment()
  found = suite.select('sentiment,translation', 'test', own=CHINESE, limit=5)
  assert found['sentiment'] == CHINESE.replace(data=CHINESE.data.replace(limit=5))
  assert found['translation'].data.limit == 5
  spam = Classification(**SPAM)
  assert suite.select([spam, 'sentiment', 'classification'], 'test', own=spam) == {
    'classification_1': spam, 'sentiment': Sentiment(), 'classification_3': spam}


def test_json_gives_one_task_or_several(tmp_path):
  path = tmp_path / 'tasks.json'

  def select(content):
    path.write_text(json.dumps(content))
    return suite.select(str(path), 'test')

  assert select(SPAM) == select([SPAM]) == {'classification': Classification(**SPAM)}
  assert [*select([SPAM, {'kind': 'sentiment'}, SPAM])] == [
    'classification_1', 'sentiment', 'classification_3']
  assert [*select({'mail': SPAM})] == ['mail']
  for content, message in (([], 'expected the config'), ({'mail': 3}, "kind '3' is no task"),
                           ({**SPAM, 'labels': [['0', 'ham']]}, 'classification: .*at least two')):
    with pytest.raises(ValueError, match=message):
      select(content)


def test_the_file_in_the_docs_is_accepted(tmp_path):
  text = DOCS.read_text(encoding='utf-8').partition('```json\n')[2].partition('```')[0]
  (tmp_path / 'tasks.json').write_text(text)
  found = suite.select(str(tmp_path / 'tasks.json'), 'test')
  assert found['spam'].labels == (('0', 'ham'), ('1', 'spam'))
  assert found['squad'].kind == 'question_answering'


def test_the_records_in_the_docs_are_read():
  lines = [line for line in DOCS.read_text(encoding='utf-8').splitlines() if line.startswith('{"')]
  records = list(map(json.loads, lines))
  assert len(records) == 6
  for record in records:
    kind = 'preference' if 'chosen' in record else 'chat'
    assert any(s.weight for s in TASKS[kind].example(TASKS[kind].config(), record).segments)


def test_data_of_ones_own_are_taken_whole(tmp_path):
  path = tmp_path / 'reviews.tsv'
  path.write_text('text\tlabel\ngood\tpositive\nbad\tnegative\nbad\tnegative\n')
  config, = suite.select('sentiment', 'test', data=str(path)).values()
  assert len(load(config.data, 'test')) == 3
  context = tmp_path / 'qa.json'
  named = suite.select('extractive_question_answering', 'test', data=str(context))
  assert named['extractive_question_answering'].data.sources[0].location == str(context)
  with pytest.raises(ValueError, match='is for one task, not for sentiment, translation'):
    suite.select('sentiment,translation', 'test', data=str(path))


@pytest.mark.parametrize('names, message', [
  ('sentiments', "kind 'sentiments' is no task; one of translation"),
  ('classification', 'classification: Classification.data: a value is required'),
  ('none.json', 'cannot be read as JSON'),
])
def test_what_is_no_task_is_said(names, message):
  with pytest.raises(ValueError, match=message):
    suite.select(names, 'test')


def test_a_baseline_has_its_own_prompt_where_the_labels_are_the_same():
  task, own = Sentiment(), Sentiment(prompt='{text}!', data=CHINESE.data)
  assert suite.in_format_of(task, own) == own.replace(data=task.data)
  others = own.replace(labels=(('0', 'bad'), ('1', 'good')))
  for config in (None, others, Classification(**SPAM)):
    assert suite.in_format_of(task, config) == task
