"""Mixed sources: each record is of one of them, and each source is visited as its share says."""

import json
import random
from fractions import Fraction

import grain
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.data import preparing, records, shards
from jaxllm.data.batches import Mixture, Phase, Stored, make_batches, open_records, place_of
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig

BYTES = TokenizerConfig(kind='bytes')
SIZES = 40, 7, 1, 19  # Documents of each source.


@pytest.fixture
def paths(tmp_path):
  found = []
  for number, size in enumerate(SIZES):
    found.append(tmp_path / f'source-{number}.jsonl')
    found[-1].write_text(''.join(
      json.dumps({'text': f'Of {number}, text {i}. ' * (2 + i % 4)}) + '\n' for i in range(size)))
  return found


def data_of(paths, weights=(), epochs=(), **fields):
  sources = [{'location': str(path)} for path in paths]
  for name, values in (('weight', weights), ('epochs', epochs)):
    for source, value in zip(sources, values, strict=False):
      source[name] = value
  return DataConfig(**{'sources': sources, 'validation': None, 'context_length': 16, **fields})


def rows_of(directory, split='train'):
  return [bytes(row) for row in open_records(directory, split).rows]


@pytest.mark.parametrize('packing', ['packed', 'best_fit', 'concat'])
def test_records_of_a_mixture_are_those_that_each_source_gives_alone(paths, tmp_path, packing):
  alone = []
  for number, path in enumerate(paths):
    one = data_of([path], packing=packing)
    alone.append(preparing.prepare(one, BYTES, tmp_path / str(number), progress=False).train)
  data = data_of(paths, epochs=(1, 1, 1, 1), packing=packing)
  manifest = preparing.prepare(data, BYTES, tmp_path / 'out', progress=False)
  assert rows_of(tmp_path / 'out') == [
    row for number in range(4) for row in rows_of(tmp_path / str(number))]
  train = manifest.train
  assert train.source_records == tuple(split.records for split in alone)
  assert train.source_tokens == tuple(split.tokens for split in alone)
  for name in ('documents', 'tokens', 'target_tokens', 'text_bytes', 'target_bytes',
               'dropped_tokens'):
    assert getattr(train, name) == sum(getattr(split, name) for split in alone)


