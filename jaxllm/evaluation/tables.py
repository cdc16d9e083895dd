"""The scores of a model on several tasks as one table, with intervals and a baseline beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.evaluation import statistics

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
    ValueError: as `statistics.bootstrap`.
  """
  scores: Scores = {}
  for metric, part in metrics.items():
    ours = [part(prediction) for prediction in predictions]
    found = {name: interval._asdict() for name, interval in
             statistics.bootstrap(metric, ours, references).items()}
    theirs = [part(prediction) for prediction in baseline_predictions or ()]
    # Loss and perplexity say nothing between models that count tokens differently.
    if baseline_predictions is not None and (
        metric != 'perplexity' or [o[1] for o in ours] == [t[1] for t in theirs]):
      for name, one in statistics.compare(metric, ours, theirs, references).items():
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
             number(one['value']), _interval(one)]
      if comparison := one.get('comparison'):
        row += [number(one['baseline']), f'{comparison["difference"]:+.4f}', _interval(comparison),
                f'{comparison["p_value"]:.3f}']
      rows.append(row + [''] * (len(rows[0]) - len(row)))
  return _aligned(rows, left=(0, 2))


def render_confusion(confusion: Mapping[str, Any]) -> str:
  """Return a confusion matrix, {'labels', 'counts'}, as text; a row is what is true."""
  labels, counts = confusion['labels'], confusion['counts']
  rows = [['true \\ said', *labels],
          *([label, *map(str, row)] for label, row in zip(labels, counts, strict=True))]
  return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
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


def _interval(bounds: Mapping[str, float | None]) -> str:
  low, high = bounds['low'], bounds['high']
  return '-' if low is None or high is None else f'[{number(low)}, {number(high)}]'
