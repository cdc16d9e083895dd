"""JSON as an automaton over bytes: what a document may be, and which byte may come next.

- What a value may be is said by a `Choice` of `json_nodes`.
- A stack is a pair of the innermost unfinished thing (a frame) and the stack around it; `()` means
  that the document is complete. Stacks are hashable values, and share what lies below.
- `step` gives the stacks after one more byte: none where the byte cannot come, several where more
  than one alternative is open.

Every stack can be completed. Documents are bounded where a weak model would run on: containers lie
at most `MAX_DEPTH` deep; between two tokens of JSON stands one space, or a line break with its
indentation; numbers have at most `MAX_DIGITS` digits before and after the point and stay below
1e308.
"""

from typing import Any, Literal, NamedTuple

from jaxllm.generation.json_nodes import Array, Choice, Number, Object, String, Words
from jaxllm.generation.json_strings import QUOTE, Name, follow, lex, simplest

MAX_DEPTH = 32
MAX_DIGITS = 32
# Digits before the point and a positive exponent together.
_MAX_EXPONENT = 308
_INDENT = 4

Stack = tuple[Any, Any] | tuple[()]
Stacks = list[Stack]


def start(choice: Choice) -> Stack:
  """Return the stack before the first byte."""
  return _Start(choice, 0), ()


def step(stack: Stack, byte: int) -> Stacks:
  """Return the stacks after one more byte."""
  return stack[0].step(byte, stack[1]) if stack else []


def is_complete(stack: Stack) -> bool:
  """Return whether the document may end here."""
  if not stack:
    return True
  frame, rest = stack
  return not rest and isinstance(frame, NumberFrame | WordFrame) and frame.complete


def _gap(byte: int, gap: int, room: int) -> int | None:
  """Count white space: one space, or a line break and what indents the next line.

  `gap` is 0 before it, -1 after the one space, else the number of characters.
  """
  if gap == 0:
    return {0x20: -1, 0x0A: 1}.get(byte)
  if gap > 0 and byte in b' \t' and gap <= _INDENT * (MAX_DEPTH - room):
    return gap + 1
  return None


def _begin(choice: Choice, byte: int, rest: Stack, room: int) -> Stacks:
  """Return the stacks after the first byte of a value; `rest` is what follows the value."""
  stacks: Stacks = []
  for node in choice.starting(byte):
    if node.height > room:
      continue
    match node:
      case Words():
        stacks += WordFrame(node, node.names).step(byte, rest)
      case Number():
        stacks += NumberFrame(node, 'start', 0, 0).step(byte, rest)
      case String():
        stacks.append((TextFrame(node, 0, node.names, b''), rest))
      case Array():
        stacks.append((_ArrayFrame(node, 'first', 0, 0, room - 1), rest))
      case Object():
        stacks.append((_ObjectFrame(node, 'first', 0, None, 0, room - 1), rest))
  return stacks


class _Start(NamedTuple):
  choice: Choice
  gap: int

  def step(self, byte: int, rest: Stack) -> Stacks:
    if (gap := _gap(byte, self.gap, MAX_DEPTH)) is not None:
      return [(self._replace(gap=gap), rest)]
    return _begin(self.choice, byte, rest, MAX_DEPTH)


class WordFrame(NamedTuple):
  """Inside a word.

  Attributes:
    node: what it may be.
    place: in `node.names`.
  """

  node: Words
  place: Name

  @property
  def complete(self) -> bool:
    """Whether the word may end here."""
    return self.place.index is not None

  def step(self, byte: int, rest: Stack) -> Stacks:
    """Return the stacks after a byte, which may be the first one after the word."""
    child = self.place.children.get(chr(byte))
    if child is not None:
      return [(self._replace(place=child), rest)]
    return step(rest, byte) if self.complete else []


