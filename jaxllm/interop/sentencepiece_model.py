"""SentencePiece's model files, as far as encoding depends on them.

The messages are declared here, in a pool of their own: importing `sentencepiece_model_pb2` of the
core wheel beside transformers' copy in one process raises "duplicate file name
sentencepiece_model.proto".

Reference:
  sentencepiece_model.proto in github.com/google/sentencepiece.
"""

import functools
from collections.abc import Iterable, Mapping
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


def parse(content: bytes) -> Any:
  """Return the message of a model file; refuse a damaged one."""
  model = _file_class()()
  try:
    model.ParseFromString(content)
    if not all(entry.HasField('piece') for entry in model.pieces):
      raise ValueError('a piece has no text')
    texts(model)
  except (message.DecodeError, ValueError) as error:
    raise ValueError(f'tokenizer.model: not a SentencePiece model: {error!r}') from None
  return model


def texts(model: Any, *kinds: int) -> list[str]:
  """Return the pieces of these kinds, of all where none is given."""
  return [entry.piece.decode() for entry in model.pieces if not kinds or entry.kind in kinds]


def build(
  pieces: Iterable[tuple[str, float, int]], trainer: Mapping[str, Any],
  normalizer: Mapping[str, Any],
) -> bytes:
  """Write a model file.

  Args:
    pieces: text, score and kind of each id; the score is a log-probability, of BPE minus the rank.
    trainer: fields of the message 'Trainer'; ids of special pieces are -1 where there is none.
    normalizer: fields of the message 'Normalizer'.
  """
  model = _file_class()()
  for piece, score, kind in pieces:
    model.pieces.add(piece=piece.encode(), score=score, kind=kind)
  model.trainer.MergeFrom(type(model.trainer)(vocab_size=len(model.pieces), **trainer))
  model.normalizer.MergeFrom(type(model.normalizer)(name=b'identity', escape=True, **normalizer))
  for name in ('unk', 'bos', 'eos', 'pad'):
    if (i := getattr(model.trainer, f'{name}_id')) >= 0:
      setattr(model.trainer, f'{name}_piece', model.pieces[i].piece)
  return model.SerializeToString()


@functools.cache
def _file_class() -> Any:
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
