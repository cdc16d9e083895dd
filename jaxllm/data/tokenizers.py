"""Tokenizers: text to ids and back, without loss.

- `TokenizerConfig` names one; `train_or_load` makes it; `from_files`, `save` and `load` rebuild it.
- `Tokenizer` is what all kinds share.
- `LOADERS` lists the kinds by the file that tells them apart.
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pydantic

from jaxllm.config import Config

Files = Mapping[str, bytes]

_MARK = '\u2581'  # SentencePiece's own sign for a space.
_CHUNK_BYTES = 4000


class TokenizerConfig(Config):
  """Which tokenizer to use, and how to train it where it is trained on the corpus."""

  kind: Literal['sentencepiece', 'gpt2', 'json', 'bytes'] = 'sentencepiece'
  """'sentencepiece' (trained on the corpus, or loaded), 'gpt2' (vocab.json or encoder.json with
  merges.txt or vocab.bpe), 'json' (any tokenizer.json) or 'bytes' (256 raw bytes)."""
  path: str | None = None
  """The tokenizer's file, or the directory that holds its files; None trains on the corpus."""
  vocab_size: int | None = pydantic.Field(default=None, gt=0)
  """Size of a vocabulary that is trained; None takes every character (model_type 'char' only)."""
  model_type: Literal['unigram', 'bpe', 'char'] = 'bpe'
  """How SentencePiece cuts words."""
  byte_fallback: bool = True
  """Give characters outside the vocabulary by their bytes. False saves 256 ids, and then text with
  such a character is refused."""
  sample_bytes: int = pydantic.Field(default=50_000_000, gt=0)
  """Bytes of text that training looks at; more are sampled evenly."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'TokenizerConfig':
    trained = self.kind == 'sentencepiece' and self.path is None
    if self.kind in ('gpt2', 'json') and self.path is None:
      raise ValueError(f'path=None: kind={self.kind!r} needs the path of its files')
    if self.vocab_size is not None and not trained:
      raise ValueError(f'vocab_size={self.vocab_size}: only a tokenizer that is trained takes a '
                       'vocabulary size; leave it None')
    if trained and self.vocab_size is None and self.model_type != 'char':
      raise ValueError(f'vocab_size=None: model_type={self.model_type!r} needs a size, '
                       'such as 4096')
    return self


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to ids and back. `decode(encode(text)) == text` for every text.

  `encode` adds no special tokens, and text that spells one ('<s>') stays plain text.
  """

  encode: Callable[[str], list[int]]
  """Text -> ids."""
  decode: Callable[[Sequence[int]], str]
  """Ids -> text; special tokens give no text, and bytes that are not UTF-8 give U+FFFD."""
  id_bytes: Sequence[bytes]
  """The bytes that each id stands for; empty for special tokens."""
  bos_id: int | None
  eos_id: int | None
  pad_id: int
  _files: Files

  @property
  def vocab_size(self) -> int:
    """The number of ids."""
    return len(self.id_bytes)

  def files(self) -> dict[str, bytes]:
    """Return everything from which `from_files` rebuilds this tokenizer, by file name."""
    return dict(self._files)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the files, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, content in sorted(self._files.items()):
      digest.update(f'{name}\0{len(content)}\0'.encode() + content)
    return digest.hexdigest()


def train_or_load(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
  """Return the tokenizer that `config` describes.

  Args:
    config: the kind and its settings.
    texts: what a trained tokenizer is trained on; not read otherwise.

  Raises:
    ValueError: files are missing or damaged, or the corpus does not give such a vocabulary.
  """
  if config.kind == 'bytes':
    return from_files({'bytes.txt': b'256 bytes, then <eos>\n'})
  if config.path is None:
    return from_files({'tokenizer.model': _train(config, texts)})
  raise ValueError('not yet')


def from_files(files: Files) -> Tokenizer:
  """Rebuild a tokenizer from `Tokenizer.files()`, or from the files of a model directory.

  Raises:
    ValueError: no tokenizer is among the files, or it is damaged.
  """
  for name, loader in LOADERS.items():
    if name in files:
      return loader(files)
  raise ValueError(f'no tokenizer among {sorted(files)}; expected one of {", ".join(LOADERS)}')


def save(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> None:
  """Write the tokenizer's files into `directory`, each one atomically."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for name, content in tokenizer.files().items():
    partial = directory / f'.{name}.{uuid.uuid4().hex}'
    partial.write_bytes(content)
    os.replace(partial, directory / name)


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Read a tokenizer that `save` wrote."""
  directory = pathlib.Path(directory)
  return from_files({path.name: path.read_bytes() for path in sorted(directory.iterdir())
                     if path.is_file() and not path.name.startswith('.')})


def _bytes_tokenizer(files: Files) -> Tokenizer:
  def encode(text: str) -> list[int]:
    return list(text.encode())

  id_bytes = [bytes([value]) for value in range(256)] + [b'']
  return Tokenizer(encode, _bytes_decoder(id_bytes), id_bytes, None, 256, 256, files)


def _bytes_decoder(id_bytes: Sequence[bytes]) -> Callable[[Sequence[int]], str]:
  def decode(ids: Sequence[int]) -> str:
    return b''.join(id_bytes[i] for i in ids).decode('utf-8', errors='replace')
  return decode


def _sentencepiece_tokenizer(files: Files) -> Tokenizer:
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor(model_proto=files['tokenizer.model'])
  id_bytes = [_piece_bytes(processor, i) for i in range(processor.vocab_size())]
  mark = [processor.piece_to_id(f'<0x{value:02X}>') for value in _MARK.encode()]

  def encode(text: str) -> list[int]:
    # A literal U+2581 would come back as a space: it goes as its three bytes.
    first, *others = text.split(_MARK)
    ids = processor.encode(first)
    for part in others:
      ids += mark + processor.encode(part)
    return ids

  def special(i: int) -> int | None:
    return i if i >= 0 else None

  return Tokenizer(encode, _bytes_decoder(id_bytes), id_bytes, special(processor.bos_id()),
                   special(processor.eos_id()), max(processor.pad_id(), 0), files)


def _piece_bytes(processor: Any, i: int) -> bytes:
  if processor.is_control(i) or processor.is_unknown(i):
    return b''
  piece = processor.id_to_piece(i)
  if processor.is_byte(i):
    return bytes([int(piece[3:5], 16)])
  return piece.replace(_MARK, ' ').encode()


LOADERS: dict[str, Callable[[Files], Tokenizer]] = {
  'tokenizer.model': _sentencepiece_tokenizer,
  'bytes.txt': _bytes_tokenizer,
}


def _train(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
  import sentencepiece

  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=_chunks(texts),
    model_writer=writer,
    vocab_size=config.vocab_size or 1_000_000,
    use_all_vocab=config.vocab_size is None,
    model_type=config.model_type,
    character_coverage=1.0 if config.model_type == 'char' else 0.9995,
    byte_fallback=config.byte_fallback,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    num_threads=4,
    minloglevel=2,
  )
  return writer.getvalue()


def _chunks(texts: Iterable[str]) -> Iterator[str]:
  # SentencePiece skips sentences longer than 4,192 bytes; a character takes at most four.
  for text in texts:
    for part in text.split(_MARK):
      for match in re.finditer(rf'(?s).{{1,{_CHUNK_BYTES // 4}}}', part):
        yield match.group()
