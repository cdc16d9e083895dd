"""Documents to fixed-length records, once.

- `prepare` makes records or finds that they are there, by their fingerprint.
- `_write` is one pass: read, clean, split, tokenize, pack, write.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from jaxllm import storage
from jaxllm.data import cleaning, documents, parallel, records, shards, tokenizers
from jaxllm.data import texts as texts_lib
from jaxllm.data.documents import SourceConfig, SourceCounts
from jaxllm.data.files import COMPRESSIONS
from jaxllm.data.records import DataConfig, Manifest, Split
from jaxllm.data.shards import Text
from jaxllm.data.texts import Counters
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig

_HASHES = '.source_hashes.json'
_STATE = 'state.json'
_SAVE_SECONDS = 10.0


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
    OSError: the directory cannot be written, the disk is full, or a process of it was killed.
  """
  if tokenizer is None or not data.sources:
    raise ValueError(f'data.sources={data.sources} and tokenizer={tokenizer}: preparing documents '
                     'needs both')
  directory = storage.path(directory)
  hashes = dict(known := storage.read_json(directory / _HASHES))
  sources = documents.survey(data.sources, data.own_validation, hashes)
  fingerprint = _fingerprint(data, tokenizer, sources)
  if records.find(directory, fingerprint) is None:
    folder = directory / fingerprint[:16]
    with storage.locked(directory, folder.name):
      if records.find(directory, fingerprint) is None:  # Another process may have been faster.
        if folder.exists():
          logging.warning('%s is not complete; its records are prepared anew', folder)
        # In a bucket others write there, too, and nothing counts before the manifest.
        shared = write and storage.is_remote(folder)
        place = contextlib.nullcontext(folder) if shared else storage.replaced(folder, kept=True)
        with place as staging:
          make = write or functools.partial(_write, progress=progress, workers=workers)
          manifest = make(data, tokenizer, staging, sources, fingerprint)
          storage.write_json(staging / 'manifest.json', manifest.model_dump(mode='json'))
          if not shared:
            storage.remove(folder)
  if hashes != known:
    with contextlib.suppress(OSError):  # They only save time.
      storage.write_json(directory / _HASHES, hashes)
  return records.load_manifest(directory / fingerprint[:16])


def fingerprint(
  data: DataConfig, tokenizer: TokenizerConfig | None, directory: str | os.PathLike[str]
) -> str:
  """Return the fingerprint that `prepare` would give now; arguments and errors as there."""
  if tokenizer is None:
    raise ValueError('tokenizer=None: preparing documents needs one')
  hashes = storage.read_json(storage.path(directory) / _HASHES)
  return _fingerprint(data, tokenizer, documents.survey(data.sources, data.own_validation, hashes))


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
    'version': records.VERSION,
    **({'mixed': True} if data.mixed else {}),
    **({'held_out': 1} if texts_lib.from_same_files(data) else {}),
    'data': {**data.model_dump(mode='json', exclude={'sources', 'shuffle', 'validation'}),
             'cleaning': data.cleaning.facts() | evaluation,
             'packing': records.OLD_PACKING.get(data.packing, data.packing)},
    'validation': len(data.sources) if isinstance(data.validation, tuple) else data.validation,
    'sources': [without_paths(source) for source in (*data.sources, *data.own_validation)],
    'contents': [source.sha256 for source in sources],
    'tokenizer': tokenizer.model_dump(mode='json', exclude={'path'}),
    'tokenizer_files': {name: hashlib.sha256(content).hexdigest()
                        for name, content in tokenizers.read_files(tokenizer).items()},
  }
  return storage.digest(facts)


def _write(
  data: DataConfig, config: TokenizerConfig, staging: pathlib.Path,
  sources: Sequence[SourceCounts], fingerprint: str, progress: bool,
  workers: int | None,
) -> Manifest:
  sizes = [_size(data, sources)]
  with parallel.processes(cleaning.chunk_passer, data.cleaning.to_json(),
                          workers if data.cleaning.steps else 1) as run:
    if state := _left(data, staging):
      logging.info('%s: going on after %d documents of an interrupted call', staging,
                   state['texts'])
      tokenizer = tokenizers.from_files(tokenizers.read_directory(staging / 'tokenizer'))
    else:
      shutil.rmtree(staging, ignore_errors=True)
      staging.mkdir()
      state = {'ends': texts_lib.too_few(data, run), 'texts': 0, 'splits': {}}
      counts: Counters = [Counter() for _ in sources]
      texts = texts_lib.texts(data, run, state['ends'], counts)
      if config.trained and data.cleaning.steps:
        texts = texts_lib.kept(texts, counts, staging)
      tokenizer = tokenizers.train_or_load(config, (
        text.text for text in _shown('tokenizer', texts, sizes, progress and config.trained)
        if text.split == 'train'))
      tokenizers.save(tokenizer, staging / 'tokenizer')

    counts = [Counter() for _ in sources]
    writers = {name: shards.SplitWriter(staging, name, data, tokenizer.vocab_size,
                                         state['splits'].get(name, {})) for name in data.splits}
    texts = (texts_lib.kept_before(staging, counts) if (staging / texts_lib.CLEANED).is_file() else
             texts_lib.texts(data, run, state['ends'], counts))
    texts = _shown('records', texts, sizes, progress)
    _pack(texts, tokenizer, data, writers, staging, state, workers)
  (staging / texts_lib.CLEANED).unlink(missing_ok=True)
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
    version=records.VERSION, fingerprint=fingerprint, data=data, tokenizer=config,
    tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
    sources=sources, train=splits['train'], validation=splits.get('validation'), ends=ends,
  )


def _pack(
  texts: Iterator[Text], tokenizer: Tokenizer, data: DataConfig,
  writers: Mapping[str, shards.SplitWriter], staging: pathlib.Path, state: Mapping[str, Any],
  workers: int | None,
) -> None:
  """Tokenize texts, pack and write them, and every few seconds what an interrupted call needs."""
  # What an interrupted call has written is cleaned again, for the counts, and no more.
  rest, saved = itertools.islice(texts, state['texts'], None), time.monotonic()
  with parallel.processes(tokenizers.id_packer, str(staging / 'tokenizer'), workers,
                          tokenizers.pack_ids(tokenizer)) as run:
    for number, tokens in enumerate(
        shards.tokenize(rest, tokenizer, data, run), state['texts'] + 1):
      writers[tokens.split].add(tokens)
      if time.monotonic() - saved >= _SAVE_SECONDS:
        storage.write_json(staging / _STATE, {**state, 'texts': number, 'splits': {
          name: writer.state() for name, writer in writers.items()}})
        for writer in writers.values():
          writer.saved()
        saved = time.monotonic()


def _left(data: DataConfig, staging: pathlib.Path) -> dict[str, Any]:
  """Return the state that an interrupted call has left; {}: none, or not all that belongs to it."""
  state = storage.read_json(staging / _STATE)
  for name in data.splits if state else ():
    of = state['splits'][name]
    for kind, size in of['bytes'].items():
      path = shards.open_path(staging, name, len(of['shards']) - 1, kind)
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
    def say(number: int) -> None:
      if show:
        rate = number / (bar.format_dict['elapsed'] + 1e-9)
        bar.set_postfix_str(f'{number:,} documents, {rate:,.0f}/s', refresh=False)

    number = 0
    for number, text in enumerate(texts, 1):
      yield text
      bar.update(len(text.text.encode()))
      if number % 256 == 0:
        say(number)
    say(number)
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
