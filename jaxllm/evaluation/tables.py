"""How sure a score is: intervals, and paired tests of two systems on the same examples.

`score` does it for a task, with a baseline beside it; `render` makes a table of that. A mean over
examples has an interval that knows small numbers: three right answers of three do not prove that
all are right. Other scores are resampled. Where all resamples agree, they tell nothing: the
interval is then that of a mean of as many equal values, or none where the score has no limits.

Every metric is a function of sums over examples (`scores.Metric`), so a resample is a product of
example counts with the statistics of each example, which `scipy.stats` has not.

Axis letters: I examples, M statistics of one example, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from jaxllm.evaluation import scores

# Rows of the (R, I) matrix of counts that exist at once.
_CHUNK = 128


class Interval(NamedTuple):
  """A score and the interval that holds it at the level asked for; None: too few examples."""

  value: float
  low: float | None
  high: float | None


class Comparison(NamedTuple):
  """A system minus a baseline: the difference, its interval, and how likely chance gives it."""

  difference: float
  low: float | None
  high: float | None
  p_value: float


def bootstrap(
  name: str, predictions: Sequence[Any], references: Sequence[Any], num_resamples: int = 1000,
  level: float = 0.95, seed: int = 0,
) -> dict[str, Interval]:
  """Score predictions, with intervals: of means by Wilson's score, of others by the bootstrap.

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
    Significance Tests for Machine Translation Evaluation, 2004. Means: see `_mean_interval`.
  """
  rows_IM = scores.rows(name, predictions, references)
  metric = scores.METRICS[name]
  resampled = metric.values(_add_up(rows_IM, _draws, num_resamples, seed))
  single = metric.values(rows_IM)
  return {
    key: Interval(float(value), *_interval(metric, key, single[key], resampled[key], level, 0.0))
    for key, value in metric.values(rows_IM.sum(0)).items()}


def compare(
  name: str, predictions: Sequence[Any], baseline_predictions: Sequence[Any],
  references: Sequence[Any], num_resamples: int = 1000, level: float = 0.95, seed: int = 0,
) -> dict[str, Comparison]:
  """Compare two systems on the same examples.

  The intervals are those of `bootstrap`, of paired differences. The p-value is of approximate
  randomisation: how often the difference is at least as large when each example's two predictions
  change sides at random; it is two-sided and never below 1 / (R + 1).

  Arguments and errors as in `bootstrap`; the baseline too has one prediction per example.

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
  both_I2M = np.stack([ours_IM, theirs_IM], axis=1)
  resampled = metric.values(_add_up(both_I2M, _draws, num_resamples, seed))
  # What leaves one side arrives at the other.
  moved_RM = _add_up(ours_IM - theirs_IM, lambda rng, num_rows, num_examples: rng.integers(
    0, 2, size=(num_rows, num_examples)), num_resamples, seed)
  swapped = metric.values(ours_IM.sum(0) - moved_RM), metric.values(theirs_IM.sum(0) + moved_RM)
  single = metric.values(ours_IM), metric.values(theirs_IM)
  result = {}
  for key, value in ours.items():
    difference = float(value - theirs[key])
    # Sums in another order differ in their last digits.
    limit = abs(difference) * (1 - 1e-9)
    at_least = int((np.abs(swapped[0][key] - swapped[1][key]) >= limit).sum())
    interval = _interval(metric, key, single[0][key] - single[1][key],
                         resampled[key][:, 0] - resampled[key][:, 1], level, -1.0)
    result[key] = Comparison(difference, *interval, (at_least + 1) / (num_resamples + 1))
  return result


def _draws(rng: np.random.Generator, num_rows: int, num_examples: int) -> np.ndarray:
  return rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=num_rows)


def _add_up(
  rows: np.ndarray, weigh: Callable[[np.random.Generator, int, int], np.ndarray],
  num_resamples: int, seed: int,
) -> np.ndarray:
  """Return R sums of rows (I, ...), weighted at random by `weigh`."""
  rng = np.random.default_rng(seed)
  flat = rows.reshape(len(rows), -1)
  parts = [weigh(rng, min(_CHUNK, num_resamples - start), len(rows)).astype(float) @ flat
           for start in range(0, num_resamples, _CHUNK)]
  return np.concatenate(parts).reshape(num_resamples, *rows.shape[1:])


def _interval(
  metric: scores.Metric, key: str, values_I: np.ndarray, values_R: np.ndarray, level: float,
  least: float,
) -> tuple[float | None, float | None]:
  """Return the interval of a score between `least`, 0 or -1, and 1 times the metric's largest."""
  if key in metric.means:
    return _mean_interval(values_I, level, least)
  # A resample may hold nothing to measure.
  low, high = np.nanquantile(values_R, [(1 - level) / 2, (1 + level) / 2])
  if high - low > 1e-9 * max(abs(low), abs(high)):
    return float(low), float(high)
  if metric.largest is None:
    return None, None
  return _mean_interval(np.full(len(values_I), low), level, least * metric.largest, metric.largest)


