"""Records on disk: what they hold, and opening them.

- `DataConfig` says which texts become which records, a `Manifest` what became of them.
- Records lie in a folder that is named by their fingerprint, what they are made of: ArrayRecord
  shards, the tokenizer, and `manifest.json`. Settings, sources or tokenizer files that change give
  other folders beside it; what lies in one is compared with the manifest when it is opened.
"""

import contextlib
import os
import pathlib
from typing import Any, Literal

import pydantic

from jaxllm import storage
from jaxllm.config import Config
from jaxllm.data import documents, parallel, shards, tokenizers
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.documents import SourceConfig, SourceCounts, Sources
from jaxllm.data.lineage import Lineage
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig

# Part of every fingerprint: to be raised when the same settings give other records.
VERSION = 1


# Names of before, which fingerprints keep.
OLD_PACKING = {'best_fit': 'whole', 'concat': 'stream'}
DAMAGED = 'the records are damaged; delete the directory and prepare them anew'


class DataConfig(Config):
  """Which texts become which records."""

  sources: Sources = ()
  """Where the training documents come from, in this order, also as a path, glob or directory, or
  several with commas; () where a task has its own records."""
  validation: float | Sources | None = 0.05
  """Held-out documents: a fraction of the sources, chosen by the hash of each document, or sources
  of their own; None holds nothing out. Where these are so few that none or all are chosen, the end
  of each is held out."""
  cleaning: CleaningConfig = CleaningConfig()
  """What is done to each text before it is tokenized."""
  context_length: int = pydantic.Field(gt=0)
  """Tokens that the model reads at once."""
  packing: Literal['packed', 'best_fit', 'concat', 'one_document'] = 'packed'
  """'packed': documents share records without seeing each other, and are cut where a record ends;
  'best_fit': the same, but no document that fits a record is cut; 'concat': all documents are one
  running text, cut every context_length tokens; 'one_document': no document shares a record, so
  that short ones leave most of it empty. Were once 'whole' ('best_fit') and 'stream'."""
  add_bos: bool = True
  """Begin each document with the tokenizer's BOS."""
  add_eos: bool = True
  """End each document with the tokenizer's EOS."""
  shuffle: bool = True
  """Visit the training records in a new random order each epoch."""

  @pydantic.field_validator('packing', mode='before')
  @classmethod
  def _renamed(cls, value: Any) -> Any:
    return next((new for new, old in OLD_PACKING.items() if old == value), value)

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits."""
    return ('train',) if self.validation is None else ('train', 'validation')

  @property
  def own_validation(self) -> tuple[SourceConfig, ...]:
    """The sources that are held out whole."""
    return self.validation if isinstance(self.validation, tuple) else ()

  @property
  def mixed(self) -> bool:
    """Whether sources have weights or epochs, so that each record is of one of them alone."""
    return documents.mixed(self.sources)

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'DataConfig':
    fraction = self.validation if isinstance(self.validation, float) else 0.5
    if self.validation == () or not 0 < fraction < 1:
      raise ValueError(f'validation={self.validation}: expected a fraction between 0 and 1, '
                       'sources, or None')
    documents.mixed(self.sources)
    others = (*self.own_validation, *self.cleaning.evaluation)
    if any(source.weight or source.epochs for source in others):
      raise ValueError('validation, cleaning.evaluation: only what is trained on is mixed; leave '
                       'weight and epochs away')
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
  """UTF-8 bytes that the target tokens stand for: all but those of first tokens, which nothing
  predicts unless a BOS stands before them."""
  shards: tuple[int, ...]
  """Records in each shard."""
  sha256: tuple[str, ...] = ()
  """SHA-256 of each shard; () of older records, which are not compared."""
  dropped: int = 0
  """Examples of a task that are left out: too long, or without anything to train on."""
  cut: int = 0
  """Examples of a task that are there in part."""
  dropped_tokens: int = 0
  """Tokens of documents that are in no record: one that was left over alone, without a target."""
  lineage_sha256: tuple[str, ...] = ()
  """SHA-256 of the file beside each shard that says where its tokens come from; () where there is
  none, as for older records and for those of a task."""
  source_records: tuple[int, ...] = ()
  """Records of each source, where sources are mixed; else () as a record may be of several."""
  source_tokens: tuple[int, ...] = ()
  """Tokens of each source; () in older records."""

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
  sources: tuple[SourceCounts, ...]
  """The sources, those of their own for validation last."""
  train: Split
  """The training records."""
  validation: Split | None
  """The held-out records."""
  ends: bool = False
  """Whether the ends of documents are held out, as no whole ones could be."""

  @property
  def context_length(self) -> int:
    """Tokens of a record that the model reads."""
    return self.data.context_length

  def split(self, name: str) -> Split:
    """Return a split by name, 'train' or 'validation'."""
    if (found := {'train': self.train, 'validation': self.validation}.get(name)) is None:
      raise ValueError(f'no split {name!r} was prepared; set config.data.validation')
    return found

  @property
  def folder(self) -> str:
    """Name of the folder, inside the prepared directory, with shards and tokenizer."""
    return self.fingerprint[:16]


def find(directory: str | os.PathLike[str], fingerprint: str | None) -> pathlib.Path | None:
  """Return the folder of the records with this fingerprint; None: they are not all there."""
  directory = storage.path(directory)
  with contextlib.suppress(OSError):  # Manifests once lay beside their folders.
    old = storage.read_json(directory / 'manifest.json').get('fingerprint')
    if isinstance(old, str) and (directory / old[:16]).is_dir():
      storage.write_file(directory / old[:16] / 'manifest.json',
                         (directory / 'manifest.json').read_bytes())
      (directory / 'manifest.json').unlink()
  folder = directory / (fingerprint or 'none')[:16]
  try:
    manifest = load_manifest(folder)
    complete = manifest.fingerprint == fingerprint and all(
      path.is_file() for split in manifest.data.splits
      for path in shard_paths(folder, manifest, split))
  except (ValueError, FileNotFoundError):
    return None
  return folder if complete else None


def folder_of(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Return the folder of records: the directory itself, or the only one in it."""
  directory = storage.path(directory)
  if (directory / 'manifest.json').is_file():
    return directory
  found = [path.parent for path in directory.glob('*/manifest.json')]
  if len(found) != 1:
    raise ValueError(f'{directory} holds the records of {", ".join(p.name for p in found)}; name '
                     f'one of these folders' if found else
                     f'no prepared data in {str(directory)!r}: run prepare first')
  return found[0]


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
  """Read the manifest of records (see `folder_of`); refuse none, or a damaged one."""
  path = folder_of(directory) / 'manifest.json'
  try:
    return Manifest(**storage.unsealed(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path}: {DAMAGED} ({error})') from None


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  """Load the tokenizer of records (see `folder_of`); refuse one that is not as it was written."""
  place = folder_of(directory) / 'tokenizer'
  files = tokenizers.read_directory(storage.local(place))
  if tokenizers.fingerprint(files) != load_manifest(directory).tokenizer_fingerprint:
    raise ValueError(f'{place}: {DAMAGED} (a file is not as it was written)')
  return tokenizers.from_files(files)


def shard_paths(
  directory: str | os.PathLike[str], manifest: Manifest, split: str
) -> list[pathlib.Path]:
  """List the record files of a split."""
  folder = storage.local(folder_of(directory))
  return [shards.paths_of_shard(folder, split, i)[0]
          for i, _ in enumerate(manifest.split(split).shards)]


def open_lineage(directory: str | os.PathLike[str], split: str) -> Lineage:
  """Return where the tokens of a split come from; a ValueError says that it is not known."""
  manifest = load_manifest(directory)
  of = manifest.split(split)
  if len(of.lineage_sha256) < len(of.shards):
    raise ValueError(f'{folder_of(directory)}: these records are of a version that did not write '
                     'down where their tokens come from; delete the directory and prepare them '
                     'anew, which gives the same records')
  paths = [path.with_suffix('.lineage') for path in shard_paths(directory, manifest, split)]
  for path, written in zip(paths, of.lineage_sha256, strict=True):
    if not path.is_file() or storage.file_digest(path, {}) != written:
      raise ValueError(f'{path}: {DAMAGED} (it is not as it was written)')
  return Lineage(paths, of.shards)


def open_shards(
  directory: str | os.PathLike[str], split: str
) -> tuple[Manifest, list[pathlib.Path]]:
  """Return the manifest of records (see `folder_of`) and the verified record files of a split.

  The files are read once, about a second for a gigabyte and core.

  Raises:
    ValueError: nothing is prepared there, or a file is not as it was written.
  """
  manifest = load_manifest(directory)
  paths = shard_paths(directory, manifest, split)
  if lost := [path for path in paths if not path.is_file()]:
    raise ValueError(f'{lost[0]}: {DAMAGED} (there is no such file)')
  digests = parallel.map_ahead(lambda path: storage.file_digest(path, {}), paths, os.cpu_count())
  written = manifest.split(split).sha256
  for path, own, wanted in zip(paths, digests, written, strict=False):
    if own != wanted:
      raise ValueError(f'{path}: {DAMAGED} (it is not as it was written)')
  return manifest, paths
