"""Examples that are left out or cut are counted, said and written down."""

import json

import pytest

from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.objectives.preference import Orpo
from jaxllm.optim.optimizers import ScheduleConfig
from jaxllm.tasks.chat import PLAIN, Chat
from jaxllm.tasks.classification import Classification
from jaxllm.tasks.preference import Preference
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.tasks.summarization import Summarization
from jaxllm.training import dataset
from tests.training import tiny_run


def opened(tmp_path, task, rows, context_length=32, **fields):
  path = tmp_path / 'r.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  data = RecordsConfig(sources=(RecordSource(location=str(path), split='train'),))
  experiment = Experiment(
    name='x', model=tiny_run.MODEL, tokenizer=TokenizerConfig(kind='bytes'),
    data=DataConfig(context_length=context_length), schedule=ScheduleConfig(warmup_steps=1),
    training=TrainingConfig(num_steps=2, batch_size=2), **fields, task=task(data))
  return dataset.open_dataset(experiment).manifest.train


def summaries(*lengths):
  return [{'document': f'{i}' + 'x' * n, 'summary': 's'} for i, n in enumerate(lengths)]


@pytest.mark.parametrize('truncation, kept, dropped, cut, said', [
  ('drop', 2, 1, 0, "of 3 examples 1 longer than data.context_length=32, with "
                    "task.truncation='drop', left out"),
  ('start', 3, 0, 1, 'of 3 examples 1 longer than data.context_length=32, cut'),
])
def test_long_examples(tmp_path, caplog, truncation, kept, dropped, cut, said):
  found = opened(tmp_path, lambda data: Summarization(
    data=data, prompt='{document}:', truncation=truncation), summaries(1, 99, 2))
  assert (found.documents, found.dropped, found.cut) == (kept, dropped, cut)
  assert said in caplog.text


def test_chats_in_which_nobody_answers(tmp_path, caplog):
  user, bot = {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}
  chats = [[user, bot], [user], [user, {**bot, 'weight': 0}]]
  found = opened(tmp_path, lambda data: Chat(data=data, template=PLAIN),
                 [{'messages': messages} for messages in chats])
  assert (found.documents, found.dropped, found.cut) == (1, 2, 0)
  assert '2 in task.data without anything that an assistant says, left out' in caplog.text
  with pytest.raises(ValueError, match='none of 1 examples can be trained on: 1 in task.data'):
    opened(tmp_path, lambda data: Chat(data=data, template=PLAIN), [{'messages': [user]}])


def test_pairs(tmp_path):
  rows = [{'prompt': 'p' * n, 'chosen': 'c', 'rejected': 'r' * m} for n, m in (
    (1, 1), (99, 1), (1, 99))]
  for truncation, expected in (('drop', (1, 2, 0)), ('start', (2, 1, 1))):
    found = opened(tmp_path, lambda data, t=truncation: Preference(data=data, truncation=t), rows,
                   objective=Orpo())
    assert (found.documents, found.dropped, found.cut) == expected


def test_pairs_with_equal_answers(tmp_path, caplog):
  rows = [{'prompt': 'p', 'chosen': 'c', 'rejected': answer} for answer in 'crc']
  found = opened(tmp_path, lambda data: Preference(data=data), rows, objective=Orpo())
  assert (found.documents, found.dropped, found.cut, found.records) == (1, 2, 0, 1)
  assert 'of 3 examples 2 in task.data with two equal answers, left out' in caplog.text
  with pytest.raises(ValueError, match='none of 1 examples can be trained on: 1 in task.data with'):
    opened(tmp_path, lambda data: Preference(data=data), rows[:1], objective=Orpo())


def test_texts_of_a_classifier(tmp_path):
  rows = [{'text': f'{i}' + 't' * n, 'label': 'a'} for i, n in enumerate((1, 99))]
  for truncation, expected in (('drop', (1, 1, 0)), ('end', (2, 0, 1)), ('start', (2, 0, 1))):
    found = opened(
      tmp_path, lambda data, t=truncation: Classification(
        data=data, labels=(('a', 'a'), ('b', 'b')), truncation=t), rows,
      objective=ClassifierConfig(num_classes=2))
    assert (found.documents, found.dropped, found.cut) == expected


@pytest.mark.parametrize('fields', [{}, {'objective': Orpo()}], ids=['tokens', 'pairs'])
def test_where_nothing_is_left_the_fields_are_named(tmp_path, fields):
  task = Preference if fields else Summarization
  rows = [{'prompt': 'p' * 99, 'chosen': 'c', 'rejected': 'r'}] if fields else summaries(99)
  with pytest.raises(ValueError, match="none of 1 examples can be trained on: 1 longer than "
                                       "data.context_length=32, with task.truncation='drop'"):
    opened(tmp_path, lambda data: task(data=data, truncation='drop'), rows, **fields)
