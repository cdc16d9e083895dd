"""Which tokens may come next, so that the text is JSON, or JSON of a schema.

`JsonConstraints` makes the constraints of a tokenizer. llguidance computes the masks, and `Brake`
ends what would be valid and go on for ever: digits and nesting. A new schema is first compiled in
a process with limits of time and memory (`sandbox`), and only then here. Documents are
narrower than their schema: objects have their properties in the order of the schema, white space is
a space or a new line with up to 32 spaces, and only characters that must be escaped are.

Schemas are rewritten for llguidance, so that they accept only documents of the original: formats
become patterns, or go where they say nothing about the text (`_FORMATS`); `propertyNames` becomes
properties; an alternative of `anyOf` that looks around itself is left out where others remain.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxllm.generation import sandbox

CPU_SECONDS, MEMORY_BYTES = 2, 400_000_000
"""What compiling a schema may take; Python itself takes about 100 MB of address space."""
MAX_NESTING, MAX_DIGITS, MAX_EXPONENT = 32, 32, 2

# What every JSON document can be spelled with; all other characters can be escaped.
_NEEDED = b'"\\{}[]:,-.+0123456789abcdeflnrstu'
_OPTIONS = {'whitespace_pattern': r' |\n {0,32}', 'json_allowed_escapes': 'nrbtf\\"'}
_MAX_ITEMS = 20_000  # About four for each optional property of an object.
_MAX_LEXER_STATES = 100_000  # Up to 2 kB each, as long as a row lasts.
_MAX_COMPILED = 10_000
# Digests of grammars that compiled, the oldest first.
_compiled: dict[bytes, None] = {}
_TOO_COSTLY = ('schema: it cannot be followed from here by the tokens of this model, or not at a '
               'bearable cost; make it simpler')


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


class ConstraintError(ValueError):
  """A constraint cannot be followed any further; the message may be told to its client."""


class Constraint(Protocol):
  """Tells which tokens may come next; one per row, on the host."""

  def allowed(self) -> np.ndarray:
    """Return bool (vocab_size,); EOS is allowed exactly when the text is complete."""

  def advance(self, token: int) -> None:
    """Take the token that was sampled."""


class JsonConstraints:
  """Makes constraints for the tokens of one tokenizer, and is it for llguidance; thread-safe.

  Args of the constructor:
    id_bytes: of each id; tokens without bytes never come.
    eos_token_ids: end the text, and come at no other time.
    vocab_size: of masks; the number of ids by default.

  Raises:
    ValueError: an id is out of range, or the vocabulary cannot spell JSON.
  """

  is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()

  def __init__(
    self, id_bytes: Sequence[bytes], eos_token_ids: Sequence[int], vocab_size: int | None = None
  ):
    self.size = len(id_bytes) if vocab_size is None else vocab_size
    if self.size < len(id_bytes):
      raise ValueError(f'vocab_size={vocab_size} is below the {len(id_bytes)} ids of the tokenizer')
    if not eos_token_ids or not all(0 <= token < self.size for token in eos_token_ids):
      raise ValueError(f'eos_token_ids={[*eos_token_ids]}: give at least one id below {self.size}, '
                       'so that the text can end')
    single = {text[0] for text in id_bytes if len(text) == 1}
    if missing := bytes(byte for byte in _NEEDED if byte not in single):
      raise ValueError('the vocabulary cannot spell every JSON document: it has no token for '
                       f'{", ".join(missing.decode())}')
    # A character may be begun only where every continuation of it is a token.
    splits = all(byte in single for byte in range(0x80, 0xC0))
    self.tokens = [bytes(text) if splits or text.decode(errors='ignore').encode() == text else b''
                   for text in id_bytes]
    self.tokens += [b''] * (self.size - len(id_bytes))
    for token in eos_token_ids:
      self.tokens[token] = b''
    self.eos_token_id = eos_token_ids[0]
    self.brakes = [np.array([*map(count, self.tokens)], np.int8) for count in (
      _leading_digits, lambda text: b'[' in text or b'{' in text,
      lambda text: re.search(rb'".*[\[{]', text, re.DOTALL) is not None)]
    import llguidance

    self.compiled = llguidance.LLTokenizer(self, eos_token=[*eos_token_ids])  # type: ignore[arg-type]

  def __call__(self, text: str) -> list[int]:
    """Never called, for grammars are compiled with `no_forcing`."""
    raise NotImplementedError

  def schema(self, schema: Any, client: str = '') -> 'JsonConstraint':
    """Return a constraint to the documents of a JSON Schema; refuse one that is not supported.

    Nobody but its `client` can tell by the time that a schema was compiled before.
    """
    text = json.dumps(prepare(schema) | {'x-guidance': _OPTIONS})
    grammar = json.dumps({'grammars': [
      {'lark_grammar': f'%llguidance {{"no_forcing": true}}\nstart: %json {text}'}]})
    _check(grammar, client)
    import llguidance

    limits = llguidance.LLParserLimits(
      max_items_in_row=_MAX_ITEMS, max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    matcher = llguidance.LLMatcher(self.compiled, grammar, log_level=0, limits=limits)
    if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_error():
      raise ValueError('schema: no document satisfies it; look for a recursion without an end')
    return JsonConstraint(self, matcher)


class JsonConstraint:
  """A `Constraint` to JSON; begins at the start of a document.

  Nothing of it is kept for other requests: what is compiled grows with the tokens that it meets,
  and is spent once it has met too many. Copies share it.
  """

  def __init__(self, vocabulary: JsonConstraints, matcher: Any):
    self._vocabulary, self._matcher = vocabulary, matcher
    self._brake = Brake(vocabulary)

  def copy(self) -> 'JsonConstraint':
    """Return another one, which has to be at the start too."""
    return JsonConstraint(self._vocabulary, self._matcher.deep_copy())

  def allowed(self) -> np.ndarray:
    """Return bool (vocab_size,): the tokens that may come next; EOS after the end.

    Raises:
      ConstraintError: the schema has become too costly to follow, or the vocabulary cannot go on.
    """
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
    mask = np.unpackbits(bits, count=self._vocabulary.size, bitorder='little').view(bool)
    if self._matcher.is_error() or not mask.any():
      raise ConstraintError(_TOO_COSTLY)
    return self._brake.apply(mask)

  def advance(self, token: int) -> None:
    """Take the token that was sampled; refuse one that was not allowed, or as `allowed` does."""
    if not self._matcher.consume_token(token):
      if re.search(r'\bmax is\b|too |limit', self._matcher.get_error()):
        raise ConstraintError(_TOO_COSTLY)
      raise ValueError(f'token={token} is not allowed here; sample among allowed()')
    self._brake.advance(self._vocabulary.tokens[token])


class Brake:
  """Takes out tokens that make a number or a nesting longer than documents need.

  A number has up to 32 digits, its exponent 2, a container 32 levels, unless the schema has more.
  """

  def __init__(self, vocabulary: JsonConstraints):
    self._digits_V, self._opens_V, self._opens_later_V = vocabulary.brakes
    self._in_string = self._escaped = False
    self._depth = self._digits = 0

  def advance(self, text: bytes) -> None:
    """Follow the text."""
    for byte in text:
      if self._in_string:
        self._in_string = self._escaped or byte != 0x22
        self._escaped = byte == 0x5C and not self._escaped
        continue
      self._in_string = byte == 0x22
      self._depth += (byte in b'[{') - (byte in b']}')
      if byte in b'0123456789':
        self._digits += 1
      elif byte in b'eE' and self._digits:
        self._digits = MAX_DIGITS - MAX_EXPONENT
      elif byte not in b'.+-':
        self._digits = 0

  def apply(self, mask_V: np.ndarray) -> np.ndarray:
    """Return the mask without them; the mask itself where nothing would be left."""
    braked_V = mask_V
    if not self._in_string:
      braked_V = mask_V & (self._digits_V <= max(MAX_DIGITS - self._digits, 0))
    if self._depth >= MAX_NESTING:
      braked_V = braked_V & ~(self._opens_later_V if self._in_string else self._opens_V).view(bool)
    return braked_V if braked_V.any() else mask_V


def _leading_digits(text: bytes) -> int:
  """Return how many digits a token adds to a number; too many for a long exponent."""
  if re.search(rb'[eE][+-]?\d{%d}' % (MAX_EXPONENT + 1), text):
    return MAX_DIGITS + 1
  return min(len(re.match(rb'\d*', text)[0]), MAX_DIGITS + 1)  # type: ignore[index]


def _check(grammar: str, client: str) -> None:
  """Compile a grammar in another process, where it can take neither all time nor all memory."""
  digest = hashlib.sha256(f'{client} {grammar}'.encode()).digest()
  if digest in _compiled:
    return
  try:
    error = sandbox.run('compile', CPU_SECONDS, MEMORY_BYTES, grammar=grammar)
  except sandbox.SandboxError as failure:
    raise ValueError(f'schema: to compile it is too much: {failure}; make it simpler') from None
  if error:
    raise ValueError(f'schema: {_reason(error)}')
  while len(_compiled) >= _MAX_COMPILED:
    _compiled.pop(next(iter(_compiled)), None)
  _compiled[digest] = None


def _reason(error: str) -> str:
  """Return what llguidance says of a schema, as one sentence."""
  text = re.sub(r'^(at \d+\(\d+\): )?failed to \w+ (JSON schema|"%json"): ', '', error)
  text = ' '.join(re.split(r'\s+1 \| %llg|\n\n', text)[0].split())
  text = re.sub(r'Unimplemented keys: \[(.*)\]', r'not supported: \1; leave it out', text)
  return text.partition('. Enable')[0][:200]


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