def _mean_interval(
  values_I: np.ndarray, level: float, least: float = 0.0, largest: float = 1.0
) -> tuple[float, float]:
  """Return the interval of the mean of values that lie between two limits.

  Of zeros and ones it is Wilson's. Other values vary less, and count as more examples in
  proportion; their variance is estimated with one value at each limit added, so that equal values
  do not pass for certain ones.

  Reference:
    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927; effective
    numbers of examples: Korn and Graubard, Confidence Intervals for Proportions With Small Expected
    Number of Positive Counts Estimated From Survey Data, 1998.
  """
  x_I = np.clip((values_I - least) / (largest - least), 0, 1)
  added = np.concatenate([x_I, [0, 1]])
  spread = added.var() / (added.mean() * (1 - added.mean()))
  count, mean = len(x_I) / spread, x_I.mean()
  z = NormalDist().inv_cdf((1 + level) / 2)
  center = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
  half = z / (1 + z**2 / count) * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
  return tuple(float(least + (largest - least) * min(max(edge, 0), 1))  # type: ignore[return-value]
               for edge in (center - half, center + half))


Scores = dict[str, dict[str, Any]]
"""Name of a number, such as 'accuracy' -> {'value', 'low', 'high'}, its 95% interval; beside a
baseline also {'baseline', 'comparison'}: its number, and the `Comparison` with it."""


def score(
  metrics: Mapping[str, Callable[[Any], Any]], predictions: Sequence[Any],
  references: Sequence[Any], baseline_predictions: Sequence[Any] | None = None,
) -> Scores:
  """Score the predictions of a task by all its metrics, with 95% intervals.

  Args:
    metrics: name in `scores.METRICS` -> the part of a prediction that it compares.
    predictions: one per example.
    references: one per example.
    baseline_predictions: those of a baseline for the same examples.

  Raises:
    ValueError: as `bootstrap`.
  """
  scores: Scores = {}
  for metric, part in metrics.items():
    ours = [part(prediction) for prediction in predictions]
    found = {name: interval._asdict() for name, interval in
             bootstrap(metric, ours, references).items()}
    theirs = [part(prediction) for prediction in baseline_predictions or ()]
    # Loss and perplexity say nothing between models that count tokens differently.
    if baseline_predictions is not None and (
        metric != 'perplexity' or [o[1] for o in ours] == [t[1] for t in theirs]):
      for name, one in compare(metric, ours, theirs, references).items():
        found[name] |= {'baseline': found[name]['value'] - one.difference,
                        'comparison': one._asdict()}
    scores |= found
  return scores


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Return the scores of all tasks, name -> {'examples', 'scores'}, as a table."""
  compared = any(
    'comparison' in one for result in results.values() for one in result['scores'].values())
  rows = [['task', 'examples', 'score', 'value', '95% interval',
           *(['baseline', 'difference', '95% interval', 'p'] if compared else [])]]
  for task, result in results.items():
    for i, (name, one) in enumerate(result['scores'].items()):
      row = ['' if i else task, '' if i else f'{result["examples"]:,}', name,
             number(one['value']), _shown(one)]
      if comparison := one.get('comparison'):
        row += [number(one['baseline']), f'{comparison["difference"]:+.4f}', _shown(comparison),
                f'{comparison["p_value"]:.3f}']
      rows.append(row + [''] * (len(rows[0]) - len(row)))
  return aligned(rows, left=(0, 2))


def render_confusion(confusion: Mapping[str, Any]) -> str:
  """Return a confusion matrix, {'labels', 'counts'}, as text; a row is what is true."""
  labels, counts = confusion['labels'], confusion['counts']
  rows = [['true \\ said', *labels],
          *([label, *map(str, row)] for label, row in zip(labels, counts, strict=True))]
  return aligned(rows)


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
  """Return rows as lines; the columns named in `left` are aligned to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(cell.ljust(width) if i in left else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
    for row in rows)


def number(value: float) -> str:
  """Return a score with four digits that mean something, or all before the point."""
  whole = len(f'{abs(value):.0f}') if abs(value) >= 1 else 0
  return f'{value:,.{max(4 - whole, 0)}f}'


def _shown(bounds: Mapping[str, float | None]) -> str:
  low, high = bounds['low'], bounds['high']
  return '-' if low is None or high is None else f'[{number(low)}, {number(high)}]'