class TextFrame(NamedTuple):
  """Inside a string.

  Attributes:
    node: what it may be.
    begun: characters, as far as it matters.
    place: in `node.names`.
    pending: bytes of the character under way.
  """

  node: String
  begun: int
  place: Name | None
  pending: bytes

  @property
  def free(self) -> bool:
    """Whether any character may come, as far as `most` allows."""
    return self.node.names is None

  @property
  def left(self) -> int | None:
    """How many more characters may begin; None: any number."""
    return None if self.node.most is None else self.node.most - self.begun

  def close(self, text: str, rest: Stack) -> Stacks:
    """Return the stacks after `text`, which completes the character under way, and the quote."""
    begun = self.begun + len(text) - bool(self.pending)
    if self.place is not None:
      return [rest] if self.place.index is not None else []
    most = self.node.most
    return [rest] if self.node.least <= begun and (most is None or begun <= most) else []

  def step(self, byte: int, rest: Stack) -> Stacks:
    """Return the stacks after a byte."""
    if byte == QUOTE and not self.pending:
      return self.close('', rest)
    if not self.pending and self.left == 0:
      return []
    read = lex(self.pending, byte)
    if read is None:
      return []
    pending, char = read
    if self.place is not None:
      place = follow(self.place, pending, char, -1)
      return [(TextFrame(self.node, 0, place, pending), rest)] if place else []
    begun = self.begun + (not self.pending)
    if self.node.most is None:
      begun = min(begun, self.node.least)
    return [(TextFrame(self.node, begun, None, simplest(pending)), rest)]


class KeyFrame(NamedTuple):
  """Inside the name of a property; the frame below is that of the object.

  Attributes:
    node: the object.
    open: bits of the declared properties that may come.
    free: whether others may come.
    place: in the declared names; None: it is none of them.
    pending: bytes of the character under way.
  """

  node: Object
  open: int
  free: bool
  place: Name | None
  pending: bytes

  @property
  def left(self) -> int | None:
    """How many more characters may begin: any number."""
    return None

  def close(self, text: str, rest: Stack) -> Stacks:
    """Return the stacks after `text`, which completes the character under way, and the quote."""
    place = self.place
    for char in text:
      place = place.children.get(char) if place else None
    around: _ObjectFrame = rest[0]  # type: ignore[misc]
    if place is None or place.index is None:
      if not self.free:
        return []
      frame = around._replace(phase='colon', choice=self.node.additional)
    else:
      bit = 1 << place.index
      if not bit & self.open:
        return []
      choice = self.node.values[place.index]
      frame = around._replace(phase='colon', choice=choice, seen=around.seen | bit)
    return [(frame, rest[1])]  # type: ignore[misc]

  def step(self, byte: int, rest: Stack) -> Stacks:
    """Return the stacks after a byte."""
    if byte == QUOTE and not self.pending:
      return self.close('', rest)
    read = lex(self.pending, byte)
    if read is None:
      return []
    pending, char = read
    # Where other names may come, one that has been used is followed too: it must not come again.
    bits = -1 if self.free else self.open
    place = self.place and follow(self.place, pending, char, bits)
    if place is None:
      if not self.free:
        return []
      pending = simplest(pending)
    return [(self._replace(place=place, pending=pending), rest)]


