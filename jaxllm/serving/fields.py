"""Checks of JSON from outside: one function per kind of value, one reader of objects.

A check takes the name of a field and its value, and returns what the value means or raises an
`ApiError`. Texts are never repeated in messages, for they may be prompts.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.serving.errors import invalid

Check = Callable[[str, Any], Any]
REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a request; null means the same as leaving it out.

  Attributes:
    check: what its value must be.
    default: without a value; `REQUIRED`: there must be one.
  """

  check: Check
  default: Any = None


@dataclasses.dataclass(frozen=True)
class Unsupported:
  """A field of OpenAI's API that this server refuses.

  Attributes:
    instead: what to do.
    neutral: values that ask for nothing.
  """

  instead: str
  neutral: tuple[Any, ...] = ()


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
  except ValueError as error:  # A number of more digits than Python reads, or one of ours.
    reason = error.args[0] if isinstance(error, _Refused) else 'a number has too many digits'
    raise invalid(None, f'the body is not JSON: {reason}') from None
  if not isinstance(value, dict):
    raise invalid(None, f'the body is {shown(value)}; it must be an object')
  return value


def read(
  body: Mapping[str, Any], fields: Mapping[str, Field],
  unsupported: Mapping[str, Unsupported] | None = None, where: str = '',
) -> dict[str, Any]:
  """Check an object, and return a value for each of `fields`.

  Args:
    body: the object.
    fields: what it may have.
    unsupported: fields with a reason of their own why they are refused.
    where: the name that the object goes by, in front of its fields'.

  Raises:
    ApiError: a field is unknown, refused, missing, or its value is not accepted.
  """
  at = f'{where}.' if where else ''
  for name, value in body.items():
    if name in fields:
      continue
    full = f'{at}{name[:64]}'
    refused = (unsupported or {}).get(name)
    if refused is None:
      near = difflib.get_close_matches(name[:64], fields, 1)
      hint = f'did you mean {near[0]!r}?' if near else f'known are {", ".join(fields)}'
      raise invalid(full, f'there is no such field; {hint}', 'unknown_field')
    if value is not None and not any(_same(value, neutral) for neutral in refused.neutral):
      raise invalid(full, f'not supported; {refused.instead}', 'unsupported_field')
  result = {}
  for name, field in fields.items():
    value = body.get(name)
    if value is None and field.default is REQUIRED:
      raise invalid(f'{at}{name}', 'a value is required', 'missing_field')
    result[name] = field.default if value is None else field.check(f'{at}{name}', value)
  return result


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


def boolean(name: str, value: Any) -> bool:
  """Return true or false."""
  if not isinstance(value, bool):
    raise invalid(name, f'{shown(value)} is neither true nor false')
  return value


def integer(low: int, high: int) -> Check:
  """Return a check for whole numbers between `low` and `high`, both included."""
  def check(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
      raise invalid(name, f'{shown(value)} is not an integer; give one between {low} and {high}')
    if not low <= value <= high:
      raise invalid(name, f'{shown(value)} is not between {low} and {high}')
    return value

  return check


def number(low: float, high: float, above: bool = False) -> Check:
  """Return a check for numbers between `low` and `high`; `above`: `low` itself is refused."""
  bounds = f'{"above" if above else "at least"} {low:g} and at most {high:g}'

  def check(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise invalid(name, f'{shown(value)} is not a number; give one {bounds}')
    if not low <= value <= high or (above and value == low):
      raise invalid(name, f'{shown(value)} is not {bounds}')
    return float(value)

  return check


def text(max_length: int | None = None) -> Check:
  """Return a check for strings, without halves of surrogate pairs, that are not empty."""
  def check(name: str, value: Any) -> str:
    any_text(name, value)
    if not value:
      raise invalid(name, 'the string is empty; leave the field out, or give at least a character')
    if max_length is not None and len(value) > max_length:
      raise invalid(name, f'{shown(value)} is too long; {max_length} are accepted')
    return value

  return check


def any_text(name: str, value: Any) -> str:
  """Return a string that may be empty."""
  if not isinstance(value, str):
    raise invalid(name, f'{shown(value)} is not a string')
  return valid_text(name, value)


def valid_text(name: str, value: str) -> str:
  """Return a string that UTF-8 can express."""
  try:
    value.encode()
  except UnicodeEncodeError:
    raise invalid(name, 'the string holds half of a surrogate pair; send whole characters'
                  ) from None
  return value


def one_of(*values: Any) -> Check:
  """Return a check for a few fixed strings."""
  def check(name: str, value: Any) -> Any:
    if not isinstance(value, str) or value not in values:
      given = repr(value[:32]) if isinstance(value, str) else shown(value)
      raise invalid(name, f'{given} is none of {", ".join(map(repr, values))}')
    return value

  return check


def array(name: str, value: Any, what: str, most: int | None = None) -> list[Any]:
  """Return a list of one or more items."""
  if not isinstance(value, list):
    raise invalid(name, f'{shown(value)} is not {what}')
  if not value:
    raise invalid(name, f'the list is empty; give {what}')
  if most is not None and len(value) > most:
    raise invalid(name, f'{len(value)} items are too many; {most} are accepted')
  return value


def obj(name: str, value: Any) -> dict[str, Any]:
  """Return an object."""
  if not isinstance(value, dict):
    raise invalid(name, f'{shown(value)} is not an object')
  return value


def _same(value: Any, neutral: Any) -> bool:
  return type(value) is type(neutral) and value == neutral


class _Refused(ValueError):
  """A reason that may be told."""


def _no_constant(name: str) -> Any:
  raise _Refused(f'{name} is no number of JSON')


def _finite(digits: str) -> float:
  value = float(digits)
  if not math.isfinite(value):
    raise _Refused('a number is too large')
  return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    raise _Refused('an object has the same name twice')
  return result


