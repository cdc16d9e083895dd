"""JSON under a token mask: whatever is drawn is valid, whatever is valid can be drawn."""

import datetime
import functools
import itertools
import json
import random
import re
import string
import uuid

import numpy as np
import pytest

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation import constraint as constraint_lib
from jaxllm.generation.constraint import ConstraintError, JsonConstraints

BYTES = [bytes([value]) for value in range(256)]
# Several structures, halves of characters, escapes, and white space in one token.
MIXED = [
  b'"},{"', b'":"', b'","', b'":', b'"}', b'"]', b'}}', b']]', b'[[', b'{"', b' "', b'", "', b': ',
  b'\n  ', b'\n', b'  ', b'\t\t', b'\\"', b'\\n', b'\\u', b'\\ud83d', b'\\ude00', b'u00', b'true',
  b'false,', b'null}', b'ull', b'12', b'3.5', b'0.', b'e+', b'-1', b',1', b'name', b'"name":',
  b'na', b'me":[', b'a"b', b'kind":"', b'other', b'caf\xc3', b'\xa9"', b'\xf0\x9f\x99', b'\x82 ok',
  b'\xe4\xb8', b'\xad', b'\xed\xa0', b'\xc0\xaf', b'\x00', b'abc', b'" ,', b'{}', b'[]',
  b'{"name":"', b'1}', b'1]', b'",',
]
SCHEMAS = {
  'record': {
    'type': 'object', 'additionalProperties': False, 'required': ['name', 'age'], 'title': 'x',
    'properties': {
      'name': {'type': 'string', 'minLength': 1, 'maxLength': 5}, 'age': {'type': 'integer'},
      'tags': {'type': 'array', 'items': {'enum': ['a', 'é', 'a"b', 7, None, 1.5]}, 'maxItems': 3},
      'name2': {'type': ['number', 'null']},
    },
  },
  'open': {
    'type': 'object', 'required': ['na', 'other'], 'properties': {'na': {'type': 'boolean'}},
    'additionalProperties': {'type': 'integer'},
  },
  'union': {'anyOf': [
    {'type': 'object', 'properties': {'kind': {'const': 'a'}, 'v': {'type': 'string'}},
     'required': ['kind', 'v'], 'additionalProperties': False},
    {'type': 'object', 'properties': {'kind': {'const': 'b'}, 'v': {'type': 'number'}},
     'required': ['kind', 'v'], 'additionalProperties': False},
    {'type': 'array', 'items': {'type': 'integer'}, 'minItems': 2},
  ]},
  'tree': {
    '$ref': '#/$defs/node', '$defs': {'node': {
      'type': 'object', 'additionalProperties': False, 'required': ['v', 'kids'],
      'properties': {'v': {'type': 'null'},
                     'kids': {'type': 'array', 'items': {'$ref': '#/$defs/node'}}},
    }},
  },
  'constant': {'const': {'a': [1, True, {'b': 'ü'}], 'c': 2.5}},
  'pair': {'type': 'array', 'prefixItems': [{'type': 'string', 'maxLength': 3}, True],
           'items': False, 'minItems': 1},
  'number': {'type': 'number'},
  'words': {'anyOf': [*({'const': f'w{i}'} for i in range(50)), {'enum': [*range(200), -1, 0.5]},
                      {'type': 'boolean'}, {'type': 'array', 'items': {'const': 1}}]},
  'patterns': {
    'type': 'object', 'required': ['zip', 'n', 'when', 'id'], 'additionalProperties': False,
    'properties': {
      'zip': {'type': 'string', 'pattern': r'^\d{5}$'},
      'part': {'type': 'string', 'pattern': 'b+', 'maxLength': 4},
      'n': {'type': 'integer', 'minimum': -3, 'exclusiveMaximum': 12},
      'x': {'type': 'number', 'minimum': 0, 'maximum': 1},
      'even': {'type': 'integer', 'multipleOf': 2},
      'when': {'type': 'string', 'format': 'date'},
      'id': {'type': 'string', 'format': 'uuid4'},
      'data': {'type': 'string', 'format': 'base64'},
      'file': {'type': 'string', 'format': 'path', 'maxLength': 3},
    },
  },
  'one': {'oneOf': [
    {'type': 'object', 'properties': {'pet': {'const': 'cat'}, 'n': {'type': 'integer'}},
     'required': ['pet', 'n'], 'additionalProperties': False},
    {'type': 'object', 'properties': {'pet': {'const': 'dog'}, 'n': {'type': 'boolean'}},
     'required': ['pet', 'n'], 'additionalProperties': False},
    {'type': 'null'},
  ], 'discriminator': {'propertyName': 'pet'}},
  'all': {
    'allOf': [{'$ref': '#/$defs/a'}, {'required': ['b']}], 'description': 'x',
    '$defs': {'a': {'type': 'object', 'properties': {'a': {'type': 'null'}, 'b': {'type': 'null'}},
                    'additionalProperties': False}},
  },
  'maps': {'type': 'object', 'additionalProperties': False, 'required': ['m', 'names'],
           'properties': {
             'm': {'type': 'object', 'patternProperties': {'^x': {'type': 'integer'}},
                   'additionalProperties': False, 'minProperties': 1},
             'names': {'type': 'object', 'propertyNames': {'$ref': '#/$defs/k'},
                       'additionalProperties': {'type': 'boolean'}},
             'other': {'type': 'object', 'propertyNames': {'pattern': '^[ab]+$'}}},
           '$defs': {'k': {'enum': ['k1', 'k2']}}},
  'money': {'anyOf': [{'type': 'number', 'minimum': 0}, {
    'type': 'string', 'pattern': r'^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$'}]},
}
DOCUMENTS = {
  'record': [{'name': 'é🙂"\\\n', 'age': -12},
             {'name': 'x', 'age': 0, 'tags': [], 'name2': -1.5e-07},
             {'name': '中', 'age': 10**20, 'tags': ['a"b', 7, None]}],
  'open': [{'na': True, 'other': 1}, {'na': False, 'other': 4, 'n': 3, 'nam': 5, '': 6, 'é': 7}],
  'union': [{'kind': 'b', 'v': 1e30}, {'kind': 'a', 'v': 'b'}, [1, 2, 3]],
  'tree': [{'v': None, 'kids': [{'v': None, 'kids': []}, {'v': None, 'kids': []}]}],
  'constant': [{'a': [1, True, {'b': 'ü'}], 'c': 2.5}],
  'pair': [['abc', {'x': [None]}], ['']],
  'words': ['w4', 'w49', 12, 123, 1, -1, 0.5, 50, False, [1, 1, 1]],
  'number': [0, -0.5, 12, 1e16, 5e-32, 1.7976931348623157e30],
  'patterns': [{'zip': '00501', 'n': 11, 'when': '2024-02-29',
                'id': '6b7cfb58-4d31-4f0b-8f0d-0a1b2c3d4e5f'},
               {'zip': '12345', 'part': 'abbc', 'n': -3, 'x': 0.5, 'even': 10, 'when': '0999-12-31',
                'id': '00000000-0000-4000-a000-000000000000', 'data': 'aGk=', 'file': '/é'}],
  'one': [{'pet': 'cat', 'n': 1}, {'pet': 'dog', 'n': True}, None],
  'all': [{'b': None}, {'a': None, 'b': None}],
  'maps': [{'m': {'x1': 1}, 'names': {'k1': True, 'k2': False}},
           {'m': {'x': 1, 'xy': 2}, 'names': {}, 'other': {'ab': [1]}}],
  'money': [0, 12.5],
}
REFUSED = {
  'record': ['{"name":"abcdef","age":1}', '{"name":"a"}', '{"name":"","age":1}', '{"age":1',
             '{"name":"a","age"1', '{"x"', '{"name":"a","age":1,"tags":["b"',
             '{"name":"a","age":1,"tags":[7,7,7,', '{"name":"a","age":01'],
  'open': ['{"other":1}', '{"na":1', '{"n\\u0061":1', '{"na":true,"other":true',
           '{"na":true,"other":1,"n\\u0061"', '{"na":true,"other":1,"na"'],
  'union': ['{"kind":"a","v":1', '[1]', '"', '{"kind":"c'],
  'tree': ['{"v":null}', '{"v":null,"kids":[1', '{"v":null,"kids":[]}}'],
  'constant': ['{"a":[1,true]', '{"a":[1,true,{"b":"ü"}],"c":2,', '{"c":2.5}'],
  'pair': ['["abcd', '[]', '["a",1,', '[1'],
  'words': ['"w50', '"w4"1', '200', '-2', '0.6', '12.5', '01', 'tru1', '[12', '[2', '1,'],
  'number': ['01', '-a', '+1', '.5', '1.e', '"1"', 'NaN', '--1'],
  'patterns': ['{"zip":"1234"', '{"zip":"123456', '{"zip":"1234a', '{"zip":"12345","part":"aa"',
               '{"zip":"12345","n":12', '{"zip":"12345","n":-4', '{"zip":"12345","n":1,"x":1.5',
               '{"zip":"12345","n":1,"even":3,', '{"zip":"12345","n":1,"when":"2023-02-29',
               '{"zip":"12345","n":1,"when":"2023-13'],
  'one': ['{"pet":"cat","n":true', '{"pet":"cow', '{"pet":"cat"}'],
  'all': ['{}', '{"a":null}', '{"b":null,"c'],
  'maps': ['{"m":{}', '{"m":{"y', '{"m":{"x":1},"names":{"k3', '{"m":{"x":"'],
  'money': ['"', '-1'],
  None: ['[', '1', '{a', '{"a":1,}', '{"a"}', "{'a'", '{"a":\x00', '{"a":"\n', '{"\\ud800"',
         '{"\\x', '{"\\udc00', '{"a":[1,]', '{"a":1]', '{"a":1}}', '{"a":tru}', '   {', '{"a":  '],
}
# What leads to the end of a document soon.
ENDING = {b'"', b'}', b']', b':', b'0', b'1', b'true', b'na', b'other', b'b'}


