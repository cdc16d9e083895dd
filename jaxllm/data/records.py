"""Documents to fixed-length records on disk, with a manifest that says what they are.

- `DataConfig` says what goes in; `prepare` does it once and returns the `Manifest`.
- Records lie in a folder that is named by their fingerprint, what they are made of: ArrayRecord
  shards, the tokenizer, and `manifest.json`. Settings, sources or tokenizer files that change give
  other folders beside it; what lies in one is compared with the manifest when it is opened.
- `_write` is one pass: read, clean, split, tokenize, pack, write.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pydantic
from absl import logging

from jaxllm import storage
from jaxllm.config import Config
from jaxllm.data import cleaning, documents, packing, parallel, readers, tokenizers
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.documents import SourceConfig, SourceCounts, Sources
from jaxllm.data.duplicates import digest as digest
from jaxllm.data.files import COMPRESSIONS, ending
from jaxllm.data.lineage import Lineage
from jaxllm.data.packing import Text
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig

# Part of every fingerprint: to be raised when the same settings give other records.
VERSION = 1

# Names of before, which fingerprints keep.
_OLD_PACKING = {'best_fit': 'whole', 'concat': 'stream'}

_HASHES = '.source_hashes.json'
_STATE = 'state.json'
_CLEANED = 'cleaned.jsonl'
_SAVE_SECONDS = 10.0
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
    return next((new for new, old in _OLD_PACKING.items() if old == value), value)

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


def prepare(
  data: DataConfig,
  tokenizer: TokenizerConfig | None,
  directory: str | os.PathLike[str],
  progress: bool = True,
  workers: int | None = None,
  write: Callable[..., Manifest] | None = None,
) -> Manifest:
  """Make or find the records that the settings describe in `directory`; return their manifest.

  Args:
    data: sources and settings.
    tokenizer: which tokenizer; trained on the training documents where it has no files.
    directory: where their folder is made. Folders of other records there stay as they are.
    progress: show a bar on stderr.
    workers: processes that clean, which decide nothing but the time; None: one a core, where it
      takes long.
    write: makes the records elsewhere: `beam.write` with its options.

  Raises:
    ValueError: a source is missing, damaged or empty, or the settings do not fit the data.
    OSError: the directory cannot be written, the disk is full, or a process that cleans was killed;
      nothing half-written is left.
  """
  if tokenizer is None or not data.sources:
    raise ValueError(f'data.sources={data.sources} and tokenizer={tokenizer}: preparing documents '
                     'needs both')
  directory = storage.path(directory)
  hashes = dict(known := storage.read_json(directory / _HASHES))
  sources = documents.survey(data.sources, data.own_validation, hashes)
  fingerprint = _fingerprint(data, tokenizer, sources)
  if find(directory, fingerprint) is None:
    folder = directory / fingerprint[:16]
    with storage.locked(directory, folder.name):
      if find(directory, fingerprint) is None:  # Another process may have been faster.
        if folder.exists():
          logging.warning('%s is not complete; its records are prepared anew', folder)
        # In a bucket others write there, too, and nothing counts before the manifest.
        shared = write and storage.is_remote(folder)
        place = contextlib.nullcontext(folder) if shared else storage.replaced(folder, kept=True)
        with place as staging, parallel.processes(
            cleaning.chunk_passer, data.cleaning.to_json(),
            workers if data.cleaning.steps and not write else 1) as run:
          make = write or functools.partial(_write, progress=progress, run=run, workers=workers)
          manifest = make(data, tokenizer, staging, sources, fingerprint)
          storage.write_json(staging / 'manifest.json', manifest.model_dump(mode='json'))
          if not shared:
            storage.remove(folder)
  if hashes != known:
    with contextlib.suppress(OSError):  # They only save time.
      storage.write_json(directory / _HASHES, hashes)
  return load_manifest(directory / fingerprint[:16])


def fingerprint(
  data: DataConfig, tokenizer: TokenizerConfig | None, directory: str | os.PathLike[str]
) -> str:
  """Return the fingerprint that `prepare` would give now; arguments and errors as there."""
  if tokenizer is None:
    raise ValueError('tokenizer=None: preparing documents needs one')
  hashes = storage.read_json(storage.path(directory) / _HASHES)
  return _fingerprint(data, tokenizer, documents.survey(data.sources, data.own_validation, hashes))


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
  return [packing.paths_of_shard(folder, split, i)[0]
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


def _fingerprint(
  data: DataConfig, tokenizer: TokenizerConfig, sources: Sequence[SourceCounts]
) -> str:
  """Hash what decides the records: settings and contents, not where files lie."""
  def without_paths(source: SourceConfig) -> dict[str, Any]:
    # Records from before a field existed stay valid while it has its default.
    fields = source.model_dump(mode='json')
    skipped = {'weight', 'epochs'} | {name for name in ('encoding', 'column_names')
                                      if getattr(source, name)
                                      == SourceConfig.model_fields[name].default}
    if source.separator and source.slice != (0, 1):
      fields['separator'] = [source.separator, 'whole texts']
    skipped |= set() if source.location.partition(':')[0] in documents.SCHEMES else {'location'}
    return {name: value for name, value in fields.items() if name not in skipped}

  # A source that is trained on may be one of evaluation, too, so that each is surveyed by itself.
  evaluation = {'evaluation': [
    (without_paths(source), documents.survey([source], (), {})[0].sha256)
    for source in data.cleaning.evaluation]} if data.cleaning.evaluation else {}
  facts = {
    'version': VERSION,
    **({'mixed': True} if data.mixed else {}),
    **({'held_out': 1} if from_same_files(data) else {}),
    'data': {**data.model_dump(mode='json', exclude={'sources', 'shuffle', 'validation'}),
             'cleaning': data.cleaning.facts() | evaluation,
             'packing': _OLD_PACKING.get(data.packing, data.packing)},
    'validation': len(data.sources) if isinstance(data.validation, tuple) else data.validation,
    'sources': [without_paths(source) for source in (*data.sources, *data.own_validation)],
    'contents': [source.sha256 for source in sources],
    'tokenizer': tokenizer.model_dump(mode='json', exclude={'path'}),
    'tokenizer_files': {name: hashlib.sha256(content).hexdigest()
                        for name, content in tokenizers.read_files(tokenizer).items()},
  }
  return storage.digest(facts)


Counters = Sequence[Counter[str]]


Run = Callable[[Iterable[cleaning.Chunk]], Iterator[Any]]


def _texts(
  data: DataConfig, run: Run, ends: bool, counts: Counters | None = None
) -> Iterator[Text]:
  """Yield texts with their splits, holding out the `ends` of documents or whole ones.

  Documents are counted per source. Texts that are held out from files that are trained on too are
  nowhere trained on. `run` is `cleaning.chunk_passer` of many chunks.
  """
  def chunks(sources: Iterable[SourceConfig]) -> Iterator[cleaning.Chunk]:
    for number, source in enumerate(sources):
      first = 0
      for texts in parallel.grouped(documents.documents(source), len, packing.GROUP_CHARACTERS):
        yield number, first, texts
        first += len(texts)

  sources = (*data.sources, *data.own_validation)
  held_out = {digest(passes[-1][0]) for _, _, found in run(chunks(data.own_validation))
              for _, passes in found if passes[-1][0]} if from_same_files(data) else ()
  compare = cleaning.comparer(cleaning.stages(data.cleaning))
  counts = counts or [Counter() for _ in sources]
  for number, first, found in run(chunks(sources)):
    split = 'train' if number < len(data.sources) else 'validation'
    for place, (size, passes) in enumerate(found, first):
      found_out = split == 'train' and dropped_as_held_out(passes, held_out)
      text, steps = (None, found_out) if found_out else compare(passes)
      counts[number].update(steps, documents=1, dropped=not text, characters=size)
      if text:
        yield from parts(data, Text(split, text, number, place), ends)


def dropped_as_held_out(
  passes: Sequence[cleaning.Passed], held_out: Collection[bytes]
) -> Counter[str] | None:
  """Return what drops a text whose digest is held out, and the steps before; None: it is not."""
  if not held_out or not (text := passes[-1][0]) or digest(text) not in held_out:
    return None
  steps = Counter({'held_out.dropped': 1, 'held_out.characters': len(text)})
  for _, counts, _ in passes:
    steps.update(counts)
  return steps


def parts(data: DataConfig, text: Text, ends: bool) -> Iterator[Text]:
  """Yield what is trained on of a text and what is held out, one of them or the other's rest."""
  fraction = data.validation if isinstance(data.validation, float) else 0.0
  if text.split == 'validation' or not ends:
    held_out = text.split == 'validation' or 0 < fraction and _sample(text.text) < fraction
    yield text._replace(split='validation' if held_out else 'train')
    return
  place = len(text.text) - int(len(text.text) * fraction)
  # Where the line before it ends, if that is nearer than the end of the text.
  cut = text.text.rfind('\n', max(0, 2 * place - len(text.text)), place) + 1 or place
  for split, piece in (('train', text.text[:cut]), ('validation', text.text[cut:])):
    if piece:
      yield text._replace(split=split, text=piece)


