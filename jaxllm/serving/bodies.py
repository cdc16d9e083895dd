"""JSON bodies of requests: parsed without surprises, checked by pydantic, refused as OpenAI does.

Texts are never repeated in messages, for they may be prompts.
"""

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from jaxllm import mistakes
from jaxllm.serving.access import ApiError, LimitsConfig, invalid

# Of a name that a client made up, so much is repeated.
_NAME_LENGTH = 64
_MESSAGES = {'missing': 'a value is required', 'model_type': 'Input should be an object',
             'dict_type': 'Input should be an object',
             'string_unicode': 'half of a surrogate pair is in it; send whole characters'}
B = TypeVar('B', bound='Body')


def field_error(message: str, field: str = '', code: Any = 'value_error') -> PydanticCustomError:
  """Return the error that a validator raises; `field` is the one at fault inside of its object."""
  return PydanticCustomError(code, '{message}', {'message': message, 'field': field})


# With a length pydantic also looks whether a string is whole characters.
String = Annotated[str, pydantic.Field(min_length=0)]
Text = Annotated[str, pydantic.Field(min_length=1)]
Name = Annotated[str, pydantic.Field(min_length=1, max_length=64)]


class Body(pydantic.BaseModel):
  """Base of request models: strict types, no unknown fields; null is the same as no value."""

  model_config = pydantic.ConfigDict(
    extra='forbid', strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

  @pydantic.model_validator(mode='before')
  @classmethod
  def _check_names(cls, value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    known = {field.alias or name: field.json_schema_extra
             for name, field in cls.model_fields.items()}
    for name, item in value.items():
      if name not in known:
        served = [name for name, refused in known.items() if refused is None]
        hint = mistakes.hint(name[:_NAME_LENGTH], served) or f'; known are {", ".join(served)}'
        raise field_error(f'there is no such field{hint}', name, 'unknown_field')
      refused: Any = known[name]
      if refused and item is not None and (type(item), item) not in refused['neutral']:
        raise field_error(f'not supported; {refused["instead"]}', name, 'unsupported_field')
    return {name: item for name, item in value.items() if item is not None and not known[name]}


def unsupported(instead: str, *neutral: Any) -> Any:
  """Return a field of OpenAI's API that is refused.

  Args:
    instead: what to do.
    *neutral: values that ask for nothing, and are accepted.
  """
  extra: Any = {'instead': instead, 'neutral': [(type(value), value) for value in neutral]}
  return pydantic.Field(None, json_schema_extra=extra)


async def receive(
  request: Request, limits: LimitsConfig, take: Callable[[int], None]
) -> bytes:
  """Return the body of a request; `take` is told how many bytes come.

  Raises:
    ApiError: it is not JSON by its header, too large, or too slow.
    ClientDisconnect: the client has gone.
  """
  kind, _, parameters = request.headers.get('content-type', '').lower().partition(';')
  charset = parameters.partition('charset=')[2].strip(' "\'')
  if kind.strip() != 'application/json' or charset not in ('', 'utf-8', 'utf8'):
    raise ApiError(415, 'Content-Type: it must be application/json, in UTF-8',
                   code='unsupported_media_type')
  if request.headers.get('content-encoding', 'identity').lower() != 'identity':
    raise ApiError(415, 'Content-Encoding: send the body uncompressed',
                   code='unsupported_media_type')
  too_large = ApiError(413, f'the body has more than {limits.max_body_bytes} bytes',
                       code='request_too_large')
  if int(request.headers.get('content-length', 0)) > limits.max_body_bytes:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for part in request.stream():
        take(len(part))
        body += part
        if len(body) > limits.max_body_bytes:
          raise too_large
  except TimeoutError:
    raise ApiError(408, f'the body did not arrive within {limits.body_seconds:g} seconds',
                   code='request_timeout', headers={'Connection': 'close'}) from None
  return bytes(body)


def parse(body: bytes) -> dict[str, Any]:
  """Return the JSON object in a body; an ApiError says why it is none, or not to be believed."""
  try:
    value = json.loads(body.decode(), parse_constant=_no_constant, parse_float=_finite,
                       object_pairs_hook=_no_duplicates)
  except RecursionError:
    raise invalid(None, 'the body is nested too deeply') from None
  except UnicodeDecodeError as error:
    raise invalid(None, f'the body is not UTF-8 (byte {error.start}); encode it so') from None
  except json.JSONDecodeError as error:
    raise invalid(None, f'the body is not JSON: {error.msg} (line {error.lineno}, column '
                        f'{error.colno})') from None
  except ValueError:  # Python reads no whole number of so many digits.
    raise invalid(None, 'the body is not JSON: a number has too many digits') from None
  if not isinstance(value, dict):
    raise invalid(None, f'the body is {shown(value)}; it must be an object')
  return value


def read(model: type[B], body: Mapping[str, Any], **context: Any) -> B:
  """Return the request that a body is.

  Args:
    body: from `parse`.
    **context: what the validators of the model need to know.

  Raises:
    ApiError: a field is unknown, refused, missing, or its value is not accepted.
  """
  try:
    return model.model_validate(body, context=context)
  except pydantic.ValidationError as error:
    problem = error.errors()[0]
  kind, details = problem['type'], problem.get('ctx', {})
  message = _MESSAGES.get(kind, problem['msg'])
  if 'message' not in details and not kind.endswith(('missing', 'short', 'long', 'unicode')):
    message += f', not {shown(problem["input"])}'
  parts = [*problem['loc'], details.get('field', '')]
  param = ''.join(f'[{part}]' if isinstance(part, int) else f'.{part[:_NAME_LENGTH]}'
                  for part in parts if part not in ('', '[key]'))
  code = {'missing': 'missing_field'}.get(kind, kind if kind.endswith('_field') else None)
  raise invalid(param.removeprefix('.'), message, code)


def shown(value: Any) -> str:
  """Return how a value is named in a message; texts by their length alone."""
  if value is None or isinstance(value, bool):
    return json.dumps(value)
  if isinstance(value, int | float):
    text = repr(value)
    return text if len(text) <= 32 else f'{text[:32]}...'
  if isinstance(value, str):
    return f'a string of {len(value)} characters'
  return f'a list of {len(value)} items' if isinstance(value, list) else 'an object'


def _no_constant(name: str) -> Any:
  raise invalid(None, f'the body is not JSON: {name} is no number of JSON')


def _finite(digits: str) -> float:
  if not math.isfinite(value := float(digits)):
    raise invalid(None, 'the body is not JSON: a number is too large')
  return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    raise invalid(None, 'the body is not JSON: an object has the same name twice')
  return result
