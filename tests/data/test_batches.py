"""A batch depends on seed and step alone; an epoch visits every record once, on any processes."""

import collections
import itertools
import shutil
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest

from jaxllm.data import parallel, preparing, shards
from jaxllm.data.batches import Phase, make_batches, open_records
from jaxllm.data.documents import SourceConfig
from jaxllm.data.parallel import map_ahead
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig

# 37 records of 8 tokens: prime, so that it divides by no batch size and no process count.
RECORDS, LENGTH = 37, 8


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  root = tmp_path_factory.mktemp('batches')
  # Each record begins with its own number in hexadecimal.
  text = ''.join(f'{i:02x}' + '-' * (LENGTH - 2) for i in range(RECORDS)) + '-'
  (root / 'text.txt').write_text(text, encoding='utf-8')
  data = DataConfig(
    sources=(SourceConfig(location=str(root / 'text.txt')),), validation=None, packing='concat',
    context_length=LENGTH, add_bos=False, add_eos=False)
  # Small shards, so that several are read.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, '_SHARD_TOKENS', 10 * LENGTH)
    manifest = preparing.prepare(data, TokenizerConfig(kind='bytes'), root / 'out', progress=False)
  assert manifest.train.shards == (10, 10, 10, 7)
  return root / 'out'


def _numbers(batch):
  """The number of each record in a batch, None for padding."""
  return [int(bytes(row[:2].astype(np.uint8)), 16) if weights.any() else None
          for row, weights in zip(batch['tokens'], batch['weights'], strict=True)]


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('batch_size', [4, 8, 64])
def test_every_record_once_per_epoch(directory, processes, shuffle, batch_size):
  stored = open_records(directory, 'train')
  parts = [make_batches(stored, batch_size, 5, p, processes, shuffle, num_epochs=1)
           for p in range(processes)]
  seen = [number for step in range(parts[0].num_batches) for part in parts
          for number in _numbers(part.batch_at(step))]
  assert len(seen) == parts[0].num_batches * batch_size
  padding = -RECORDS % batch_size
  assert seen[RECORDS:] == [None] * padding  # The remainder: rows of weight 0 at the very end.
  assert sorted(seen[:RECORDS]) == list(range(RECORDS))
  assert (seen[:RECORDS] == list(range(RECORDS))) is not shuffle