def _too_few(data: DataConfig, run: Run) -> bool:
  """Return whether the documents are too few to be divided: all fall into one split."""
  if not isinstance(data.validation, float):
    return False
  sides: set[str] = set()
  for text in _texts(data, run, ends=False):
    sides.add(text.split)
    if len(sides) > 1:
      return False
  return True


def _sample(text: str) -> float:
  """Return a number in [0, 1) that depends on the text alone: duplicates share their split."""
  return int.from_bytes(digest(text, 8)) / 2**64


def from_same_files(data: DataConfig) -> bool:
  """Return whether files of several texts are trained on and held out, in different slices."""
  trained, held_out = ({
    file.path.resolve() for source in sources for file in documents.find(source).files
    if source.separator or (
      source.format or readers.ENDINGS.get(ending(file.path))) not in readers.TEXTS}
    for sources in (data.sources if data.own_validation else (), data.own_validation))
  return bool(trained & held_out)


def _write(
  data: DataConfig, config: TokenizerConfig, staging: pathlib.Path,
  sources: Sequence[SourceCounts], fingerprint: str, progress: bool, run: Run,
  workers: int | None,
) -> Manifest:
  sizes = [_size(data, sources)]
  if state := _left(data, staging):
    logging.info('%s: going on after %d documents of an interrupted call', staging, state['texts'])
    tokenizer = tokenizers.from_files(tokenizers.read_directory(staging / 'tokenizer'))
  else:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    state = {'ends': _too_few(data, run), 'texts': 0, 'splits': {}}
    counts: Counters = [Counter() for _ in sources]
    texts = _texts(data, run, state['ends'], counts)
    if config.trained and data.cleaning.steps:
      texts = _kept(texts, counts, staging)
    tokenizer = tokenizers.train_or_load(config, (
      text.text for text in _shown('tokenizer', texts, sizes, progress and config.trained)
      if text.split == 'train'))
    tokenizers.save(tokenizer, staging / 'tokenizer')

  counts = [Counter() for _ in sources]
  writers = {name: packing.SplitWriter(staging, name, data, tokenizer.vocab_size,
                                       state['splits'].get(name, {})) for name in data.splits}
  texts = (_kept_before(staging, counts) if (staging / _CLEANED).is_file() else
           _texts(data, run, state['ends'], counts))
  texts = _shown('records', texts, sizes, progress)
  _pack(texts, tokenizer, data, writers, staging, state, workers)
  (staging / _CLEANED).unlink(missing_ok=True)
  splits = {name: Split(**writer.finish()) for name, writer in writers.items()}
  (staging / _STATE).unlink(missing_ok=True)
  return finished(data, config, tokenizer, fingerprint, sources, counts, splits, state['ends'])


