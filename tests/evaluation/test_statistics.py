"""Intervals cover the truth, tests are exact where that can be counted, seeds decide everything."""

import numpy as np
import pytest

from jaxllm.evaluation import scores
from jaxllm.evaluation import tables as statistics


def _answers(seed, count, accuracy):
  rng = np.random.default_rng(seed)
  right = rng.random(count) < accuracy
  return ['yes' if r else 'no' for r in right], ['yes'] * count


def test_interval_covers_the_truth_about_as_often_as_it_says():
  hits = 0
  for seed in range(100):
    interval = statistics.bootstrap('accuracy', *_answers(seed, 200, 0.7), num_resamples=200)
    hits += interval['accuracy'].low <= 0.7 <= interval['accuracy'].high
  # Binomial(100, 0.95) is in this range with probability over 0.9999.
  assert 86 <= hits <= 100


def test_interval_of_a_mean_equals_the_normal_approximation():
  predictions, references = _answers(0, 1000, 0.6)
  value, low, high = statistics.bootstrap('accuracy', predictions, references)['accuracy']
  assert value == scores.score('accuracy', predictions, references)['accuracy']
  spread = 1.96 * np.sqrt(value * (1 - value) / 1000)
  assert (low, high) == pytest.approx((value - spread, value + spread), abs=0.006)


def wilson(right, count):
  """Wilson's interval as a formula of counts."""
  z, p = 1.959964, right / count
  center, scale = p + z * z / (2 * count), 1 + z * z / count
  half = z * np.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
  return (center - half) / scale, (center + half) / scale


@pytest.mark.parametrize('right, count', [(3, 3), (0, 3), (1, 1), (2, 3), (90, 100), (100, 100)])
def test_interval_of_a_share_is_wilsons(right, count):
  answers, references = ['y'] * right + ['n'] * (count - right), ['y'] * count
  for metric, name in (('accuracy', 'accuracy'), ('classification', 'accuracy'),
                       ('squad', 'exact_match')):
    truth = [[one] for one in references] if metric == 'squad' else references
    _, low, high = statistics.bootstrap(metric, answers, truth)[name]
    assert (low, high) == pytest.approx(wilson(right, count), abs=1e-6)
  if (right, count) == (3, 3):
    assert low == pytest.approx(0.4385, abs=1e-4) and high == 1


def test_no_score_is_certain_after_three_examples():
  right = ['a', 'b', 'a']
  for name, predictions in (('classification', right), ('squad', right),
                            ('calibration', [(one, 1.0) for one in right])):
    references = [[one] for one in right] if name == 'squad' else right
    for key, (value, low, high) in statistics.bootstrap(name, predictions, references).items():
      assert 0 <= low <= value <= high <= 1 and high - low > 0.3, key
    compared = statistics.compare(name, predictions, predictions, references)
    for key, (difference, low, high, _) in compared.items():
      assert low < -0.3 and difference == 0 and high > 0.3, key
  won = statistics.compare('accuracy', right, ['c'] * 3, right)['accuracy']
  assert won.difference == 1 and won.low < 0.1


def test_what_has_no_limits_has_no_interval_after_one_example():
  for rows in ([(-8.0, 4, 16)], [(-8.0, 4, 16)] * 5):
    found = statistics.bootstrap('perplexity', rows, [None] * len(rows))
    assert found['loss'] == (2.0, None, None)
    assert statistics.compare('perplexity', rows, rows, [None] * len(rows))['loss'][1:3] == (
      None, None)
  two = statistics.bootstrap('perplexity', [(-8.0, 4, 16), (-4.0, 4, 16)], [None] * 2)
  assert two['loss'] == (1.5, 1.0, 2.0)


def test_interval_of_values_between_the_limits_covers_their_mean():
  rng = np.random.default_rng(0)
  texts = ['a b c d e f'.rsplit(' ', n)[0] for n in range(1, 6)]
  values = [scores.token_f1(text, ['a b c d e f']) for text in texts]
  mean = np.mean(values)
  for count, least in ((5, 90), (200, 88)):
    hits = 0
    for _ in range(100):
      sampled = list(rng.choice(texts, count))
      found = statistics.bootstrap('squad', sampled, [['a b c d e f']] * count, num_resamples=2)
      hits += found['f1'].low <= mean <= found['f1'].high
    assert hits >= least
  # No wider than the normal approximation, but for what it adds.
  assert found['f1'].high - found['f1'].low < 1.1 * 3.92 * np.std(values) / np.sqrt(200)


