"""Tables: every metric is there, a baseline is compared, per-token numbers only on equal tokens."""

import json
from operator import itemgetter

import pytest

from jaxllm.evaluation import scores, tables

LABELS = {'classification': itemgetter('label'), 'calibration': itemgetter('label', 'score')}
REFERENCES = ['a', 'b', 'a', 'b', 'a', 'a']
GOOD = [{'label': label, 'score': 0.9} for label in 'abaaaa']
BAD = [{'label': label, 'score': 0.6} for label in 'bababb']


def test_all_numbers_of_all_metrics_with_intervals():
  found = tables.score(LABELS, GOOD, REFERENCES)
  labels = [one['label'] for one in GOOD]
  expected = scores.score('classification', labels, REFERENCES)
  assert {*expected, 'ece'} == {*found}
  for name, value in expected.items():
    assert found[name]['value'] == pytest.approx(value)
    assert found[name]['low'] <= value <= found[name]['high'] and len(found[name]) == 3


def test_a_baseline_is_compared_on_the_same_examples():
  accuracy = tables.score(LABELS, GOOD, REFERENCES, BAD)['accuracy']
  assert (accuracy['value'], accuracy['baseline']) == (pytest.approx(5 / 6), pytest.approx(0))
  assert accuracy['comparison']['difference'] == pytest.approx(5 / 6)
  # Of 2**6 ways to swap sides only those of the five that differ count: 2 in 32.
  assert 0.03 < accuracy['comparison']['p_value'] < 0.11
  same = tables.score(LABELS, GOOD, REFERENCES, GOOD)
  assert {one['comparison']['p_value'] for one in same.values()} == {1.0}
  with pytest.raises(ValueError, match='both systems must answer the same examples'):
    tables.score(LABELS, GOOD, REFERENCES, BAD[:3])


@pytest.mark.parametrize('tokens, compared', [(4, True), (5, False)])
def test_other_tokens_are_compared_by_their_bytes_alone(tokens, compared):
  metrics = dict.fromkeys(('perplexity', 'bits_per_byte'), lambda one: one)
  ours, theirs = [(-8.0, 4, 16)] * 3, [(-6.0, tokens, 16)] * 3
  found = tables.score(metrics, ours, [None] * 3, theirs)
  assert found['bits_per_byte']['comparison']['difference'] > 0
  assert ('comparison' in found['loss']) == ('comparison' in found['perplexity']) == compared


def test_the_table_and_its_json():
  found = tables.score({'accuracy': itemgetter('label')}, GOOD, REFERENCES, BAD)
  header, row = tables.render({'sentiment': {'scores': found, 'examples': 6}}).split('\n')
  assert header.split() == ['task', 'examples', 'score', 'value', '95%', 'interval', 'baseline',
                            'difference', '95%', 'interval', 'p']
  assert row.split()[:4] == ['sentiment', '6', 'accuracy', '0.8333'] and '+0.8333' in row
  alone = tables.render({'a': {'scores': found, 'examples': 6}, 'b': {'scores': {}, 'examples': 6}})
  assert len(alone.split('\n')) == 2
  assert json.loads(json.dumps(found))['accuracy']['comparison']['low'] > 0
