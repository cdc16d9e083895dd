"""Metrics of a server, for Prometheus."""

import dataclasses
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from jaxllm.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'


class Metrics:
  """What a server has done since its start; thread-safe.

  Args of the constructor:
    engine: whose statistics are told, of the moment.
    num_active: returns how many requests are worked on.
  """

  def __init__(self, engine: Engine, num_active: Callable[[], int]):
    self._registry = CollectorRegistry()
    self.requests = Counter(
      'jaxllm_requests', 'Requests answered; 499: the client had gone.', ['route', 'status'],
      registry=self._registry)
    self.request_seconds, self.first_token_seconds, self.token_seconds = (
      Histogram(f'jaxllm_{name}_seconds', text, buckets=buckets, registry=self._registry)
      for name, text, buckets in (
        ('request', 'Time to answer a request.', SECONDS),
        ('time_to_first_token', 'From a request to the first token of a choice.', SECONDS),
        ('time_per_output_token', 'Mean time between tokens of a choice.', TOKEN_SECONDS)))
    self._registry.register(_EngineCollector(engine, num_active))

  def text(self) -> bytes:
    """Return all metrics in Prometheus' text format."""
    return generate_latest(self._registry)


@dataclasses.dataclass(frozen=True, eq=False)
class _EngineCollector(Collector):
  """Statistics of an engine when they are asked for."""

  engine: Engine
  num_active: Callable[[], int]

  def collect(self) -> Iterator[Metric]:
    now = self.engine.statistics()
    for name in ('prompt_tokens', 'completion_tokens', 'prefix_hit_tokens', 'decode_steps',
                 'compilations'):
      yield CounterMetricFamily(f'jaxllm_{name}', name, getattr(now, name))
    gauges = {'requests_active': self.num_active(), 'queue_rows': now.queued,
              'slots': now.num_slots, 'slots_busy': now.busy_slots,
              'batch_fill_ratio': now.busy_slots / now.num_slots,
              'cache_tokens': now.cached_tokens, 'cache_capacity_tokens': now.capacity_tokens,
              'cache_fill_ratio': now.cached_tokens / now.capacity_tokens}
    for name, value in gauges.items():
      yield GaugeMetricFamily(f'jaxllm_{name}', name, value)
    finished = CounterMetricFamily('jaxllm_rows_finished', 'Rows that ended.', labels=['reason'])
    for reason, count in sorted(now.finished.items()):
      finished.add_metric([reason], count)
    yield finished
