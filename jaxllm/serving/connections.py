"""uvicorn's HTTP/1.1 connections with limits of time and number.

By hand, since uvicorn has no time limit for headers, for bodies, or for a client that reads nothing
of its answer, and answers in plain text where a request is no HTTP or connections are too many.
"""

import asyncio
import http
import resource
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxllm.serving.access import ApiError, LimitsConfig

# The app answers a body that is too slow; this much later the connection breaks, answered or not.
LINGER_SECONDS = 5.0
# How long a connection may wait for its next request.
KEEP_SECONDS = 30
# Connections that are taken in at a time, and open files beside those of counted connections.
BACKLOG = 1024
SPARE_FILES = BACKLOG + 256
# How long clients may take in that their answers were ended.
FAREWELL_SECONDS = 15


class LimitedProtocol(H11Protocol):
  """A connection with limits; `settings` makes the class that has them."""

  limits: LimitsConfig
  _timer: asyncio.TimerHandle | None = None
  _wait: tuple[float, str, Any] | None = None
  _since = 0.0

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    """Look at the connection from now on, or refuse one too many."""
    super().connection_made(transport)
    if len(self.connections) > self.limits.max_connections:
      self._refuse(ApiError(503, 'there are too many connections; come back later',
                            code='too_many_connections', headers={'Retry-After': '5'}))
    self._look()

  def connection_lost(self, exc: Exception | None) -> None:
    """Look no more."""
    super().connection_lost(exc)
    if self._timer is not None:
      self._timer.cancel()

  def send_400_response(self, msg: str) -> None:
    """Refuse bytes that are no HTTP, or headers that are too large."""
    error = sys.exc_info()[1]
    status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
    if status == 431:
      self._refuse(ApiError(
        431, f'the headers have more than {self.limits.max_header_bytes} bytes',
        code='headers_too_large'))
    else:
      self._refuse(ApiError(400, 'this is no valid HTTP/1.1 request', code='invalid_http'))

  def _look(self) -> None:
    """Break the connection if its client lets it wait too long; look again soon."""
    wait, now = self._waiting(), self.loop.time()
    if wait != self._wait:
      self._wait, self._since = wait, now
    elif wait is not None and now - self._since >= wait[0]:
      if wait[1] != 'headers' or self.transport.is_closing():
        self.transport.abort()
        return
      self._refuse(ApiError(
        408, f'the headers did not arrive within {self.limits.header_seconds:g} seconds',
        code='request_timeout'))
    soon = min(self.limits.header_seconds, self.limits.body_seconds, self.limits.send_seconds) / 8
    self._timer = self.loop.call_later(min(soon, 1.0), self._look)

  def _waiting(self) -> tuple[float, str, Any] | None:
    """Return (seconds that it may take, what the client has to send or to take, what of it)."""
    state, unsent = self.conn.their_state, self.transport.get_write_buffer_size()
    if unsent:
      return self.limits.send_seconds, 'answer', unsent
    if state is h11.SEND_BODY:
      return self.limits.body_seconds + LINGER_SECONDS, 'body', self.cycle
    if state is h11.IDLE and self.timeout_keep_alive_task is None:
      return self.limits.header_seconds, 'headers', self.cycle
    return None

  def _refuse(self, error: ApiError) -> None:
    """Send an error without asking the app, and close."""
    response = error.response()
    headers = [*response.raw_headers, (b'connection', b'close')]
    reason = http.HTTPStatus(error.status).phrase
    try:
      for event in (h11.Response(status_code=error.status, headers=headers, reason=reason),
                    h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
        self.transport.write(self.conn.send(event) or b'')
    except h11.LocalProtocolError:
      # A response is under way.
      self.transport.abort()
    self.transport.close()
    if self.cycle is not None:
      # The app may answer too.
      self.cycle.disconnected = True


class Server(uvicorn.Server):
  """A uvicorn server that calls `end` in a thread when it is told to stop.

  Answers that `end` cuts short end with an error; uvicorn alone would drop their connections.
  """

  def __init__(self, config: uvicorn.Config, end: Callable[[], None]):
    super().__init__(config)
    self._end_answers = end

  async def shutdown(self, sockets: Any = None) -> None:
    """Accept no more requests; return when all accepted ones are answered or ended."""
    ending = asyncio.create_task(asyncio.to_thread(self._end_answers))
    await super().shutdown(sockets)
    await ending


def fitting(limits: LimitsConfig) -> LimitsConfig:
  """Raise the limit of open files; return limits whose connections fit it.

  Without files left, asyncio logs and retries as fast as it can.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = limits.max_connections + SPARE_FILES
  if soft == resource.RLIM_INFINITY or soft >= wanted:
    return limits
  soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  return limits.replace(max_connections=max(soft - SPARE_FILES, soft // 4))


def settings(limits: LimitsConfig) -> dict[str, Any]:
  """Return the arguments of `uvicorn.Config` that go with these limits."""
  return {
    'http': type('Limited', (LimitedProtocol,), {'limits': limits}),
    'backlog': BACKLOG, 'ws': 'none', 'lifespan': 'off', 'loop': 'asyncio',
    'h11_max_incomplete_event_size': limits.max_header_bytes, 'timeout_keep_alive': KEEP_SECONDS,
    'timeout_graceful_shutdown': limits.drain_seconds + FAREWELL_SECONDS,
    # The middleware logs requests, without the text that a client wrote into their paths.
    'access_log': False, 'log_config': None, 'server_header': False, 'proxy_headers': False}
