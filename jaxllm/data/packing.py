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

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
  weights_BT = is_target(segments_BS).astype(np.float32)
  if 'weights' in (records.dtype.names or ()):
    weights_BT *= records['weights'][:, 1:]
  return {
    'tokens': tokens_BS[:, :-1],
    'targets': tokens_BS[:, 1:],
    'weights': weights_BT,
    'segment_ids': segments_BT,
    'positions': np.where(segments_BT > 0, index_BT - start_BT, 0).astype(np.int32),
  }


def is_target(segments_BS: np.ndarray) -> np.ndarray:
  """Return which of all tokens (..., S) but the first have weight as targets, (..., S - 1)."""
  return (segments_BS[..., 1:] == segments_BS[..., :-1]) & (segments_BS[..., 1:] > 0)
