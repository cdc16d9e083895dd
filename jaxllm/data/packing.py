"""Token sequences into records of one fixed size, and records into batch arrays.

A record holds `context_length + 1` tokens; inputs are all but the last, targets all but the first.
Where a sequence goes on in another record, that one begins with the last token again: it was only a
target before. So every token but the first of a sequence is a target exactly once, wherever records
end. A piece in a new record starts at position 0 and sees nothing of what came before.

- `PACKERS` lists the policies; each is made with a `record_dtype` and the records that are `open`,
  takes sequences by `add` and gives records, the last ones at `finish`.
- `pack` lays short sequences whose tokens have weights, all of them at hand, into records.
- `batch_arrays` decodes records: rows of a structured array, so that a batch is one call.

Axes: S = T + 1 stored tokens.
"""

import base64
import bisect
import collections
import errno
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxllm import storage
from jaxllm.data import lineage, parallel
from jaxllm.data.tokenizers import Tokenizer

_OPEN_RECORDS = 64


def record_dtype(context_length: int, vocab_size: int, weights: bool = False) -> np.dtype:
  """Return the layout of a record: S `tokens`, S `segment_ids` (0 = padding), perhaps `weights`."""
  width = context_length + 1
  token = '<u2' if vocab_size <= 2**16 else '<u4'
  segment = '<u2' if width < 2**16 else '<u4'
  fields = [('tokens', token, (width,)), ('segment_ids', segment, (width,))]
  return np.dtype([*fields, ('weights', '<f4', (width,))] if weights else fields)


class Record:
  """A record that is being filled from the left; of two with equal room the first number leads.

  Attributes:
    row: its content.
    pieces: where its tokens come from, as `lineage.PIECE` without the first field.
  """

  def __init__(self, dtype: np.dtype, number: int = 0, row: Any = None, pieces: Any = ()):
    self.row = np.zeros((), dtype) if row is None else row
    self.pieces: list[tuple[int, int, int, int]] = [*map(tuple, pieces)]
    self.room = int((self.row['segment_ids'] == 0).sum())
    self.segment = int(self.row['segment_ids'].max())
    self.number = number

  def put(
    self, tokens: npt.ArrayLike, new_segment: bool, origin: tuple[int, int, int] | None = None,
    weights: npt.ArrayLike = (),
  ) -> None:
    """Append tokens; `origin` are source, document and token that the first of them is."""
    self.segment += new_segment
    start, count = self.row['tokens'].size - self.room, np.size(tokens)
    span = slice(start, start + count)
    self.row['tokens'][span], self.row['segment_ids'][span] = tokens, self.segment
    if np.size(weights):
      self.row['weights'][span] = weights
    if origin and count and not (self.pieces and self._origin(start) == origin):
      self.pieces.append((start, *origin))
    self.room -= count

  def _origin(self, place: int) -> tuple[int, int, int]:
    """Return the source, document and token of a place, if the last piece goes on to there."""
    start, source, document, token = self.pieces[-1]
    return source, document, token + place - start

  def repeat(self, full: 'Record') -> None:
    """Begin with the last token of a full record."""
    size = self.row['tokens'].size
    self.put(full.row['tokens'][-1:], True, full._origin(size - 1))

  def sizes(self) -> np.ndarray:
    """Return how many tokens each piece has."""
    return np.diff([*(start for start, *_ in self.pieces), self.row['tokens'].size - self.room])


def fill(dtype: np.dtype, tokens: np.ndarray, sizes: np.ndarray, joined: bool) -> np.ndarray:
  """Return the record of these tokens; each piece of it is a segment, if not all are `joined`."""
  row = np.zeros((), dtype)
  row['tokens'][: len(tokens)] = tokens
  row['segment_ids'][: len(tokens)] = 1 if joined else np.repeat(
    np.arange(1, len(sizes) + 1), sizes)
  return row


