"""Documents to fixed-length records on disk, with a manifest that says what they are.

- `DataConfig` says what goes in; `prepare` does it once and returns the `Manifest`.
- The directory holds `manifest.json`, the commit point, and the folder that it names: ArrayRecord
  shards and the tokenizer. It is reused as long as settings, sources and tokenizer stay the same.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pydantic

from jaxllm.config import Config
from jaxllm.data import documents, packing, storage, tokenizers
from jaxllm.data.cleaning import CleaningConfig, clean
from jaxllm.data.documents import SourceConfig
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig

# Part of every fingerprint: raise it when the same settings would give other records.
_VERSION = 1
_SHARD_TOKENS = 2**26


class DataConfig(Config):
  """Which texts become which records."""

  sources: tuple[SourceConfig, ...]
  """Where the training documents come from, in this order."""
  validation: float | tuple[SourceConfig, ...] | None = 0.05
  """Held-out documents: a fraction of the sources, chosen by the hash of each document, or sources
  of their own; None holds nothing out."""
  cleaning: CleaningConfig = CleaningConfig()
  """What is done to each text before it is tokenized."""
  context_length: int = pydantic.Field(gt=0)
  """Tokens that the model reads at once."""
  packing: Literal['packed', 'stream'] = 'packed'
  """'packed': documents share records but do not see each other; 'stream': all documents are one
  running text, cut every context_length tokens."""
  add_bos: bool = True
  """Begin each document with the tokenizer's BOS."""
  add_eos: bool = True
  """End each document with the tokenizer's EOS."""
  shuffle: bool = True
  """Visit the training records in a new random order each epoch."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'DataConfig':
    if not self.sources:
      raise ValueError('sources=(): at least one source is needed')
    if isinstance(self.validation, float) and not 0 < self.validation < 1:
      raise ValueError(f'validation={self.validation}: expected a fraction between 0 and 1, '
                       'sources, or None')
    return self


class Split(Config):
  """What one split holds."""

  documents: int
  """Documents that were kept."""
  records: int
  """Records in all shards."""
  tokens: int
  """Tokens of the documents, BOS and EOS included, none counted twice."""
  target_tokens: int
  """Tokens that have weight as targets."""
  text_bytes: int
  """UTF-8 bytes of the documents."""
  target_bytes: int
  """UTF-8 bytes that the target tokens stand for."""
  shards: tuple[int, ...]
  """Records in each shard."""

  @property
  def bytes_per_token(self) -> float:
    """UTF-8 bytes per target token: loss / log(2) / bytes_per_token is in bits per byte."""
    return self.target_bytes / self.target_tokens


class Manifest(Config):
  """What a prepared directory holds and what it was made from."""

  version: int
  """Version of the layout."""
  fingerprint: str
  """SHA-256 of everything that decides the records."""
  data: DataConfig
  """The settings."""
  tokenizer: TokenizerConfig
  """The tokenizer's settings."""
  tokenizer_fingerprint: str
  """SHA-256 of the tokenizer's files."""
  vocab_size: int
  """Ids are below this."""
  train: Split
  """The training records."""
  validation: Split | None
  """The held-out records."""

  @property
  def context_length(self) -> int:
    """Tokens of a record that the model reads."""
    return self.data.context_length

  def split(self, name: str) -> Split:
    """Return a split by name, 'train' or 'validation'."""
    found = {'train': self.train, 'validation': self.validation}.get(name)
    if found is None:
      raise ValueError(f'no split {name!r} was prepared; set config.data.validation')
    return found

  @property
  def folder(self) -> str:
    """Name of the folder, inside the prepared directory, with shards and tokenizer."""
    return self.fingerprint[:16]


def prepare(
  data: DataConfig,
  tokenizer: TokenizerConfig,
  directory: str | os.PathLike[str],
  progress: bool = True,
) -> Manifest:
  """Make `directory` hold the records that the settings describe, or find that it does already.

  Args:
    data: sources and settings.
    tokenizer: which tokenizer; it is trained on the training documents where it must be.
    directory: where to write; what it held before is replaced once the new records are complete.
    progress: show a bar on stderr.

  Returns:
    The manifest, as `load_manifest` reads it.

  Raises:
    ValueError: a source is missing, damaged or empty, or settings do not fit the data.
    OSError: the directory cannot be written or the disk is full; nothing half-written is left.
  """
  directory = pathlib.Path(directory)
  fingerprint = _fingerprint(data, tokenizer)
  manifest = _current(directory, fingerprint)
  if manifest is not None:
    return manifest
  with storage.locked(directory):
    manifest = _current(directory, fingerprint)
    if manifest is not None:  # Another process was faster.
      return manifest
    with storage.staged(directory / fingerprint[:16]) as staging:
      manifest = _write(data, tokenizer, fingerprint, staging, progress)
    storage.write_file(directory / 'manifest.json', manifest.to_json().encode())
    for folder in directory.iterdir():
      if folder.is_dir() and folder.name != manifest.folder:
        shutil.rmtree(folder, ignore_errors=True)
  return manifest


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
  """Read the manifest of a prepared directory.

  Raises:
    ValueError: nothing is prepared there.
  """
  path = pathlib.Path(directory) / 'manifest.json'
  if not path.is_file():
    raise ValueError(f'no prepared data in {str(directory)!r}: run prepare first')
  return Manifest.from_json(path.read_text(encoding='utf-8'))


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  """Load the tokenizer of a prepared directory."""
  return tokenizers.load(pathlib.Path(directory) / load_manifest(directory).folder / 'tokenizer')


