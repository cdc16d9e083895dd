"""Loss on completions only: weighted token sequences become batches for `next_token_loss`.

Each token carries its weight as a target: 0 for what a model is given, 1 for what it should say.
`pack` lays whole sequences into records of one size, `batch_arrays` turns records into a batch.

Axes: S = T + 1 stored tokens.
"""

import bisect
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxllm.data import packing

Truncation = Literal['start', 'end', 'drop', 'error']


class Tokens(NamedTuple):
  """A sequence.

  Attributes:
    ids: token ids.
    weights: weight of each token as a target; the first one never is a target.
  """

  ids: Sequence[int]
  weights: Sequence[float]


def truncate(tokens: Tokens, context_length: int, policy: Truncation) -> Tokens | None:
  """Make a sequence fit a record.

  Args:
    tokens: the sequence.
    context_length: T; a record holds one token more.
    policy: what to do with a longer one: cut the start of what has no weight, the first token (BOS)
      excepted, and then the end ('start'); cut the end ('end'); leave it out ('drop'); or refuse it
      ('error').

  Returns:
    The sequence, or None where nothing would be left to learn from it.

  Raises:
    ValueError: it is too long and the policy is 'error'.
  """
  ids, weights = list(tokens.ids), list(tokens.weights)
  excess = len(ids) - (context_length + 1)
  if excess > 0:
    if policy == 'error':
      raise ValueError(f'an example has {len(ids)} tokens, but the context is {context_length}; '
                       "choose a longer context or another truncation ('start', 'end', 'drop')")
    if policy == 'drop':
      return None
    if policy == 'start':
      first = next((i for i, weight in enumerate(weights) if weight), len(ids))
      cut = slice(1, 1 + min(excess, max(first - 1, 0)))
      del ids[cut], weights[cut]
    del ids[context_length + 1 :], weights[context_length + 1 :]
  return Tokens(ids, weights) if any(weights[1:]) else None


def pack(
  sequences: Sequence[Tokens], context_length: int, vocab_size: int, together: bool = True
) -> np.ndarray:
  """Lay sequences into records, each as a segment of its own that sees nothing else.

  Longest first, each into the fullest record that still has room for it. Records that sequences
  share are then shuffled, always alike: else the first ones would hold the longest sequences.

  Args:
    sequences: none longer than T + 1; see `truncate`.
    context_length: T.
    vocab_size: ids are below it.
    together: whether sequences share records.

  Returns:
    Structured array (records,), like `data.packing.record_dtype` with a third field `weights`.

  Raises:
    ValueError: a sequence is too long, or an id is not in the vocabulary.

  Reference:
    Best-fit decreasing: Johnson et al., Worst-Case Performance Bounds for Simple One-Dimensional
    Packing Algorithms, 1974.
  """
  width = context_length + 1
  lengths = [len(sequence.ids) for sequence in sequences]
  if max(lengths, default=0) > width:
    raise ValueError(f'a sequence of {max(lengths)} tokens does not fit a record of {width}')
  contents = _best_fit(lengths, width) if together else [[i] for i in range(len(lengths))]
  records = np.zeros(len(contents), record_dtype(context_length, vocab_size))
  for record, members in zip(records, contents, strict=True):
    start = 0
    for segment, member in enumerate(members, start=1):
      ids, weights = sequences[member]
      if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f'token ids {min(ids)} to {max(ids)} are not all in the vocabulary '
                         f'(0 to {vocab_size - 1})')
      span = slice(start, start + len(ids))
      record['tokens'][span], record['weights'][span] = ids, weights
      record['segment_ids'][span] = segment
      start = span.stop
  return np.random.default_rng(0).permutation(records) if together else records


def record_dtype(context_length: int, vocab_size: int) -> np.dtype:
  """Return the layout of a record: `tokens`, `segment_ids` and float32 `weights`, S of each."""
  plain = packing.record_dtype(context_length, vocab_size)
  return np.dtype([*plain.descr, ('weights', '<f4', (context_length + 1,))])


def batch_arrays(records: np.ndarray) -> dict[str, np.ndarray]:
  """Return `tokens`, `targets`, `weights`, `segment_ids` and `positions`, each (B, T)."""
  batch = packing.batch_arrays(records)
  return {**batch, 'weights': batch['weights'] * records['weights'][:, 1:]}


def _best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
  contents: list[list[int]] = []
  rooms: list[tuple[int, int]] = []  # (room, record), sorted.
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    place = bisect.bisect_left(rooms, (lengths[i], -1))
    if place == len(rooms):
      room, record = width, len(contents)
      contents.append([])
    else:
      room, record = rooms.pop(place)
    contents[record].append(i)
    bisect.insort(rooms, (room - lengths[i], record))
  return contents