class EndToEnd:
  """Lay sequences end to end and cut wherever a record is full; only the last record has padding.

  Args:
    dtype: from `record_dtype`.
    joined: make all sequences one, without segment borders; else each is its own segment.
    open: the record that is not full, if any.
  """

  def __init__(self, dtype: np.dtype, joined: bool, open: Sequence[Record] = ()):
    self._dtype, self._joined = dtype, joined
    self.open = [*open] or [Record(dtype)]

  def add(self, tokens: np.ndarray, source: int = 0, document: int = 0) -> Iterator[Record]:
    """Append a sequence (1-D, at least one token); yield the records that became full."""
    begins, done = not (self._joined and self.open[0].segment), 0
    if begins and self.open[0].room < 2:  # One token alone would have no target.
      yield self._next()
    while True:
      piece = tokens[done : done + self.open[0].room]
      self.open[0].put(piece, begins, (source, document, done))
      done += len(piece)
      if done == len(tokens):
        return
      full = self._next()
      yield full
      self.open[0].repeat(full)
      begins = False

  def finish(self) -> Iterator[Record]:
    """Yield the record that is not full, if it holds a target; a token alone stays in `open`."""
    if self.open[0].room < self.open[0].row['tokens'].size - 1:
      yield self._next()

  def _next(self) -> Record:
    full, self.open[0] = self.open[0], Record(self._dtype)
    return full


class BestFit:
  """Put each sequence whole into the fullest open record that has room for it.

  Only sequences longer than a record are cut, into full records and a rest. What finds no room is
  left as padding. At most `limit` records are kept open, so that sequences stream; with 0 no
  sequence shares a record with another.

  Reference: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830, where all
  records are open.
  """

  def __init__(self, dtype: np.dtype, open: Sequence[Record] = (), limit: int = _OPEN_RECORDS):
    self._dtype, self._limit = dtype, limit
    self.open = [*open]  # Sorted by room.

  def add(self, tokens: np.ndarray, source: int = 0, document: int = 0) -> Iterator[Record]:
    """Place a sequence (1-D, at least one token); yield the records that became full."""
    width, done = self._dtype['tokens'].shape[0], 0
    while len(tokens) - done > width:
      record = Record(self._dtype)
      record.put(tokens[done : done + width], True, (source, document, done))
      yield record
      done += width - 1
    record = _take(self.open, len(tokens) - done) or Record(self._dtype)
    record.put(tokens[done:], True, (source, document, done))
    if record.room < 2:
      yield record
      return
    _keep(self.open, record)
    if len(self.open) > self._limit:
      yield self.open.pop(0)

  def finish(self) -> Iterator[Record]:
    """Yield the records that are still open."""
    while self.open:
      yield self.open.pop(0)


def _take(records: list[Record], size: int) -> Record | None:
  """Remove the fullest record that has room for `size` tokens."""
  at = bisect.bisect_left(records, size, key=lambda record: record.room)
  return records.pop(at) if at < len(records) else None


def _keep(records: list[Record], record: Record) -> None:
  bisect.insort(records, record, key=lambda record: (record.room, record.number))


def pack(
  sequences: Sequence[tuple[Sequence[int], Sequence[float]]], context_length: int, vocab_size: int,
  together: bool = True,
) -> np.ndarray:
  """Return records with weights of whole sequences, each a segment that sees nothing else.

  Longest first, each into the fullest record that still has room for it. Records that sequences
  share are then shuffled, always alike: else the first ones would hold the longest sequences.

  Args:
    sequences: (ids, weight of each as a target), none longer than T + 1.
    context_length: T.
    vocab_size: ids are below it.
    together: whether sequences share records.

  Raises:
    ValueError: a sequence is too long, or an id is not in the vocabulary.

  Reference:
    Best-fit decreasing: Johnson et al., Worst-Case Performance Bounds for Simple One-Dimensional
    Packing Algorithms, 1974.
  """
  dtype = record_dtype(context_length, vocab_size, weights=True)
  records: list[Record] = []
  unfilled: list[Record] = []
  for ids, weights in sorted(sequences, key=lambda one: -len(one[0])) if together else sequences:
    if len(ids) > context_length + 1:
      raise ValueError(f'a sequence of {len(ids)} tokens does not fit a record of '
                       f'{context_length + 1}')
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
      raise ValueError(f'token ids {min(ids)} to {max(ids)} are not all in the vocabulary '
                       f'(0 to {vocab_size - 1})')
    record = _take(unfilled, len(ids)) if together else None
    if record is None:
      record = Record(dtype, len(records))
      records.append(record)
    record.put(ids, True, weights=weights)
    _keep(unfilled, record)
  rows = np.zeros(len(records), dtype)
  for i, record in enumerate(records):
    rows[i] = record.row
  return np.random.default_rng(0).permutation(rows) if together else rows


