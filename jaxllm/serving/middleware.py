"""Middleware around all routes: access, headers, errors, metrics and the log."""

import logging
import secrets
import time
import traceback
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from jaxllm.serving.errors import ApiError
from jaxllm.serving.keys import Keys, access_error
from jaxllm.serving.metrics import Metrics

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
  """Check, count and log every request, and answer its errors.

  Args of the constructor:
    router: the routes.
    keys: see `access_error`.
    hosts: see there.
    metrics: counts requests.
  """

  def __init__(self, router: Router, keys: Keys, hosts: Sequence[str] | None, metrics: Metrics):
    # Starlette's own app would raise an error again for the server to log, prompt and all.
    self._app = ExceptionMiddleware(
      router, {ApiError: _told, HTTPException: _told, Exception: _told})
    self._keys, self._hosts, self._metrics = keys, hosts, metrics
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
      error = access_error(request, self._keys, self._hosts)
      await (error.response() if error else self._app)(scope, receive, send_on)
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
