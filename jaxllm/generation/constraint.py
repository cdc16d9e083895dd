"""Which tokens may come next, so that the text is JSON, or JSON of a schema.

- `Constraint` is what a decoder asks before it draws, one per row.
- `Vocabulary` is the tree of all tokens' bytes, built once per tokenizer.
- `JsonConstraints` makes the constraints of a tokenizer; masks are kept by state, across rows.

The mask holds exactly the tokens after which the text can still become such a document. In a free
string most tokens can come, whatever lies around the string: those are found once per vocabulary,
and only the tokens that end the string are followed in each state.
"""

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxllm.generation import json_grammar
from jaxllm.generation.json_grammar import KeyFrame, Stack, TextFrame
from jaxllm.generation.json_schema import any_object, compile_schema
from jaxllm.generation.json_strings import QUOTE, lex

# What every JSON document can be spelled with; all other characters can be escaped.
_NEEDED = b'"\\{}[]:,-.+0123456789abcdeflnrstu'
# Open alternatives of anyOf that are followed at the same time; further ones are dropped.
_MAX_STACKS = 32
_MAX_SCANS = 256
_MAX_MASKS = 256
_MAX_SCHEMAS = 32


class Constraint(Protocol):
  """Says which tokens may come next; one per row, on the host."""

  def allowed(self) -> np.ndarray:
    """Return bool (vocab_size,); EOS is allowed exactly when the text is complete."""

  def advance(self, token: int) -> None:
    """Take the token that was drawn."""


@dataclasses.dataclass(eq=False, slots=True)
class _Node:
  """A beginning that tokens share: the ids of those that end here, and what follows by byte."""

  ids: list[int] = dataclasses.field(default_factory=list)
  children: 'dict[int, _Node]' = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scan:
  """What tokens do in a free string.

  Attributes:
    ids: tokens that stay inside.
    begun: characters that each of them begins.
    exits: nodes right after a quote that ends the string, and the text up to it.
  """

  ids: np.ndarray
  begun: np.ndarray
  exits: list[tuple[_Node, str]]


class Vocabulary:
  """The bytes of all tokens, as a tree.

  Args of the constructor:
    id_bytes: of each id; tokens without bytes never come.
    eos_ids: end the text, and come at no other time.
    vocab_size: of masks; the number of ids by default.

  Raises:
    ValueError: an id is out of range, or the vocabulary cannot spell JSON.
  """

  def __init__(
    self, id_bytes: Sequence[bytes], eos_ids: Sequence[int], vocab_size: int | None = None
  ):
    self.vocab_size = len(id_bytes) if vocab_size is None else vocab_size
    if self.vocab_size < len(id_bytes):
      raise ValueError(f'vocab_size={vocab_size} is below the {len(id_bytes)} ids of the tokenizer')
    if not eos_ids or not all(0 <= token < self.vocab_size for token in eos_ids):
      raise ValueError(f'eos_ids={[*eos_ids]}: give at least one id below {self.vocab_size}, so '
                       'that the text can end')
    self.eos_ids = tuple(eos_ids)
    self.id_bytes = [b'' if token in self.eos_ids else text for token, text in enumerate(id_bytes)]
    single = {text[0] for text in self.id_bytes if len(text) == 1}
    if missing := bytes(byte for byte in _NEEDED if byte not in single):
      raise ValueError('the vocabulary cannot spell every JSON document: it has no token for '
                       f'{", ".join(missing.decode())}')
    # A character may be begun only where every continuation of it is a token.
    self.splits_characters = all(byte in single for byte in range(0x80, 0xC0))
    self.root = _Node()
    for token, text in enumerate(self.id_bytes):
      node = self.root
      for byte in text:
        following = node.children.get(byte)
        if following is None:
          following = node.children[byte] = _Node()
        node = following
      if text:
        node.ids.append(token)
    self._scans: dict[bytes, _Scan] = {}
    self.scan(b'')

  def scan(self, pending: bytes) -> _Scan:
    """Return what tokens do in a string with these bytes of a character under way; kept."""
    found = self._scans.get(pending)
    if found is None:
      if len(self._scans) >= _MAX_SCANS:
        self._scans = {b'': self._scans[b'']}
      found = self._scans[pending] = self._scan(pending)
    return found

  def _scan(self, pending: bytes) -> _Scan:
    ids: list[int] = []
    begun: list[int] = []
    exits: list[tuple[_Node, str]] = []
    todo = [(self.root, pending, '')]
    while todo:
      node, before, text = todo.pop()
      for byte, child in node.children.items():
        if byte == QUOTE and not before:
          exits.append((child, text))
        elif read := lex(before, byte):
          after, char = read
          todo.append((child, after, text + char))
          if child.ids and self.may_end(after):
            ids += child.ids
            begun += [len(text + char) + bool(after) - bool(pending)] * len(child.ids)
    return _Scan(np.asarray(ids, np.int64), np.asarray(begun, np.int64), exits)

  def may_end(self, pending: bytes) -> bool:
    """Return whether a token may end with these bytes of a character under way."""
    return self.splits_characters or not pending or pending[0] < 0x80


