"""Records made on a cluster: one Apache Beam pipeline of the functions that one machine uses.

`write` does what `preparing.prepare` does itself, on any runner of Beam, and gives the same bytes.
What travels are blocks: documents of one part of a source that follow each other.

- Parts are read and cleaned in parallel; duplicates are found by the keys that they share.
- The tokenizer is made once, of a sample of all texts.
- Packing needs the lengths of the documents in order, and nothing else. One worker for each split
  runs the packer on them; the plan of a shard and its tokens go to whoever writes it.
"""

import argparse
import collections
import functools
import itertools
import logging
import re
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm import mistakes, storage
from jaxllm.data import (
  cleaning,
  documents,
  duplicates,
  lineage,
  packing,
  preparing,
  records,
  tokenizers,
)
from jaxllm.data import shards as shards_lib
from jaxllm.data import texts as texts_lib
from jaxllm.data.documents import SourceCounts
from jaxllm.data.parallel import grouped
from jaxllm.data.records import DataConfig, Manifest
from jaxllm.data.shards import Text
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig

_RESULT = 'result.json'
_REFUSED = ('<<refused: ', ' :refused>>')

# A block of numbered texts, or of `Text`s, by the source, part and document with which it begins;
# what CoGroupByKey makes of several collections.
_Block = tuple[tuple[int, int, int], Sequence[Any]]
_Joined = tuple[Any, Mapping[str, Any]]
# The documents of a block as tokens; tokens that make a piece of a shard.
_SIZES = np.dtype([('document', '<u8'), ('size', '<u8'), ('text_bytes', '<u8'),
                   ('first_bytes', '<u4'), ('split', 'u1')])
_SPANS = np.dtype([('piece', '<u8'), ('document', '<u8'), ('start', '<u8'), ('size', '<u8')])


def options(runner: str, flags: Sequence[str], others: Iterable[str] = ()) -> Any:
  """Return the options of a Beam pipeline; refuse unknown flags, with the nearest of `others` too.

  Raises:
    ValueError: there is no such flag, or a value is not accepted.
    ImportError: Beam is not installed.
  """
  try:
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise ImportError(
      f"--runner={runner} needs Apache Beam ({error}): pip install 'jaxllm[beam]' in an "
      'environment of its own, of Python 3.11 to 3.13') from None
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  for kind in pipeline_options.PipelineOptions.__subclasses__():
    kind._add_argparse_args(parser)
  try:
    _, unknown = parser.parse_known_args([*flags])
  except argparse.ArgumentError as error:
    raise ValueError(f'Apache Beam: {error}') from None
  if unknown:
    name, names = unknown[0].partition('=')[0], [*others, *parser._option_string_actions]
    raise ValueError(f'{name}: neither this program nor Apache Beam has such a flag'
                     f'{mistakes.hint(name, names)}')
  return pipeline_options.PipelineOptions([f'--runner={runner}', *flags])


def write(
  data: DataConfig, config: TokenizerConfig, staging: Any, sources: Sequence[SourceCounts],
  fingerprint: str, options: Any,
) -> Manifest:
  """Make records in `staging`, a path that all workers reach; `options` are those of Beam.

  Raises:
    ValueError: what a worker, or Beam itself, refuses.
  """
  import apache_beam as beam

  for handler in logging.getLogger().handlers:  # What is refused is said below, in one sentence.
    handler.addFilter(lambda record: _REFUSED[0] not in record.getMessage())
  storage.remove(staging)
  staging.mkdir(parents=True)
  try:
    with beam.Pipeline(options=options) as pipeline:
      _build(pipeline, data, config, staging)
  except Exception as error:
    if said := re.search(rf'{_REFUSED[0]}(.*?){_REFUSED[1]}', str(error), re.DOTALL):
      raise ValueError(said[1]) from None
    if 'apache_beam' in traceback.extract_tb(error.__traceback__)[-1].filename and (
        '[while running' not in str(error)):
      raise ValueError(f'Apache Beam: {error}') from None
    raise
  found: dict[str, dict[Any, Any]] = collections.defaultdict(dict)
  for kind, key, value in storage.read_json(staging / _RESULT, needed=True)['found']:
    found[kind][key] = value
  (staging / _RESULT).unlink()
  splits = {}
  for name in data.splits:
    shards = tuple(zip(*(one for _, one in sorted(found[name].items())), strict=True))
    splits[name] = records.Split(
      **found['split'].get(name) or shards_lib.SplitPacker(data, 1).counts(),
      **dict(zip(('shards', 'sha256', 'lineage_sha256'), shards or ((), (), ()), strict=True)),
      records=sum(shards[0]) if shards else 0)
  counts = [found['source'].get(number, {}) for number in range(len(sources))]
  return preparing.finished(data, config, tokenizers.load(staging / 'tokenizer'), fingerprint,
                          sources, counts, splits, _are_ends(data, found['side']))


