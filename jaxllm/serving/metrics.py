"""Counters and histograms in Prometheus' text format."""

import bisect
import threading
from collections.abc import Iterable, Mapping, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

Sample = tuple[Mapping[str, str], float]


class Histogram:
  """How often a value fell below each of some bounds."""

  def __init__(self, bounds: Sequence[float]):
    self._bounds = tuple(bounds)
    self._counts = [0] * (len(bounds) + 1)
    self._sum = 0.0

  def observe(self, value: float) -> None:
    """Count a value."""
    self._counts[bisect.bisect_left(self._bounds, value)] += 1
    self._sum += value

  def lines(self, name: str) -> list[str]:
    """Return it as text."""
    lines, total = [f'# TYPE {name} histogram'], 0
    bounds = [*(f'{bound:g}' for bound in self._bounds), '+Inf']
    for bound, count in zip(bounds, self._counts, strict=True):
      total += count
      lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f'{name}_sum {self._sum:.9g}', f'{name}_count {total}']


class Metrics:
  """What the server has done since its start; thread-safe."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._requests: dict[tuple[str, int], int] = {}
    self._histograms = {
      'jaxllm_request_seconds': Histogram(SECONDS),
      'jaxllm_time_to_first_token_seconds': Histogram(SECONDS),
      'jaxllm_time_per_output_token_seconds': Histogram(TOKEN_SECONDS),
    }

  def request(self, route: str, status: int, seconds: float) -> None:
    """Count a request that has been answered; a status of 499: its client went away."""
    with self._lock:
      self._requests[route, status] = self._requests.get((route, status), 0) + 1
      self._histograms['jaxllm_request_seconds'].observe(seconds)

  def first_token(self, seconds: float) -> None:
    """Count the time from a request's arrival to the first token of a choice."""
    with self._lock:
      self._histograms['jaxllm_time_to_first_token_seconds'].observe(seconds)

  def per_token(self, seconds: float) -> None:
    """Count the mean time between the tokens of a choice."""
    with self._lock:
      self._histograms['jaxllm_time_per_output_token_seconds'].observe(seconds)

  def text(self, measured: Iterable[tuple[str, str, Sequence[Sample]]] = ()) -> str:
    """Return all metrics.

    Args:
      measured: further ones, of the moment: name, 'counter' or 'gauge', (labels, value) each.
    """
    with self._lock:
      requests: list[Sample] = [
        ({'route': route, 'status': str(status)}, count)
        for (route, status), count in sorted(self._requests.items())]
      lines = _lines('jaxllm_requests_total', 'counter', requests)
      for name, histogram in self._histograms.items():
        lines += histogram.lines(name)
    for name, kind, samples in measured:
      lines += _lines(name, kind, samples)
    return '\n'.join(lines) + '\n'


def _lines(name: str, kind: str, samples: Sequence[Sample]) -> list[str]:
  lines = [f'# TYPE {name} {kind}']
  for labels, value in samples:
    inside = ','.join(f'{key}="{text}"' for key, text in labels.items())
    lines.append(f'{name}{{{inside}}} {value:.12g}' if inside else f'{name} {value:.12g}')
  return lines