class NumberFrame(NamedTuple):
  """Inside a number.

  Attributes:
    node: what it may be.
    phase: the part of the number that stands last.
    digits: how many the fraction or the negative exponent has; the value of a positive one.
    whole: how many digits stand before the point.
  """

  node: Number
  phase: Literal['start', 'minus', 'zero', 'whole', 'point', 'fraction', 'e', 'plus', 'under',
                 'exponent', 'small']
  digits: int
  whole: int

  @property
  def complete(self) -> bool:
    """Whether the number may end here."""
    return self.phase in ('zero', 'whole', 'fraction', 'exponent', 'small')

  def step(self, byte: int, rest: Stack) -> Stacks:
    """Return the stacks after a byte, which may be the first one after the number."""
    moved = self._digit(byte - 0x30) if 0x30 <= byte <= 0x39 else self._sign(byte)
    if moved is not None:
      return [(moved, rest)]
    return step(rest, byte) if self.complete else []

  def _sign(self, byte: int) -> 'NumberFrame | None':
    phase, whole = self.phase, max(self.whole, 1)
    if byte == ord('-') and phase == 'start':
      return self._replace(phase='minus')
    if self.node.integer:
      return None
    if byte == ord('.') and phase in ('zero', 'whole'):
      return NumberFrame(self.node, 'point', 0, whole)
    if byte in b'eE' and phase in ('zero', 'whole', 'fraction'):
      return NumberFrame(self.node, 'e', 0, whole)
    if byte in b'+-' and phase == 'e':
      return self._replace(phase='plus' if byte == ord('+') else 'under')
    return None

  def _digit(self, digit: int) -> 'NumberFrame | None':
    match self.phase:
      case 'start' | 'minus':
        return NumberFrame(self.node, 'whole' if digit else 'zero', 0, 1)
      case 'whole':
        return self._replace(whole=self.whole + 1) if self.whole < MAX_DIGITS else None
      case 'point' | 'fraction':
        more = self._replace(phase='fraction', digits=self.digits + 1)
        return more if self.digits < MAX_DIGITS else None
      case 'e' | 'plus' | 'exponent':
        value = 10 * self.digits + digit
        fits = value + self.whole <= _MAX_EXPONENT and (value or self.phase != 'exponent')
        return self._replace(phase='exponent', digits=value) if fits else None
      case 'under' | 'small':
        more = self._replace(phase='small', digits=self.digits + 1)
        return more if self.digits < 3 else None
    return None


class _ArrayFrame(NamedTuple):
  node: Array
  phase: Literal['first', 'next', 'after']
  place: int
  gap: int
  room: int

  def step(self, byte: int, rest: Stack) -> Stacks:
    if (gap := _gap(byte, self.gap, self.room)) is not None:
      return [(self._replace(gap=gap), rest)]
    node, stacks = self.node, []
    if byte == ord(']') and self.phase != 'next' and self.place >= node.least:
      stacks.append(rest)
    elif self.phase == 'after':
      if byte == ord(',') and self._more():
        stacks.append((self._replace(phase='next', gap=0), rest))
    elif self._more():
      # Counted as far as a bound or the prefix asks for it.
      most = max(len(node.prefix), node.least, node.most or 0)
      after = self._replace(phase='after', gap=0, place=min(self.place + 1, most))
      stacks += _begin(node.element(self.place), byte, (after, rest), self.room)
    return stacks

  def _more(self) -> bool:
    most = self.node.most
    below = most is None or self.place < most
    return below and self.node.element(self.place).height <= self.room


class _ObjectFrame(NamedTuple):
  node: Object
  phase: Literal['first', 'next', 'colon', 'value', 'after']
  seen: int
  choice: Choice | None
  gap: int
  room: int

  def step(self, byte: int, rest: Stack) -> Stacks:
    if self.phase == 'colon':
      return [(self._replace(phase='value', gap=0), rest)] if byte == ord(':') else []
    if (gap := _gap(byte, self.gap, self.room)) is not None:
      return [(self._replace(gap=gap), rest)]
    if self.phase == 'value' and self.choice is not None:
      after = self._replace(phase='after', choice=None, gap=0)
      return _begin(self.choice, byte, (after, rest), self.room)
    if byte == ord('}') and self.phase != 'next':
      return [] if self.node.required & ~self.seen else [rest]
    if byte == (ord(',') if self.phase == 'after' else QUOTE):
      open_, free = self._open()
      if open_ or free:
        inside = self._replace(phase='next', gap=0), rest
        key = KeyFrame(self.node, open_, free, self.node.names, b'')
        return [inside] if self.phase == 'after' else [(key, inside)]
    return []

  def _open(self) -> tuple[int, bool]:
    """Return what property may come: the bits of declared ones, and whether others may."""
    other = self.node.additional
    free = other is not None and other.height <= self.room
    return self.node.fitting(self.room) & ~self.seen, free
