"""Token sequences into records of one fixed size, and records into batch arrays.

A record holds `context_length + 1` tokens; inputs are all but the last, targets all but the first.
Where a sequence goes on in another record, that one begins with the last token again: it was only a
target before. So every token but the first of a sequence is a target exactly once, wherever records
end. A piece in a new record starts at position 0 and sees nothing of what came before.

- `PACKERS` lists the policies; each is made with a `record_dtype`, takes sequences by `add` and
  gives records, the last ones at `finish`.
- `pack` lays short sequences whose tokens have weights, all of them at hand, into records.
- `batch_arrays` decodes records: rows of a structured array, so that a batch is one call.

Axes: S = T + 1 stored tokens.
"""

import bisect
import collections
import errno
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxllm import storage
from jaxllm.data import parallel
from jaxllm.data.tokenizers import Tokenizer

_OPEN_RECORDS = 64


def record_dtype(context_length: int, vocab_size: int, weights: bool = False) -> np.dtype:
  """Return the layout of a record: S `tokens`, S `segment_ids` (0 = padding), perhaps `weights`."""
  width = context_length + 1
  token = '<u2' if vocab_size <= 2**16 else '<u4'
  segment = '<u2' if width < 2**16 else '<u4'
  fields = [('tokens', token, (width,)), ('segment_ids', segment, (width,))]
  return np.dtype([*fields, ('weights', '<f4', (width,))] if weights else fields)


class _Record:
  """A record that is being filled from the left; of two with equal room the first number leads."""

  def __init__(self, dtype: np.dtype, number: int = 0):
    self.row = np.zeros((), dtype)
    self.room = self.row['tokens'].size
    self.segment = 0
    self.number = number

  def put(self, tokens: npt.ArrayLike, new_segment: bool, weights: npt.ArrayLike = ()) -> None:
    self.segment += new_segment
    start, count = self.row['tokens'].size - self.room, np.size(tokens)
    span = slice(start, start + count)
    self.row['tokens'][span], self.row['segment_ids'][span] = tokens, self.segment
    if np.size(weights):
      self.row['weights'][span] = weights
    self.room -= count


class EndToEnd:
  """Lay sequences end to end and cut wherever a record is full; only the last record has padding.

  Args:
    dtype: from `record_dtype`.
    joined: make all sequences one, without segment borders; else each is its own segment.
  """

  def __init__(self, dtype: np.dtype, joined: bool):
    self._dtype, self._joined = dtype, joined
    self._record = _Record(dtype)

  def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Append a sequence (1-D, at least one token); yield the records that became full."""
    begins = not (self._joined and self._record.segment)
    if begins and self._record.room < 2:  # One token alone would have no target.
      yield self._next()
    while True:
      piece, tokens = tokens[: self._record.room], tokens[self._record.room :]
      self._record.put(piece, begins)
      if not len(tokens):
        return
      last = self._record.row['tokens'][-1:]
      yield self._next()
      self._record.put(last, True)
      begins = False

  def finish(self) -> Iterator[np.ndarray]:
    """Yield the record that is not full, if it holds a target."""
    if self._record.room < self._record.row['tokens'].size - 1:
      yield self._next()

  def _next(self) -> np.ndarray:
    full, self._record = self._record, _Record(self._dtype)
    return full.row


class BestFit:
  """Put each sequence whole into the fullest open record that has room for it.

  Only sequences longer than a record are cut, into full records and a rest. What finds no room is
  left as padding.

  Reference: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830. We keep a
  bounded number of records open, so that sequences stream.
  """

  def __init__(self, dtype: np.dtype):
    self._dtype = dtype
    self._open: list[_Record] = []  # Sorted by room.

  def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Place a sequence (1-D, at least one token); yield the records that became full."""
    width = self._dtype['tokens'].shape[0]
    while len(tokens) > width:
      record = _Record(self._dtype)
      record.put(tokens[:width], True)
      yield record.row
      tokens = tokens[width - 1 :]
    record = _take(self._open, len(tokens)) or _Record(self._dtype)
    record.put(tokens, True)
    if record.room < 2:
      yield record.row
      return
    _keep(self._open, record)
    if len(self._open) > _OPEN_RECORDS:
      yield self._open.pop(0).row

  def finish(self) -> Iterator[np.ndarray]:
    """Yield the records that are still open."""
    yield from (record.row for record in self._open)


def _take(records: list[_Record], size: int) -> _Record | None:
  """Remove the fullest record that has room for `size` tokens."""
  at = bisect.bisect_left(records, size, key=lambda record: record.room)
  return records.pop(at) if at < len(records) else None


def _keep(records: list[_Record], record: _Record) -> None:
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
  records: list[_Record] = []
  unfilled: list[_Record] = []
  for ids, weights in sorted(sequences, key=lambda one: -len(one[0])) if together else sequences:
    if len(ids) > context_length + 1:
      raise ValueError(f'a sequence of {len(ids)} tokens does not fit a record of '
                       f'{context_length + 1}')
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
      raise ValueError(f'token ids {min(ids)} to {max(ids)} are not all in the vocabulary '
                       f'(0 to {vocab_size - 1})')
    record = _take(unfilled, len(ids)) if together else None
    if record is None:
      record = _Record(dtype, len(records))
      records.append(record)
    record.put(ids, True, weights)
    _keep(unfilled, record)
  rows = np.zeros(len(records), dtype)
  for i, record in enumerate(records):
    rows[i] = record.row
  return np.random.default_rng(0).permutation(rows) if together else rows


