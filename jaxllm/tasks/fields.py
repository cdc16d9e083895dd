"""What the fields of a record may hold: readers, of which each task has a table by field.

A reader takes a value and the name of its field. It returns the one form that the task works with,
or refuses; nothing becomes text that was none.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

Reader = Callable[[Any, str], Any]

_SHOWN = 60


def refused(value: Any, name: str, expected: str) -> ValueError:
  """Return the error for a value that is not what its field should hold."""
  return ValueError(f'field {name!r} is {shown(value)}; expected {expected}')


def shown(value: Any) -> str:
  """Name a value, shortened, by its kind in JSON."""
  if value is None:
    return 'null'
  if isinstance(value, str) and not value.strip():
    return f'the empty text {value!r}'
  text = repr(value) if len(repr(value)) <= _SHOWN else f'{repr(value)[:_SHOWN]}...'
  kinds = {bool: 'truth value', str: 'text', Mapping: 'object', list: 'list', int | float: 'number'}
  return f'the {next((k for c, k in kinds.items() if isinstance(value, c)), "value")} {text}'


def any_text(value: Any, name: str) -> str:
  """Read a text, which may be empty."""
  if not isinstance(value, str):
    raise refused(value, name, 'text')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise refused(value, name, 'text without halves of surrogate pairs') from None
  return value


def text(value: Any, name: str) -> str:
  """Read a text that says something."""
  if not any_text(value, name).strip():
    raise refused(value, name, 'text')
  return value


def optional(reader: Reader) -> Reader:
  """Return a reader that takes null and white space for a field that is not there."""
  def read(value: Any, name: str) -> Any:
    empty = value is None or isinstance(value, str) and not value.strip()
    return None if empty else reader(value, name)

  return read


def listed(reader: Reader, least: int, of: str) -> Reader:
  """Return a reader of lists with at least so many items; CSV has them as JSON in a text."""
  def read(value: Any, name: str) -> list[Any]:
    found = from_json(value)
    if not isinstance(found, list) or len(found) < least:
      raise refused(value, name, f'a list of {of}')
    return [reader(item, f'{name}[{i}]') for i, item in enumerate(found)]

  return read


def from_json(value: Any) -> Any:
  """Return the list or object that a text is as JSON; anything else as it is."""
  if isinstance(value, str) and value.lstrip()[:1] in ('[', '{'):
    try:
      return json.loads(value)
    except (ValueError, RecursionError):
      pass
  return value


def several(value: Any, name: str) -> str | list[str]:
  """Read a text, or several that are as good, of which the first is trained on."""
  return listed(text, 1, 'texts')(value, name) if isinstance(value, list) else text(value, name)


def first(value: str | list[str]) -> str:
  """Return the one of several texts that is trained on."""
  return value if isinstance(value, str) else value[0]


def label(value: Any, name: str) -> str:
  """Read a label: a text, a whole number as its digits, a truth value as 'true' or 'false'."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, int | float) and abs(value) < 2**63 and value == int(value):
    return str(int(value))
  if not isinstance(value, str):
    raise refused(value, name, 'text or a whole number')
  return text(value, name)


def filling(value: Any, name: str) -> str:
  """Read what stands in a template: any text, or a number."""
  if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
    return str(value)
  return any_text(value, name)