PACKERS: dict[str, Callable[[np.dtype, Sequence[Record]], EndToEnd | BestFit]] = {
  'packed': lambda dtype, open: EndToEnd(dtype, False, open),
  'best_fit': BestFit,
  'concat': lambda dtype, open: EndToEnd(dtype, True, open),
  'one_document': lambda dtype, open: BestFit(dtype, open, 0),
}


def batch_arrays(records: np.ndarray) -> dict[str, np.ndarray]:
  """Decode records.

  Args:
    records: (B,) of a `record_dtype`.

  Returns:
    `tokens`, `targets`, `segment_ids` (0 = padding) and `positions` (from 0 in each segment), all
    (B, T) int32; `weights` (B, T) float32, where the target belongs to the segment of its input:
    1, or the weight that the record has.
  """
  tokens_BS = records['tokens'].astype(np.int32)
  segments_BS = records['segment_ids'].astype(np.int32)
  segments_BT = segments_BS[:, :-1]
  index_BT = np.broadcast_to(np.arange(segments_BT.shape[1], dtype=np.int32), segments_BT.shape)
  begins_BT = np.diff(segments_BT, axis=1, prepend=-1) != 0
  start_BT = np.maximum.accumulate(np.where(begins_BT, index_BT, 0), axis=1)
  weights_BT = _is_target(segments_BS).astype(np.float32)
  if 'weights' in (records.dtype.names or ()):
    weights_BT *= records['weights'][:, 1:]
  return {
    'tokens': tokens_BS[:, :-1],
    'targets': tokens_BS[:, 1:],
    'weights': weights_BT,
    'segment_ids': segments_BT,
    'positions': np.where(segments_BT > 0, index_BT - start_BT, 0).astype(np.int32),
  }


def _is_target(segments_BS: np.ndarray) -> np.ndarray:
  return (segments_BS[..., 1:] == segments_BS[..., :-1]) & (segments_BS[..., 1:] > 0)


_SHARD_TOKENS = 2**26
_KINDS = ('rows', 'pieces')
GROUP_CHARACTERS = 2**20


class Text(NamedTuple):
  """A document, or a part of it, on its way into the records of a split.

  Attributes:
    split: 'train' or 'validation'.
    text: cleaned.
    source: which source it is of, from 0.
    document: which document of that, dropped ones counted, from 0.
  """

  split: str
  text: str
  source: int
  document: int


class Tokens(NamedTuple):
  """A `Text` as tokens.

  Attributes:
    ids: BOS and EOS included where they are wanted.
    text_bytes: size of the text.
    first_bytes: how many of them the first token stands for.
  """

  split: str
  ids: np.ndarray
  source: int
  document: int
  text_bytes: int
  first_bytes: int


def tokenize(
  texts: Iterable[Text], tokenizer: Tokenizer, data: Any,
  run: Callable[[Iterable[list[str]]], Iterable[list[bytes]]],
) -> Iterator[Tokens]:
  """Yield the tokens of each text, with BOS and EOS as `data` says; refuse unknown ids.

  `run` gives the ids of many groups of texts, as bytes of <u4.
  """
  groups: collections.deque[list[Text]] = collections.deque()

  def begun() -> Iterator[list[str]]:
    for group in parallel.grouped(texts, lambda text: len(text.text), GROUP_CHARACTERS):
      groups.append(group)
      yield [text.text for text in group]

  prefix, suffix = (np.array(some, np.int64) for some in borders(tokenizer, data))
  for several in run(begun()):
    for text, content in zip(groups.popleft(), several, strict=True):
      ids = np.concatenate([prefix, np.frombuffer(content, '<u4'), suffix])
      if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise ValueError(f'the tokenizer gave ids {ids.min()} to {ids.max()}, outside its '
                         f'vocabulary of {tokenizer.vocab_size}')
      first = len(tokenizer.id_bytes[ids[0]]) if len(ids) else 0
      yield Tokens(text.split, ids, text.source, text.document, len(text.text.encode()), first)


