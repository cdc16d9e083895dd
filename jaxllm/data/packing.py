"""Token sequences into records of one fixed size, and records into batch arrays.

A record holds `context_length + 1` tokens; inputs are all but the last, targets all but the first.
Where a sequence does not end with its record, the next record begins with the last token again:
that token was only a target before, and so every token but the first of a sequence is a target
exactly once. Records are rows of a structured array, so a batch decodes in one call.

Axes: S = T + 1 stored tokens.
"""

from collections.abc import Iterator

import numpy as np


def record_dtype(context_length: int, vocab_size: int) -> np.dtype:
  """Return the layout of a record: S `tokens` and S `segment_ids` (0 = padding)."""
  width = context_length + 1
  token = '<u2' if vocab_size <= 2**16 else '<u4'
  segment = '<u2' if width < 2**16 else '<u4'
  return np.dtype([('tokens', token, (width,)), ('segment_ids', segment, (width,))])


class Packer:
  """Lay sequences end to end into records; see the module docstring for the cut at a record's end.

  Args:
    dtype: from `record_dtype`.
    join: make all sequences one segment, as if they were one text; else each piece of a sequence is
      its own segment, which attends to nothing else and whose positions start at 0.
  """

  def __init__(self, dtype: np.dtype, join: bool):
    self._join = join
    self._record = np.zeros((), dtype)
    self._width = self._record['tokens'].size
    self._fill = 0
    self._segment = 0

  def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Append a sequence (1-D, at least one token); yield the records that became full."""
    if not self._join or not self._segment:
      if self._width - self._fill < 2:  # A single token has no target.
        yield self._flush()
      self._segment += 1
    while True:
      piece = tokens[: self._width - self._fill]
      span = slice(self._fill, self._fill + len(piece))
      self._record['tokens'][span] = piece
      self._record['segment_ids'][span] = self._segment
      self._fill += len(piece)
      tokens = tokens[len(piece):]
      if not len(tokens):
        return
      last = self._record['tokens'][-1]
      yield self._flush()
      self._record['tokens'][0], self._record['segment_ids'][0] = last, 1
      self._fill = self._segment = 1

  def finish(self) -> Iterator[np.ndarray]:
    """Yield the last record, padded, if it holds a target."""
    if self._fill > 1:
      yield self._flush()

  def _flush(self) -> np.ndarray:
    full, self._record = self._record, np.zeros((), self._record.dtype)
    self._fill = self._segment = 0
    return full


def count_targets(records: np.ndarray) -> int:
  """Count the tokens that have weight as targets in one or more records."""
  segments_BS = records['segment_ids']
  return int(_is_target(segments_BS).sum())


def batch_arrays(records: np.ndarray) -> dict[str, np.ndarray]:
  """Decode records.

  Args:
    records: (B,) of a `record_dtype`.

  Returns:
    `tokens`, `targets`, `segment_ids` (0 = padding) and `positions` (from 0 in each segment), all
    (B, T) int32; `weights` (B, T) float32, 1 where the target belongs to the segment of its input.
  """
  tokens_BS = records['tokens'].astype(np.int32)
  segments_BS = records['segment_ids'].astype(np.int32)
  segments_BT = segments_BS[:, :-1]
  index_T = np.arange(segments_BT.shape[1], dtype=np.int32)
  begins_BT = np.diff(segments_BT, axis=1, prepend=-1) != 0
  start_BT = np.maximum.accumulate(np.where(begins_BT, index_T[None], 0), axis=1)
  return {
    'tokens': tokens_BS[:, :-1],
    'targets': tokens_BS[:, 1:],
    'weights': _is_target(segments_BS).astype(np.float32),
    'segment_ids': segments_BT,
    'positions': np.where(segments_BT > 0, index_T[None] - start_BT, 0).astype(np.int32),
  }


def _is_target(segments_BS: np.ndarray) -> np.ndarray:
  return (segments_BS[..., 1:] == segments_BS[..., :-1]) & (segments_BS[..., 1:] > 0)