def _build(pipeline: Any, data: DataConfig, config: TokenizerConfig, staging: Any) -> None:
  import apache_beam as beam

  readers = [(number, part, read)
             for number, source in enumerate((*data.sources, *data.own_validation))
             for part, read in enumerate(documents.parts(source))]
  blocks, sizes = (pipeline | beam.Create(readers) | beam.Reshuffle()
                   | beam.FlatMap(_read).with_outputs('sizes', main='blocks'))
  held_out: Any = frozenset()
  if texts_lib.from_same_files(data):
    held_out = beam.pvalue.AsSingleton(
      blocks | beam.FlatMap(_held_out, data) | beam.combiners.ToSet())
  counts = []
  for number, stage in enumerate(cleaning.stages(data.cleaning)):
    blocks, found, keys = (blocks | f'clean {number}' >> beam.FlatMap(
      _cleaned, data, number, held_out).with_outputs('counts', 'keys', main='blocks'))
    counts.append(found)
    if stage.name:
      lost = _lost(keys, f'{number}', stage.name == 'near_duplicates' and data.cleaning.similarity)
      blocks = {'blocks': blocks, 'lost': lost} | f'join {number}' >> beam.CoGroupByKey()
  sides = blocks | beam.FlatMap(_sides, data) | beam.combiners.Count.PerElement()
  texts = blocks | beam.FlatMap(_divided, data, beam.pvalue.AsDict(sides))
  given = None if config.trained else dict(tokenizers.train_or_load(config, ()).files())
  files = beam.pvalue.AsSingleton(
    texts | beam.FlatMap(_sampled, config) | beam.CombineGlobally(functools.partial(
      tokenizers.join_samples, limit=config.sample_bytes))
    | beam.FlatMap(_tokenizer_files, config, given, staging))
  offsets = beam.pvalue.AsSingleton(sizes | 'parts' >> beam.combiners.ToList() | beam.Map(_offsets))
  tokens, sizes = (texts | beam.FlatMap(_tokenized, data, files, offsets)
                   .with_outputs('sizes', main='tokens'))
  plans, spans, splits = (sizes | 'of splits' >> beam.GroupByKey() | beam.FlatMap(
    _planned, data).with_outputs('spans', 'splits', main='plans'))
  pieces = ({'tokens': tokens, 'spans': spans} | 'of blocks' >> beam.CoGroupByKey()
            | beam.FlatMap(_routed))
  shards = ({'pieces': pieces, 'plans': plans} | 'of shards' >> beam.CoGroupByKey()
            | beam.FlatMap(_written, data, files, staging))
  counts = counts | 'counts' >> beam.Flatten() | beam.CombinePerKey(_added)
  named = [some | name >> beam.MapTuple(lambda key, value, name=name: (name, key, value))
           for name, some in (('source', counts), ('side', sides), ('split', splits))]
  ([*named, shards] | 'found' >> beam.Flatten() | beam.combiners.ToList()
   | beam.Map(_report, staging))


