"""Who may ask and for how much, and how the rest is refused: errors, limits, API keys."""

import base64
import hashlib
import hmac
import os
import pathlib
import re
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

  @property
  def shortest(self) -> float:
    """The shortest time that a client may let a connection wait."""
    return min(self.header_seconds, self.body_seconds, self.send_seconds)


# Open without a key, so that health checks need none.
OPEN_PATHS = ('/health', '/ready')
LOOPBACK = ('127.0.0.1', '::1', 'localhost')
_KEY = re.compile(r'[!-~]{8,256}')


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


def access_error(
  connection: HTTPConnection, keys: Keys, hosts: Sequence[str] | None
) -> ApiError | None:
  """Return why a request is refused before anything is read of it; None: it is not.

  Args:
    connection: of the request.
    keys: one of them is needed; none: everyone may ask.
    hosts: names that the server goes by; None: any. A page elsewhere that turns its own name into
      our address (DNS rebinding) still sends its name.
  """
  host, path = connection.headers.get('host'), connection.scope['path']
  if host and hosts is not None and re.sub(r':\d*$', '', host).strip('[]').lower() not in hosts:
    return ApiError(403, 'Host: the server does not go by this name; use 127.0.0.1, or start it '
                         'with --allowed_hosts', code='unknown_host')
  key = _sent_key(connection.headers.get('authorization', ''))
  if not keys or path in OPEN_PATHS or keys.allow(key):
    return None
  # A browser asks for the key by itself where Basic is offered.
  browser = path == '/' or path.startswith('/static/')
  offered = 'Basic realm="jaxllm: any name, API key as password"' if browser else 'Bearer'
  return ApiError(401, 'the API key is missing or wrong; send it as Authorization: Bearer KEY',
                  code='invalid_api_key', headers={'WWW-Authenticate': offered})


def _sent_key(authorization: str) -> str:
  """Return a Bearer token, or the password of Basic."""
  kind, _, value = authorization.partition(' ')
  if kind.lower() != 'basic':
    return value.strip() if kind.lower() == 'bearer' else ''
  try:
    return base64.b64decode(value.strip(), validate=True).decode().partition(':')[2]
  except ValueError:
    return ''
