"""JSON under a token mask: whatever is drawn is valid, whatever is valid can be drawn."""

import itertools
import json
import random
import string

import numpy as np
import pytest

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation import json_grammar
from jaxllm.generation.constraint import JsonConstraints

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
}
DOCUMENTS = {
  'record': [{'name': 'é🙂"\\\n', 'age': -12},
             {'age': 0, 'name2': -1.5e-07, 'name': 'x', 'tags': []},
             {'tags': ['a"b', 7, None], 'age': 10**20, 'name': '中'}],
  'open': [{'na': True, 'other': 1}, {'n': 3, 'other': 4, 'na': False, 'nam': 5, '': 6, 'é': 7}],
  'union': [{'kind': 'b', 'v': 1e300}, {'v': 'b', 'kind': 'a'}, [1, 2, 3]],
  'tree': [{'v': None, 'kids': [{'kids': [], 'v': None}, {'v': None, 'kids': []}]}],
  'constant': [{'c': 2.5, 'a': [1, True, {'b': 'ü'}]}],
  'pair': [['abc', {'x': [None]}], ['']],
  'words': ['w4', 'w49', 12, 123, 1.0, -1, 0.5, 50.0, False, [1, 1.0, 1]],
  'number': [0, -0.5, 12, 1e16, 5e-324, 1.7976931348623157e307],
}
REFUSED = {
  'record': ['{"name":"abcdef","age":1}', '{"name":"a"}', '{"name":"","age":1}', '{"age":1.5',
             '{"age":1,"age"', '{"x"', '{"tags":["b"', '{"tags":[7,7,7,', '{"age":01',
             '{"name2":tr'],
  'open': ['{"other":1}', '{"na":1', '{"n\\u0061":1', '{"other":true', '{"na":true,"n\\u0061"'],
  'union': ['{"kind":"a","v":1', '{"v":1,"kind":"a"', '[1]', '"'],
  'tree': ['{"v":null}', '{"v":null,"kids":[1', '{"kids":[],"v":null}}'],
  'constant': ['{"a":[1,true]', '{"c":2,', '{"c":2.5}'],
  'pair': ['["abcd', '[]', '["a",1,', '[1'],
  'words': ['"w50', '"w4"1', '200', '-2', '0.6', '12.5', '01', 'tru1', '[12', '[2', '1,'],
  'number': ['1e309', '01', '-a', '+1', '.5', '1.e', '"1"', 'NaN'],
  None: ['[', '1', '{a', '{"a":1,}', '{"a"}', "{'a'", '{"a":\x00', '{"a":"\n', '{"\\ud800"',
         '{"\\x', '{"\\udc00', '{"a":[1,]', '{"a":1]', '{"a":1}}', '{"a":tru}', '   {', '{"a":  '],
}
# What leads to the end of a document soon.
ENDING = {b'"', b'}', b']', b':', b'1', b'true', b'na', b'other'}


def equal(one, other):
  """Compare as JSON does: 1 is 1.0 but not true."""
  return one == other and isinstance(one, bool) == isinstance(other, bool)


def satisfies(schema, value, root=None):
  """Judge a document by the meaning of the keywords, apart from the code under test."""
  root = root or schema
  if schema is True:
    return True
  if '$ref' in schema:
    return satisfies(root['$defs'][schema['$ref'].split('/')[-1]], value, root)
  if 'anyOf' in schema:
    return any(satisfies(part, value, root) for part in schema['anyOf'])
  if 'const' in schema:
    return equal(value, schema['const'])
  if 'enum' in schema:
    return any(equal(value, known) for known in schema['enum'])
  kinds = {'object': dict, 'array': list, 'string': str, 'integer': int, 'number': (int, float),
           'boolean': bool, 'null': type(None)}
  types = schema['type'] if isinstance(schema['type'], list) else [schema['type']]
  if not any(isinstance(value, kinds[name]) and (isinstance(value, bool) <= (name == 'boolean'))
             for name in types):
    return False
  if isinstance(value, str):
    return schema.get('minLength', 0) <= len(value) <= schema.get('maxLength', len(value))
  if isinstance(value, list):
    parts = [*schema.get('prefixItems', [])]
    rest = schema.get('items', True)
    if rest is False and len(value) > len(parts):
      return False
    return schema.get('minItems', 0) <= len(value) <= schema.get('maxItems', len(value)) and all(
      satisfies(part, item, root) for item, part in
      zip(value, itertools.chain(parts, itertools.repeat(rest)), strict=False))
  if isinstance(value, dict):
    known, rest = schema.get('properties', {}), schema.get('additionalProperties', True)
    return set(schema.get('required', [])) <= set(value) and all(
      satisfies(known.get(name, rest), item, root) if known.get(name, rest) else False
      for name, item in value.items())
  return True


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
  return constraints.any_object() if schema is None else constraints.schema(schema)


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
  assert len(found) > 3