def test_of_both_splits_each_record_is_of_one_source_and_a_killed_call_goes_on(
  paths, tmp_path, monkeypatch
):
  data = data_of(paths, (1, 2, 3, 4), validation=0.3)
  whole = preparing.prepare(data, BYTES, tmp_path / 'whole', progress=False)
  for name in ('train', 'validation'):
    lineage, split = records.open_lineage(tmp_path / 'whole', name), whole.split(name)
    sources = [{int(piece['source']) for piece in lineage.pieces(i)} for i in range(split.records)]
    assert all(len(some) == 1 for some in sources)
    found = np.bincount([source for some in sources for source in some], minlength=4)
    assert tuple(found) == split.source_records and sum(split.source_tokens) == split.tokens
  monkeypatch.setattr(preparing, '_SAVE_SECONDS', 0)
  add, added = shards.SplitWriter.add, []

  def limited(self, *args):
    if len(added) == 50:
      raise KeyboardInterrupt
    added.append(0)
    add(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(shards.SplitWriter, 'add', limited)
    with pytest.raises(KeyboardInterrupt):
      preparing.prepare(data, BYTES, tmp_path / 'killed', progress=False)
  assert preparing.prepare(data, BYTES, tmp_path / 'killed', progress=False) == whole
  for name in ('train', 'validation'):
    assert rows_of(tmp_path / 'killed', name) == rows_of(tmp_path / 'whole', name)


def test_weights_and_epochs_do_not_decide_the_records_but_whether_sources_are_mixed(
  paths, tmp_path
):
  plain, *mixed = (
    preparing.fingerprint(data_of(paths, **fields), BYTES, tmp_path)
    for fields in ({}, {'weights': (1, 2, 3, 4)}, {'weights': (1, 1, 1, 1), 'epochs': (5,)},
                   {'epochs': (1, 2, 1, 0.5)}))
  assert len({*mixed}) == 1 and plain not in mixed
  manifest = preparing.prepare(data_of(paths), BYTES, tmp_path / 'out', progress=False)
  assert not manifest.train.source_records
  assert sum(manifest.train.source_tokens) == manifest.train.tokens


@pytest.mark.parametrize('fields, said', [
  ({'weights': (1, 2, 3)}, r'sources\[3\]\.weight=None, but other sources have one'),
  ({'epochs': (1,)}, r'sources\[1\]\.epochs=None, but other sources have one'),
  ({'weights': (1, 2, 3), 'epochs': (1, 1, 1, 1)}, r'sources\[3\]\.weight=None'),
  ({'weights': (1, 2, 3, 0)}, r'sources\.3=.*weight=0'), ({'epochs': (-1,)}, 'epochs=-1'),
  ({'weights': (1, 2, 3, float('inf'))}, 'weight=inf'),
  ({'validation': ({'location': 'a', 'weight': 1.0},)}, 'validation, .*: only what is trained on'),
  ({'cleaning': {'steps': ('decontaminate',),
                 'evaluation': ({'location': 'a', 'epochs': 1.0},)}},
   'cleaning.evaluation: only what is'),
])
def test_mixtures_that_say_too_little_are_refused(paths, fields, said):
  with pytest.raises(ConfigError, match=said):
    data_of(paths, **fields)


# Of the records of sources, the number of the source and that of the record in it.
ROWS = np.dtype([('source', '<u4'), ('record', '<u4')])


def stored_of(sizes):
  rows = [np.array((source, i), ROWS).tobytes()
          for source, size in enumerate(sizes) for i in range(size)]

  def decode(rows_B):  # noqa: N803
    return {'tokens': rows_B['source'] * 0, **{name: rows_B[name] for name in ROWS.names}}

  return Stored(rows, ROWS, 2, decode, sizes)


@pytest.mark.parametrize('weights', [
  (0.7, 0.3), (1, 1), (3, 2, 1), (1, 1, 1, 1), (0.5, 0.25, 0.125, 0.125), (100, 1, 1, 7),
  (0.1, 0.2, 0.3, 0.15, 0.25), (1e-3, 1), (5, 4, 3, 2, 1, 1, 1)])
def test_each_source_gives_its_share_to_within_a_record(weights):
  mixture = Mixture([Phase(0, 0, 1, 0, weights)])
  total = sum(Fraction(str(weight)) for weight in weights)
  before = [0] * len(weights)
  for place in range(1, 2000):
    counts = mixture.counts(place)
    assert sorted(new - old for new, old in zip(counts, before, strict=True)) == [
      *[0] * (len(weights) - 1), 1]
    for count, weight in zip(counts, weights, strict=True):
      assert abs(count - place * Fraction(str(weight)) / total) < 1
    before = counts


def test_shares_are_those_of_grain():
  weights = (0.6, 0.3, 0.1)
  theirs = grain.MapDataset.mix(
    [grain.MapDataset.source([source]).repeat() for source in range(3)], weights)
  mixture = Mixture([Phase(0, 0, 1, 0, weights)])
  for count in (10, 100, 1000):
    assert np.bincount([theirs[i] for i in range(count)]).tolist() == mixture.counts(count)


@pytest.mark.parametrize('shuffle', [True, False])
def test_a_pass_by_epochs_visits_every_record_as_often_as_they_say(shuffle):
  sizes, epochs = (13, 5, 20), (1, 3, 0.5)
  weights = tuple(size * times for size, times in zip(sizes, epochs, strict=True))
  batches = make_batches(stored_of(sizes), [Phase(0, 0, 1, 0, weights)], 0, shuffle=shuffle)
  numbers = [number for step in range(13 + 15 + 10) for number in batches.numbers(step)]
  counts = np.bincount(numbers, minlength=38)
  assert counts[:13].tolist() == [1] * 13 and counts[13:18].tolist() == [3] * 5
  assert sorted(counts[18:].tolist()) == [0] * 10 + [1] * 10


def visited(stored, phases, seed, step, processes=1, passed=()):
  """The (source, record) of each row, in order, of a step."""
  return [(int(source), int(record)) for process in range(processes) for batch in [
    make_batches(stored, phases, seed, process, processes, passed=passed).batch_at(step)]
    for source, record in zip(batch['source'], batch['record'], strict=True)]


def in_order(stored, phases, seed, count):
  """The same of places in the order."""
  sequence = make_batches(stored, phases, seed).sequence
  return [np.frombuffer(stored.rows[sequence[at]], ROWS)[0].item() for at in range(count)]


@pytest.mark.parametrize('case', range(5))
def test_each_record_once_in_each_epoch_of_its_source_whatever_is_changed(case):
  pick = random.Random(case)
  sizes = [pick.randint(1, 30) for _ in range(pick.randint(1, 5))]
  stored, seed = stored_of(sizes), pick.randrange(1000)
  # Each source by itself.
  orders = []
  for source in range(len(sizes)):
    weights = tuple(1.0 if i == source else 1e-9 for i in range(len(sizes)))
    orders.append([i for _, i in in_order(stored, [Phase(0, 0, 1, 0, weights)], seed, 100)])
  for source, order in enumerate(orders):
    for start in range(0, 100 - sizes[source], sizes[source]):
      assert sorted(order[start : start + sizes[source]]) == [*range(sizes[source])]
  phases, records, place, seen, passed = [], 0, 0, [], []
  for step in range(12):
    size, processes = 4 * pick.randint(1, 2), pick.choice([1, 2, 4])
    weights = phases[-1].weights if phases else tuple(1.0 for _ in sizes)
    if not phases or pick.random() < 0.4:
      place, weights = place_of(records, passed), tuple(pick.randint(1, 100) for _ in sizes)
    phases.append(Phase(step, records, size, place, weights))
    if pick.random() < 0.3:  # What is passed over lies ahead.
      first = place_of(records, passed) + pick.randint(0, 4)
      first = max(first, *(stop + 2 for _, stop in passed), 0)
      passed = [*passed, (first, first + pick.randint(0, 3))]
    now = visited(stored, phases, seed, step, processes, passed)
    assert now == visited(stored, phases, seed, step, 1, passed) and len(now) == size
    seen += now
    records += size
  # What is passed over is visited too, so to speak.
  places = [place_of(count, passed) for count in range(records)]
  every = in_order(stored, phases, seed, places[-1] + 1)
  assert seen == [every[at] for at in places]
  for source in range(len(sizes)):
    own = [number for one, number in every if one == source]
    assert own == orders[source][: len(own)]
