"""Checks a JSON Schema before llguidance compiles it, and rewrites what llguidance does not take.

Rewritten schemas accept only documents of the original: formats become patterns, or go where they
say nothing about the text (`_FORMATS`); `propertyNames` becomes properties; an alternative of
`anyOf` that looks around itself is left out where others remain; a reference whose documents
never end becomes `false`.
"""

import collections
import fractions
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
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
    ValueError: it is too large or nested too deeply, not JSON, or no finite document satisfies it.
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
  document = {} if schema is True else _rewritten(schema, schema)
  _check_multiples(document)
  endless = _endless(document)
  if '' in endless:
    raise ValueError('schema: no finite document satisfies it; look for a recursion without an '
                     'end, or a required value that cannot be')
  return _replaced(document, endless)


_TOO_DEEP = f'schema: nested deeper than {MAX_DEPTH} levels; use $defs'


def check_depth(schema: Any) -> None:
  """Raise ValueError for JSON of more than `MAX_DEPTH` levels."""
  level = [schema]
  for _ in range(MAX_DEPTH):
    level = [child for item in level if isinstance(item, dict | list)
             for child in (item.values() if isinstance(item, dict) else item)]
  if level:
    raise ValueError(_TOO_DEEP)


def _all(schema: Any) -> Iterator[Mapping[str, Any]]:
  """Yield a schema and all those inside of it that are objects."""
  if isinstance(schema, Mapping):
    yield schema
    parts: list[Any] = []
    _mapped(schema, parts.append)
    for part in parts:
      yield from _all(part)


def _mapped(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
  """Return a schema with a change to each schema directly inside of it."""
  changed = dict(schema)
  for key, value in schema.items():
    if key in _SINGLE:
      changed[key] = change(value)
    elif key in _LISTS and isinstance(value, list):
      changed[key] = [change(part) for part in value]
    elif key in _MAPS and isinstance(value, Mapping):
      changed[key] = {name: change(part) for name, part in value.items()}
  return changed


def _rewritten(schema: Any, document: Any) -> Any:
  if not isinstance(schema, Mapping):
    return schema
  for value in (schema.get('const'), *(_list(schema.get('enum')))):
    if isinstance(value, str) and _CONTROL.search(value):
      raise ValueError('schema: a constant holds a control character; leave it out')
  new = _mapped(schema, lambda part: _rewritten(part, document))
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
    if '$ref' in names:
      names = _resolved(document, _reference(names))
    value = new.get('additionalProperties', True)
    if isinstance(names, Mapping) and isinstance(pattern := names.get('pattern'), str):
      new |= {'patternProperties': {pattern: value}, 'additionalProperties': False}
      del new['propertyNames']
    elif isinstance(names, Mapping) and 'enum' in names:
      known = [name for name in _list(names['enum']) if isinstance(name, str)]
      new |= {'properties': dict.fromkeys(known, value), 'additionalProperties': False}
      del new['propertyNames']
  return new


def _check_multiples(document: Any) -> None:
  """Refuse numbers whose common multiple llguidance could not hold."""
  found = [fractions.Fraction(repr(value)) for schema in _all(document)
           if isinstance(value := schema.get('multipleOf'), int | float) and value > 0]
  scale = math.lcm(*(value.denominator for value in found))
  if found and math.lcm(*(int(value * scale) for value in found)) >= 2**31:
    raise ValueError('schema.multipleOf: the common multiple of all numbers is too large; use '
                     'rounder ones')


def _resolved(document: Any, reference: str) -> Any:
  """Return the schema that a reference names; None where that is not known here."""
  if not re.match('#(/|$)', reference):
    return None
  value = document
  for name in urllib.parse.unquote(reference[1:]).split('/')[1:]:
    name = name.replace('~1', '/').replace('~0', '~')
    if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
      value = value[int(name)]
    else:
      value = value.get(name) if isinstance(value, Mapping) else None
  return value


def _endless(document: Any) -> set[str]:
  """Return the references whose documents never end, and '' where that is true of the document."""
  targets, users = {'': document}, collections.defaultdict(set)
  todo = ['']
  while todo:
    user = todo.pop()
    for schema in _all(targets[user]):
      reference = _reference(schema)
      users[reference].add(user)
      if reference not in targets and (target := _resolved(document, reference)) is not None:
        targets[reference] = target
        todo.append(reference)
  endless, todo = set(targets), list(targets)
  while todo:
    reference = todo.pop()
    if reference in endless and _ends(targets[reference], endless):
      endless.remove(reference)
      todo += users[reference] & endless
  return endless


def _ends(schema: Any, endless: set[str]) -> bool:
  """Return whether a schema has finite documents, if no reference of `endless` has."""
  if not isinstance(schema, Mapping):
    return schema is not False
  if 'const' in schema or 'enum' in schema:
    return True
  if _reference(schema) in endless or not all(_ends(part, endless)
                                              for part in _list(schema.get('allOf'))):
    return False
  for key in ('anyOf', 'oneOf'):
    if _list(schema.get(key)) and not any(_ends(part, endless) for part in schema[key]):
      return False
  kinds = _list(schema.get('type')) or [schema.get('type')]
  needed = {'object': _needed_values, 'array': _needed_items}
  if not all(isinstance(kind, str) and kind in needed for kind in kinds):
    return True
  return any(all(_ends(part, endless) for part in needed[kind](schema)) for kind in kinds)


def _needed_values(schema: Mapping[str, Any]) -> list[Any]:
  properties, other = schema.get('properties'), schema.get('additionalProperties', True)
  known = properties if isinstance(properties, Mapping) else {}
  return [known.get(name, other) for name in _list(schema.get('required'))
          if isinstance(name, str)]


def _needed_items(schema: Mapping[str, Any]) -> list[Any]:
  least, first = schema.get('minItems', 0), _list(schema.get('prefixItems'))
  if not isinstance(least, int) or least <= len(first):
    return first[:max(least, 0)] if isinstance(least, int) else []
  return [*first, schema.get('items', True)]


def _replaced(schema: Any, endless: set[str]) -> Any:
  if not endless or not isinstance(schema, Mapping):
    return schema
  if _reference(schema) in endless:
    return False
  return _mapped(schema, lambda part: _replaced(part, endless))


def _reference(schema: Mapping[str, Any]) -> str:
  """Return what a schema refers to; '-', which no reference is, for nothing."""
  reference = schema.get('$ref')
  return reference if isinstance(reference, str) else '-'


def _list(value: Any) -> list[Any]:
  return value if isinstance(value, list) else []
