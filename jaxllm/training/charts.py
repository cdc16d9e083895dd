"""Line charts as numbers and SVG paths, for a template to draw.

Everything is placed in a square of 100 units, which the page stretches to any width; labels stand
beside the drawing, so that text keeps its size on a phone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_MAX_BUCKETS = 400
_MAX_MARKS = 60


class Line(NamedTuple):
  """One line.

  Attributes:
    label: for the legend; empty for none.
    style: its CSS class. The points of 'validation' are marked, where there are not too many.
    steps: int, ascending.
    values: float64, finite, as many.
  """

  label: str
  style: str
  steps: np.ndarray
  values: np.ndarray


def line(records: Sequence[Mapping[str, Any]], name: str, label: str, style: str) -> Line:
  """Collect the finite values of a metric from records."""
  found = [(r['step'], r[name]) for r in records
           if isinstance(r.get(name), int | float) and math.isfinite(r[name])]
  steps, values = zip(*found, strict=True) if found else ((), ())
  return Line(label, style, np.array(steps, int), np.array(values, float))


def smooth(noisy: Line, label: str, style: str) -> Line:
  """Return the running mean over about a twentieth of the points, spikes left out.

  The mean is that of each window's middle half. The window narrows towards the first point, where
  metrics fall steeply, and is cut off at the last one, where they are noise.
  """
  count = len(noisy.values)
  centres = np.unique(np.linspace(0, count - 1, min(count, _MAX_BUCKETS)).round().astype(int))
  means = []
  for centre in centres:
    half = min(count // 40, centre)
    window = np.sort(noisy.values[centre - half : centre + half + 1])
    cut = len(window) // 4
    means.append(window[cut : len(window) - cut].mean())
  return Line(label, style, noisy.steps[centres], np.array(means))


def chart(
  title: str, lines: Sequence[Line], text: Callable[[float], str], num_ticks: int = 6,
  log: bool = False,
) -> dict[str, Any] | None:
  """Lay out a chart.

  Args:
    title: of the chart.
    lines: drawn in this order; empty ones are left out.
    text: writes a value for a label.
    num_ticks: about how many along the steps.
    log: whether the value axis is logarithmic; only where all values are positive and span more
      than a factor of 3.

  Returns:
    What the template draws: `title`, `lines` (label, style, path, marked points and the latest
    value), `x_ticks` and `y_ticks` (label and place). None where there is no point.
  """
  lines = [line for line in lines if len(line.steps)]
  if not lines:
    return None
  everything = np.concatenate([line.values for line in lines])
  low, high = float(everything.min()), float(everything.max())
  log = log and 0 < 3 * low < high
  if high - low <= 1e-9 * abs(high):
    margin = abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
  scale: Any = np.log if log else np.asarray
  last_step = max(*(line.steps[-1] for line in lines), 1)

  def x(step: Any) -> Any:
    return 100 * step / last_step

  def y(value: Any) -> Any:
    return 100 * (scale(high) - scale(value)) / (scale(high) - scale(low))

  drawn = []
  for label, style, steps, values in lines:
    steps, values = _thin(steps, values)
    places = [f'{a:.2f} {b:.2f}' for a, b in zip(x(steps), y(values), strict=True)]
    marked = len(places) == 1 or (style == 'validation' and len(places) <= _MAX_MARKS)
    points = [{'place': place, 'label': f'step {step:,}: {text(value)}'}
              for place, step, value in zip(places, steps, values, strict=True) if marked]
    drawn.append({'label': label, 'style': style, 'latest': text(float(f'{values[-1]:.4g}')),
                  'path': 'M' + 'L'.join(places), 'points': points})
  y_ticks = (_log_ticks if log else _linear_ticks)(low, high, 5)
  return {
    'title': title,
    'lines': drawn,
    'x_ticks': [{'label': compact(tick), 'place': round(x(tick), 2)}
                for tick in _linear_ticks(0, last_step, num_ticks, smallest=1)],
    'y_ticks': [{'label': text(tick), 'place': round(float(y(tick)), 2)} for tick in y_ticks],
  }


def compact(value: float) -> str:
  """Return a number short enough for an axis: 950, 12.5k, 3.1M, 2.5e-4."""
  for limit, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= limit * 0.99995:
      return f'{value / limit:.4g}{unit}'
  if 0 < abs(value) < 0.000995:
    digits, _, power = f'{value:.2e}'.partition('e')
    return f'{float(digits):g}e{int(power)}'
  return f'{value:.4g}'


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Keep each bucket's smallest and largest value, and the ends: spikes stay visible."""
  if len(steps) <= 2 * _MAX_BUCKETS:
    return steps, values
  kept = {0, len(steps) - 1}
  for bucket in np.array_split(np.arange(len(steps)), _MAX_BUCKETS):
    kept |= {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
  index = sorted(kept)
  return steps[index], values[index]


def _linear_ticks(low: float, high: float, count: int, smallest: float = 0) -> list[float]:
  """Return round numbers in [low, high], about `count` of them, at least `smallest` apart."""
  rough = max((high - low) / max(count - 1, 1), smallest) or 1.0
  power = 10.0 ** math.floor(math.log10(rough))
  gap = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
  first = math.ceil(low / gap - 1e-9)
  return [round(i * gap, 12) for i in range(first, math.floor(high / gap + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
  """Return round numbers in [low, high], about `count` of them, evenly over its logarithm."""
  digits = 1 if high > 5 * low else 2
  ticks = {float(f'{tick:.{digits}g}') for tick in np.geomspace(low, high, count)}
  return sorted(tick for tick in ticks if low <= tick <= high)
