"""SentencePiece's model files, as far as encoding depends on them.

The messages are declared here, in a pool of their own: importing `sentencepiece_model_pb2` of the
core wheel beside transformers' copy in one process raises "duplicate file name
sentencepiece_model.proto".

Reference:
  sentencepiece_model.proto in github.com/google/sentencepiece.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4

# Message -> field -> (number, type, default).
_MESSAGES: dict[str, dict[str, tuple[int, str, str]]] = {
  'Piece': {'piece': (1, 'BYTES', ''), 'score': (2, 'FLOAT', ''), 'kind': (3, 'INT32', '1')},
  'Trainer': {
    'algorithm': (3, 'INT32', '1'), 'vocab_size': (4, 'INT32', ''),
    'byte_fallback': (35, 'BOOL', ''), 'unk_id': (40, 'INT32', '0'), 'bos_id': (41, 'INT32', '1'),
    'eos_id': (42, 'INT32', '2'), 'pad_id': (43, 'INT32', '-1'), 'unk_piece': (45, 'BYTES', ''),
    'bos_piece': (46, 'BYTES', ''), 'eos_piece': (47, 'BYTES', ''), 'pad_piece': (48, 'BYTES', ''),
  },
  'Normalizer': {
    'name': (1, 'BYTES', ''), 'charsmap': (2, 'BYTES', ''), 'dummy_prefix': (3, 'BOOL', 'true'),
    'squeeze': (4, 'BOOL', 'true'), 'escape': (5, 'BOOL', 'true'),
  },
  'File': {'pieces': (1, 'Piece', ''), 'trainer': (2, 'Trainer', ''),
           'normalizer': (3, 'Normalizer', '')},
}


@dataclasses.dataclass(frozen=True)
class Model:
  """A model file.

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
    unk_id: stands for an unknown piece.
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


# Fields of `Model` by the message that holds them.
_TRAINER = ('algorithm', 'byte_fallback', 'unk_id', 'bos_id', 'eos_id', 'pad_id')
_NORMALIZER = ('charsmap', 'dummy_prefix', 'squeeze')


def parse(content: bytes) -> Model:
  """Read a model file; refuse a damaged one."""
  file = _file_class()()
  try:
    file.ParseFromString(content)
    pieces = [entry.piece.decode('utf-8') for entry in file.pieces]
    if not all(entry.HasField('piece') for entry in file.pieces):
      raise ValueError('a piece has no text')
  except (message.DecodeError, ValueError) as error:
    raise ValueError(f'tokenizer.model: not a SentencePiece model: {error!r}') from None
  return Model(
    pieces, [entry.score for entry in file.pieces], [entry.kind for entry in file.pieces],
    **{name: getattr(file.trainer, name) for name in _TRAINER},
    **{name: getattr(file.normalizer, name) for name in _NORMALIZER})


def build(model: Model) -> bytes:
  """Write a model file that SentencePiece encodes with as `model` says."""
  file = _file_class()()
  for piece, score, kind in zip(model.pieces, model.scores, model.kinds, strict=True):
    file.pieces.add(piece=piece.encode(), score=score, kind=kind)
  for name in _TRAINER:
    setattr(file.trainer, name, getattr(model, name))
  for name in _NORMALIZER:
    setattr(file.normalizer, name, getattr(model, name))
  for name in ('unk', 'bos', 'eos', 'pad'):
    if (i := getattr(model, f'{name}_id')) >= 0:
      setattr(file.trainer, f'{name}_piece', model.pieces[i].encode())
  file.trainer.vocab_size, file.normalizer.name, file.normalizer.escape = (
    len(model.pieces), b'identity', True)
  return file.SerializeToString()


@functools.cache
def _file_class() -> Any:
  """Return the class of a whole file."""
  file = descriptor_pb2.FileDescriptorProto(name='jaxllm.proto', package='jaxllm', syntax='proto2')
  kinds = descriptor_pb2.FieldDescriptorProto
  for message_name, fields in _MESSAGES.items():
    declared = file.message_type.add(name=message_name)
    for name, (number, kind, default) in fields.items():
      label = kinds.LABEL_REPEATED if name == 'pieces' else kinds.LABEL_OPTIONAL
      if kind in _MESSAGES:
        declared.field.add(name=name, number=number, label=label, type=kinds.TYPE_MESSAGE,
                           type_name=f'.jaxllm.{kind}')
      else:
        declared.field.add(name=name, number=number, label=label,
                           type=getattr(kinds, f'TYPE_{kind}'), default_value=default or None)
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('jaxllm.File'))
