"""Tokenizers: `TokenizerConfig` names one, `train_or_load` makes it, `from_files` rebuilds it."""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from absl import logging

from jaxllm import storage
from jaxllm.config import Config
from jaxllm.data import tokenizer_kinds, tokenizer_settings
from jaxllm.data.tokenizer_kinds import Tokenizer as Tokenizer
from jaxllm.data.tokenizer_kinds import fingerprint as fingerprint
from jaxllm.data.tokenizer_settings import Files

BUILDERS: dict[str, Callable[[Files], Tokenizer]] = {
  'tokenizer.json': tokenizer_kinds.from_library,
  'tokenizer.model': tokenizer_kinds.from_sentencepiece,
  'vocab.json': tokenizer_kinds.from_library,
  'bytes.txt': tokenizer_kinds.from_bytes,
}

# The files beside a vocabulary.
SETTINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
            'chat_template.jinja')
# The names that belong to a tokenizer among all files of a model directory, and older ones.
FILE_NAMES = (*BUILDERS, 'merges.txt', *SETTINGS)
_RENAMED = {'encoder.json': 'vocab.json', 'vocab.bpe': 'merges.txt'}
_NEEDED = {'sentencepiece': ('tokenizer.model',), 'gpt2': ('vocab.json', 'merges.txt'),
           'json': ('tokenizer.json',)}
_MAX_BYTES = 200_000_000
_SAY_SECONDS = 5.0

# SentencePiece's signs for a space and for an unknown character.
_SIGNS = re.compile(f'[{tokenizer_kinds.MARK}\u2585]')
_OTHER_PIECES = 4 + 256  # Special tokens and bytes.
_CHUNK = re.compile(r'(?s).{1,3999}\n|.{1,4000}')


class TokenizerConfig(Config):
  """Which tokenizer to use, and how to train it where it is trained on the corpus."""

  kind: Literal['sentencepiece', 'byte_level_bpe', 'gpt2', 'json', 'bytes'] = 'sentencepiece'
  """'sentencepiece' (trained on the corpus, or a tokenizer.model), 'byte_level_bpe' (trained on the
  corpus as GPT-2's was), 'gpt2' (vocab.json and merges.txt, or encoder.json and vocab.bpe), 'json'
  (any tokenizer.json), or 'bytes'."""
  path: str | None = None
  """The tokenizer's file, or the directory that holds its files; None trains on the corpus."""
  vocab_size: int | None = pydantic.Field(default=None, gt=0)
  """Size of the vocabulary to train, at most: a small corpus gives fewer pieces. None takes all
  characters (model_type 'char' only)."""
  model_type: Literal['bpe', 'unigram', 'char'] = 'bpe'
  """How SentencePiece builds its pieces."""
  byte_fallback: bool = True
  """Give characters outside the vocabulary by their bytes. False saves the 256 ids of bytes, and a
  text with such a character is refused."""
  sample_bytes: int = pydantic.Field(default=50_000_000, gt=0)
  """Bytes of text to train on at most; more are sampled evenly."""
  bos_token: str | None = None
  """The token that begins a document, where the files do not say it (kind 'json')."""
  eos_token: str | None = None
  """The token that ends a document, where the files do not say it (kind 'json')."""

  @property
  def trained(self) -> bool:
    """Whether the corpus decides the vocabulary."""
    return self.kind in ('sentencepiece', 'byte_level_bpe') and self.path is None

  @property
  def has_bytes(self) -> bool:
    """Whether rare characters are left to their bytes: a character model has all."""
    return self.byte_fallback and self.model_type != 'char'

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'TokenizerConfig':
    trained = self.trained
    if self.kind in ('gpt2', 'json') and self.path is None:
      raise ValueError(f'path=None: kind={self.kind!r} needs the path of its files')
    if self.kind == 'bytes' and self.path is not None:
      raise ValueError(f"path={self.path!r}: kind='bytes' has no files; leave it None")
    if self.kind == 'byte_level_bpe':
      if self.path is not None:
        raise ValueError(f"path={self.path!r}: kind='byte_level_bpe' is trained on the corpus; "
                         "leave it None, or read the files of one by kind='json'")
      if self.model_type != 'bpe' or not self.byte_fallback:
        raise ValueError(f'model_type={self.model_type!r}, byte_fallback={self.byte_fallback}: '
                         "kind='byte_level_bpe' has no such choice; leave them out, or take "
                         "kind='sentencepiece'")
      if (self.vocab_size or 257) < 257:
        raise ValueError(f'vocab_size={self.vocab_size}: the 256 bytes and the end of a text take '
                         '257; raise it')
    if self.vocab_size is not None and not trained:
      raise ValueError(f'vocab_size={self.vocab_size}: only a tokenizer that is trained takes a '
                       'vocabulary size; leave it None')
    if trained and self.vocab_size is None and self.model_type != 'char':
      raise ValueError(f'vocab_size=None: model_type={self.model_type!r} needs a size, say 4096')
    if self.kind != 'json' and (self.bos_token or self.eos_token):
      raise ValueError(f"bos_token, eos_token: only kind='json' takes them, not {self.kind!r}")
    return self