@pytest.mark.parametrize('name', [None, *SCHEMAS])
def test_whatever_is_valid_can_be_drawn(name):
  id_bytes, eos = vocabulary(1)
  constraints = JsonConstraints(id_bytes, [eos])
  draw = random.Random(3)
  documents = DOCUMENTS[name] if name else [
    {}, {'a': [1, 2.5e-8, [], {}, [[True]], None, 'é\u2028\x7f🙂'], '': {'b\\"/\b': 'x'}}]
  styles = [{'separators': (',', ':')}, {'separators': (',', ':'), 'ensure_ascii': False}, {},
            {'indent': 2}, {'indent': 4, 'ensure_ascii': False}, {'indent': '\t'}]
  for document, style in itertools.product(documents, styles):
    assert name is None or satisfies(SCHEMAS[name], document)
    text = json.dumps(document, **style).encode()
    constraint = make(constraints, SCHEMAS.get(name))
    for token in spelled(id_bytes, text, draw):
      assert constraint.allowed()[token], (text, id_bytes[token])
      constraint.advance(token)
    assert constraint.allowed()[eos] and constraint.complete
  for text in REFUSED[name]:
    constraint = make(constraints, SCHEMAS.get(name))
    with pytest.raises(ValueError, match='is not allowed'):
      for token in spelled(id_bytes, text.encode(), draw):
        constraint.advance(token)
      constraint.advance(eos)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('name', [None, *SCHEMAS])
def test_mask_equals_trying_every_token(name, whole):
  id_bytes, eos = vocabulary(7, extra=100)
  if not whole:  # Without bytes beyond ASCII, characters cannot be spelled in parts.
    id_bytes = [text for text in id_bytes if len(text) != 1 or text[0] < 0x80]
    eos = id_bytes.index(b'')
  constraints = JsonConstraints(id_bytes, [eos], len(id_bytes) + 5)
  draw = random.Random(5)
  for _ in range(3):
    constraint = make(constraints, SCHEMAS.get(name))
    for _ in range(20):
      stacks = constraint._stacks
      want = np.zeros(len(id_bytes) + 5, bool)
      for token, text in enumerate(id_bytes):
        after = list(stacks)
        for byte in text:
          after = [end for stack in after for end in json_grammar.step(stack, byte)]
        inside = after and after[0] and getattr(after[0][0], 'pending', b'')[:1] >= b'\x80'
        want[token] = bool(text) and bool(after) and (whole or not inside)
      want[eos] = any(map(json_grammar.is_complete, stacks))
      got = constraint.allowed()
      np.testing.assert_array_equal(got, want)
      choices = [i for i in np.flatnonzero(got) if i != eos]
      if not choices:
        break
      constraint.advance(int(draw.choice(choices)))


def test_nothing_runs_on_for_ever():
  id_bytes, eos = vocabulary(0)
  constraints = JsonConstraints(id_bytes, [eos])
  for begin, byte, most in [
      (b'', b' ', 1), (b'{', b'\n', 1), (b'{\n', b' ', 4), (b'{"a":', b' ', 1),
      (b'{"a":', b'[', 31), (b'{"a":1', b'1', 31), (b'{"a":0.', b'0', 32), (b'{"a":1e-', b'0', 3),
      (b'{"a":1e', b'0', 1)]:
    constraint = constraints.any_object()
    for value in begin:
      constraint.advance(id_bytes.index(bytes([value])))
    token = id_bytes.index(byte)
    for _ in range(most):
      constraint.advance(token)
    assert not constraint.allowed()[token], (begin, byte)