PACKERS: dict[str, Callable[[np.dtype], EndToEnd | BestFit]] = {
  'packed': lambda dtype: EndToEnd(dtype, joined=False),
  'best_fit': BestFit,
  'concat': lambda dtype: EndToEnd(dtype, joined=True),
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
_GROUP_CHARACTERS = 2**20


def tokenize(
  texts: Iterable[tuple[str, str]], encode_batch: Callable[[Sequence[str]], list[list[int]]]
) -> Iterator[tuple[str, str, list[int]]]:
  """Yield (split, text, ids) for each (split, text).

  A group of texts is tokenized on all cores while the one before is being used.
  """
  def groups() -> Iterator[list[tuple[str, str]]]:
    group, size = [], 0
    for split, text in texts:
      group.append((split, text))
      size += len(text)
      if size >= _GROUP_CHARACTERS:
        yield group
        group, size = [], 0
    yield group

  def encode(group: list[tuple[str, str]]) -> list[tuple[str, str, list[int]]]:
    ids = encode_batch([text for _, text in group])
    return [(split, text, i) for (split, text), i in zip(group, ids, strict=True)]

  for group in parallel.map_ahead(encode, groups(), num_threads=1, ahead=2):
    yield from group


class _ShardWriter:
  """Writes records into `NAME-00000.array_record`, `-00001` and so on, a fixed number into each."""

  def __init__(self, directory: pathlib.Path, name: str, records_per_shard: int):
    self._directory, self._name, self._limit = directory, name, records_per_shard
    self._writer: Any = None
    self.counts: list[int] = []

  def write(self, record: bytes) -> None:
    from array_record.python import array_record_module
    if self._writer is None or self.counts[-1] == self._limit:
      self.close()
      path = self._directory / shard_name(self._name, len(self.counts))
      self._writer = self._io(array_record_module.ArrayRecordWriter, str(path), 'group_size:1')
      self.counts.append(0)
    self._io(self._writer.write, record)
    self.counts[-1] += 1

  def close(self) -> None:
    writer, self._writer = self._writer, None
    if writer is not None:
      self._io(writer.close)

  def _io(self, call: Callable[..., Any], *args: Any) -> Any:
    with storage.explained(self._directory):
      try:
        return call(*args)
      except RuntimeError as error:  # How the library reports every failure of the file system.
        code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
                     if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code)) from error


def shard_name(name: str, index: int) -> str:
  """Return the file name of a shard."""
  return f'{name}-{index:05d}.array_record'


class SplitWriter:
  """Packs and writes one split, and counts what goes into it.

  Args:
    directory: where the shards go.
    name: of the split.
    tokenizer: gives BOS, EOS and the bytes of tokens.
    data: packing, context length and whether documents have BOS and EOS.

  Raises:
    ValueError: the tokenizer has no BOS or EOS where it is wanted.
  """

  def __init__(self, directory: pathlib.Path, name: str, tokenizer: Tokenizer, data: Any):
    self._directory, self._name = directory, name
    self._tokenizer, self._joined = tokenizer, data.packing == 'concat'
    self._prefix = _border(tokenizer.bos_id, 'bos') if data.add_bos else []
    self._suffix = _border(tokenizer.eos_id, 'eos') if data.add_eos else []
    dtype = record_dtype(data.context_length, tokenizer.vocab_size)
    self._packer = PACKERS[data.packing](dtype)
    self._shards = _ShardWriter(directory, name, max(1, _SHARD_TOKENS // data.context_length))
    self._counts = collections.Counter(
      dict.fromkeys(('documents', 'tokens', 'target_tokens', 'text_bytes', 'target_bytes'), 0))

  def add(self, text: str, encoded: list[int]) -> int:
    """Append a document and return its number of tokens, borders included; refuse unknown ids."""
    ids = np.array([*self._prefix, *encoded, *self._suffix], np.int64)
    if not len(ids):
      return 0
    if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
      raise ValueError(f'the tokenizer gave ids {ids.min()} to {ids.max()}, outside its vocabulary '
                       f'of {self._tokenizer.vocab_size}')
    size = len(text.encode())
    predicted = size
    if not (self._joined and self._counts['documents']):  # Nothing predicts the first token.
      predicted -= len(self._tokenizer.id_bytes[ids[0]])
    self._counts.update(documents=1, tokens=len(ids), text_bytes=size, target_bytes=predicted)
    self._write(self._packer.add(ids))
    return len(ids)

  def finish(self) -> dict[str, Any]:
    """Write what is left and return the counts, as fields of `records.Split`."""
    self._write(self._packer.finish())
    self._shards.close()
    shards = tuple(self._shards.counts)
    paths = (self._directory / shard_name(self._name, i) for i in range(len(shards)))
    digests = tuple(storage.file_digest(path, {}) for path in paths)
    return {**self._counts, 'records': sum(shards), 'shards': shards, 'sha256': digests}

  def _write(self, records: Iterator[np.ndarray]) -> None:
    for record in records:
      self._counts.update(target_tokens=int(_is_target(record['segment_ids']).sum()))
      self._shards.write(record.tobytes())


def _border(token_id: int | None, name: str) -> list[int]:
  if token_id is None:
    raise ValueError(f'config.data.add_{name}=True, but the tokenizer has no {name.upper()}: set '
                     f"it to False, or (kind='json') name it in config.tokenizer.{name}_token")
  return [token_id]