def equal(one, other):
  """Compare as JSON does: 1 is 1.0 but not true."""
  return one == other and isinstance(one, bool) == isinstance(other, bool)


def is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


TYPES = {
  'object': lambda value: isinstance(value, dict), 'array': lambda value: isinstance(value, list),
  'string': lambda value: isinstance(value, str), 'boolean': lambda value: isinstance(value, bool),
  'null': lambda value: value is None, 'number': is_number,
  'integer': lambda value: is_number(value) and value == int(value),
}
FORMATS = {
  'date': datetime.date.fromisoformat,
  'uuid4': lambda text: uuid.UUID(text) if uuid.UUID(text).version == 4 else 1 / 0,
  'base64': lambda text: __import__('base64').b64decode(text, validate=True), 'path': len,
}


def satisfies(schema, value, root=None):
  """Judge a document by the meaning of the keywords, apart from the code under test."""
  root = root or schema
  inside = functools.partial(satisfies, root=root)
  if isinstance(schema, bool):
    return schema
  checks = [
    '$ref' not in schema or inside(root['$defs'][schema['$ref'].split('/')[-1]], value),
    'anyOf' not in schema or any(inside(part, value) for part in schema['anyOf']),
    'oneOf' not in schema or sum(inside(part, value) for part in schema['oneOf']) == 1,
    all(inside(part, value) for part in schema.get('allOf', [])),
    'const' not in schema or equal(value, schema['const']),
    'enum' not in schema or any(equal(value, known) for known in schema['enum']),
  ]
  types = schema.get('type', [*TYPES])
  checks.append(any(TYPES[name](value) for name in ([types] if isinstance(types, str) else types)))
  if isinstance(value, str):
    checks += [schema.get('minLength', 0) <= len(value) <= schema.get('maxLength', len(value)),
               re.search(schema.get('pattern', ''), value, re.ASCII) is not None]
    if 'format' in schema:
      FORMATS[schema['format']](value)
  if is_number(value):
    checks += [schema.get('minimum', value) <= value <= schema.get('maximum', value),
               value < schema.get('exclusiveMaximum', float('inf')),
               value % schema.get('multipleOf', 1) == 0 or 'multipleOf' not in schema]
  if isinstance(value, list):
    rest = itertools.repeat(schema.get('items', True))
    checks += [schema.get('minItems', 0) <= len(value) <= schema.get('maxItems', len(value)),
               all(inside(part, item) for item, part in zip(
                 value, itertools.chain(schema.get('prefixItems', []), rest), strict=False))]
  if isinstance(value, dict):
    checks += [set(schema.get('required', [])) <= set(value),
               len(value) >= schema.get('minProperties', 0)]
    for name, item in value.items():
      parts = [part for known, part in schema.get('properties', {}).items() if known == name]
      parts += [part for pattern, part in schema.get('patternProperties', {}).items()
                if re.search(pattern, name)]
      parts = parts or [schema.get('additionalProperties', True)]
      checks += [inside(part, item) for part in (*parts, schema.get('propertyNames', True))
                 if part is not schema.get('propertyNames')]
      checks.append(inside(schema.get('propertyNames', True), name))
  return all(checks)