def _current(directory: pathlib.Path, fingerprint: str) -> Manifest | None:
  try:
    manifest = load_manifest(directory)
  except (ValueError, OSError):
    return None
  return manifest if manifest.fingerprint == fingerprint else None


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig) -> str:
  facts = [_VERSION, data.model_dump(mode='json'), tokenizer.model_dump(mode='json')]
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _texts(data: DataConfig) -> Iterator[tuple[str, str]]:
  """Yield (split, cleaned text) of every document that is kept."""
  fraction = data.validation if isinstance(data.validation, float) else 0.0
  held_out = data.validation if isinstance(data.validation, tuple) else ()
  for sources, split in ((data.sources, None), (held_out, 'validation')):
    for source in sources:
      for document in documents.documents(source):
        text = clean(document.text, data.cleaning)
        if text:
          yield split or _split_of(text, fraction), text


def _split_of(text: str, fraction: float) -> str:
  draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
  return 'validation' if draw < fraction * 2**64 else 'train'


def _write(
  data: DataConfig, config: TokenizerConfig, fingerprint: str, staging: pathlib.Path, progress: bool
) -> Manifest:
  tokenizer = tokenizers.train_or_load(
    config, (text for split, text in _texts(data) if split == 'train'))
  tokenizers.save(tokenizer, staging / 'tokenizer')
  names = ['train'] if data.validation is None else ['train', 'validation']
  writers = {name: _SplitWriter(data, tokenizer, staging, name) for name in names}
  for split, text in _texts(data):
    writers[split].add(text)
  splits = {name: writer.finish() for name, writer in writers.items()}
  return Manifest(
    version=_VERSION, fingerprint=fingerprint, data=data, tokenizer=config,
    tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
    train=splits['train'], validation=splits.get('validation'),
  )


class _SplitWriter:
  def __init__(self, data: DataConfig, tokenizer: Tokenizer, staging: pathlib.Path, name: str):
    self._data, self._tokenizer = data, tokenizer
    self._prefix = [tokenizer.bos_id] if data.add_bos else []
    self._suffix = [tokenizer.eos_id] if data.add_eos else []
    dtype = packing.record_dtype(data.context_length, tokenizer.vocab_size)
    self._packer = packing.Packer(dtype, join=data.packing == 'stream')
    per_shard = max(1, _SHARD_TOKENS // data.context_length)
    self._shards = storage.ShardWriter(staging, name, per_shard)
    self._counts: dict[str, int] = dict.fromkeys(
      ('documents', 'tokens', 'target_tokens', 'text_bytes', 'target_bytes'), 0)

  def add(self, text: str) -> None:
    ids = np.array([*self._prefix, *self._tokenizer.encode(text), *self._suffix], np.int64)
    first = len(self._tokenizer.id_bytes[ids[0]])
    size = len(text.encode())
    self._count(documents=1, tokens=len(ids), text_bytes=size, target_bytes=size - first)
    self._write(self._packer.add(ids))

  def _write(self, records: Iterator[np.ndarray]) -> None:
    for record in records:
      self._count(target_tokens=packing.count_targets(record))
      self._shards.write(record.tobytes())

  def _count(self, **amounts: int) -> None:
    for name, amount in amounts.items():
      self._counts[name] += amount

  def finish(self) -> Split:
    self._write(self._packer.finish())
    self._shards.close()
    shards = tuple(self._shards.counts)
    return Split(**self._counts, records=sum(shards), shards=shards)


def read_record_files(directory: pathlib.Path, manifest: Manifest, split: str) -> list[str]:
  """Return the paths of a split's shards."""
  folder = directory / manifest.folder
  count = len(manifest.split(split).shards)
  return [str(folder / storage.shard_name(split, i)) for i in range(count)]


__all__: list[Any] = [
  'DataConfig', 'Manifest', 'Split', 'load_manifest', 'load_tokenizer', 'prepare',
]