def finished(
  data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer, fingerprint: str,
  sources: Sequence[SourceCounts], counts: Counters, splits: Mapping[str, Split], ends: bool,
) -> Manifest:
  """Return the manifest of records; a ValueError says that there is nothing to train on."""
  sources = tuple(source.replace(
    **{name: number for name, number in count.items() if '.' not in name},
    cleaning={name: number for name, number in sorted(count.items()) if '.' in name})
    for source, count in zip(sources, counts, strict=True))
  _check_splits(data, splits, sources)
  if ends:
    number = sum(source.documents - source.dropped for source in sources)
    logging.warning('config.data.validation=%s: the end of %s is held out, as no whole document '
                    'can be', data.validation,
                    'the document' if number == 1 else f'each of the {number} documents')
  return Manifest(
    version=VERSION, fingerprint=fingerprint, data=data, tokenizer=config,
    tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
    sources=sources, train=splits['train'], validation=splits.get('validation'), ends=ends,
  )


def _pack(
  texts: Iterator[Text], tokenizer: Tokenizer, data: DataConfig,
  writers: Mapping[str, packing.SplitWriter], staging: pathlib.Path, state: Mapping[str, Any],
  workers: int | None,
) -> None:
  """Tokenize texts, pack and write them, and every few seconds what an interrupted call needs."""
  # What an interrupted call has written is cleaned again, for the counts, and no more.
  rest, saved = itertools.islice(texts, state['texts'], None), time.monotonic()
  with parallel.processes(tokenizers.id_packer, str(staging / 'tokenizer'), workers,
                          tokenizers.pack_ids(tokenizer)) as run:
    for number, tokens in enumerate(
        packing.tokenize(rest, tokenizer, data, run), state['texts'] + 1):
      writers[tokens.split].add(tokens)
      if time.monotonic() - saved >= _SAVE_SECONDS:
        storage.write_json(staging / _STATE, {**state, 'texts': number, 'splits': {
          name: writer.state() for name, writer in writers.items()}})
        for writer in writers.values():
          writer.saved()
        saved = time.monotonic()