def vocabulary(seed, extra=0):
  """Return (bytes of ids, id of EOS): all bytes, mixed and special tokens, in any order."""
  draw = random.Random(seed)
  id_bytes = [*BYTES, *MIXED, b'', b'', b'{']
  letters = [*string.ascii_lowercase, *'"{}[]:,\\ \n0123456789-.eut', 'é', '中', '🙂']
  for _ in range(extra):
    text = ''.join(draw.choices(letters, k=draw.randint(2, 6))).encode()
    id_bytes.append(text[draw.randint(0, 1) : len(text) - draw.randint(0, 1)])
  draw.shuffle(id_bytes)
  return id_bytes, id_bytes.index(b'')


def make(constraints, schema):
  return constraints.schema({'type': 'object'} if schema is None else schema)


def spelled(id_bytes, text, draw):
  """Return token ids for a text, chosen at random among those that fit."""
  ids, place = [], 0
  while place < len(text):
    fitting = [i for i, part in enumerate(id_bytes) if part and text.startswith(part, place)]
    ids.append(draw.choice(fitting))
    place += len(id_bytes[ids[-1]])
  return ids


def walk(constraint, id_bytes, eos, draw, patience):
  """Draw tokens until EOS; after `patience` tokens prefer those that end something."""
  text = b''
  for count in itertools.count():
    assert count < 20_000, text[:200]
    allowed = np.flatnonzero(constraint.allowed())
    assert allowed.size, text
    if eos in allowed and (count > patience or draw.random() < 0.5):
      constraint.advance(eos)
      assert list(np.flatnonzero(constraint.allowed())) == [eos]
      return text
    choices = allowed if eos not in allowed or allowed.size == 1 else allowed[allowed != eos]
    if count > patience:
      ending = [i for i in choices if id_bytes[i] in ENDING]
      choices = ending or choices
    token = int(draw.choice(list(choices)))
    constraint.advance(token)
    text += id_bytes[token]
  raise AssertionError