class JsonConstraints:
  """Makes constraints for one tokenizer; thread-safe. Arguments as of `Vocabulary`."""

  def __init__(
    self, id_bytes: Sequence[bytes], eos_ids: Sequence[int], vocab_size: int | None = None
  ):
    self._vocabulary = Vocabulary(id_bytes, eos_ids, vocab_size)
    self._object = Masks(self._vocabulary, json_grammar.start(any_object()))
    self._schemas: collections.OrderedDict[str, Masks] = collections.OrderedDict()

  def any_object(self) -> 'JsonConstraint':
    """Return a constraint to JSON objects."""
    return JsonConstraint(self._object)

  def schema(self, schema: Any) -> 'JsonConstraint':
    """Return a constraint to the documents of a JSON Schema (see `json_schema`).

    Raises:
      ValueError: the schema is not supported, or nothing satisfies it.
    """
    try:
      key = json.dumps(schema)
    except RecursionError:
      raise ValueError('schema: nested too deeply; use $defs') from None
    masks = self._schemas.pop(key, None)
    if masks is None:
      masks = Masks(self._vocabulary, json_grammar.start(compile_schema(schema)))
    self._schemas[key] = masks
    while len(self._schemas) > _MAX_SCHEMAS:
      self._schemas.popitem(last=False)
    return JsonConstraint(masks)


class JsonConstraint:
  """A `Constraint` to JSON; begins at the start of a document."""

  def __init__(self, masks: 'Masks'):
    self._masks = masks
    self._stacks: tuple[Stack, ...] = (masks.start,)
    self._ended = False

  @property
  def complete(self) -> bool:
    """Whether the text is a whole document."""
    return any(map(json_grammar.is_complete, self._stacks))

  def allowed(self) -> np.ndarray:
    """Return bool (vocab_size,), read-only: the tokens that may come next; EOS after the end."""
    return self._masks.mask(((),) if self._ended else self._stacks)

  def advance(self, token: int) -> None:
    """Take the token that was drawn.

    Raises:
      ValueError: the token was not allowed.
    """
    if token in self._masks.eos_ids and (self._ended or self.complete):
      self._ended = True
      return
    stacks = () if self._ended else self._masks.after(self._stacks, token)
    if not stacks:
      raise ValueError(f'token={token} is not allowed here; draw among allowed()')
    self._stacks = stacks


class Masks:
  """The masks of a vocabulary in the states of one grammar.

  Args of the constructor:
    vocabulary: the tokens.
    start: the state that a text begins in.
  """

  def __init__(self, vocabulary: Vocabulary, start: Stack):
    self.start = start
    self.eos_ids = vocabulary.eos_ids
    self._vocabulary = vocabulary
    self._size = vocabulary.vocab_size
    # Packed, eight tokens to a byte: vocabularies are large.
    self._masks: dict[tuple[Stack, ...], np.ndarray] = {}

  def mask(self, stacks: tuple[Stack, ...]) -> np.ndarray:
    """Return bool (vocab_size,): the tokens that may follow any of these; kept."""
    packed = self._masks.get(stacks)
    if packed is None:
      if len(self._masks) >= _MAX_MASKS:
        self._masks.clear()
      groups = _groups(stacks)
      if len(groups) == 1:
        found = self._mask(stacks)
      else:
        found = np.logical_or.reduce([self.mask(group) for group in groups])
      self._masks[stacks] = np.packbits(found)
      return found
    return np.unpackbits(packed, count=self._size).astype(bool)

  def after(self, stacks: tuple[Stack, ...], token: int) -> tuple[Stack, ...]:
    """Return the states after a token; none where no state takes it."""
    text = self._vocabulary.id_bytes[token] if 0 <= token < len(self._vocabulary.id_bytes) else b''
    found: list[Stack] = []
    for following in _groups(stacks) if text else ():
      for byte in text:
        following = _step(following, byte)
      found += following if self._may_end(following) else ()
    return tuple(dict.fromkeys(found))[:_MAX_STACKS]

  def _mask(self, group: tuple[Stack, ...]) -> np.ndarray:
    mask = np.zeros(self._vocabulary.vocab_size, bool)
    mask[list(self.eos_ids)] = any(map(json_grammar.is_complete, group))
    todo: list[tuple[_Node, tuple[Stack, ...]]] = []
    if _is_free(group[0]):
      frame, rest = group[0]  # type: ignore[misc]
      scan, left = self._vocabulary.scan(frame.pending), frame.left
      mask[scan.ids if left is None else scan.ids[scan.begun <= left]] = True
      todo += [(node, stacks) for node, text in scan.exits
               if (stacks := tuple(frame.close(text, rest)))]
      for node, _ in todo:
        mask[node.ids] = True
    else:
      todo.append((self._vocabulary.root, group))
    while todo:
      node, stacks = todo.pop()
      for byte, child in node.children.items():
        if following := _step(stacks, byte):
          if child.ids and self._may_end(following):
            mask[child.ids] = True
          if child.children:
            todo.append((child, following))
    return mask

  def _may_end(self, stacks: tuple[Stack, ...]) -> bool:
    """Return whether a token may end in one of these states, which lie after the same bytes."""
    frame = stacks[0][0] if stacks and stacks[0] else None
    inside = isinstance(frame, TextFrame | KeyFrame)
    return not inside or self._vocabulary.may_end(frame.pending)  # type: ignore[union-attr]


def _is_free(stack: Stack) -> bool:
  frame = stack[0] if stack else None
  return isinstance(frame, TextFrame | KeyFrame) and frame.free


def _groups(stacks: tuple[Stack, ...]) -> list[tuple[Stack, ...]]:
  """Return what is followed together: each stack in a free string alone, all others at once."""
  alone = [(stack,) for stack in stacks if _is_free(stack)]
  others = tuple(stack for stack in stacks if not _is_free(stack))
  return [*alone, others] if others else [*alone]


def _step(stacks: tuple[Stack, ...], byte: int) -> tuple[Stack, ...]:
  if len(stacks) == 1:
    found = json_grammar.step(stacks[0], byte)
    return tuple(found) if len(found) < 2 else tuple(dict.fromkeys(found))[:_MAX_STACKS]
  found = [after for stack in stacks for after in json_grammar.step(stack, byte)]
  return tuple(dict.fromkeys(found))[:_MAX_STACKS]
