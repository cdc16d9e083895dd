"""Overlap of evaluation and training texts."""

import json

from jaxllm.data import preparing, records
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.contamination import (
  longest_text,
  overlaps,
  record_texts,
  summary,
)


def test_literals():
  training = iter(['One two, three four FIVE six!', 'seven eight'])
  found = overlaps(
    ['two three four five', 'zero one two three', 'eight', 'eight nine', '', 'seven  eight'],
    training, num_words=3,
  )
  assert found == [
    (1.0, 'two three four'), (0.5, 'one two three'), (1.0, 'eight'),
    (0.0, None), (0.0, None), (1.0, 'seven eight'),
  ]


def test_chinese_is_compared_by_character():
  found = overlaps(['猫坐在垫子上'], ['那只猫坐在垫子里。'], num_words=4)
  assert found == [(2 / 3, '猫 坐 在 垫')]


def test_runs_do_not_cross_texts():
  assert overlaps(['a b c'], ['a b', 'c'], num_words=3) == [(0.0, None)]


def test_a_copied_passage_is_found_in_a_long_text():
  passage = ' '.join(f'word{i}' for i in range(30))
  share, example = overlaps([f'{passage} and more of our own words'], [f'x {passage} y'])[0]
  assert 0.7 < share < 0.8 and example.startswith('word0 word1')


def test_the_summary_counts_and_shows_the_worst():
  found = summary([(0.0, None), (0.5, 'a b'), (0.25, 'c d')])
  assert found == {'texts': 3, 'overlapping': 2, 'mean_share': 0.25, 'ngram_words': 13,
                   'example': 'a b'}


def test_what_a_record_is_about_is_its_longest_text():
  assert longest_text({'label': 'positive', 'text': 'A longer text.', 'id': 12345678901234567}) == (
    'A longer text.')
  assert longest_text({'id': 1}) == ''
  said = [{'role': 'user', 'content': 'What is it?'}, {'role': 'assistant', 'content': 'A cat.'}]
  assert longest_text({'messages': said}) == 'user What is it? assistant A cat.'


def test_training_texts_come_back_from_records(tmp_path):
  lines = [f'Document {i} says this and no more.' for i in range(9)]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': line}) + '\n' for line in lines))
  data = DataConfig(
    sources=(SourceConfig(location=str(tmp_path / 'a.jsonl')),), validation=None,
    context_length=90, packing='best_fit',
  )
  manifest = preparing.prepare(data, TokenizerConfig(kind='bytes'), tmp_path / 'records', False)
  assert manifest.train.records < 9
  found = record_texts(tmp_path / 'records', records.load_tokenizer(tmp_path / 'records'))
  assert sorted(found) == lines
