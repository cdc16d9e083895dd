"""From a JSON Schema to what `json_grammar` accepts: the part of the language that is supported.

Supported are `type` (one or several), `properties`, `required`, `additionalProperties`, `items`,
`prefixItems`, `minItems`, `maxItems`, `minLength`, `maxLength`, `enum`, `const`, `anyOf`, and
`$ref` to `#` or a definition of the document, recursion included. Any other keyword that would
restrict values is refused by its name, wherever it stands; annotations are passed over.

Documents are narrower than the schema in two ways: an integer is written without point and
exponent, and a property that the schema names comes once.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.generation.json_grammar import MAX_DEPTH
from jaxllm.generation.json_nodes import Array, Choice, Number, Object, String, Words
from jaxllm.generation.json_strings import names_of

MAX_SCHEMAS = 2000
"""Schemas in a document, values of `enum` and `const` included."""
MAX_SCHEMA_DEPTH = 64
MAX_CONTAINERS = 32
"""Objects, and arrays, that one place may choose from."""

_ANNOTATIONS = {
  '$schema', '$id', '$comment', '$defs', 'definitions', 'title', 'description', 'default',
  'examples', 'deprecated', 'readOnly', 'writeOnly',
}
_TYPES: dict[str, set[str]] = {
  'object': {'properties', 'required', 'additionalProperties'},
  'array': {'items', 'prefixItems', 'minItems', 'maxItems'},
  'string': {'minLength', 'maxLength'},
  'number': set(), 'integer': set(), 'boolean': set(), 'null': set(),
}
_ALONE = ('$ref', 'anyOf', 'enum', 'const')
_KEYWORDS = {'type', *_ALONE}.union(*_TYPES.values())
_UNREACHABLE = MAX_DEPTH + 1


def any_object() -> Choice:
  """Return what accepts every object."""
  return _Compiler({'type': 'object'}).compile()


def compile_schema(schema: Any) -> Choice:
  """Return what accepts the documents of a schema.

  Args:
    schema: parsed JSON: an object, or true.

  Raises:
    ValueError: a keyword is not supported or has a wrong value, a reference leads nowhere, or no
      document can satisfy the schema within the bounds.
  """
  return _Compiler(schema).compile()


class _Compiler:
  """Builds nodes. What a place takes is a list until all is read.

  The list holds nodes, other places, strings that are given, and words (bytes).
  """

  def __init__(self, schema: Any):
    self._document = schema
    self._parts: dict[Choice, list[Any]] = {}
    self._references: dict[str, Choice] = {}
    self._unread: list[tuple[str, Choice]] = []
    self._seen = 0
    self._anything: Choice | None = None

  def compile(self) -> Choice:
    root = self._new(self._place(self._document, 'schema', 0))
    while self._unread:
      pointer, choice = self._unread.pop()
      where = 'schema' + pointer[1:].replace('/', '.')
      self._parts[choice].append(self._place(self._definition(pointer), where, 0))
    for choice in self._parts:
      choice.nodes = _merged(self._flat(choice))
    self._measure()
    if root.height > MAX_DEPTH:
      raise ValueError(f'schema: no document of at most {MAX_DEPTH} levels satisfies it; look for '
                       'a recursion without an end, or bounds that exclude each other')
    return root

  def _flat(self, choice: Choice) -> list[Any]:
    """Return what stands behind references and alternatives, each place once."""
    found, todo, seen = [], [choice], {choice}
    while todo:
      for part in self._parts[todo.pop()]:
        if not isinstance(part, Choice):
          found.append(part)
        elif part not in seen:
          seen.add(part)
          todo.append(part)
    return found

  def _measure(self) -> None:
    """Set all heights, the flattest first."""
    containers = {node for choice in self._parts for node in choice.nodes
                  if isinstance(node, Array | Object)}
    for node in containers:
      node.height = _UNREACHABLE
    for _ in range(MAX_DEPTH + 1):
      for choice in self._parts:
        choice.height = min((node.height for node in choice.nodes), default=_UNREACHABLE)
      for node in containers:
        node.height = min(_UNREACHABLE, 1 + max(map(_height, _needed(node)), default=0))

  def _new(self, *parts: Any) -> Choice:
    choice = Choice()
    self._parts[choice] = list(parts)
    return choice

  def _reference(self, pointer: str, where: str) -> Choice:
    """Return the place of a definition, which is read later: references may chain and recur."""
    if pointer not in self._references:
      if self._definition(pointer) is None:
        raise ValueError(f'{where}.$ref: {_short(pointer)} names no definition; use "#" or '
                         '"#/$defs/NAME" of this document')
      self._references[pointer] = self._new()
      self._unread.append((pointer, self._references[pointer]))
    return self._references[pointer]

  def _definition(self, pointer: str) -> Any:
    """Return the schema that a reference names; None where there is none."""
    if pointer == '#':
      return self._document
    start, _, name = pointer.partition('/')[2].partition('/')
    if not pointer.startswith('#/') or start not in ('$defs', 'definitions') or '/' in name:
      return None
    definitions = self._document.get(start)
    name = name.replace('~1', '/').replace('~0', '~')
    return definitions.get(name) if isinstance(definitions, Mapping) else None

  def _place(self, schema: Any, where: str, depth: int) -> Choice:
    """Return what a (sub)schema takes."""
    self._count(where)
    if depth > MAX_SCHEMA_DEPTH:
      raise ValueError(f'schema: nested deeper than {MAX_SCHEMA_DEPTH} levels; use $defs')
    if schema is True:
      schema = {}
    if not isinstance(schema, Mapping):
      raise ValueError(f'{where}: {_short(schema)} is no schema; give an object')
    given = set(schema) - _ANNOTATIONS
    for keyword in sorted(given - _KEYWORDS):
      raise ValueError(f'{where}: the keyword {_short(keyword)} is not supported; supported are '
                       f'{", ".join(sorted(_KEYWORDS))}')
    if not given:
      return self._any()
    alone = [keyword for keyword in _ALONE if keyword in given]
    if alone:
      return self._alone(schema, alone[0], given, where, depth)
    if 'type' not in given:
      raise ValueError(f'{where}: {", ".join(sorted(given))} without a type; add "type"')
    types = _types(schema['type'], where)
    accepted = {'type'}.union(*(_TYPES[name] for name in types))
    for keyword in sorted(given - accepted):
      raise ValueError(f'{where}: {keyword} says nothing about type {" or ".join(types)}; leave it '
                       'out, or change the type')
    return self._new(*(self._typed(name, schema, where, depth) for name in types))

  def _any(self) -> Choice:
    if self._anything is None:
      self._anything = anything = self._new()
      self._parts[anything] += [
        String(), Number(), b'true', b'false', b'null', Array(anything),
        Object(names_of([]), (), 0, anything),
      ]
    return self._anything

  def _alone(
    self, schema: Mapping[str, Any], keyword: str, given: set[str], where: str, depth: int
  ) -> Choice:
    """Compile a keyword that says all by itself; `type` may narrow `enum` and `const`."""
    value, here = schema[keyword], f'{where}.{keyword}'
    others = given - {keyword} - ({'type'} if keyword in ('enum', 'const') else set())
    for other in sorted(others):
      raise ValueError(f'{where}: {keyword} and {other} together are not supported; move one into '
                       'a schema of its own')
    if keyword == '$ref':
      if not isinstance(value, str):
        raise ValueError(f'{here}: {_short(value)} is no text')
      return self._reference(value, where)
    if keyword == 'anyOf':
      if not isinstance(value, list) or not value:
        raise ValueError(f'{here}: {_short(value)} is no list of schemas')
      return self._new(*(self._place(part, f'{here}[{i}]', depth + 1)
                         for i, part in enumerate(value)))
    if keyword == 'enum' and (not isinstance(value, list) or not value):
      raise ValueError(f'{here}: {_short(value)} is no list of values')
    values = value if keyword == 'enum' else [value]
    if 'type' in given:
      types = _types(schema['type'], where)
      values = [v for v in values if any(_is_type(v, name) for name in types)]
    return self._constants(values, here, depth)

  def _constants(self, values: list[Any], where: str, depth: int) -> Choice:
    """Return what takes these values, in every spelling of their strings."""
    if depth > MAX_SCHEMA_DEPTH:
      raise ValueError(f'{where}: nested deeper than {MAX_SCHEMA_DEPTH} levels')
    return self._new(*(part for value in values for part in self._constant(value, where, depth)))

  def _constant(self, value: Any, where: str, depth: int) -> list[Any]:
    self._count(where)
    if isinstance(value, str):
      if not _encodable(value):
        raise ValueError(f'{where}: a text holds half of a surrogate pair')
      return [value]
    if isinstance(value, Mapping):
      if not all(map(_encodable, value)):
        raise ValueError(f'{where}: a name holds half of a surrogate pair')
      places = tuple(self._constants([item], where, depth + 1) for item in value.values())
      return [Object(names_of(value), places, (1 << len(value)) - 1, None)]
    if isinstance(value, list):
      places = tuple(self._constants([item], where, depth + 1) for item in value)
      return [Array(self._new(), places, len(value), len(value))]
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'{where}: {value} is no JSON')
    return _texts(value)

  def _typed(self, name: str, schema: Mapping[str, Any], where: str, depth: int) -> Any:
    match name:
      case 'object':
        return self._object(schema, where, depth)
      case 'array':
        return self._array(schema, where, depth)
      case 'string':
        least, most = _bounds(schema, 'minLength', 'maxLength', where)
        return String(least, most)
      case 'boolean':
        return self._new(b'true', b'false')
      case 'null':
        return b'null'
    return Number(integer=name == 'integer')

  def _object(self, schema: Mapping[str, Any], where: str, depth: int) -> Object:
    properties, required = schema.get('properties', {}), schema.get('required', [])
    if not isinstance(properties, Mapping) or not all(map(_encodable, properties)):
      raise ValueError(f'{where}.properties: {_short(properties)} is no object of schemas')
    if not isinstance(required, list) or not all(
        isinstance(name, str) and _encodable(name) for name in required):
      raise ValueError(f'{where}.required: {_short(required)} is no list of names')
    other = schema.get('additionalProperties', True)
    additional = None if other is False else self._place(
      other, f'{where}.additionalProperties', depth + 1)
    places = {name: self._place(part, f'{where}.properties[{_short(name)}]', depth + 1)
              for name, part in properties.items()}
    for name in required:
      self._count(where)
      if name not in places and additional is None:
        raise ValueError(f'{where}.required: {_short(name)} is not in properties, and '
                         'additionalProperties is false')
      places.setdefault(name, additional)  # type: ignore[arg-type]
    bits = sum(1 << i for i, name in enumerate(places) if name in set(required))
    return Object(names_of(places), tuple(places.values()), bits, additional)

  def _array(self, schema: Mapping[str, Any], where: str, depth: int) -> Array:
    least, most = _bounds(schema, 'minItems', 'maxItems', where)
    first = schema.get('prefixItems', [])
    if not isinstance(first, list):
      raise ValueError(f'{where}.prefixItems: {_short(first)} is no list of schemas')
    prefix = tuple(self._place(part, f'{where}.prefixItems[{i}]', depth + 1)
                   for i, part in enumerate(first))
    items = schema.get('items', True)
    if items is False:
      return Array(self._new(), prefix, least, most)
    return Array(self._place(items, f'{where}.items', depth + 1), prefix, least, most)

  def _count(self, where: str) -> None:
    self._seen += 1
    if self._seen > MAX_SCHEMAS:
      raise ValueError(f'{where[:80]}: the schema has more than {MAX_SCHEMAS} parts')


def _merged(parts: list[Any]) -> tuple[Any, ...]:
  """Return the nodes of a place: all strings that are given in one, all words in one."""
  strings = dict.fromkeys(part for part in parts if isinstance(part, str))
  words = dict.fromkeys(part.decode() for part in parts if isinstance(part, bytes))
  nodes = [part for part in parts if not isinstance(part, str | bytes)]
  for kind, name in ((Object, 'objects'), (Array, 'arrays')):
    if (count := sum(isinstance(node, kind) for node in nodes)) > MAX_CONTAINERS:
      raise ValueError(f'schema: {count} {name} to choose from in one place; at most '
                       f'{MAX_CONTAINERS} are supported')
  nodes += [String(names=names_of(strings))] if strings else []
  return (*nodes, Words(names_of(words))) if words else tuple(nodes)


def _needed(node: Array | Object) -> list[Choice]:
  """Return what a value of a container needs."""
  if isinstance(node, Object):
    return [value for i, value in enumerate(node.values) if node.required >> i & 1]
  own = list(node.prefix[: node.least])
  return own if node.least <= len(node.prefix) else [*own, node.items]


def _height(choice: Choice) -> int:
  return choice.height


def _types(value: Any, where: str) -> list[str]:
  names = [value] if isinstance(value, str) else value
  if not isinstance(names, list) or not names:
    raise ValueError(f'{where}.type: {_short(value)} is no type; use {", ".join(_TYPES)}')
  for name in names:
    if not isinstance(name, str) or name not in _TYPES:
      raise ValueError(f'{where}.type: {_short(name)} is no type; use {", ".join(_TYPES)}')
  return list(dict.fromkeys(names))


def _bounds(
  schema: Mapping[str, Any], lower: str, upper: str, where: str
) -> tuple[int, int | None]:
  least, most = schema.get(lower, 0), schema.get(upper)
  for name, value in ((lower, least), (upper, most)):
    if name in schema and (type(value) is not int or value < 0):
      raise ValueError(f'{where}.{name}: {_short(value)} is no number of 0 or more')
  if most is not None and least > most:
    raise ValueError(f'{where}: {lower} {least} is above {upper} {most}')
  return least, most


_CHECKS: dict[str, Callable[[Any], bool]] = {
  'object': lambda value: isinstance(value, Mapping),
  'array': lambda value: isinstance(value, list),
  'string': lambda value: isinstance(value, str),
  'boolean': lambda value: isinstance(value, bool),
  'null': lambda value: value is None,
  'number': lambda value: isinstance(value, int | float) and not isinstance(value, bool),
  'integer': lambda value: not isinstance(value, bool) and (
    isinstance(value, int) or (isinstance(value, float) and value.is_integer())),
}


def _is_type(value: Any, name: str) -> bool:
  return _CHECKS[name](value)


def _texts(value: int | float | None) -> list[bytes]:
  """Return how a constant may be written: as it is given; a number with or without its `.0`."""
  values = [value]
  if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53:
    values += [float(value)] + [int(value)] * (int(value) == value)
  return [json.dumps(each).encode() for each in values]


def _encodable(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _short(value: Any) -> str:
  """Return a value as it may stand in a message: one line, and not long."""
  if isinstance(value, Mapping | list):
    return 'an object' if isinstance(value, Mapping) else 'a list'
  text = json.dumps(value, default=str)
  return text if len(text) <= 60 else f'{text[:57]}...'
