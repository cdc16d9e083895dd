"""The scores of a model on several tasks as one table, with intervals and a baseline beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.evaluation import statistics
from jaxllm.evaluation.statistics import Comparison, Interval


class Line(NamedTuple):
  """One number of a task.

  Attributes:
    name: of the number, such as 'accuracy'.
    score: of the model, with its interval.
    baseline: the number of the baseline, where there is one.
    comparison: the model minus the baseline, on the same examples.
  """

  name: str
  score: Interval
  baseline: float | None = None
  comparison: Comparison | None = None


def score(
  metrics: Mapping[str, Callable[[Any], Any]], predictions: Sequence[Any],
  references: Sequence[Any], baseline_predictions: Sequence[Any] | None = None,
) -> list[Line]:
  """Score the predictions of a task by all its metrics, with 95% intervals.

  Args:
    metrics: name in `scores.METRICS` -> what of a prediction it compares.
    predictions: one per example.
    references: one per example.
    baseline_predictions: those of a baseline for the same examples.

  Raises:
    ValueError: as `statistics.bootstrap`.
  """
  lines = []
  for metric, part in metrics.items():
    ours = [part(prediction) for prediction in predictions]
    found = statistics.bootstrap(metric, ours, references)
    lines += [Line(name, interval) for name, interval in found.items()]
    if baseline_predictions is None:
      continue
    theirs = [part(prediction) for prediction in baseline_predictions]
    compared = statistics.compare(metric, ours, theirs, references)
    # Loss and perplexity say nothing between models that count tokens differently.
    same_tokens = metric != 'perplexity' or [o[1] for o in ours] == [t[1] for t in theirs]
    for i, line in enumerate(lines):
      if line.name in found and same_tokens:
        comparison = compared[line.name]
        lines[i] = Line(*line[:2], line.score.value - comparison.difference, comparison)
  return lines


def render(tables: Mapping[str, Sequence[Line]], counts: Mapping[str, int]) -> str:
  """Return the tables of all tasks as text.

  Args:
    tables: name of a task -> its lines.
    counts: name of a task -> number of examples.
  """
  compared = any(line.comparison for lines in tables.values() for line in lines)
  rows = [['task', 'examples', 'score', 'value', '95% interval',
           *(['baseline', 'difference', '95% interval', 'p'] if compared else [])]]
  for task, lines in tables.items():
    for i, line in enumerate(lines):
      row = ['' if i else task, '' if i else f'{counts[task]:,}', line.name,
             number(line.score.value), _interval(line.score.low, line.score.high)]
      if line.comparison and line.baseline is not None:
        difference, low, high, p_value = line.comparison
        row += [number(line.baseline), f'{difference:+.4f}', _interval(low, high),
                f'{p_value:.3f}']
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


def as_json(lines: Sequence[Line]) -> dict[str, Any]:
  """Return the lines of a task as JSON-able values by the names of the numbers."""
  return {
    line.name: {
      **line.score._asdict(),
      **({} if line.comparison is None
         else {'baseline': line.baseline, 'comparison': line.comparison._asdict()}),
    }
    for line in lines}


def number(value: float) -> str:
  """Return a score with four digits that mean something, or all before the point."""
  whole = len(f'{abs(value):.0f}') if abs(value) >= 1 else 0
  return f'{value:,.{max(4 - whole, 0)}f}'


def _interval(low: float | None, high: float | None) -> str:
  return '-' if low is None or high is None else f'[{number(low)}, {number(high)}]'
