"""No token is lost or doubled as a target, and no target lies in another segment."""

import numpy as np
import pytest

from jaxllm.data import packing, shards
from jaxllm.data.records import DataConfig


def _pack(policy, sequences, context_length):
  dtype = packing.record_dtype(context_length, 1000)
  packer = packing.PACKERS[policy](dtype, ())
  records = [record for tokens in sequences for record in packer.add(np.array(tokens))]
  records += packer.finish()
  return np.array([record.row for record in records], dtype)


def _pairs(records):
  """All (input, target) with weight, of tokens that are unique in the test's sequences."""
  batch = packing.batch_arrays(records)
  chosen = batch['weights'] > 0
  pairs = zip(batch['tokens'][chosen].tolist(), batch['targets'][chosen].tolist(), strict=True)
  return sorted(pairs)


def test_packed_literal():
  records = _pack('packed', [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11]], 4)
  assert records['tokens'].tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [10, 11, 0, 0, 0]]
  assert records['segment_ids'].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
  batch = packing.batch_arrays(records)
  assert batch['tokens'].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [10, 11, 0, 0]]
  assert batch['targets'].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [11, 0, 0, 0]]
  assert batch['weights'].tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 0, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]]
  assert {name: array.dtype.name for name, array in batch.items()} == {
    'tokens': 'int32', 'targets': 'int32', 'weights': 'float32', 'segment_ids': 'int32',
    'positions': 'int32'}


def test_no_sequence_begins_where_it_could_have_no_target():
  records = _pack('packed', [[1, 2, 3, 4], [5, 6]], 4)
  assert records['tokens'].tolist() == [[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]
  assert records['segment_ids'].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_stream_literal():
  records = _pack('concat', [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], 4)
  assert records['tokens'].tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 0, 0, 0]]
  batch = packing.batch_arrays(records)
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
  assert batch['weights'].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]


def test_whole_literal():
  records = _pack('best_fit', [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16]], 4)
  # The seven tokens are cut; 8 and 9 fill the record of 1, 2, 3 and what is left begins another.
  assert sorted(records['tokens'].tolist()) == [
    [1, 2, 3, 8, 9], [4, 5, 6, 7, 0], [10, 11, 12, 13, 14], [14, 15, 16, 0, 0]]


def _random_sequences(seed, longest):
  draw = np.random.default_rng(seed)
  sizes = draw.integers(1, longest, 60)
  ends = np.cumsum(sizes)
  return [np.arange(end - size + 1, end + 1) % 1000 for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize('policy', packing.PACKERS)
@pytest.mark.parametrize('context_length', [1, 2, 7, 32])
@pytest.mark.parametrize('longest', [2, 5, 16])
def test_every_pair_of_a_sequence_is_trained_exactly_once(policy, context_length, longest):
  sequences = _random_sequences(context_length, longest)
  joined = [np.concatenate(sequences)] if policy == 'concat' else sequences
  expected = sorted((int(a), int(b)) for s in joined for a, b in zip(s[:-1], s[1:], strict=True))
  records = _pack(policy, sequences, context_length)
  assert _pairs(records) == expected
  assert packing.batch_arrays(records)['weights'].sum() == len(expected)


def test_whole_cuts_nothing_that_fits_and_wastes_little():
  sequences = _random_sequences(3, 20) * 5
  records = _pack('best_fit', sequences, 31)
  segments = records['segment_ids']
  pieces = sum(int(row.max()) for row in segments)
  assert pieces == len(sequences)
  assert (segments > 0).mean() > 0.9
  packed = _pack('packed', sequences, 31)
  assert (packed['segment_ids'][:-1] > 0).mean() > 0.99


def test_one_document_literal():
  records = _pack('one_document', [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12]], 4)
  assert records['tokens'].tolist() == [
    [1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 9, 10], [10, 11, 12, 0, 0]]
  assert (records['segment_ids'] == (records['tokens'] > 0)).all()


@pytest.mark.parametrize('policy', packing.PACKERS)
@pytest.mark.parametrize('context_length', [1, 7, 32])
@pytest.mark.parametrize('longest', [2, 16, 70])
def test_lengths_alone_decide_where_each_token_goes_and_none_is_lost(
  policy, context_length, longest
):
  mixed = longest == 16
  data = DataConfig(context_length=context_length, packing=policy, sources=[
    {'location': name, 'weight': 1.0 if mixed else None} for name in 'abc'])
  sequences = {(number // 20, number): ids for number, ids in enumerate(
    _random_sequences(context_length, longest))}
  real, planned = (shards.SplitPacker(data, 1000) for _ in range(2))
  records, plans = [], []
  for (source, document), ids in sequences.items():
    nothing = np.broadcast_to(np.int64(0), len(ids))
    records += real.add(shards.Tokens('train', ids, source, document, 2 * len(ids), 2))
    plans += planned.add(shards.Tokens('train', nothing, source, document, 2 * len(ids), 2))
  records += real.finish()
  plans += planned.finish()
  assert real.counts() == planned.counts() and len(records) == len(plans)
  found = set()
  for record, plan in zip(records, plans, strict=True):
    assert record.pieces == plan.pieces and record.room == plan.room
    tokens = []
    for (_, source, document, token), size in zip(plan.pieces, plan.sizes().tolist(), strict=True):
      tokens += sequences[source, document][token : token + size].tolist()
      found.update((source, document, token + place) for place in range(size))
    row = packing.fill(record.row.dtype, np.array(tokens), plan.sizes(), policy == 'concat')
    assert (row == record.row).all()
  counts = real.counts()
  assert counts['documents'] == len(sequences) and not (
    mixed and any(len({piece[1] for piece in record.pieces}) > 1 for record in records))
  assert counts['tokens'] == sum(map(len, sequences.values())) == (
    len(found) + counts['dropped_tokens'])
  assert counts['target_tokens'] == packing.batch_arrays(
    np.array([record.row for record in records], packing.record_dtype(context_length, 1000))
  )['weights'].sum()


def test_whole_keeps_a_bounded_number_of_records_open():
  packer = packing.PACKERS['best_fit'](packing.record_dtype(9, 1000), ())
  early = [row for _ in range(200) for row in packer.add(np.arange(6))]
  assert len(early) == 200 - packing._OPEN_RECORDS
  assert len(list(packer.finish())) == packing._OPEN_RECORDS


def test_positions_restart_exactly_where_segments_do():
  batch = packing.batch_arrays(_pack('packed', _random_sequences(5, 9), 24))
  for segments, positions in zip(batch['segment_ids'], batch['positions'], strict=True):
    for segment in set(segments.tolist()) - {0}:
      own = positions[segments == segment]
      assert own.tolist() == list(range(len(own)))
  assert not batch['positions'][batch['segment_ids'] == 0].any()


def test_wide_vocabularies_and_contexts_keep_their_values():
  assert packing.record_dtype(4, 65_536)['tokens'].base == np.dtype('<u2')
  dtype = packing.record_dtype(70_000, 65_537)
  assert dtype['tokens'].base == dtype['segment_ids'].base == np.dtype('<u4')
  packer = packing.PACKERS['packed'](dtype, ())
  assert list(packer.add(np.array([65_536, 1]))) == []
  record, = packer.finish()
  assert record.row['tokens'][:2].tolist() == [65_536, 1]
