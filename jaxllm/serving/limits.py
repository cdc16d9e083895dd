"""Who may ask, how much, and how long it may take.

- `LimitsConfig` are the limits of requests and connections.
- `Keys` are the API keys; `Guard` stands before the app and lets nobody pass without one.
- `read_body` takes in a body of bounded size in bounded time.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import os
import pathlib
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import pydantic
from starlette.exceptions import HTTPException

from jaxllm.config import Config
from jaxllm.serving.errors import ApiError
from jaxllm.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Open without a key, so that whoever watches over the server needs none.
OPEN_PATHS = ('/health', '/ready')
LOOPBACK = ('127.0.0.1', '::1', 'localhost')
DISCONNECTED = 499
_KEY = re.compile(r'[!-~]{8,256}')
_HEADERS = {
  'content-security-policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
}
_LOG = logging.getLogger('jaxllm.serving')


class LimitsConfig(Config):
  """What is accepted."""

  max_body_bytes: int = pydantic.Field(default=4_000_000, gt=0)
  """Bytes of a request's body."""
  max_header_bytes: int = pydantic.Field(default=16_384, ge=1024)
  """Bytes of a request's line and headers."""
  max_prompt_tokens: int | None = pydantic.Field(default=None, gt=0)
  """Tokens of one prompt; None: as many as the context holds, less one."""
  max_rows: int = pydantic.Field(default=64, gt=0)
  """Choices of a request: its prompts times n."""
  max_new_tokens: int = pydantic.Field(default=32_768, gt=0)
  """Tokens that a request may ask for: choices times max_tokens."""
  max_inputs: int = pydantic.Field(default=256, gt=0)
  """Texts that a request may embed."""
  max_biases: int = pydantic.Field(default=512, gt=0, le=512)
  """Entries of logit_bias."""
  max_stop_characters: int = pydantic.Field(default=256, gt=0)
  """Characters of one stop string."""
  max_concurrency: int = pydantic.Field(default=256, gt=0)
  """Requests that are worked on at the same time; further ones are told to come back."""
  max_connections: int = pydantic.Field(default=1024, gt=0)
  """Open connections; further ones are closed."""
  header_seconds: float = pydantic.Field(default=10, gt=0)
  """Time for a request's line and headers to come in."""
  body_seconds: float = pydantic.Field(default=30, gt=0)
  """Time for a request's body to come in."""
  send_seconds: float = pydantic.Field(default=60, gt=0)
  """Time for which a client may take nothing of what is sent to it."""
  request_seconds: float = pydantic.Field(default=600, gt=0)
  """Time for the whole answer."""
  drain_seconds: int = pydantic.Field(default=60, gt=0)
  """Time for running answers to end after SIGTERM."""


class Disconnected(Exception):  # noqa: N818 - not the fault of anybody.
  """The client went away; nobody needs an answer."""


class Keys:
  """API keys; only their digests are kept."""

  def __init__(self, keys: Iterable[str]):
    self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

  def __bool__(self) -> bool:
    """Return whether there are any."""
    return bool(self._digests)

  def allow(self, key: str) -> bool:
    """Return whether a key is one of them, in a time that says nothing about which."""
    digest = hashlib.sha256(key.encode(errors='replace')).digest()
    return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_keys(path: str | None, environ: Mapping[str, str] = os.environ) -> Keys:
  """Return the API keys of a file, one per line, and of JAXLLM_API_KEYS, with commas between.

  Raises:
    ValueError: there is no such file, it has no key, or one is too short to be a secret.
  """
  found: list[str] = []
  if path is not None:
    lines = [line.strip() for line in pathlib.Path(path).read_text(encoding='utf-8').split('\n')]
    found = [line for line in lines if line and not line.startswith('#')]
    if not found:
      raise ValueError('--api_keys_file: the file has no key; write one per line')
  found += [key.strip() for key in environ.get('JAXLLM_API_KEYS', '').split(',') if key.strip()]
  for place, key in enumerate(found, 1):
    if not _KEY.fullmatch(key):
      raise ValueError(f'API key number {place}: a key is 8 to 256 characters of ASCII without '
                       "spaces; make one with `python -c 'import secrets; "
                       "print(secrets.token_urlsafe(32))'`")
  return Keys(found)