def train_or_load(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
  """Return the tokenizer that `config` describes.

  Args:
    config: the kind and its settings.
    texts: the corpus, read only where the tokenizer is trained.

  Raises:
    ValueError: files are missing or damaged, or the corpus does not give such a vocabulary.
  """
  if config.trained:
    return from_files(_train(config, texts))
  tokenizer = from_files(read_files(config))
  for name in ('bos', 'eos'):
    token = getattr(config, f'{name}_token')
    if token is not None and getattr(tokenizer, f'{name}_id') is None:
      raise ValueError(f'config.tokenizer.{name}_token={token!r} is not in the vocabulary of '
                       f'{config.path!r}')
  return tokenizer


def read_files(config: TokenizerConfig) -> dict[str, bytes]:
  """Read the files that `config.path` names, none of them missing; none where it is trained."""
  if config.kind == 'bytes':
    return {'bytes.txt': b'ids 0 to 255 are bytes, 256 begins and ends a document\n'}
  if config.path is None:
    return {}
  path, needed = storage.local(config.path, 'config.tokenizer.path='), _NEEDED[config.kind]
  found = read_directory(path if path.is_dir() else path.parent)
  own = needed[0] if len(needed) == 1 else _RENAMED.get(path.name, path.name)
  if path.is_file() and own in needed:
    found[own] = path.read_bytes()
  if missing := [name for name in needed if name not in found]:
    raise ValueError(f'no {missing[0]} at {config.path!r} (config.tokenizer.path)')
  files = {name: found[name] for name in (*needed, *SETTINGS) if name in found}
  chosen = {name: token for name in ('bos_token', 'eos_token') if (token := getattr(config, name))}
  if chosen:
    known = tokenizer_settings.settings(files)
    files['tokenizer_config.json'] = json.dumps(known | chosen).encode()
    files.pop('special_tokens_map.json', None)
  return files


def read_directory(
  directory: pathlib.Path, names: Iterable[str] = FILE_NAMES
) -> dict[str, bytes]:
  """Read a directory's files of a tokenizer by their names of today; refuse absurd sizes."""
  files: dict[str, bytes] = {}
  for path in (directory / name for name in (*names, *_RENAMED)):
    name = _RENAMED.get(path.name, path.name)
    if name not in files and path.is_file():
      if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f'{path}: larger than {_MAX_BYTES} bytes')
      files[name] = path.read_bytes()
  return files


def from_files(files: Files) -> Tokenizer:
  """Build a tokenizer from files of a model directory; refuse none, or damaged ones."""
  for name, build in BUILDERS.items():
    if name in files:
      return build(files)
  raise ValueError(f'no tokenizer among {sorted(files)}: expected {" or ".join(BUILDERS)}')


def pack_ids(tokenizer: Tokenizer) -> Callable[[Sequence[str]], list[bytes]]:
  """Return a function from texts to their ids, of four bytes each."""
  return lambda texts: [np.array(ids, '<u4').tobytes() for ids in tokenizer.encode_batch(texts)]


def id_packer(directory: str) -> Callable[[Sequence[str]], list[bytes]]:
  """Return `pack_ids` for `parallel.processes`."""
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # There is one process for each core.
  encode = load(directory).encode
  return lambda texts: [np.array(encode(text), '<u4').tobytes() for text in texts]


