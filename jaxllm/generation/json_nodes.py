"""What a JSON value may be: nodes, and places that choose among them.

`height` is how many levels of containers the flattest value of a node has; `json_schema` sets it.
"""

import dataclasses
from typing import Any

from jaxllm.generation.json_strings import QUOTE, Name


@dataclasses.dataclass(eq=False)
class Choice:
  """What a place takes: any of these nodes.

  Attributes:
    nodes: filled after construction where a schema is recursive.
    height: levels of containers that the flattest value has.
  """

  nodes: tuple[Any, ...] = ()
  height: int = 0
  _by_byte: dict[int, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

  def starting(self, byte: int) -> tuple[Any, ...]:
    """Return the nodes whose values may begin with a byte."""
    found = self._by_byte.get(byte)
    if found is None:
      kind = _KINDS.get(byte, (Number, Words))
      found = self._by_byte[byte] = tuple(node for node in self.nodes if isinstance(node, kind))
    return found


@dataclasses.dataclass(eq=False)
class Words:
  """A value that is written as one of these words, as `true`; none is a string."""

  names: Name
  height: int = 0


@dataclasses.dataclass(eq=False)
class String:
  """A string of `least` to `most` characters, or one of the `names`."""

  least: int = 0
  most: int | None = None
  names: Name | None = None
  height: int = 0


@dataclasses.dataclass(eq=False)
class Number:
  """A number; an integer is written without point and exponent."""

  integer: bool = False
  height: int = 0


@dataclasses.dataclass(eq=False)
class Array:
  """An array: `prefix` says what its first elements are, `items` what the others are."""

  items: Choice
  prefix: tuple[Choice, ...] = ()
  least: int = 0
  most: int | None = None
  height: int = 1

  def element(self, place: int) -> Choice:
    """Return what may stand at a place."""
    return self.prefix[place] if place < len(self.prefix) else self.items


@dataclasses.dataclass(eq=False)
class Object:
  """An object.

  Attributes:
    names: tree of the declared properties.
    values: what each declared property may be, in the order of its index.
    required: bits of the properties that must be there.
    additional: what other properties may be, if there may be any.
  """

  names: Name
  values: tuple[Choice, ...]
  required: int
  additional: Choice | None
  height: int = 1

  def fitting(self, room: int) -> int:
    """Return the bits of properties whose flattest value has at most `room` levels."""
    return sum(1 << i for i, value in enumerate(self.values) if value.height <= room)


_KINDS = {QUOTE: String, ord('['): Array, ord('{'): Object}