class Guard:
  """Stand before the app: host, key, headers, errors, metrics and log of every request.

  Args of the constructor:
    app: what is guarded.
    keys: one of them is needed; none: everyone may ask.
    hosts: names that the server goes by; None: any. A page elsewhere that turns its own name into
      our address (DNS rebinding) still sends its name.
    metrics: counts requests.
  """

  def __init__(self, app: App, keys: Keys, hosts: Sequence[str] | None, metrics: Metrics):
    self._app, self._keys, self._hosts, self._metrics = app, keys, hosts, metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    scope['app'] = self  # By which the router knows that errors are told here.
    started, status = time.monotonic(), 0
    added = [(name.encode(), value.encode()) for name, value in
             {**_HEADERS, 'x-request-id': f'req_{secrets.token_hex(12)}'}.items()]

    async def send_on(message: MutableMapping[str, Any]) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        message = {**message, 'headers': [*message.get('headers', []), *added]}
      await send(message)

    try:
      self._check(scope)
      await self._app(scope, receive, send_on)
    except Disconnected:
      pass
    except Exception as error:  # noqa: BLE001 - the client is told, the server goes on.
      if not isinstance(error, ApiError | HTTPException):
        log_failure(error)
      if not status:
        await send_error(_told(error), send_on)
    finally:
      route, seconds = scope.get('jaxllm.route', 'other'), time.monotonic() - started
      self._metrics.request(route, status or DISCONNECTED, seconds)
      _LOG.info('%s %s %d %.3f s', _method(scope), route, status or DISCONNECTED, seconds)

  def _check(self, scope: Scope) -> None:
    if self._hosts is not None:
      host = _header(scope, b'host')
      if host and re.sub(r':\d*$', '', host).strip('[]').lower() not in self._hosts:
        raise ApiError(403, 'Host: the server does not go by this name; use 127.0.0.1, or start it '
                            'with --allowed_hosts', code='unknown_host')
    if self._keys and scope['path'] not in OPEN_PATHS and not self._keys.allow(_key(scope)):
      # A browser asks for the key by itself where Basic is offered.
      browser = scope['path'] == '/' or scope['path'].startswith('/static/')
      raise ApiError(
        401, 'the API key is missing or wrong; send it as Authorization: Bearer KEY',
        code='invalid_api_key',
        headers={'WWW-Authenticate': 'Basic realm="jaxllm: any name, API key as password"'
                 if browser else 'Bearer'})


def _told(error: Exception) -> ApiError:
  """Return what a client is told of an error."""
  if isinstance(error, ApiError):
    return error
  if isinstance(error, HTTPException):  # Of the router, before any handler.
    message = {404: 'there is no such route', 405: 'the route is not for this method'}
    return ApiError(error.status_code, message.get(error.status_code, error.detail),
                    code={404: 'not_found', 405: 'method_not_allowed'}.get(error.status_code),
                    headers=dict(error.headers or {}))
  return ApiError(500, 'the server failed; it is not your request')


async def send_error(error: ApiError, send: Send) -> None:
  """Send an error as the response."""
  body = error.body()
  headers = {'content-type': 'application/json', 'content-length': str(len(body)), **error.headers}
  await send({'type': 'http.response.start', 'status': error.status,
              'headers': [(name.lower().encode(), value.encode())
                          for name, value in headers.items()]})
  await send({'type': 'http.response.body', 'body': body})


def log_failure(error: BaseException) -> None:
  """Log what failed and where, without the message, which may repeat a prompt."""
  _LOG.error('%s\n%s', type(error).__name__, ''.join(traceback.format_tb(error.__traceback__)))


async def read_body(scope: Scope, receive: Receive, limits: LimitsConfig) -> bytes:
  """Return the body of a request.

  Raises:
    ApiError: it is not JSON by its header, too large, or too slow.
    Disconnected: the client has gone.
  """
  kind, _, parameters = (_header(scope, b'content-type') or '').lower().partition(';')
  charset = parameters.partition('charset=')[2].strip(' "\'')
  if kind.strip() != 'application/json' or charset not in ('', 'utf-8', 'utf8'):
    raise ApiError(415, 'Content-Type: it must be application/json, in UTF-8',
                   code='unsupported_media_type')
  if (_header(scope, b'content-encoding') or 'identity').lower() != 'identity':
    raise ApiError(415, 'Content-Encoding: send the body uncompressed',
                   code='unsupported_media_type')
  declared = _header(scope, b'content-length') or '0'
  too_large = ApiError(413, f'the body has more than {limits.max_body_bytes} bytes',
                       code='request_too_large')
  if int(declared) > limits.max_body_bytes:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      while True:
        message = await receive()
        if message['type'] == 'http.disconnect':
          raise Disconnected
        body += message.get('body', b'')
        if len(body) > limits.max_body_bytes:
          raise too_large
        if not message.get('more_body'):
          return bytes(body)
  except TimeoutError:
    raise ApiError(408, f'the body did not arrive within {limits.body_seconds:g} seconds',
                   code='request_timeout', headers={'Connection': 'close'}) from None


def _header(scope: Scope, name: bytes) -> str | None:
  return next((value.decode('latin-1') for key, value in scope['headers'] if key == name), None)


def _key(scope: Scope) -> str:
  """Return the key of a request: a Bearer token, or the password of Basic."""
  kind, _, value = (_header(scope, b'authorization') or '').partition(' ')
  if kind.lower() != 'basic':
    return value.strip() if kind.lower() == 'bearer' else ''
  try:
    return base64.b64decode(value.strip(), validate=True).decode().partition(':')[2]
  except ValueError:
    return ''


def _method(scope: Scope) -> str:
  known = ('GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS')
  return scope['method'] if scope['method'] in known else 'OTHER'
