"""Line charts as plain numbers and SVG paths, for a template to draw.

Paths live in a square of `SIZE` units that the page stretches to any width; labels are placed in
per cent, so that text keeps its size on a phone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SIZE = 1000
_MAX_BUCKETS = 400
_MAX_POINTS = 60


class Series(NamedTuple):
  """One line: its name, how it looks, and its finite points.

  Attributes:
    label: for the legend; empty for none.
    style: CSS class of the line.
    steps: int, ascending.
    values: float64, as many.
    points: whether points are marked and labelled, where there are not too many.
  """

  label: str
  style: str
  steps: np.ndarray
  values: np.ndarray
  points: bool = False


def series(
  records: Sequence[Mapping[str, Any]], name: str, label: str, style: str, points: bool = False
) -> Series:
  """Collect the finite values of a metric from records."""
  found = [(r['step'], r[name]) for r in records if isinstance(r.get(name), int | float)]
  found = [(step, value) for step, value in found if math.isfinite(value)]
  steps, values = zip(*found, strict=True) if found else ((), ())
  return Series(label, style, np.array(steps, int), np.array(values, float), points)


def smooth(line: Series, label: str, style: str) -> Series:
  """Return the running mean over about a twentieth of the points, spikes left out.

  The mean is that of each window's middle half. The window narrows towards the first point, where
  metrics fall steeply, and is cut off at the last one, where they are noise.
  """
  count = len(line.values)
  centres = np.unique(np.linspace(0, count - 1, min(count, _MAX_BUCKETS)).round().astype(int))
  means = []
  for centre in centres:
    half = min(count // 40, centre)
    window = np.sort(line.values[centre - half : centre + half + 1])
    cut = len(window) // 4
    means.append(window[cut : len(window) - cut].mean())
  return Series(label, style, line.steps[centres], np.array(means))


def chart(
  title: str,
  lines: Sequence[Series],
  text: Callable[[float], str],
  num_ticks: tuple[int, int] = (6, 5),
  log: bool = False,
) -> dict[str, Any] | None:
  """Lay out a chart.

  Args:
    title: of the chart.
    lines: drawn in this order; empty ones are left out.
    text: writes a value for a label.
    num_ticks: about how many along the steps and along the values.
    log: whether the value axis is logarithmic; only where all values are positive and span more
      than a factor of 3.

  Returns:
    What the template draws: `title`, `latest` (the last value), `lines` (label, style, path and
    points), `x_ticks` and `y_ticks` (label and place in per cent). None where there is no point.
  """
  lines = [line for line in lines if len(line.steps)]
  if not lines:
    return None
  values = np.concatenate([line.values for line in lines])
  low, high = float(values.min()), float(values.max())
  log = log and 0 < 3 * low < high
  if high - low <= 1e-9 * abs(high):
    margin = abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
  last_step = max(int(line.steps[-1]) for line in lines)

  def x(step: float) -> float:
    return step / max(last_step, 1)

  def y(value: float) -> float:
    if log:
      return math.log(high / value) / math.log(high / low)
    return (high - value) / (high - low)

  return {
    'title': title,
    'latest': text(float(f'{lines[-1].values[-1]:.3g}')),
    'lines': [_draw(line, x, y, text) for line in lines],
    'x_ticks': [
      {'label': compact(tick), 'place': round(100 * x(tick), 2)}
      for tick in _linear_ticks(0, last_step, num_ticks[0], smallest=1)
    ],
    'y_ticks': [
      {'label': text(tick), 'place': round(100 * y(tick), 2)}
      for tick in (_log_ticks if log else _linear_ticks)(low, high, num_ticks[1])
    ],
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


def _draw(
  line: Series, x: Callable[[float], float], y: Callable[[float], float],
  text: Callable[[float], str],
) -> dict[str, Any]:
  steps, values = _thin(line.steps, line.values)
  places = [
    f'{SIZE * x(step):.1f} {SIZE * y(value):.1f}' for step, value in zip(steps, values, strict=True)
  ]
  points = []
  if (line.points and len(places) <= _MAX_POINTS) or len(places) == 1:
    points = [
      {'place': place, 'label': f'step {step:,}: {text(value)}'}
      for place, step, value in zip(places, steps, values, strict=True)
    ]
  return {'label': line.label, 'style': line.style, 'latest': text(float(line.values[-1])),
          'path': 'M' + 'L'.join(places), 'points': points}


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
