"""Tables: every metric is there, a baseline is compared, per-token numbers only on equal tokens."""

from operator import itemgetter

import pytest

from jaxllm.evaluation import scores, tables

LABELS = {'classification': itemgetter('label'), 'calibration': itemgetter('label', 'score')}
REFERENCES = ['a', 'b', 'a', 'b', 'a', 'a']
GOOD = [{'label': label, 'score': 0.9} for label in 'abaaaa']
BAD = [{'label': label, 'score': 0.6} for label in 'bababb']


def test_all_numbers_of_all_metrics_with_intervals():
  lines = {line.name: line for line in tables.score(LABELS, GOOD, REFERENCES)}
  labels = [one['label'] for one in GOOD]
  expected = scores.score('classification', labels, REFERENCES)
  assert {*expected, 'ece'} == {*lines}
  for name, value in expected.items():
    assert lines[name].score.value == pytest.approx(value)
    assert lines[name].score.low <= value <= lines[name].score.high
    assert lines[name].baseline is lines[name].comparison is None


def test_a_baseline_is_compared_on_the_same_examples():
  lines = {line.name: line for line in tables.score(LABELS, GOOD, REFERENCES, BAD)}
  accuracy = lines['accuracy']
  assert (accuracy.score.value, accuracy.baseline) == (pytest.approx(5 / 6), pytest.approx(0))
  assert accuracy.comparison.difference == pytest.approx(5 / 6)
  # Of 2**6 ways to swap sides only those of the five that differ count: 2 in 32.
  assert 0.03 < accuracy.comparison.p_value < 0.11
  same = tables.score(LABELS, GOOD, REFERENCES, GOOD)
  assert {line.comparison.p_value for line in same} == {1.0}
  with pytest.raises(ValueError, match='both systems must answer the same examples'):
    tables.score(LABELS, GOOD, REFERENCES, BAD[:3])


@pytest.mark.parametrize('tokens, compared', [(4, True), (5, False)])
def test_other_tokens_are_compared_by_their_bytes_alone(tokens, compared):
  metrics = dict.fromkeys(('perplexity', 'bits_per_byte'), lambda one: one)
  ours, theirs = [(-8.0, 4, 16)] * 3, [(-6.0, tokens, 16)] * 3
  lines = {line.name: line for line in tables.score(metrics, ours, [None] * 3, theirs)}
  assert lines['bits_per_byte'].comparison.difference > 0
  assert (lines['loss'].comparison is not None) == compared
  assert (lines['perplexity'].comparison is not None) == compared


def test_the_table_and_its_json():
  lines = tables.score({'accuracy': itemgetter('label')}, GOOD, REFERENCES, BAD)
  header, row = tables.render({'sentiment': lines}, {'sentiment': 6}).split('\n')
  assert header.split() == ['task', 'examples', 'score', 'value', '95%', 'interval', 'baseline',
                            'difference', '95%', 'interval', 'p']
  assert row.split()[:4] == ['sentiment', '6', 'accuracy', '0.8333'] and '+0.8333' in row
  alone = tables.render({'a': lines[:1], 'b': tables.score({}, GOOD, REFERENCES)}, {'a': 6, 'b': 6})
  assert len(alone.split('\n')) == 2
  found = tables.as_json(lines)['accuracy']
  assert found['value'] == pytest.approx(5 / 6) and found['comparison']['low'] > 0
