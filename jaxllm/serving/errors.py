"""Errors as OpenAI's API gives them: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from starlette.responses import JSONResponse

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
