"""Batches as a pure function of the position in the data, a count of records.

`sequence` visits every record once per epoch, in a new random order each epoch. A step takes the
next items of it, as many as its phase says, each process its share of these rows. Where the batch
size does not divide the records, a batch continues with the next epoch; after the last epoch it is
filled with rows of weight 0. In a `Mixture` each source has such a sequence of its own.
"""

import bisect
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

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
    sources: how many records each source gave, one after the other; () where they are not apart.
  """

  rows: Sequence[bytes]
  dtype: np.dtype
  vocab_size: int
  decode: Decode = packing.batch_arrays
  sources: Sequence[int] = ()


class Phase(NamedTuple):
  """The steps of one batch size and mixture in a run, which may go on with others.

  Attributes:
    step: steps before the first of them.
    records: records that these have read.
    batch_size: records of each step, over all processes.
    place: where in the order of the records the mixture begins.
    weights: of the sources in the mixture; () without.
  """

  step: int
  records: int
  batch_size: int
  place: int = 0
  weights: tuple[float, ...] = ()


def records_before(phases: Sequence[Phase], step: int) -> int:
  """Return how many records the first `step` steps read; those passed over do not count."""
  phase = next(one for one in reversed(phases) if one.step <= step)
  return phase.records + (step - phase.step) * phase.batch_size


def place_of(count: int, passed: Sequence[tuple[int, int]]) -> int:
  """Return the place of the record that is read after `count` others, as in `Batches`."""
  for first, last in passed:
    count += (last - first + 1) * (first <= count)
  return count


class Mixture:
  """The order of a mixture: at each place the next record of the source that is most behind.

  It is random access. Since the last change of weights each source has given its share of the
  records to within about one; where weights change, each goes on with its next record.

  Args:
    phases: of the run; the first has weights.
    orders: for each source, the numbers of its records in the order in which they are visited.
  """

  def __init__(self, phases: Sequence[Phase], orders: Sequence[Sequence[int]] = ()):
    self._orders = orders
    self._changes: list[tuple[int, list[int], list[tuple[int, int, int]]]] = []
    for place, weights in {phase.place: phase.weights for phase in phases}.items():
      counts = self.counts(place) if place else [0] * len(weights)
      self._changes.append((place, counts, _shares(weights)))

  def counts(self, place: int) -> list[int]:
    """Return how many records of each source lie before a place."""
    at = bisect.bisect_right(self._changes, place, key=lambda change: change[0]) - 1
    start, counts, shares = self._changes[at]
    left, counts = place - start, [*counts]
    for source, weight, rest in shares:
      count = (2 * left * weight + rest) // (2 * rest)
      counts[source] += count
      left -= count
    return counts

  def __getitem__(self, place: int) -> int:
    counts = self.counts(place)
    source = next(i for i, after in enumerate(self.counts(place + 1)) if after > counts[i])
    return self._orders[source][counts[source]]


def _shares(weights: Sequence[float]) -> list[tuple[int, int, int]]:
  """Return source, weight, and weight of it and those that follow: whole numbers, largest first."""
  exact = [Fraction(str(weight)) for weight in weights]
  scale = math.lcm(*(one.denominator for one in exact))
  ordered = sorted(((int(one * scale), i) for i, one in enumerate(exact)), reverse=True)
  return [(source, weight, sum(after for after, _ in ordered[at:]))
          for at, (weight, source) in enumerate(ordered)]


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
    return [place_of(count, self.passed) for count in places]

  def numbers(self, step: int) -> list[int]:
    """Return the numbers of the stored records in this process's rows of the batch of a step."""
    return [self.sequence[place] for place in self.places(step)
            if self.num_epochs is None or place < len(self.sequence)]

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
  """Open the records that `preparing.prepare` wrote of a split, 'train' or 'validation'.

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
  return Stored(rows, dtype, manifest.vocab_size, sources=manifest.split(split).source_records)


def runs(stored: Stored, numbers: Iterable[int]) -> Iterator[tuple[int, int, np.ndarray]]:
  """Yield the tokens of records that see each other: record, place of the first, all of them."""
  from tqdm import tqdm
  for number in tqdm(numbers, desc='read', leave=False, delay=3, disable=None):
    row = np.frombuffer(stored.rows[number], stored.dtype)[0]
    for segment in range(1, int(row['segment_ids'].max()) + 1):
      places = np.flatnonzero(row['segment_ids'] == segment)
      yield number, int(places[0]), row['tokens'][places]


def make_batches(
  stored: Stored, batch_size: int | Sequence[Phase], seed: int, process_index: int = 0,
  process_count: int = 1, shuffle: bool = True, num_epochs: int | None = None,
  passed: Sequence[tuple[int, int]] = (),
) -> Batches:
  """Put records into the order of the epochs, and take this process's rows of each batch.

  Args:
    stored: from `open_records`, or in memory; every process has all of them.
    batch_size: rows of a batch over all processes, or the phases of a run.
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

  def order(start: int, stop: int, seed: int) -> Sequence[int]:
    numbers = grain.MapDataset.range(start, stop)
    return (numbers.shuffle(seed=seed) if shuffle else numbers).repeat(num_epochs)

  sequence: Any = order(0, len(stored.rows), seed)
  if phases[-1].weights:
    stops = np.cumsum(stored.sources).tolist()
    seeds = np.random.SeedSequence(seed).generate_state(len(stops)).tolist()
    sequence = Mixture(phases, [
      order(stop - count, stop, own) if count else ()
      for stop, count, own in zip(stops, stored.sources, seeds, strict=True)])
  return Batches(stored, phases, num_epochs, (process_index, process_count), sequence, passed)
