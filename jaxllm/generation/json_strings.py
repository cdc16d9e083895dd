"""The characters of JSON strings, byte by byte, raw or escaped, and trees of given strings.

Strings are valid Unicode: no half of a surrogate pair, written raw or escaped.
"""

import dataclasses
import functools
from collections.abc import Iterable

QUOTE = 0x22
_BACKSLASH = 0x5C
_SHORT = {'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}
_HEX = frozenset(b'0123456789abcdefABCDEF')


@dataclasses.dataclass(eq=False)
class Name:
  """A place in the tree of given strings, which are followed character by character.

  Attributes:
    below: bits of the strings that begin so.
    index: the number of the string that ends here.
    children: by the next character.
  """

  below: int = 0
  index: int | None = None
  children: 'dict[str, Name]' = dataclasses.field(default_factory=dict)


def names_of(strings: Iterable[str]) -> Name:
  """Return the tree of strings; each one's index is its place in the order."""
  root = Name()
  for index, string in enumerate(strings):
    place = root
    for char in string:
      place.below |= 1 << index
      place = place.children.setdefault(char, Name())
    place.below |= 1 << index
    place.index = index
  return root


@functools.lru_cache(65536)
def lex(pending: bytes, byte: int) -> tuple[bytes, str] | None:
  """Read one byte of a string.

  Args:
    pending: the bytes of the character that is under way.
    byte: neither the quote that ends the string nor anything outside it.

  Returns:
    (the bytes of the character under way, the character that this byte completed or ''), or None
    where the byte cannot stand here.
  """
  text = pending + bytes([byte])
  if not pending:
    if byte == _BACKSLASH or 0xC2 <= byte <= 0xF4:
      return text, ''
    return None if byte < 0x20 or byte == QUOTE or byte >= 0x80 else (b'', chr(byte))
  if pending[0] == _BACKSLASH:
    return _lex_escape(text)
  missing = _size(pending[0]) - len(text)
  try:
    char = (text + b'\x80' * missing).decode()
  except UnicodeDecodeError:
    return None
  return (text, '') if missing else (b'', char)


def simplest(pending: bytes) -> bytes:
  """Return the bytes that stand for all pending ones with the same continuations."""
  if len(pending) < 2:
    return _simplest_lead(pending, 1)
  if pending[0] != _BACKSLASH:
    return _simplest_lead(pending, len(pending))
  digits = pending[2:6].lower()
  if digits[:1] == b'd':
    if len(digits) == 1:
      return b'\\ud'
    if digits[1:2] >= b'8':
      high = b'\\ud8' + b'0' * (len(digits) - 2)
      low = pending[6:9].lower() + (b'c' + b'0' * (len(pending) - 10) if len(pending) > 9 else b'')
      return high + low
  return pending[:2] + b'0' * len(digits)


def _size(lead: int) -> int:
  return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _simplest_lead(pending: bytes, length: int) -> bytes:
  if not pending or pending[0] < 0x80 or (length == 1 and pending[0] in b'\xe0\xed\xf0\xf4'):
    return pending
  return {1: b'\xc2', 2: b'\xe1', 3: b'\xf1'}[_size(pending[0]) - length]


def _lex_escape(text: bytes) -> tuple[bytes, str] | None:
  """Read an escape; halves of surrogate pairs come as pairs only."""
  last, place = text[-1], len(text)
  if place == 2:
    if last == ord('u'):
      return text, ''
    char = _SHORT.get(chr(last))
    return None if char is None else (b'', char)
  if place in (7, 8):
    return (text, '') if last == b'\\u'[place - 7] else None
  if last not in _HEX:
    return None
  digit = int(chr(last), 16)
  first = text[2:3].lower()
  if (place == 4 and first == b'd' and digit >= 12) or (place == 9 and digit != 13):
    return None
  if place == 10 and digit < 12:
    return None
  if place == 6 and not (first == b'd' and text[3:4].lower() >= b'8'):
    return b'', chr(int(text[2:6], 16))
  if place == 12:
    high, low = int(text[2:6], 16), int(text[8:12], 16)
    return b'', chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00)
  return text, ''


@functools.lru_cache(65536)
def _spellings(char: str) -> tuple[bytes, ...]:
  """Return the ways to write a character in a string, with lower-case digits."""
  units = char.encode('utf-16-be').hex()
  escaped = ''.join(f'\\u{units[i : i + 4]}' for i in range(0, len(units), 4)).encode()
  short = tuple(f'\\{letter}'.encode() for letter, meant in _SHORT.items() if meant == char)
  raw = () if char in '"\\' or char < ' ' else (char.encode(),)
  return (*raw, *short, escaped)


def _leads(place: Name, pending: bytes, bits: int) -> bool:
  """Return whether the character under way may be the next one of such a string."""
  pending = pending[:2] + pending[2:].lower() if pending[0] == _BACKSLASH else pending
  return any(
    spelling.startswith(pending)
    for char, child in place.children.items() if child.below & bits
    for spelling in _spellings(char)
  )


def follow(place: Name, pending: bytes, char: str, bits: int) -> Name | None:
  """Return where given strings stand after a byte.

  Args:
    place: before it.
    pending: what `lex` returned.
    char: what `lex` returned.
    bits: the strings that count.

  Returns:
    The place after it, or None: what was read begins none of them.
  """
  if char:
    child = place.children.get(char)
    return child if child and child.below & bits else None
  return place if _leads(place, pending, bits) else None