def write_shard(
  paths: tuple[pathlib.Path, pathlib.Path], rows: Iterable[bytes], pieces: np.ndarray
) -> None:
  """Write the records of a shard and their lineage into local files; an OSError says why not."""
  from array_record.python import array_record_module
  try:
    for path, entries in zip(paths, (rows, lineage.blocks(pieces)), strict=True):
      writer: Any = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for entry in entries:
        writer.write(entry)
      writer.close()
  except RuntimeError as error:  # How the library reports every failure of the file system.
    code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
                 if os.strerror(code) in str(error)), errno.EIO)
    raise OSError(code, os.strerror(code)) from error


def open_path(directory: pathlib.Path, name: str, index: int, kind: str) -> pathlib.Path:
  """Return the file of the plain bytes of a shard that is not full, one of `_KINDS`."""
  return directory / f'{name}-{index:05d}.{kind}'


def paths_of_shard(
  directory: pathlib.Path, name: str, index: int
) -> tuple[pathlib.Path, pathlib.Path]:
  """Return the files of a shard: its records, and their lineage."""
  path = directory / f'{name}-{index:05d}.array_record'
  return path, path.with_suffix('.lineage')


class SplitPacker:
  """Packs the documents of a split into records, and counts what goes into them.

  Which tokens go where depends on lengths alone: other tokens of the same lengths give records with
  the same pieces, which `fill` can then make those of the documents.

  Args:
    data: packing, context length and the sources, of which none shares a record if they are mixed.
    vocab_size: ids are below it.
    state: what to go on from, of `state`.

  Attributes:
    shard_records: how many records a shard holds, but for the last one.
  """

  def __init__(self, data: Any, vocab_size: int, state: Mapping[str, Any] = MappingProxyType({})):
    dtype = record_dtype(data.context_length, vocab_size)
    self.shard_records = max(1, _SHARD_TOKENS // data.context_length)
    self._policy, self._mixed, self._source = data.packing, data.mixed, state.get('source')
    self._make_packer = functools.partial(PACKERS[data.packing], dtype)
    self._packer = self._make_packer([
      Record(dtype, row=np.frombuffer(base64.b64decode(row), dtype)[0].copy(), pieces=pieces)
      for row, pieces in state.get('open', ())])
    sources = len((*data.sources, *data.own_validation))
    self._records, self._tokens = ([*state.get(name, [0] * sources)]
                                   for name in ('source_records', 'source_tokens'))
    self._counts = collections.Counter(state.get('counts') or dict.fromkeys(
      ('documents', 'tokens', 'target_tokens', 'text_bytes', 'target_bytes', 'dropped_tokens'), 0))

  def add(self, tokens: Tokens) -> Iterator[Record]:
    """Append a document; yield the records that became full."""
    size = len(tokens.ids)
    if not size:
      return
    if self._mixed and self._source not in (None, tokens.source):
      yield from self.finish()
    self._source = tokens.source
    # Nothing predicts the first token.
    first = not (self._policy == 'concat' and self._packer.open[0].segment)
    self._counts.update(documents=1, tokens=size, text_bytes=tokens.text_bytes,
                        target_bytes=tokens.text_bytes - first * tokens.first_bytes)
    self._tokens[tokens.source] += size
    if size == 1 and self._policy == 'one_document':
      self._counts['dropped_tokens'] += 1
      return
    yield from self._counted(self._packer.add(tokens.ids, tokens.source, tokens.document))

  def finish(self) -> Iterator[Record]:
    """Yield the records that are left, but for a token alone, and begin anew."""
    yield from self._counted(self._packer.finish())
    self._counts['dropped_tokens'] += sum(
      int((record.row['segment_ids'] > 0).sum()) for record in self._packer.open)
    self._packer = self._make_packer([])

  def _counted(self, records: Iterable[Record]) -> Iterator[Record]:
    for record in records:
      self._counts['target_tokens'] += int(_is_target(record.row['segment_ids']).sum())
      self._records[record.pieces[0][1]] += 1
      yield record

  def counts(self) -> dict[str, Any]:
    """Return the counts of all documents and records so far, as fields of `records.Split`."""
    return {**self._counts, 'source_tokens': tuple(self._tokens),
            'source_records': tuple(self._records) if self._mixed else ()}

  def state(self) -> dict[str, Any]:
    """Return what another packer can go on from, JSON-able."""
    return {'counts': self._counts, 'source': self._source, 'source_records': self._records,
            'source_tokens': self._tokens, 'open': [
              (base64.b64encode(record.row.tobytes()).decode(), record.pieces)
              for record in self._packer.open]}


class SplitWriter:
  """Packs one split and writes it into `NAME-00000.array_record`, `-00001` and so on.

  Until its shard is full, a record lies in a file of plain bytes, its pieces in another: these can
  be cut to a known size, so that a killed process goes on from `state`.

  Args:
    directory: where the shards go.
    name: of the split.
    data: as of `SplitPacker`, and
    vocab_size: too.
    state: what to go on from, of `state`.
  """

  def __init__(
    self, directory: pathlib.Path, name: str, data: Any, vocab_size: int,
    state: Mapping[str, Any] = MappingProxyType({}),
  ):
    self._directory, self._name = directory, name
    self._packer = SplitPacker(data, vocab_size, state)
    self._shards: list[int] = [*state.get('shards', [0])]
    self._files = [self._io(self._open, kind, size) for kind, size in state.get(
      'bytes', dict.fromkeys(_KINDS, 0)).items()]

  def add(self, tokens: Tokens) -> None:
    """Append a document."""
    self._write(self._packer.add(tokens))

  def state(self) -> dict[str, Any]:
    """Return what another writer can go on from, JSON-able, once it is all on the disk."""
    for file in self._files:
      self._io(file.flush)
      self._io(os.fsync, file.fileno())
    sizes = (file.tell() for file in self._files)
    return {'shards': self._shards, 'bytes': dict(zip(_KINDS, sizes, strict=True)),
            **self._packer.state()}

  def saved(self, last: int | None = -1) -> None:
    """Remove what nothing goes on from any more, now that the last state is kept."""
    for shard in range(len(self._shards))[:last]:
      for kind in _KINDS:
        open_path(self._directory, self._name, shard, kind).unlink(missing_ok=True)

  def finish(self) -> dict[str, Any]:
    """Write what is left and return the counts, as fields of `records.Split`."""
    self._write(self._packer.finish())
    if self._shards[-1]:
      self._io(self._end_shard)
    self.saved(None)
    shards = tuple(filter(None, self._shards))
    files = [paths_of_shard(self._directory, self._name, i) for i in range(len(shards))]
    sha256, lineage_sha256 = (
      tuple(storage.file_digest(paths[kind], {}) for paths in files) for kind in (0, 1))
    return {**self._packer.counts(), 'records': sum(shards), 'shards': shards, 'sha256': sha256,
            'lineage_sha256': lineage_sha256}

  def _write(self, records: Iterator[Record]) -> None:
    for record in records:
      if self._shards[-1] == self._packer.shard_records:
        self._io(self._end_shard)
        self._shards.append(0)
        self._files = [self._io(self._open, kind, 0) for kind in _KINDS]
      pieces = np.array([(self._shards[-1], *piece) for piece in record.pieces], lineage.PIECE)
      for file, content in zip(self._files, (record.row, pieces), strict=True):
        self._io(file.write, content.tobytes())
      self._shards[-1] += 1

  def _open(self, kind: str, size: int) -> Any:
    path = open_path(self._directory, self._name, len(self._shards) - 1, kind)
    file = path.open('r+b' if size else 'w+b')
    file.truncate(size)
    file.seek(size)
    return file

  def _end_shard(self) -> None:
    rows, pieces = self._files
    pieces.flush()
    size = rows.tell() // self._shards[-1]
    rows.seek(0)
    write_shard(paths_of_shard(self._directory, self._name, len(self._shards) - 1),
                iter(lambda: rows.read(size), b''), np.memmap(pieces, lineage.PIECE, 'r'))
    rows.close()
    pieces.close()

  def _io(self, call: Callable[..., Any], *args: Any) -> Any:
    with storage.explained(self._directory):
      return call(*args)


def borders(tokenizer: Tokenizer, data: Any) -> tuple[list[int], list[int]]:
  """Return the ids before and after each document; refuse a tokenizer that lacks those wanted."""
  return (_border(tokenizer.bos_id, 'bos') if data.add_bos else [],
          _border(tokenizer.eos_id, 'eos') if data.add_eos else [])


def _border(token_id: int | None, name: str) -> list[int]:
  if token_id is None:
    raise ValueError(f'config.data.add_{name}=True, but the tokenizer has no {name.upper()}: set '
                     f"it to False, or (kind='json') name it in config.tokenizer.{name}_token")
  return [token_id]
