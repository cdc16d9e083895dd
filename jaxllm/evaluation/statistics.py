"""How sure a score is: bootstrap intervals, and paired tests of two systems on the same examples.

Every metric is a function of sums over examples (`scores.Metric`), so a resample is a product of
example counts with the statistics of each example; nothing is scored twice.

Axis letters: I examples, M statistics of one example, R resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.evaluation import scores

# Rows of the (R, I) matrix of counts that exist at once.
_CHUNK = 128


class Interval(NamedTuple):
  """A score and the interval that holds it at the level asked for."""

  value: float
  low: float
  high: float


class Comparison(NamedTuple):
  """A system minus a baseline: the difference, its interval, and how likely chance gives it."""

  difference: float
  low: float
  high: float
  p_value: float


def bootstrap(
  name: str,
  predictions: Sequence[Any],
  references: Sequence[Any],
  num_resamples: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> dict[str, Interval]:
  """Score predictions, with percentile bootstrap intervals.

  Args:
    name: of one of `scores.METRICS`.
    predictions: one per example.
    references: one per example.
    num_resamples: R.
    level: probability mass of the interval, in (0, 1).
    seed: the same seed gives the same interval.

  Raises:
    ValueError: as `scores.score`.

  Reference:
    Efron, Bootstrap Methods: Another Look at the Jackknife, 1979; for BLEU Koehn, Statistical
    Significance Tests for Machine Translation Evaluation, 2004.
  """
  rows_IM = scores.rows(name, predictions, references)
  metric = scores.METRICS[name]
  resampled = metric.values(_add_up(rows_IM, _draws, num_resamples, seed))
  return {
    key: Interval(float(value), *_percentiles(resampled[key], level))
    for key, value in metric.values(rows_IM.sum(0)).items()
  }


def compare(
  name: str,
  predictions: Sequence[Any],
  baseline_predictions: Sequence[Any],
  references: Sequence[Any],
  num_resamples: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> dict[str, Comparison]:
  """Compare two systems on the same examples.

  The interval is a paired bootstrap. The p-value is of approximate randomisation: how often the
  difference is at least as large when each example's two predictions change sides at random; it is
  two-sided and never below 1 / (R + 1).

  Args:
    name: of one of `scores.METRICS`.
    predictions: of the system, one per example.
    baseline_predictions: of the baseline, one per example.
    references: one per example.
    num_resamples: R.
    level: probability mass of the interval.
    seed: the same seed gives the same result.

  Raises:
    ValueError: as `scores.score`.

  Reference:
    Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; Riezler and Maxwell, On Some
    Pitfalls in Automatic Evaluation and Significance Testing for MT, 2005.
  """
  if len(predictions) != len(baseline_predictions):
    raise ValueError(f'{len(predictions)} predictions and {len(baseline_predictions)} of the '
                     'baseline: both systems must answer the same examples')
  metric = scores.METRICS[name]
  # Scored in one go, so that the statistics of both have the same columns.
  rows = scores.rows(name, [*predictions, *baseline_predictions], [*references, *references])
  ours_IM, theirs_IM = np.split(rows, 2)
  ours, theirs = metric.values(ours_IM.sum(0)), metric.values(theirs_IM.sum(0))
  resampled = metric.values(
    _add_up(np.stack([ours_IM, theirs_IM], axis=1), _draws, num_resamples, seed)
  )
  # What leaves one side arrives at the other.
  moved_RM = _add_up(ours_IM - theirs_IM, _coins, num_resamples, seed)
  swapped = metric.values(ours_IM.sum(0) - moved_RM), metric.values(theirs_IM.sum(0) + moved_RM)
  result = {}
  for key, value in ours.items():
    difference = float(value - theirs[key])
    # Sums in another order differ in their last digits.
    limit = abs(difference) * (1 - 1e-9)
    at_least = int((np.abs(swapped[0][key] - swapped[1][key]) >= limit).sum())
    interval = _percentiles(resampled[key][:, 0] - resampled[key][:, 1], level)
    result[key] = Comparison(difference, *interval, (at_least + 1) / (num_resamples + 1))
  return result


def _draws(rng: np.random.Generator, num_rows: int, num_examples: int) -> np.ndarray:
  return rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=num_rows)


def _coins(rng: np.random.Generator, num_rows: int, num_examples: int) -> np.ndarray:
  return rng.integers(0, 2, size=(num_rows, num_examples))


def _add_up(
  rows: np.ndarray,
  weigh: Callable[[np.random.Generator, int, int], np.ndarray],
  num_resamples: int,
  seed: int,
) -> np.ndarray:
  """Return R sums of rows (I, ...), weighted at random by `weigh`."""
  rng = np.random.default_rng(seed)
  flat = rows.reshape(len(rows), -1)

  def parts() -> Iterator[np.ndarray]:
    for start in range(0, num_resamples, _CHUNK):
      yield weigh(rng, min(_CHUNK, num_resamples - start), len(rows)).astype(float) @ flat

  return np.concatenate(list(parts())).reshape(num_resamples, *rows.shape[1:])


def _percentiles(values_R: np.ndarray, level: float) -> tuple[float, float]:
  low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