def same_vocabulary(first: Tokenizer, second: Tokenizer) -> bool:
  """Return whether both give a text the same ids; which of them begin and end it may differ."""
  def vocabulary(tokenizer: Tokenizer) -> list[Any]:
    files = tokenizer.files()
    # A directory may hold the same tokenizer twice; the first file is the one that is read.
    read = next(name for name in BUILDERS if name in files)
    keys = tokenizer_settings.settings(files)
    words = {i: token.content for i, token in tokenizer_settings.listed(files, keys).items()
             if not token.special}
    named = tokenizer_settings.class_of(keys) if read == 'vocab.json' else None
    return [read, files[read], files.get('merges.txt'), named, words]

  return vocabulary(first) == vocabulary(second)


def save(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> None:
  """Write the tokenizer's files into a directory."""
  directory = storage.path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for name, content in tokenizer.files().items():
    storage.write_file(directory / name, content)


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Build the tokenizer of a directory; refuse one that is not there, or damaged."""
  found = read_directory(storage.local(directory))
  if not found:
    raise ValueError(f'no tokenizer in {str(directory)!r}: expected {" or ".join(BUILDERS)}')
  return from_files(found)


def _train(config: TokenizerConfig, texts: Iterable[str]) -> Files:
  is_bpe = config.kind == 'byte_level_bpe'
  found = sample(config, enumerate(texts))
  chunks, size = [chunk for *_, chunk in found.kept], found.total_bytes
  if not chunks:
    raise ValueError('there is no text to train the tokenizer on: config.data.sources have none, '
                     'config.data.cleaning drops it, or config.tokenizer.sample_bytes is too small')
  taken = sum(size for _, size, *_ in found.kept)
  logging.info('training the tokenizer on %.4g of %.4g MB (%.3g %%) of the training text, a sample '
               'of config.tokenizer.sample_bytes=%s', taken / 1e6, size / 1e6, 100 * taken / size,
               f'{config.sample_bytes:,}')
  with _still_training():
    return (_train_byte_level if is_bpe else _train_sentencepiece)(config, chunks)


@contextlib.contextmanager
def _still_training() -> Iterator[None]:
  """Say now and then that a trainer, which itself says nothing, is at work."""
  done, begin = threading.Event(), time.monotonic()

  def say() -> None:
    while not done.wait(_SAY_SECONDS):
      logging.info('the tokenizer is still being trained, for %.0f s', time.monotonic() - begin)

  threading.Thread(target=say, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def _train_byte_level(config: TokenizerConfig, sample: Sequence[str]) -> Files:
  """Train byte-level BPE on words as GPT-2 cuts them; an end of text begins and ends documents.

  The trainer orders pairs by their counts and then by their ids, whatever its threads have done.
  """
  import tokenizers as library

  inner = tokenizer_settings.byte_level({}, ())
  inner.train_from_iterator(sample, library.trainers.BpeTrainer(
    vocab_size=config.vocab_size or 0, special_tokens=[tokenizer_settings.END], show_progress=False,
    initial_alphabet=[*tokenizer_kinds.BYTE_SIGNS]))
  _check_size(config, inner.get_vocab_size())
  named = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': tokenizer_settings.END,
           'eos_token': tokenizer_settings.END}
  return {'tokenizer.json': inner.to_str().encode(),
          'tokenizer_config.json': json.dumps(named).encode()}


def _check_size(config: TokenizerConfig, size: int) -> None:
  if size < (config.vocab_size or 0):
    logging.warning('config.tokenizer.vocab_size=%s: this corpus gives %s pieces, and the '
                    'tokenizer has no more', config.vocab_size, size)


def _train_sentencepiece(config: TokenizerConfig, sample: Sequence[str]) -> Files:
  """Train SentencePiece so that nothing of a text is lost.

  A corpus that gives fewer pieces than asked for gives all that it has. Of more characters than
  the vocabulary has room for, the rarest are left to their bytes: characters then take two thirds
  of the pieces, which left the fewest tokens of Chinese text at 2,048 and 4,096.
  """
  size = config.vocab_size
  for _ in range(3):  # Once for each remedy.
    try:
      return {'tokenizer.model': _fit(config, sample, size)}
    except RuntimeError as error:
      message = str(error)
    room = (size or 0) - _OTHER_PIECES
    if largest := re.search(r'value <= (\d+)', message):
      size = int(largest[1])
      _check_size(config, size)
    elif 'required_chars' in message and config.has_bytes and room > 2:
      counts = collections.Counter(itertools.chain.from_iterable(sample))
      common = ''.join(character for character, _ in counts.most_common(room * 2 // 3))
      stretches = re.compile(f'[{re.escape(common)}]+')
      sample = [stretch for text in sample for stretch in stretches.findall(text)]
    else:
      break
  raise ValueError(_explained(config, message))


def _fit(config: TokenizerConfig, sample: Sequence[str], vocab_size: int | None) -> bytes:
  import sentencepiece

  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sample),
    model_writer=writer,
    vocab_size=vocab_size or 1_000_000,
    use_all_vocab=vocab_size is None,
    model_type=config.model_type,
    byte_fallback=config.byte_fallback,
    character_coverage=0.9995 if config.has_bytes else 1.0,
    max_sentence_length=4 * 4000,  # In bytes; longer ones would be skipped.
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    num_threads=4,  # Part of the result, therefore not the machine's.
    minloglevel=2,
  )
  model = writer.getvalue()
  size = from_files({'tokenizer.model': model}).vocab_size
  if vocab_size not in (None, size):
    raise RuntimeError(f'set it to a value <= {size}')
  return model


def _explained(config: TokenizerConfig, message: str) -> str:
  field = f'config.tokenizer.vocab_size={config.vocab_size}'
  if smallest := re.search(r'required_chars\. \d+ vs (\d+)', message):
    least = _OTHER_PIECES + 3 if config.has_bytes else smallest[1]
    advice = f'raise it to at least {least}, and config.model.vocab_size with it'
    if not config.has_bytes:
      advice += (", or leave rare characters to their bytes (config.tokenizer.model_type='bpe' and "
                 'config.tokenizer.byte_fallback=True)')
    return f'{field} is too small for the characters of this corpus and their bytes: {advice}'
  return f'{field}: SentencePiece could not be trained: {message}'


def _chunks(texts: Iterable[str], cut_at_signs: bool) -> Iterator[str]:
  """Cut texts into pieces of at most 4,000 characters, which keep their newlines inside.

  SentencePiece would skip one with one of its own signs, so these stand between pieces where
  `cut_at_signs`; encoding gives them by their bytes. A piece that is cut again stays whole.
  """
  for text in texts:
    for stretch in _SIGNS.split(text) if cut_at_signs else (text,):
      for match in _CHUNK.finditer(stretch):
        yield match.group()


class Sample(NamedTuple):
  """The pieces of texts with the lowest hashes.

  Attributes:
    kept: hash, bytes, (place of the text, place in it) and content of each.
    ceiling: hashes are below it.
    total_bytes: those of all pieces.
  """

  kept: list[tuple[int, int, tuple[Any, int], str]]
  ceiling: int = 2**64
  total_bytes: int = 0

  def cut(self, limit: int) -> 'Sample':
    """Return the sample with at most `limit` bytes."""
    kept, ceiling, _ = self
    while sum(size for _, size, *_ in kept) > limit and ceiling:
      ceiling //= 2
      kept = [piece for piece in kept if piece[0] < ceiling]
    return self._replace(kept=kept, ceiling=ceiling)


def sample(config: TokenizerConfig, texts: Iterable[tuple[Any, str]]) -> Sample:
  """Sample pieces of texts, of which each has a place, for the tokenizer to be trained on."""
  kept: list[tuple[int, int, tuple[Any, int], str]] = []
  ceiling, size, total = 2**64, 0, 0
  for place, text in texts:
    for number, chunk in enumerate(_chunks((text,), config.kind == 'sentencepiece')):
      content = chunk.encode()
      total += len(content)
      draw = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
      if draw < ceiling:
        kept.append((draw, len(content), (place, number), chunk))
        size += len(content)
      if size > config.sample_bytes:
        kept, ceiling, _ = Sample(kept, ceiling).cut(config.sample_bytes)
        size = sum(length for _, length, *_ in kept)
  return Sample(kept, ceiling, total)


def join_samples(samples: Iterable[Sample], limit: int) -> Sample:
  """Return the sample of all texts from the samples of some each, in the order of their places."""
  several = [*samples]
  ceiling = min((one.ceiling for one in several), default=2**64)
  kept = sorted((piece for one in several for piece in one.kept if piece[0] < ceiling),
                key=lambda piece: piece[2])
  return Sample(kept, ceiling, sum(one.total_bytes for one in several)).cut(limit)
