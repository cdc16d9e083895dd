"""JSON bodies of requests: parsed without surprises, checked by pydantic, refused as OpenAI does.

Texts are never repeated in messages, for they may be prompts.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

from jaxllm import mistakes
from jaxllm.serving.errors import invalid

# Of a name that a client made up, so much is repeated.
_NAME_LENGTH = 64
_MESSAGES = {'missing': 'a value is required', 'model_type': 'Input should be an object',
             'dict_type': 'Input should be an object',
             'string_unicode': 'half of a surrogate pair is in it; send whole characters'}
_CODES = {'missing': 'missing_field', 'unknown_field': 'unknown_field',
          'unsupported_field': 'unsupported_field'}
# Kinds of errors whose messages say all.
_COMPLETE = {'missing', 'too_short', 'too_long', 'string_too_short', 'string_too_long',
             'string_unicode'}
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
    known = {field.alias or name: field for name, field in cls.model_fields.items()}
    for name in value.keys() - known.keys():
      served = [name for name, field in known.items() if field.annotation is not type(None)]
      hint = mistakes.hint(name[:_NAME_LENGTH], served) or f'; known are {", ".join(served)}'
      raise field_error(f'there is no such field{hint}', name, 'unknown_field')
    return {name: item for name, item in value.items() if item is not None}


def unsupported(instead: str, *neutral: Any) -> pydantic.BeforeValidator:
  """Refuse a field of OpenAI's API.

  Args:
    instead: what to do.
    *neutral: values that ask for nothing, and are accepted.
  """
  def check(value: Any) -> None:
    if not any(type(value) is type(other) and value == other for other in neutral):
      raise field_error(f'not supported; {instead}', code='unsupported_field')

  return pydantic.BeforeValidator(check)


def parse(body: bytes) -> dict[str, Any]:
  """Return the object that a body of JSON is.

  Raises:
    ApiError: it is no object, or not JSON: NaN, a number too large, nesting too deep, a name twice.
  """
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
    model: of the request.
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
  if 'message' not in details and kind not in _COMPLETE:
    message += f', not {shown(problem["input"])}'
  parts = [*problem['loc'], details.get('field', '')]
  param = ''.join(f'[{part}]' if isinstance(part, int) else f'.{part[:_NAME_LENGTH]}'
                  for part in parts if part not in ('', '[key]'))
  raise invalid(param.removeprefix('.'), message, _CODES.get(kind))


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
