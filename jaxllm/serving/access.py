"""Who may ask and for how much, and how the rest is refused: errors, limits, API keys."""

import base64
import hashlib
import hmac
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse

from jaxllm.config import Config

_TYPES = {401: 'authentication_error', 403: 'permission_error', 429: 'rate_limit_error'}


class ApiError(Exception):
  """What a client is told; the message names the field, the value and the fix.

  Attributes:
    status: of the HTTP response.
    message: for people; says nothing of prompts, keys or paths.
    param: the field of the request that is at fault.
    code: for programs.
    headers: of the response, besides the usual ones.
  """

  def __init__(
    self, status: int, message: str, param: str | None = None, code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = headers or {}

  def content(self) -> dict[str, Any]:
    """Return the body of the response, as an object."""
    kind = _TYPES.get(self.status, 'invalid_request_error' if self.status < 500 else 'server_error')
    return {'error': {'message': self.message, 'type': kind, 'param': self.param,
                      'code': self.code}}

  def response(self) -> JSONResponse:
    """Return the response."""
    return JSONResponse(self.content(), self.status, self.headers)


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
  """Return the error of a request that cannot be answered as it is."""
  return ApiError(400, message if param is None else f'{param}: {message}', param, code)


def busy(message: str) -> ApiError:
  """Return the error of a server that has too much to do; clients try again by themselves."""
  return ApiError(429, message, code='rate_limit_exceeded', headers={'Retry-After': '1'})


def unavailable(message: str, code: str, again: bool = True) -> ApiError:
  """Return the error of a server that cannot answer; `again`: whether clients should try again."""
  # OpenAI's client does so by itself after an error of a server, if it is not told otherwise.
  headers = {'Retry-After': '5'} if again else {'X-Should-Retry': 'false'}
  return ApiError(503, message, code=code, headers=headers)


class LimitsConfig(Config):
  """What is accepted."""

  max_body_bytes: int = pydantic.Field(default=4_000_000, gt=0)
  """Bytes of a request's body."""
  max_header_bytes: int = pydantic.Field(default=16_384, ge=1024)
  """Bytes of a request's line and headers."""
  max_prompt_tokens: int | None = pydantic.Field(default=None, gt=0)
  """Tokens of one prompt; None: as many as the context holds, less one."""
  max_rows: int = pydantic.Field(default=64, gt=0)
  """Choices of a request: its prompts times n; texts that it embeds."""
  max_new_tokens: int = pydantic.Field(default=32_768, gt=0)
  """Tokens that a request may ask for: choices times max_tokens."""
  max_text_bytes: int | None = pydantic.Field(default=None, gt=0)
  """Bytes of a text that becomes tokens, and tokens that become a text; None: 32 for each token of
  the context, at least 200,000."""
  max_concurrency: int = pydantic.Field(default=256, gt=0)
  """Requests that are worked on at the same time; further ones are told to come back."""
  max_buffered_bytes: int = pydantic.Field(default=256_000_000, gt=0)
  """Bytes of bodies that are held; requests that would bring more are told to come back."""
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


# Open without a key, so that health checks need none.
OPEN_PATHS, METRICS_PATH = ('/health', '/ready'), '/metrics'
LOOPBACK = ('127.0.0.1', '::1', 'localhost')
# Of addresses that sent wrong keys.
FORGET_SECONDS, MAX_ADDRESSES = 600.0, 10_000
_KEY = re.compile(r'[!-~]{16,256}')


class Keys:
  """API keys and the key of /metrics; only their digests are kept."""

  def __init__(self, keys: Iterable[str], metrics: Iterable[str] = ()):
    self._keys, self._metrics = (
      [hashlib.sha256(key.encode()).digest() for key in given] for given in (keys, metrics))

  def __len__(self) -> int:
    """Return how many clients there are to be told apart."""
    return len(self._keys)

  def client(self, key: str, path: str) -> str | None:
    """Return the name under which the holder of a key has its shares; None: it may not ask.

    The name is '' where all are one client. The time says nothing about which key it is.
    """
    known = self._metrics if path == METRICS_PATH else self._keys
    if path in OPEN_PATHS or not (known or self._keys):
      return ''
    digest = hashlib.sha256(key.encode(errors='replace')).digest()
    found = sum(number * hmac.compare_digest(digest, other)
                for number, other in enumerate(known, 1))
    return (str(found) if len(known) > 1 else '') if found else None


class WrongKeys:
  """Slows those who try keys; right keys never wait."""

  def __init__(self) -> None:
    self._tries: dict[str, tuple[int, float]] = {}

  def delay(self, address: str) -> float:
    """Return the seconds that the answer to a wrong key from this address waits."""
    now = time.monotonic()
    count, last = self._tries.pop(address, (0, now))
    count = 1 if now - last > FORGET_SECONDS else min(count + 1, 6)
    # Those of whom nothing was heard for the longest time come first.
    self._tries[address] = count, now
    if len(self._tries) > MAX_ADDRESSES:
      del self._tries[next(iter(self._tries))]
    return 0.05 * 2**count


def read_keys(
  path: str | None, environ: Mapping[str, str] = os.environ, metrics_path: str | None = None
) -> Keys:
  """Return the API keys of a file, one per line, and of JAXLLM_API_KEYS, with commas between.

  Raises:
    ValueError: there is no such file, it has no key, or one is too short to be a secret.
  """
  found = _read_file('--api_keys_file', path) if path is not None else []
  found += [key.strip() for key in environ.get('JAXLLM_API_KEYS', '').split(',') if key.strip()]
  metrics = _read_file('--metrics_key_file', metrics_path) if metrics_path is not None else []
  for place, key in enumerate([*found, *metrics], 1):
    if not _KEY.fullmatch(key):
      raise ValueError(f'API key number {place}: a key is 16 to 256 characters of ASCII without '
                       "spaces; make one with `python -c 'import secrets; "
                       "print(secrets.token_urlsafe(32))'`")
  if len(set(found + metrics)) < len(found + metrics) or len(metrics) > 1:
    raise ValueError('--api_keys_file, --metrics_key_file: a key is there twice, or /metrics has '
                     'more than one; each client needs a key of its own')
  return Keys(found, metrics)


def _read_file(flag: str, path: str) -> list[str]:
  lines = [line.strip() for line in pathlib.Path(path).read_text(encoding='utf-8').split('\n')]
  if not (found := [line for line in lines if line and not line.startswith('#')]):
    raise ValueError(f'{flag}: the file has no key; write one per line')
  return found


def check_access(
  connection: HTTPConnection, keys: Keys, hosts: Sequence[str] | None
) -> str:
  """Return the name of the client (see `Keys.client`), before anything is read of its request.

  Args:
    keys: one of them is needed; none: everyone may ask.
    hosts: names that the server goes by; None: any. A page elsewhere that turns its own name into
      our address (DNS rebinding) still sends its name.

  Raises:
    ApiError: the request is refused.
  """
  host, path = connection.headers.get('host'), connection.scope['path']
  if host and hosts is not None and re.sub(r':\d*$', '', host).strip('[]').lower() not in hosts:
    raise ApiError(403, 'Host: the server does not go by this name; use 127.0.0.1, or start it '
                        'with --allowed_hosts', code='unknown_host')
  key = _sent_key(connection.headers.get('authorization', ''))
  client = keys.client(key, path)
  if client is not None:
    return client
  # A browser asks for the key by itself where Basic is offered.
  browser = path == '/' or path.startswith('/static/')
  offered = 'Basic realm="jaxllm: any name, API key as password"' if browser else 'Bearer'
  what = ('the key of /metrics is missing or wrong; the server reads it from --metrics_key_file'
          if path == METRICS_PATH else
          'the API key is missing or wrong; send it as Authorization: Bearer KEY')
  raise ApiError(401, what, code='invalid_api_key',
                 headers={'WWW-Authenticate': offered})


def _sent_key(authorization: str) -> str:
  """Return a Bearer token, or the password of Basic."""
  kind, _, value = authorization.partition(' ')
  if kind.lower() != 'basic':
    return value.strip() if kind.lower() == 'bearer' else ''
  try:
    return base64.b64decode(value.strip(), validate=True).decode().partition(':')[2]
  except ValueError:
    return ''
