"""Middleware around all routes: access, headers, errors, the log, and metrics for Prometheus."""

import asyncio
import dataclasses
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from jaxllm.serving.access import ApiError, Keys, WrongKeys, check_access
from jaxllm.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'


class Metrics:
  """What a server has done since its start, and its engine's statistics now; thread-safe."""

  def __init__(self, engine: Engine, num_active: Callable[[], int]):
    prometheus.disable_created_metrics()
    self._registry = prometheus.CollectorRegistry()
    self.requests = prometheus.Counter(
      'jaxllm_requests', 'Requests answered; 499: the client had gone.', ['route', 'status'],
      registry=self._registry)
    self.request_seconds, self.first_token_seconds, self.token_seconds = (
      prometheus.Histogram(f'jaxllm_{name}_seconds', text, buckets=buckets, registry=self._registry)
      for name, text, buckets in (
        ('request', 'Time to answer a request.', SECONDS),
        ('time_to_first_token', 'From a request to the first token of a choice.', SECONDS),
        ('time_per_output_token', 'Mean time between tokens of a choice.', TOKEN_SECONDS)))
    self._registry.register(_EngineCollector(engine, num_active))

  def text(self) -> bytes:
    """Return all metrics in Prometheus' text format."""
    return prometheus.generate_latest(self._registry)


@dataclasses.dataclass(frozen=True, eq=False)
class _EngineCollector(Collector):
  """Statistics of an engine when they are asked for."""

  engine: Engine
  num_active: Callable[[], int]

  def collect(self) -> Iterator[prometheus.Metric]:
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


DISCONNECTED = 499
_METHODS = ('GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS')
_HEADERS = {
  'content-security-policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
}
_ROUTING = {404: ('there is no such route', 'not_found'),
            405: ('the route is not for this method', 'method_not_allowed')}
_LOG = logging.getLogger('jaxllm.serving')


class RequestMiddleware:
  """Check every request by `check_access`, count and log it, and answer its errors."""

  def __init__(self, router: Router, keys: Keys, hosts: Sequence[str] | None, metrics: Metrics):
    # Starlette's own app would raise an error again for the server to log, prompt and all.
    self._app = ExceptionMiddleware(
      router, {ApiError: _told, HTTPException: _told, Exception: _told})
    self._keys, self._hosts, self._metrics = keys, hosts, metrics
    self._wrong_keys = WrongKeys()
    self._paths: dict[Any, str] = {route.endpoint: route.path for route in router.routes
                               if isinstance(route, Route)}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request."""
    scope['app'] = self  # By which the router knows that errors are answered here.
    request, status, started = Request(scope), DISCONNECTED, time.monotonic()

    async def send_on(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        headers = MutableHeaders(scope=message)
        headers.update({**_HEADERS, 'x-request-id': f'req_{secrets.token_hex(12)}'})
      await send(message)

    try:
      scope['jaxllm.client'] = check_access(request, self._keys, self._hosts)
      await self._app(scope, receive, send_on)
    except ApiError as error:  # Of the access.
      if error.status == 401 and 'authorization' in request.headers:
        await asyncio.sleep(self._wrong_keys.delay(request.client.host if request.client else ''))
      await error.response()(scope, receive, send_on)
    finally:
      seconds = time.monotonic() - started
      route = self._paths.get(scope.get('endpoint'), 'other')
      self._metrics.requests.labels(route, status).inc()
      self._metrics.request_seconds.observe(seconds)
      method = request.method if request.method in _METHODS else 'OTHER'
      _LOG.info('%s %s %d %.3f s', method, route, status, seconds)


async def _told(request: Request, error: Exception) -> Response:
  """Return what a client is told of an error."""
  if isinstance(error, HTTPException):  # Of the router.
    message, code = _ROUTING.get(error.status_code, (error.detail, None))
    error = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
  return (error if isinstance(error, ApiError) else failure(error)).response()


def failure(error: BaseException) -> ApiError:
  """Log what failed and where, without the message, which may repeat a prompt; return the error."""
  _LOG.error('%s\n%s', type(error).__name__, ''.join(traceback.format_tb(error.__traceback__)))
  return ApiError(500, 'the server failed; it is not your request')