@pytest.mark.parametrize('batch_size', [4, 8, 64])
def test_without_end_a_batch_goes_on_with_the_next_epoch(directory, batch_size):
  batches = make_batches(open_records(directory, 'train'), batch_size, 5)
  assert batches.num_batches == -(-RECORDS // batch_size)
  steps = itertools.count()
  seen = []
  while len(seen) < 5 * RECORDS:
    seen += _numbers(batches.batch_at(next(steps)))
  epochs = [seen[i * RECORDS : (i + 1) * RECORDS] for i in range(5)]
  assert all(sorted(epoch) == list(range(RECORDS)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 5  # A new order each time.


@pytest.mark.parametrize('num_epochs', [None, 1, 3])
@pytest.mark.parametrize('shuffle', [True, False])
def test_processes_together_make_the_same_batch(directory, shuffle, num_epochs):
  stored = open_records(directory, 'train')
  alone = make_batches(stored, 8, 3, 0, 1, shuffle, num_epochs)
  for processes in (2, 4, 8):
    parts = [make_batches(stored, 8, 3, p, processes, shuffle, num_epochs)
             for p in range(processes)]
    for step in (0, 1, 4):
      rows = [part.batch_at(step) for part in parts]
      for name, array in alone.batch_at(step).items():
        assert np.array_equal(np.concatenate([row[name] for row in rows]), array)


def test_the_same_records_follow_each_other_whatever_the_batch_sizes_and_processes(directory):
  stored = open_records(directory, 'train')
  # Sizes of 8, 4 and 12 records on 2, 4 and 1 processes, and some places passed over.
  phases = (Phase(0, 0, 8), Phase(3, 24, 4), Phase(5, 32, 12))
  passed = [(2, 5), (30, 40)]
  seen = []
  for step in range(12):
    count = {8: 2, 4: 4, 12: 1}[8 if step < 3 else 4 if step < 5 else 12]
    now = [phase for phase in phases if phase.step <= step]
    for process in range(count):
      part = make_batches(stored, now, 3, process, count, passed=passed)
      seen += _numbers(part.batch_at(step))
  order = make_batches(stored, 1, 3)
  visited = [number for place in range(200) for number in order.numbers(place)
             if not any(first <= place <= last for first, last in passed)]
  assert seen == visited[:len(seen)] and len(seen) == 32 + 7 * 12


def test_batches_are_a_function_of_seed_and_step(directory):
  stored = open_records(directory, 'train')
  first, again, other = (make_batches(stored, 8, seed) for seed in (1, 1, 2))
  order = [9, 0, 3, 9, 1000]
  for step, other_step in zip(order, reversed(order), strict=True):
    again.batch_at(other_step)
    for name, array in first.batch_at(step).items():
      assert np.array_equal(array, again.batch_at(step)[name])
  assert _numbers(first.batch_at(0)) != _numbers(other.batch_at(0))


def test_several_epochs_end(directory):
  batches = make_batches(open_records(directory, 'train'), 8, 0, num_epochs=2)
  assert batches.num_batches == 10
  seen = [n for batch in map(batches.batch_at, range(10)) for n in _numbers(batch)]
  assert collections.Counter(seen) == {**dict.fromkeys(range(RECORDS), 2), None: 6}
  for step in (10, -1):
    with pytest.raises(IndexError, match=f'step {step}: .* 0 to 9'):
      batches.batch_at(step)


def test_padding_has_no_weight_and_no_segment(directory):
  batch = make_batches(open_records(directory, 'train'), 64, 0, num_epochs=1).batch_at(0)
  for name in ('weights', 'segment_ids', 'tokens', 'positions'):
    assert not batch[name][RECORDS:].any()


def test_bad_arguments_are_named(directory, tmp_path):
  with pytest.raises(ValueError, match='batch_size=6 does not divide into 4'):
    make_batches(open_records(directory, 'train'), 6, 0, 0, 4)
  with pytest.raises(ValueError, match='batch_size=0'):
    make_batches(open_records(directory, 'train'), 0, 0)
  with pytest.raises(ValueError, match='process_index=2'):
    make_batches(open_records(directory, 'train'), 4, 0, 2, 2)
  with pytest.raises(ValueError, match=r"no split 'validation' was prepared"):
    make_batches(open_records(directory, 'validation'), 4, 0)
  with pytest.raises(ValueError, match="no split 'tran'"):
    make_batches(open_records(directory, 'tran'), 4, 0)
  with pytest.raises(ValueError, match='no prepared data'):
    make_batches(open_records(tmp_path, 'train'), 4, 0)


def test_batches_ahead_are_in_order_and_complete(directory):
  batches = make_batches(open_records(directory, 'train'), 4, 0)
  for threads, ahead in ((1, 1), (3, 8)):
    got = list(map_ahead(batches.batch_at, range(5, 20), threads, ahead))
    assert [_numbers(b) for b in got] == [_numbers(batches.batch_at(s)) for s in range(5, 20)]
  assert list(map_ahead(batches.batch_at, range(0))) == []


def test_an_error_in_a_thread_comes_in_its_place():
  def work(i):
    if i == 3:
      raise ValueError('three')
    return i
  results = parallel.map_ahead(work, range(10), num_threads=2, ahead=4)
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(ValueError, match='three'):
    next(results)


def test_leaving_early_leaves_no_thread_and_does_not_wait():
  started = []
  def work(i):
    started.append(i)
    time.sleep(0.05)
    return i
  before = threading.active_count()
  for result in parallel.map_ahead(work, itertools.count(), num_threads=2, ahead=50):
    if result == 1:
      count = len(started)
      break
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before
  assert len(started) <= count + 2


def test_work_is_done_ahead_but_not_without_bound():
  taken = []
  def items():
    for i in range(100):
      taken.append(i)
      yield i
  results = parallel.map_ahead(lambda i: i, items(), num_threads=2, ahead=5)
  next(results)
  assert len(taken) == 5


def test_ids_beyond_the_vocabulary_never_reach_a_device(directory):
  smaller = make_batches(open_records(directory, 'train')._replace(vocab_size=50), 4, 0)
  with pytest.raises(ValueError, match='token id .* is not in the vocabulary of 50'):
    smaller.batch_at(0)


def test_damaged_shards_are_named(directory, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(directory, copy)
  shards = sorted(copy.glob('*/train-*.array_record'))
  content = shards[1].read_bytes()
  shards[1].write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match='prepare them anew'):
    make_batches(open_records(copy, 'train'), 4, 0)
  shards[1].write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
  with pytest.raises(ValueError, match='prepare them anew'):
    list(map(make_batches(open_records(copy, 'train'), 4, 0).batch_at, range(10)))
  shards[1].unlink()
  with pytest.raises(ValueError, match='prepare them anew'):
    make_batches(open_records(copy, 'train'), 4, 0)


def test_grain_agrees_about_the_order(directory):
  batches = make_batches(open_records(directory, 'train'), 8, 11)
  reference = grain.MapDataset.range(RECORDS).shuffle(seed=11).repeat(None).batch(8)
  assert [_numbers(batches.batch_at(s)) for s in (0, 7)] == [
    reference[s].tolist() for s in (0, 7)]


def test_a_hung_call_can_be_given_up_and_keeps_no_program_alive():
  code = """
import threading, time
from jaxllm.data import parallel

asked = threading.Event()
for item in parallel.map_ahead(lambda i: time.sleep(1e6 * (i == 3)) or i, range(9),
                               given_up=asked.is_set):
  print(item)
  asked.set()
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stdout.split(), done.stderr) == (0, ['0', '1', '2'], '')