@pytest.mark.parametrize('name', [None, *SCHEMAS])
def test_whatever_is_drawn_is_valid(name):
  schema = SCHEMAS.get(name)
  found = set()
  for seed in range(4):
    id_bytes, eos = vocabulary(seed, extra=200)
    constraints = JsonConstraints(id_bytes, [eos])
    draw = random.Random(seed)
    for patience in (0, 5, 30, 100):
      text = walk(make(constraints, schema), id_bytes, eos, draw, patience)
      value = json.loads(text)
      json.dumps(value, ensure_ascii=False).encode()  # No half of a surrogate pair.
      assert isinstance(value, dict) if schema is None else satisfies(schema, value), text
      found.add(text)
  assert len(found) > (0 if name == 'constant' else 3), found


@pytest.mark.parametrize('name', [None, *SCHEMAS])
def test_whatever_is_valid_can_be_drawn(name):
  id_bytes, eos = vocabulary(1)
  constraints = JsonConstraints(id_bytes, [eos])
  draw = random.Random(3)
  documents = DOCUMENTS[name] if name else [
    {}, {'a': [1, 2.5e-8, [], {}, [[True]], None, 'é\u2028🙂'], '': {'b\\"/\b': 'x'}}]
  styles = [{'separators': (',', ':')}, {}, {'indent': 2}, {'indent': 4}]
  for document, style in itertools.product(documents, styles):
    assert name is None or satisfies(SCHEMAS[name], document)
    text = json.dumps(document, ensure_ascii=False, **style).encode()
    constraint = make(constraints, SCHEMAS.get(name))
    for token in spelled(id_bytes, text, draw):
      assert constraint.allowed()[token], (text, id_bytes[token])
      constraint.advance(token)
    assert constraint.allowed()[eos]
  for text in REFUSED[name]:
    constraint = make(constraints, SCHEMAS.get(name))
    with pytest.raises(ValueError, match='is not allowed'):
      for token in spelled(id_bytes, text.encode(), draw):
        constraint.advance(token)
      constraint.advance(eos)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('name', [None, 'record', 'open', 'tree', 'words', 'patterns'])
