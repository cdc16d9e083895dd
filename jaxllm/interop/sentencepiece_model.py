"""SentencePiece's model files, read and written without its protobuf classes.

A model is a protobuf message; of its wire format only what these files use is spoken here: varints,
32-bit floats and length-prefixed bytes.

Reference:
  sentencepiece_model.proto in github.com/google/sentencepiece; protobuf.dev, "Encoding".
"""

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Model:
  """What a model file says, as far as encoding depends on it.

  Attributes:
    pieces: the text of each id.
    scores: log-probability, or for BPE minus the rank.
    kinds: NORMAL, CONTROL, ...
    algorithm: UNIGRAM, BPE or CHAR.
    charsmap: precompiled normalisation, empty where there is none.
    byte_fallback: whether unknown characters are given by their bytes.
    dummy_prefix: whether a space is put before every text.
    squeeze: whether extra spaces are removed.
    bos_id: -1 where there is none, like the next two.
    eos_id: ends a text.
    pad_id: padding.
    unk_id: stands for what cannot be expressed.
  """

  pieces: Sequence[str]
  scores: Sequence[float]
  kinds: Sequence[int]
  algorithm: int = BPE
  charsmap: bytes = b''
  byte_fallback: bool = True
  dummy_prefix: bool = True
  squeeze: bool = False
  bos_id: int = 1
  eos_id: int = 2
  pad_id: int = -1
  unk_id: int = 0

  def of_kind(self, *kinds: int) -> list[str]:
    """Return the pieces of these kinds."""
    return [piece for piece, kind in zip(self.pieces, self.kinds, strict=True) if kind in kinds]


def parse(content: bytes) -> Model:
  """Read a model file.

  Raises:
    ValueError: it is damaged.
  """
  pieces, scores, kinds = [], [], []
  trainer: dict[int, Any] = {}
  normalizer: dict[int, Any] = {}
  try:
    for field, value in _fields(content):
      if field == 1:
        piece = dict(_fields(value))
        pieces.append(piece[1].decode('utf-8'))
        scores.append(struct.unpack('<f', piece.get(2, b'\0\0\0\0'))[0])
        kinds.append(piece.get(3, NORMAL))
      elif field == 2:
        trainer = dict(_fields(value))
      elif field == 3:
        normalizer = dict(_fields(value))
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
    raise ValueError(f'tokenizer.model: not a SentencePiece model: {error!r}') from None

  def special(field: int, default: int) -> int:
    value = trainer.get(field, default)
    # Negative numbers are written as 64-bit varints.
    return value - 2**64 if value >= 2**63 else value

  return Model(
    pieces, scores, kinds,
    algorithm=trainer.get(3, UNIGRAM),
    charsmap=normalizer.get(2, b''),
    byte_fallback=bool(trainer.get(35, 0)),
    dummy_prefix=bool(normalizer.get(3, 1)),
    squeeze=bool(normalizer.get(4, 1)),
    unk_id=special(40, 0), bos_id=special(41, 1), eos_id=special(42, 2), pad_id=special(43, -1),
  )


def build(model: Model) -> bytes:
  """Write a model file that SentencePiece encodes with as `model` says."""
  content = b''.join(
    _bytes(1, _bytes(1, piece.encode()) + _float(2, score) + _int(3, kind))
    for piece, score, kind in zip(model.pieces, model.scores, model.kinds, strict=True)
  )
  trainer = _int(3, model.algorithm) + _int(4, len(model.pieces))
  trainer += _int(35, model.byte_fallback)
  for field, value in ((40, model.unk_id), (41, model.bos_id), (42, model.eos_id),
                       (43, model.pad_id)):
    trainer += _int(field, value)
  for field, value in ((45, model.unk_id), (46, model.bos_id), (47, model.eos_id),
                       (48, model.pad_id)):
    if value >= 0:
      trainer += _bytes(field, model.pieces[value].encode())
  normalizer = _bytes(1, b'identity') + _bytes(2, model.charsmap)
  normalizer += _int(3, model.dummy_prefix) + _int(4, model.squeeze) + _int(5, 1)
  return content + _bytes(2, trainer) + _bytes(3, normalizer)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
  """Yield (field number, value) of a message: integers, or the bytes of anything else."""
  at = 0
  while at < len(content):
    value: Any
    tag, at = _varint(content, at)
    kind = tag & 7
    if kind == 0:
      value, at = _varint(content, at)
    elif kind in (1, 5):
      size = 8 if kind == 1 else 4
      value, at = content[at : at + size], at + size
    elif kind == 2:
      size, at = _varint(content, at)
      value, at = content[at : at + size], at + size
    else:
      raise ValueError(f'wire type {kind}')
    if at > len(content):
      raise ValueError('cut off')
    yield tag >> 3, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    byte = content[at]
    value |= (byte & 0x7F) << shift
    at += 1
    if byte < 0x80:
      return value, at
  raise ValueError('a number has no end')


def _number(value: int) -> bytes:
  value %= 2**64
  out = bytearray()
  while value >= 0x80:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
  return _number(field << 3) + _number(int(value))


def _bytes(field: int, value: bytes) -> bytes:
  return _number(field << 3 | 2) + _number(len(value)) + value


def _float(field: int, value: float) -> bytes:
  return _number(field << 3 | 5) + struct.pack('<f', value)