def _kept(texts: Iterator[Text], counts: Counters, staging: pathlib.Path) -> Iterator[Text]:
  """Yield texts and write them down, and their counts at the end, so that none is cleaned twice."""
  with (storage.replaced(staging / _CLEANED) as partial, storage.explained(staging),
        partial.open('w') as file):
    for text in texts:
      file.write(json.dumps(text) + '\n')
      yield text
    file.write(json.dumps(counts) + '\n')
    file.flush()
    os.fsync(file.fileno())


def _kept_before(staging: pathlib.Path, counts: Counters) -> Iterator[Text]:
  """Yield the texts that `_kept` has written, and count as they were counted."""
  with (staging / _CLEANED).open() as file:
    for fields in map(json.loads, file):
      if isinstance(fields[0], str):
        yield Text(*fields)
        continue
      for count, kept in zip(counts, fields, strict=True):
        count.update(kept)


def _left(data: DataConfig, staging: pathlib.Path) -> dict[str, Any]:
  """Return the state that an interrupted call has left; {}: none, or not all that belongs to it."""
  state = storage.read_json(staging / _STATE)
  for name in data.splits if state else ():
    of = state['splits'][name]
    for kind, size in of['bytes'].items():
      path = packing.open_path(staging, name, len(of['shards']) - 1, kind)
      if not path.is_file() or path.stat().st_size < size:
        return {}
  return state


def _size(data: DataConfig, sources: Sequence[SourceCounts]) -> float | None:
  """Return about how many bytes the texts have; None: files are packed, so that none can say."""
  total = 0.0
  for source, counts in zip((*data.sources, *data.own_validation), sources, strict=True):
    if any(file.path.suffix in {*COMPRESSIONS, '.parquet'}
           for file in documents.find(source).files):
      return None
    total += counts.file_bytes * (source.slice[1] - source.slice[0])
  return total or None


def _shown(
  name: str, texts: Iterable[Text], sizes: list[float | None], show: bool
) -> Iterator[Text]:
  """Yield texts, showing how much of them has gone by, how fast, and the time left.

  The last of `sizes` is about that of all; in the end it is what has gone by.
  """
  from tqdm import tqdm
  with tqdm(desc=f'prepare {name}', total=sizes[-1], unit='B', unit_scale=True, disable=not show,
            mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
    for number, text in enumerate(texts, 1):
      yield text
      bar.update(len(text.text.encode()))
      if number % 256 == 0 and show:
        seconds = bar.format_dict['elapsed'] + 1e-9
        bar.set_postfix_str(f'{number:,} documents, {number / seconds:,.0f}/s', refresh=False)
    bar.total = bar.n
    sizes.append(bar.n if show else None)


def _check_splits(
  data: DataConfig, splits: Mapping[str, Split], sources: Sequence[SourceCounts]
) -> None:
  read, dropped = sum(s.documents for s in sources), sum(s.dropped for s in sources)
  train, validation = splits['train'], splits.get('validation')
  if not train.target_tokens:
    raise ValueError(f'nothing to train on: config.data.sources hold {read} documents, of which '
                     f'{dropped} are empty or dropped by cleaning, and '
                     f'{validation.documents if validation else 0} held out')
  if train.tokens <= data.context_length:
    raise ValueError(f'config.data.context_length={data.context_length} is longer than the data: '
                     f'the training documents have {train.tokens} tokens together; shorten it, or '
                     'train on more text')
  if validation and not validation.target_tokens:
    hint = ('these sources hold no text' if isinstance(data.validation, tuple) else
            f'it is less than a character of each of {read - dropped} documents; raise the '
            'fraction, train on more text, or set it to None')
    raise ValueError(f'config.data.validation={data.validation!r} leaves nothing to validate on: '
                     f'{hint}')