def test_masks_follow_a_tokenizer():
  tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  constraint = JsonConstraints(tokenizer.id_bytes, [tokenizer.eos_id]).any_object()
  assert bytes(np.flatnonzero(constraint.allowed()).tolist()) == b'\n {'
  for token in tokenizer.encode('{"a":1}'):
    constraint.advance(token)
  assert list(np.flatnonzero(constraint.allowed())) == [tokenizer.eos_id]


@pytest.mark.parametrize('schema, message', [
  ({'type': 'string', 'pattern': 'a+'}, '"pattern" is not supported'),
  ({'type': 'object', 'properties': {'a': {'type': 'number', 'minimum': 1}}},
   r'properties\["a"\]: the keyword "minimum"'),
  ({'oneOf': [{}]}, '"oneOf" is not supported'),
  ({'type': 'string', 'format': 'date'}, '"format"'),
  ({'type': 'text'}, '"text" is no type'),
  ({'type': []}, 'type'),
  ({'properties': {}}, 'without a type'),
  ({'type': 'integer', 'minLength': 2}, 'minLength says nothing about type integer'),
  ({'type': 'string', 'minLength': 3, 'maxLength': 2}, 'minLength 3 is above'),
  ({'type': 'string', 'minLength': True}, 'minLength: true'),
  ({'type': 'object', 'required': ['a'], 'additionalProperties': False}, '"a" is not in prop'),
  ({'anyOf': [{}], 'type': 'object'}, 'anyOf and type together'),
  ({'$ref': '#/$defs/x'}, 'names no definition'),
  ({'$ref': 'https://example.org/x'}, 'names no definition'),
  ({'$ref': '#'}, 'no document'),
  ({'anyOf': [{'$ref': '#'}]}, 'no document'),
  ({'type': 'object', 'properties': {'a': {'$ref': '#'}}, 'required': ['a']}, 'recursion without'),
  ({'type': 'integer', 'enum': ['a']}, 'no document'),
  ({'enum': []}, 'no list of values'),
  ({'const': float('nan')}, 'no JSON'),
  ({'const': '\ud800'}, 'surrogate'),
  ({'type': 'array', 'items': 5}, '5 is no schema'),
  ('x', 'no schema'),
  (False, 'no schema'),
])
def test_what_is_not_supported_is_refused_by_name(schema, message):
  id_bytes, eos = vocabulary(0)
  with pytest.raises(ValueError, match=message):
    JsonConstraints(id_bytes, [eos]).schema(schema)


def test_large_and_deep_schemas_are_refused_or_read_without_recursion():
  id_bytes, eos = vocabulary(0)
  constraints = JsonConstraints(id_bytes, [eos])
  deep = {}
  for _ in range(100):
    deep = {'type': 'array', 'items': deep}
  with pytest.raises(ValueError, match='nested deeper'):
    constraints.schema(deep)
  with pytest.raises(ValueError, match='40 objects to choose from'):
    constraints.schema({'anyOf': [{'type': 'object'}] * 40})
  with pytest.raises(ValueError, match='more than'):
    constraints.schema({'enum': [*map(str, range(10_000))]})
  chain = {f'n{i}': {'$ref': f'#/$defs/n{i + 1}'} for i in range(900)} | {'n900': {'type': 'null'}}
  constraint = constraints.schema({'$ref': '#/$defs/n0', '$defs': chain})
  assert {id_bytes[i][:1] for i in np.flatnonzero(constraint.allowed())} <= {b'n', b' ', b'\n'}


def test_many_open_alternatives_stay_bounded():
  id_bytes, eos = vocabulary(2)
  constraints = JsonConstraints(id_bytes, [eos])
  again = {'type': 'array', 'items': {'$ref': '#'}}
  constraint = constraints.schema({'anyOf': [again] * 5 + [{'type': 'null'}]})
  draw = random.Random(1)
  text = b'[' * 20 + b'null' + b']' * 20
  for token in spelled(id_bytes, text, draw):
    assert constraint.allowed()[token]
    constraint.advance(token)
    assert len(constraint._stacks) <= 32
  assert constraint.complete


def test_a_vocabulary_must_spell_json():
  with pytest.raises(ValueError, match='no token for "'):
    JsonConstraints([b'{', b'}', b''], [2])
  with pytest.raises(ValueError, match='eos_ids'):
    JsonConstraints(BYTES, [])