def test_mask_equals_trying_every_token(name, whole):
  id_bytes, eos = vocabulary(7, extra=100)
  if not whole:  # Without bytes beyond ASCII, characters cannot be spelled in parts.
    id_bytes = [text for text in id_bytes if len(text) != 1 or text[0] < 0x80]
    eos = id_bytes.index(b'')
  constraints = JsonConstraints(id_bytes, [eos], len(id_bytes) + 5)
  bytewise = JsonConstraints([*BYTES, b''], [256])
  draw = random.Random(5)
  for _ in range(2):
    constraint, prefix = make(constraints, SCHEMAS.get(name)), b''
    for _ in range(12):
      other = make(bytewise, SCHEMAS.get(name))._matcher
      assert other.consume_tokens([*prefix])
      want = np.zeros(len(id_bytes) + 5, bool)
      for token, text in enumerate(id_bytes):
        if text and (whole or text.decode(errors='ignore').encode() == text):
          want[token] = other.validate_tokens([*text]) == len(text)
      want[eos] = constraint._matcher.is_accepting()
      got = constraint.allowed()
      np.testing.assert_array_equal(got, want, str(prefix))
      choices = [i for i in np.flatnonzero(got) if i != eos]
      if not choices:
        break
      token = int(draw.choice(choices))
      constraint.advance(token)
      prefix += id_bytes[token]


@pytest.mark.parametrize('schema', [None, True])
def test_nothing_runs_on_for_ever(schema):
  id_bytes, eos = vocabulary(0)
  constraints = JsonConstraints(id_bytes, [eos])
  for begin, text, most in [
      (b'{', b'\n', 1), (b'{\n', b' ', 32), (b'{"a":', b' ', 1), (b'{"a":', b'[', 31),
      (b'{"a":', b'[[', 16), (b'{"a":1', b'1', 31), (b'{"a":1', b'12', 16), (b'{"a":0.', b'0', 31),
      (b'{"a":1e-', b'0', 2), (b'{"a":1e', b'0', 2)]:
    constraint = make(constraints, schema)
    for value in begin:
      constraint.advance(id_bytes.index(bytes([value])))
    token, count = id_bytes.index(text), 0
    while constraint.allowed()[token]:
      constraint.advance(token)
      count += 1
      assert count <= most, (begin, text)
    assert count >= most - 1, (begin, text)