def test_no_token_is_an_error_and_an_empty_example_changes_no_interval():
  for rows in ([(0.0, 0, 0)], [(0.0, 0, 0)] * 3):
    with pytest.raises(ValueError, match='no token is predicted'):
      statistics.bootstrap('perplexity', rows, [None] * len(rows))
  rows = [(0.0, 0, 0), (-8.0, 4, 16), (-4.0, 4, 16)]
  found = statistics.bootstrap('perplexity', rows, [None] * 3)
  assert found['perplexity'].low >= np.exp(1) and found['loss'] == (1.5, 1.0, 2.0)


def test_resampled_classification_equals_scores_of_the_resampled_examples():
  predictions, references = list('abcabcbb'), list('abbaccba')
  counts = np.array([2, 0, 1, 0, 3, 0, 0, 2])
  repeated = [[x for x, n in zip(xs, counts, strict=True) for _ in range(n)]
              for xs in (predictions, references)]
  rows = scores.rows('classification', predictions, references)
  values = scores.METRICS['classification'].values(counts @ rows)
  expected = scores.score('classification', *repeated)
  assert {name: float(value) for name, value in values.items()} == pytest.approx(expected)


def test_randomisation_equals_exact_enumeration():
  # Five discordant examples, all in favour of one side: 2 of the 2 ** 5 assignments are as large.
  ours, theirs = ['y'] * 10, ['n'] * 5 + ['y'] * 5
  found = statistics.compare('accuracy', ours, theirs, ['y'] * 10, num_resamples=20_000)
  assert found['accuracy'].difference == 0.5
  assert found['accuracy'].p_value == pytest.approx(2 / 2**5, abs=0.006)


def test_equal_systems_do_not_differ_and_worse_ones_do():
  predictions, references = _answers(1, 300, 0.8)
  same = statistics.compare('classification', predictions, predictions, references)
  assert all(c.difference == 0 and c.low < 0 < c.high and c.p_value == 1 for c in same.values())
  # Of 300 pairs none differs: the rule of three.
  assert same['accuracy'].high < 3.1 / 300
  worse, _ = _answers(2, 300, 0.5)
  found = statistics.compare('classification', predictions, worse, references)['accuracy']
  assert found.low > 0 and found.p_value == pytest.approx(1 / 1001)


def test_systems_with_other_labels_are_compared_over_all_labels():
  found = statistics.compare('classification', ['a', 'a'], ['b', 'c'], ['a', 'a'])
  assert found['accuracy'].difference == 1


def test_p_values_of_equally_good_systems_are_uniform():
  small = 0
  for seed in range(100):
    (a, references), (b, _) = _answers(seed, 60, 0.6), _answers(1000 + seed, 60, 0.6)
    found = statistics.compare('accuracy', a, b, references, num_resamples=200)
    small += found['accuracy'].p_value <= 0.1
  assert small <= 20


def test_the_seed_decides():
  data = _answers(3, 997, 0.5)
  first = statistics.bootstrap('classification', *data)
  assert statistics.bootstrap('classification', *data) == first
  assert statistics.bootstrap('classification', *data, seed=1) != first


def test_unequal_lengths_are_refused():
  with pytest.raises(ValueError, match='2 predictions and 1 of the baseline'):
    statistics.compare('accuracy', ['a', 'b'], ['a'], ['a', 'b'])


@pytest.mark.parity
def test_bleu_p_value_agrees_with_sacrebleu():
  significance = pytest.importorskip('sacrebleu.significance')
  from sacrebleu.metrics import BLEU

  rng = np.random.default_rng(0)
  words = np.array('a b c d e f g h i j'.split())
  references = [' '.join(rng.choice(words, 12)) for _ in range(60)]

  def damage(text, rate):
    return ' '.join('x' if rng.random() < rate else word for word in text.split())

  ours = [damage(text, 0.17) for text in references]
  theirs = [damage(text, 0.2) for text in references]
  found = statistics.compare('bleu', ours, theirs, references, num_resamples=2000)['bleu']
  _, theirs_result = significance.PairedTest(
    [('base', theirs), ('ours', ours)], {'bleu': BLEU(references=[references])}, None,
    test_type='ar', n_samples=2000,
  )()
  assert found.p_value == pytest.approx(theirs_result['BLEU'][1].p_value, abs=0.05)
