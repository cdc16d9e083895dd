"""Checks a JSON Schema before llguidance compiles it, and rewrites what llguidance does not take.

Rewritten schemas accept only documents of the original: formats become patterns, or go where they
say nothing about the text (`_FORMATS`); `propertyNames` becomes properties; an alternative of
`anyOf` that looks around itself is left out where others remain.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 100_000
"""Of a schema as JSON."""
MAX_DEPTH = 64
"""Levels of objects and lists that a schema, as JSON, may have."""

_HEX = '[0-9a-f]'
_YEAR = '^([1-9]|0[1-9]|00[1-9]|000[1-9])'  # Not 0000, which no calendar of Python has.
_SECOND = '[^:]*:[^:]*:[0-5]'  # Not 60.
# A pattern in place of a format, or with it; None: the format says nothing about the text.
_FORMATS: dict[str, str | None] = {
  'duration': r'^P(T?\d{1,4}[A-Z])+$', 'date': _YEAR, 'time': f'^{_SECOND}',
  'date-time': f'{_YEAR}{_SECOND}',
  'base64': '^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$',
  'base64url': '^([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?$',
  **{f'uuid{version}': f'^{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89ab]{_HEX}{{3}}-'
     f'{_HEX}{{12}}$' for version in range(1, 9)},
  **dict.fromkeys(('binary', 'byte', 'password', 'path', 'file-path', 'directory-path')),
}
_LISTS = ('anyOf', 'oneOf', 'allOf', 'prefixItems')
_MAPS = ('properties', 'patternProperties', '$defs', 'definitions')
_SINGLE = ('items', 'additionalProperties', 'additionalItems')
_LOOKS_AROUND = re.compile(r'\(\?<?[=!]|\\[bBzZ]')
_CONTROL = re.compile(r'[\x00-\x07\x0b\x0e-\x1f\x7f]')


def prepare(schema: Any) -> dict[str, Any]:
  """Return a schema that llguidance can compile.

  Args:
    schema: parsed JSON: an object, or true.

  Raises:
    ValueError: it is too large or nested too deeply, or not JSON.
  """
  try:
    size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
  except RecursionError:
    raise ValueError(_TOO_DEEP) from None
  except UnicodeEncodeError:
    raise ValueError('schema: a text holds half of a surrogate pair; send whole characters'
                     ) from None
  except ValueError as error:
    raise ValueError(f'schema: not JSON: {error}') from None
  if size > MAX_BYTES:
    raise ValueError(f'schema: {size} bytes are more than {MAX_BYTES}; leave out descriptions, or '
                     'use $defs')
  if not isinstance(schema, Mapping) and schema is not True:
    raise ValueError(f'schema: {json.dumps(schema)[:60]} is no schema that a document can satisfy; '
                     'give an object')
  check_depth(schema)
  return {} if schema is True else _rewritten(schema, schema)


_TOO_DEEP = f'schema: nested deeper than {MAX_DEPTH} levels; use $defs'


def check_depth(schema: Any) -> None:
  """Raise ValueError for JSON of more than `MAX_DEPTH` levels."""
  level = [schema]
  for _ in range(MAX_DEPTH):
    level = [child for item in level if isinstance(item, dict | list)
             for child in (item.values() if isinstance(item, dict) else item)]
  if level:
    raise ValueError(_TOO_DEEP)


def _rewritten(schema: Any, document: Any) -> Any:
  if not isinstance(schema, Mapping):
    return schema
  for value in (schema.get('const'), *(_list(schema.get('enum')))):
    if isinstance(value, str) and _CONTROL.search(value):
      raise ValueError('schema: a constant holds a control character; leave it out')
  new = dict(schema)
  for key, value in schema.items():
    if key in _SINGLE:
      new[key] = _rewritten(value, document)
    elif key in _LISTS and isinstance(value, list):
      new[key] = [_rewritten(part, document) for part in value]
    elif key in _MAPS and isinstance(value, Mapping):
      new[key] = {name: _rewritten(part, document) for name, part in value.items()}
  kind = new.get('format')
  if isinstance(kind, str) and kind in _FORMATS and 'pattern' not in new:
    if kind not in ('date', 'time', 'date-time', 'duration'):
      del new['format']
    if pattern := _FORMATS[kind]:
      new['pattern'] = pattern
  if alternatives := _list(new.get('anyOf')):
    simple = [part for part in alternatives if not (isinstance(part, Mapping) and
              _LOOKS_AROUND.search(str(part.get('pattern', ''))))]
    new['anyOf'] = simple or alternatives
  names = new.get('propertyNames')
  if isinstance(names, Mapping) and not {'properties', 'patternProperties'} & set(new):
    # As pydantic writes the names of an enumeration.
    _, found, name = str(names.get('$ref', '')).partition('#/$defs/')
    defined = document.get('$defs') if found else None
    names = defined.get(name) if isinstance(defined, Mapping) else names
    value = new.get('additionalProperties', True)
    if isinstance(names, Mapping) and isinstance(pattern := names.get('pattern'), str):
      new |= {'patternProperties': {pattern: value}, 'additionalProperties': False}
      del new['propertyNames']
    elif isinstance(names, Mapping) and 'enum' in names:
      known = [name for name in _list(names['enum']) if isinstance(name, str)]
      new |= {'properties': dict.fromkeys(known, value), 'additionalProperties': False}
      del new['propertyNames']
  return new


def _list(value: Any) -> list[Any]:
  return value if isinstance(value, list) else []