def test_a_schema_may_ask_for_more_than_the_brake_allows():
  id_bytes, eos = vocabulary(0)
  levels = {f'd{i}': {'type': 'array', 'items': {'$ref': f'#/$defs/d{i + 1}'}, 'minItems': 1,
                      'maxItems': 1} for i in range(40)}
  constraint = JsonConstraints(id_bytes, [eos]).schema(
    {'$ref': '#/$defs/d0', '$defs': levels | {'d40': {'type': 'null'}}})
  text = walk(constraint, id_bytes, eos, random.Random(2), 0)
  assert text.translate(None, b' \n') == b'[' * 40 + b'null' + b']' * 40


def test_masks_follow_a_tokenizer():
  tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  constraint = JsonConstraints(tokenizer.id_bytes, [tokenizer.eos_id]).schema({'type': 'object'})
  assert bytes(np.flatnonzero(constraint.allowed()).tolist()) == b'{'
  for token in tokenizer.encode('{"a":1}'):
    constraint.advance(token)
  assert list(np.flatnonzero(constraint.allowed())) == [tokenizer.eos_id]


@pytest.mark.parametrize('schema, message', [
  ({'type': 'string', 'pattern': '(?=a)b'}, 'look-around'),
  ({'type': 'object', 'patternProperties': {'(': {}}}, 'unclosed group'),
  ({'type': 'object', 'properties': {'a': {'not': {}}}}, 'not supported: "not"'),
  ({'type': 'array', 'uniqueItems': True}, 'not supported: "uniqueItems"'),
  ({'type': 'object', 'unevaluatedProperties': False}, '"unevaluatedProperties"'),
  ({'oneOf': [{'type': 'integer'}, {'type': 'number'}]}, 'oneOf'),
  ({'type': 'string', 'format': 'iri'}, 'Unknown format: iri'),
  ({'type': 'text'}, 'Invalid type: text'),
  ({'type': ['string', {}]}, 'type'),
  ({'type': 'string', 'minLength': 3, 'maxLength': 2}, r'minLength \(3\)'),
  ({'type': 'object', 'required': ['a'], 'additionalProperties': False}, 'required'),
  ({'$ref': '#/$defs/x'}, 'does not exist'),
  ({'$ref': ['x']}, 'ref must be a string'),
  ({'$ref': 'https://example.org/x'}, 'not present|not.*resolve|retriev'),
  ({'$ref': '#'}, 'no document'),
  ({'anyOf': [{'$ref': '#'}]}, 'no document'),
  ({'type': 'integer', 'enum': ['a']}, 'incompatible types'),
  ({'enum': []}, 'empty'),
  ({'const': float('nan')}, 'not JSON'),
  ({'const': '\ud800'}, 'surrogate'),
  ({'const': 'a\x01'}, 'control character'),
  ({'type': 'array', 'items': 5}, 'must be an object or boolean'),
  ({'x-guidance': {'lenient': True}, 'not': {}}, 'not supported: "not"'),
  ('x', 'no schema'),
  (False, 'no schema'),
])
def test_what_is_not_supported_is_refused_by_name(schema, message):
  with pytest.raises(ValueError, match=message) as caught:
    JsonConstraints([*BYTES, b''], [256]).schema(schema)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_large_and_deep_schemas_are_refused_or_read_without_recursion():
  id_bytes, eos = vocabulary(0)
  constraints = JsonConstraints(id_bytes, [eos])
  for levels in (70, 3000):
    deep = {}
    for _ in range(levels):
      deep = {'type': 'array', 'items': deep}
    with pytest.raises(ValueError, match='nested deeper'):
      constraints.schema(deep)
  with pytest.raises(ValueError, match='bytes are more than'):
    constraints.schema({'enum': [*map(str, range(20_000))]})
  chain = {f'n{i}': {'$ref': f'#/$defs/n{i + 1}'} for i in range(900)} | {'n900': {'type': 'null'}}
  constraint = constraints.schema({'$ref': '#/$defs/n0', '$defs': chain})
  assert {id_bytes[i][:1] for i in np.flatnonzero(constraint.allowed())} == {b'n'}
  del chain['n900']
  with pytest.raises(ValueError, match='does not exist'):
    constraints.schema({'$ref': '#/$defs/n0', '$defs': chain})


