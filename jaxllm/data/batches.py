"""Batches as a pure function of the position in the data, a count of records.

`sequence` visits every record once per epoch, in a new random order each epoch. A step takes the
next items of it, as many as its phase says, each process its share of these rows. Where the batch
size does not divide the records, a batch continues with the next epoch; after the last epoch it is
filled with rows of weight 0.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data import packing, records

Decode = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Stored(NamedTuple):
  """The records of a split.

  Attributes:
    rows: the bytes of each record.
    dtype: of a record.
    vocab_size: ids are below it.
    decode: rows of `dtype` -> arrays of a batch.
  """

  rows: Sequence[bytes]
  dtype: np.dtype
  vocab_size: int
  decode: Decode = packing.batch_arrays


class Phase(NamedTuple):
  """The steps of one batch size in a run, which may go on with another.

  Attributes:
    step: steps before the first of them.
    records: records that these have read.
    batch_size: records of each step, over all processes.
  """

  step: int
  records: int
  batch_size: int


def records_before(phases: Sequence[Phase], step: int) -> int:
  """Return how many records the first `step` steps read; those passed over do not count."""
  phase = next(one for one in reversed(phases) if one.step <= step)
  return phase.records + (step - phase.step) * phase.batch_size


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """Random access to the batches of one split, as one process sees them."""

  stored: Stored
  phases: Sequence[Phase]
  num_epochs: int | None
  process: tuple[int, int]
  """Which process this is, of how many."""
  sequence: Sequence[int]
  """The numbers of the stored records in the order in which they are visited."""
  passed: Sequence[tuple[int, int]] = ()
  """First and last of the places in `sequence` that are passed over, in order, none twice."""

  @property
  def num_batches(self) -> int:
    """Batches that visit all records: of all epochs, or of one where epochs never end."""
    return -(-len(self.stored.rows) * (self.num_epochs or 1) // self.phases[-1].batch_size)

  def places(self, step: int) -> list[int]:
    """Return the places in `sequence` of this process's rows of the batch of a step."""
    first, last = (records_before(self.phases, one) for one in (step, step + 1))
    share = (last - first) // self.process[1]
    places = range(first + self.process[0] * share, first + (self.process[0] + 1) * share)
    return [*map(self._place, places)]

  def _place(self, count: int) -> int:
    for first, last in self.passed:
      count += (last - first + 1) * (first <= count)
    return count

  def numbers(self, step: int) -> list[int]:
    """Return the numbers of the stored records in this process's rows of the batch of a step."""
    return [self.sequence[place] for place in self.places(step) if place < len(self.sequence)]

  def batch_at(self, step: int) -> dict[str, np.ndarray]:
    """Return this process's rows of the batch of a step, as `decode` gives them.

    Raises:
      IndexError: the step is negative or past the last epoch.
      ValueError: a stored record is damaged.
    """
    if step < 0 or (self.num_epochs is not None and step >= self.num_batches):
      raise IndexError(f'step {step}: these records give steps 0 to {self.num_batches - 1}')
    try:
      found = [self.stored.rows[number] for number in self.numbers(step)]
      found_B = np.frombuffer(b''.join(found), self.stored.dtype)
    except (RuntimeError, ValueError) as error:
      raise ValueError(f'step {step}: {records.DAMAGED} ({error})') from error
    rows_B = np.zeros(len(self.places(step)), self.stored.dtype)
    rows_B[: len(found_B)] = found_B
    batch = dict(self.stored.decode(rows_B))
    highest = max(int(array.max(initial=0)) for name, array in batch.items()
                  if name.endswith(('tokens', 'targets')))
    if highest >= self.stored.vocab_size:
      raise ValueError(f'step {step}: token id {highest} is not in the vocabulary of '
                       f'{self.stored.vocab_size}; {records.DAMAGED}')
    return batch


def open_records(directory: str | os.PathLike[str], split: str) -> Stored:
  """Open the records that `records.prepare` wrote of a split, 'train' or 'validation'.

  Arguments and errors are those of `records.open_shards`.
  """
  import grain

  manifest, paths = records.open_shards(directory, split)
  counts = manifest.split(split).shards
  try:
    # All files are opened now: later, they may be gone.
    rows = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    if len(rows) != sum(counts):
      raise ValueError(f'there are {len(rows)} records, but the manifest says {sum(counts)}')
    for i in range(len(counts)):
      rows[sum(counts[:i])]
  except (RuntimeError, ValueError) as error:
    raise ValueError(f'{paths[0].parent}: {records.DAMAGED} ({error})') from error
  dtype = packing.record_dtype(manifest.context_length, manifest.vocab_size)
  return Stored(rows, dtype, manifest.vocab_size)


def make_batches(
  stored: Stored, batch_size: int | Sequence[Phase], seed: int, process_index: int = 0,
  process_count: int = 1, shuffle: bool = True, num_epochs: int | None = None,
  passed: Sequence[tuple[int, int]] = (),
) -> Batches:
  """Put records into the order of the epochs, and take this process's rows of each batch.

  Args:
    stored: from `open_records`, or in memory; every process has all of them.
    batch_size: rows of a batch over all processes, or the phases of a run that changed it.
    seed: decides the order, 0 to 2**32 - 1.
    process_index: which process this is.
    process_count: how many there are; each reads only its own rows.
    shuffle: visit the records in a new random order each epoch, else as they were written.
    num_epochs: how often all records are visited; None never ends.
    passed: places in the order that are passed over, as in `Batches`.

  Raises:
    ValueError: the batch does not divide.
  """
  import grain

  phases = (Phase(0, 0, batch_size),) if isinstance(batch_size, int) else tuple(batch_size)
  size = phases[-1].batch_size
  if size < 1 or size % process_count:
    raise ValueError(f'batch_size={size} does not divide into {process_count} equal parts, '
                     'one for each process')
  if not 0 <= process_index < process_count:
    raise ValueError(f'process_index={process_index} is not below process_count={process_count}')
  sequence = grain.MapDataset.range(len(stored.rows))
  if shuffle:
    sequence = sequence.shuffle(seed=seed)
  return Batches(stored, phases, num_epochs, (process_index, process_count),
                 sequence.repeat(num_epochs), passed)