def _refusing(function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
  """Mark a refusal, so that it is found again in what a runner says of an error."""
  @functools.wraps(function)
  def run(*arguments: Any, **options: Any) -> Iterator[Any]:
    try:
      yield from function(*arguments, **options)
    except Exception as error:
      if (text := mistakes.sentence(error)) is None:
        raise
      raise RuntimeError(text.join(_REFUSED)) from error

  return run


def _tagged(tag: str, value: Any) -> Any:
  from apache_beam import pvalue
  return pvalue.TaggedOutput(tag, value)


@_refusing
def _read(item: tuple[int, int, Callable[[], Iterator[tuple[str, Any]]]]) -> Iterator[Any]:
  """Yield the blocks of a part; texts have the numbers of their documents in it."""
  source, part, read = item
  size = 0
  for texts in grouped((text for text, _ in read()), len, shards_lib.GROUP_CHARACTERS):
    yield (source, part, size), {'blocks': [[*enumerate(texts, size)]], 'lost': []}
    size += len(texts)
  yield _tagged('sizes', (source, part, size))


def _offsets(sizes: Iterable[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
  """Return the number of the first document of each part in its source."""
  found: dict[tuple[int, int], int] = {}
  total: Counter[int] = Counter()
  for source, part, size in sorted(sizes):
    found[source, part] = total[source]
    total[source] += size
  return found


_stages = functools.lru_cache(maxsize=4)(cleaning.stages)


@_refusing
def _held_out(item: _Joined, data: DataConfig) -> Iterator[bytes]:
  """Yield the digests of texts of sources of their own for validation."""
  place, found = item
  for _, text in found['blocks'][0] if place[0] >= len(data.sources) else ():
    *_, (cleaned, _, _) = cleaning.passed(_stages(data.cleaning), text)
    if cleaned:
      yield duplicates.digest(cleaned)


@_refusing
def _cleaned(
  item: _Joined, data: DataConfig, number: int, held_out: Collection[bytes]
) -> Iterator[Any]:
  """Drop what the comparison before this stage has lost, and run the stage."""
  place, found = item
  (texts,), lost, stages = found['blocks'], {*found['lost']}, _stages(data.cleaning)
  stage, kept, counts = stages[number], [], Counter[str]()
  if not number:
    counts.update(documents=len(texts), dropped=0, characters=sum(len(text) for _, text in texts))
  checked = held_out if not number and place[0] < len(data.sources) else ()
  for document, text in texts:
    if document in lost:
      name = stages[number - 1].name
      counts.update({'dropped': 1, f'{name}.dropped': 1, f'{name}.characters': len(text)})
      continue
    if checked and (steps := texts_lib.dropped_as_held_out(
        [*cleaning.passed(stages, text)], checked)):
      counts.update(steps, dropped=1)
      continue
    cleaned, steps = stage.clean(text)
    counts.update(steps, dropped=cleaned is None)
    if cleaned is not None:
      kept.append((document, cleaned))
      if stage.comparison and (key := stage.comparison.key(cleaned)) is not None:
        yield _tagged('keys', (key, (place, document)))
  yield _tagged('counts', (place[0], dict(counts)))
  yield place, kept


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
  total: Counter[str] = Counter()
  for one in counts:
    total.update(one)
  return dict(total)


def _lost(keys: Any, name: str, similarity: float) -> Any:
  """Return place and document of all that are like one kept before, by equal keys or near ones."""
  import apache_beam as beam

  same = keys | f'same {name}' >> beam.GroupByKey()
  later = same | f'later {name}' >> beam.FlatMap(lambda group: sorted(group[1])[1:])
  if not similarity:
    return later
  first = same | f'first {name}' >> beam.MapTuple(lambda own, places: (min(places), own))
  near = (first | f'bands {name}' >> beam.FlatMap(
            lambda one: ((band, one) for band in duplicates.bands(one[1])))
          | f'buckets {name}' >> beam.GroupByKey()
          | f'pairs {name}' >> beam.FlatMap(
            lambda bucket: duplicates.pairs(sorted(bucket[1]), similarity))
          | f'all pairs {name}' >> beam.combiners.ToList()
          | f'near {name}' >> beam.FlatMap(duplicates.dropped))
  return (near, later) | f'lost {name}' >> beam.Flatten()


def _sides(block: _Block, data: DataConfig) -> Iterator[str]:
  """Yield the split of each text, if it is held out whole or not at all."""
  for _, text in block[1]:
    yield next(texts_lib.parts(data, Text('train', text, 0, 0), False)).split


def _are_ends(data: DataConfig, sides: Mapping[str, int]) -> bool:
  return isinstance(data.validation, float) and len(sides) < 2


def _divided(block: _Block, data: DataConfig, sides: Mapping[str, int]) -> Iterator[_Block]:
  """Yield a block as parts of its texts, by the numbers of their documents in the part."""
  (source, *_), texts = block
  split, ends = 'train' if source < len(data.sources) else 'validation', _are_ends(data, sides)
  yield block[0], [part for document, text in texts
                   for part in texts_lib.parts(data, Text(split, text, source, document), ends)]


def _sampled(block: _Block, config: TokenizerConfig) -> Iterator[tokenizers.Sample]:
  if config.trained:
    yield tokenizers.sample(config, (((block[0], text.document), text.text) for text in block[1]
                                     if text.split == 'train'))


@_refusing
def _tokenizer_files(
  sample: tokenizers.Sample, config: TokenizerConfig, files: Any, staging: Any
) -> Iterator[Any]:
  made = tokenizers.from_files(files) if files else tokenizers.train_or_load(
    config, (chunk for *_, chunk in sample.kept))
  tokenizers.save(made, staging / 'tokenizer')
  yield tuple(made.files().items())


@functools.lru_cache(maxsize=2)
def _tokenizer(files: tuple[tuple[str, bytes], ...]) -> Tokenizer:
  return tokenizers.from_files(dict(files))


@_refusing
def _tokenized(
  block: _Block, data: DataConfig, files: Any, offsets: Mapping[tuple[int, int], int]
) -> Iterator[Any]:
  """Yield the tokens of a block by its source and first document, and their sizes by split."""
  (source, part, document), texts = block
  tokenizer, first = _tokenizer(files), offsets[source, part]
  ids, sizes = [], []
  dtype = packing.record_dtype(data.context_length, tokenizer.vocab_size)['tokens'].base
  run = functools.partial(map, tokenizers.pack_ids(tokenizer))
  for split, own, _, number, *counts in shards_lib.tokenize(texts, tokenizer, data, run):
    ids.append(own.astype(dtype).tobytes())
    sizes.append((first + number, len(own), *counts, data.splits.index(split)))
  key, table = (source, first + document), np.array(sizes, _SIZES)
  yield key, (table.tobytes(), b''.join(ids))
  for split in {*table['split'].tolist()}:
    yield _tagged('sizes', (split, (key, table[table['split'] == split].tobytes())))


@_refusing
def _planned(
  item: tuple[int, Iterable[tuple[tuple[int, int], bytes]]], data: DataConfig
) -> Iterator[Any]:
  """Yield the plan of each shard of a split, and which tokens of each block it needs."""
  split, blocks = item[0], sorted(item[1])
  starts = np.array([(source << 44) + document for (source, document), _ in blocks])
  packer, name = shards_lib.SplitPacker(data, 1), data.splits[split]

  def packed() -> Iterator[packing.Record]:
    for (source, _), content in blocks:
      for document, size, *count, _ in np.frombuffer(content, _SIZES).tolist():
        nothing = np.broadcast_to(np.uint16(0), size)
        yield from packer.add(shards_lib.Tokens(name, nothing, source, document, *count))
    yield from packer.finish()

  full = packed()
  for shard, some in enumerate(iter(lambda: [*itertools.islice(full, packer.shard_records)], [])):
    pieces = np.array([(number, *piece) for number, record in enumerate(some)
                       for piece in record.pieces], lineage.PIECE)
    sizes = np.concatenate([record.sizes() for record in some])
    yield (split, shard), (pieces.tobytes(), sizes.tobytes())
    block = np.searchsorted(
      starts, (pieces['source'].astype(np.int64) << 44) + pieces['document'].astype(np.int64),
      'right') - 1
    order = np.argsort(block, kind='stable')
    spans = np.zeros(len(order), _SPANS)
    for field, values in (('piece', order), ('document', pieces['document'][order]),
                          ('start', pieces['token'][order]), ('size', sizes[order])):
      spans[field] = values
    numbers, edges = np.unique(block[order], return_index=True)
    for number, own in zip(numbers.tolist(), np.split(spans, edges[1:]), strict=True):
      yield _tagged('spans', (blocks[number][0], (split, shard, own.tobytes())))
  yield _tagged('splits', (name, packer.counts()))


@_refusing
def _routed(item: _Joined) -> Iterator[Any]:
  """Yield the tokens of a block that each shard needs, by the pieces that they make."""
  for content, ids in item[1]['tokens']:
    table = np.frombuffer(content, _SIZES)
    width = len(ids) // max(1, int(table['size'].sum()))
    begins = np.cumsum(table['size']) - table['size']
    for split, shard, content in item[1]['spans']:
      spans = np.frombuffer(content, _SPANS)
      own = np.flatnonzero(table['split'] == split)
      own = own[np.searchsorted(table['document'][own], spans['document'])]
      first = (begins[own] + spans['start']) * width
      yield (split, shard), [
        (piece, ids[start : start + size]) for piece, start, size in zip(
          spans['piece'].tolist(), first.tolist(), (spans['size'] * width).tolist(), strict=True)]


@_refusing
def _written(item: _Joined, data: DataConfig, files: Any, staging: Any) -> Iterator[Any]:
  """Write a shard and its lineage; yield its records and digests."""
  (split, shard), found = item
  dtype = packing.record_dtype(data.context_length, _tokenizer(files).vocab_size)
  tokens = dict(itertools.chain.from_iterable(found['pieces']))
  (content, sizes), = found['plans']
  pieces = np.frombuffer(content, lineage.PIECE)
  _, edges = np.unique(pieces['record'], return_index=True)

  def rows() -> Iterator[bytes]:
    lengths = np.frombuffer(sizes, np.int64)
    for start, stop in itertools.pairwise([*edges.tolist(), len(pieces)]):
      ids = b''.join(tokens[piece] for piece in range(start, stop))
      yield packing.fill(dtype, np.frombuffer(ids, dtype['tokens'].base), lengths[start:stop],
                         data.packing == 'concat').tobytes()

  paths = shards_lib.paths_of_shard(staging, data.splits[split], shard)
  with storage.replaced(paths[0]) as first, storage.replaced(paths[1]) as second:
    shards_lib.write_shard((first, second), rows(), pieces)
    digests = [storage.file_digest(path, {}) for path in (first, second)]
  yield data.splits[split], shard, (len(edges), *digests)


def _report(found: list[Any], staging: Any) -> None:
  storage.write_json(staging / _RESULT, {'found': found})