@pytest.mark.parametrize('schema', [
  {'type': 'integer', 'multipleOf': 99_999_989},
  {'allOf': [{'type': 'integer', 'multipleOf': prime} for prime in (65537, 65539, 65543)]},
  {'type': 'object', 'patternProperties': {f'^x{i}_.*$': {} for i in range(1000)}},
], ids=['multipleOf', 'common multiple', 'patternProperties'])
def test_what_takes_too_long_to_compile_is_given_up(schema, monkeypatch):
  monkeypatch.setattr(constraint_lib, 'CPU_SECONDS', 1)
  with pytest.raises(ValueError, match='it takes more than 1 s of CPU time'):
    JsonConstraints([*BYTES, b''], [256]).schema(schema)


def test_a_schema_is_tried_in_a_process_once(monkeypatch):
  constraints = JsonConstraints([*BYTES, b''], [256])
  constraints.schema({'const': 'once'})
  monkeypatch.setattr(constraint_lib.sandbox, 'run', lambda *args, **kwargs: 1 / 0)
  constraints.schema({'const': 'once'})
  with pytest.raises(ZeroDivisionError):
    constraints.schema({'const': 'twice'})


def test_what_one_request_spends_is_there_for_the_next(monkeypatch):
  monkeypatch.setattr(constraint_lib, '_MAX_LEXER_STATES', 1500)
  constraints = JsonConstraints([*BYTES, b''], [256])
  counts = []
  for _ in range(2):
    draw = random.Random(1)
    constraint = constraints.schema({'type': 'string', 'pattern': 'a.{50}b'})
    with pytest.raises(ConstraintError):
      for count in range(10_000):
        constraint.advance(ord('"') if not count else draw.choice(b'ab'))
        constraint.allowed()
    counts.append(count)
  assert counts[0] == counts[1] > 20


def test_rows_of_a_schema_are_independent():
  constraints = JsonConstraints([*BYTES, b''], [256])
  one = constraints.schema({'enum': ['ab', 'cd']})
  other = one.copy()
  for byte in b'"ab"':
    one.advance(byte)
  assert one.allowed()[256] and not other.allowed()[256]
  assert np.flatnonzero(other.allowed()).tolist() == [ord('"')]


def test_objects_of_many_properties(monkeypatch):
  schema = {'type': 'object', 'properties': {f'p{i}': {'maxLength': i} for i in range(1500)}}

  def begin():
    constraint = JsonConstraints([*BYTES, b''], [256]).schema(schema)
    for byte in b'{"p1499":"':
      assert constraint.allowed()[byte]
      constraint.advance(byte)

  begin()
  monkeypatch.setattr(constraint_lib, '_MAX_ITEMS', 2000)
  with pytest.raises(ConstraintError, match='bearable cost'):
    begin()


def test_many_open_alternatives_stay_bounded():
  id_bytes, eos = vocabulary(2)
  constraints = JsonConstraints(id_bytes, [eos])
  again = {'type': 'array', 'items': {'$ref': '#'}}
  constraint = constraints.schema({'anyOf': [again] * 5 + [{'type': 'null'}]})
  for token in spelled(id_bytes, b'[' * 20 + b'null' + b']' * 20, random.Random(1)):
    assert constraint.allowed()[token]
    constraint.advance(token)
  assert constraint.allowed()[eos]


def test_a_dead_end_is_told():
  id_bytes = [bytes([value]) for value in range(0x80)] + [b'']
  constraint = JsonConstraints(id_bytes, [128]).schema({'const': 'é'})
  constraint.advance(ord('"'))
  with pytest.raises(ConstraintError, match='tokens of this model'):
    constraint.allowed()


def test_a_vocabulary_must_spell_json():
  with pytest.raises(ValueError, match='no token for "'):
    JsonConstraints([b'{', b'}', b''], [2])
  with pytest.raises(ValueError, match='eos_token_ids'):
    JsonConstraints(BYTES, [])
