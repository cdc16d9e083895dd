"""API keys and names of the host: who may ask."""

import base64
import hashlib
import hmac
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from starlette.requests import HTTPConnection

from jaxllm.serving.errors import ApiError

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
