"""Mixed sources: each record is of one of them, and each source is visited as its share says."""

import json

import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.data import records
from jaxllm.data.batches import open_records
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
    alone.append(records.prepare(one, BYTES, tmp_path / str(number), progress=False).train)
  data = data_of(paths, epochs=(1, 1, 1, 1), packing=packing)
  manifest = records.prepare(data, BYTES, tmp_path / 'out', progress=False)
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
  whole = records.prepare(data, BYTES, tmp_path / 'whole', progress=False)
  for name in ('train', 'validation'):
    lineage, split = records.open_lineage(tmp_path / 'whole', name), whole.split(name)
    sources = [{int(piece['source']) for piece in lineage.pieces(i)} for i in range(split.records)]
    assert all(len(some) == 1 for some in sources)
    found = np.bincount([source for some in sources for source in some], minlength=4)
    assert tuple(found) == split.source_records and sum(split.source_tokens) == split.tokens
  monkeypatch.setattr(records, '_SAVE_SECONDS', 0)
  add, added = records.packing.SplitWriter.add, []

  def limited(self, *args):
    if len(added) == 50:
      raise KeyboardInterrupt
    added.append(0)
    add(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(records.packing.SplitWriter, 'add', limited)
    with pytest.raises(KeyboardInterrupt):
      records.prepare(data, BYTES, tmp_path / 'killed', progress=False)
  assert records.prepare(data, BYTES, tmp_path / 'killed', progress=False) == whole
  for name in ('train', 'validation'):
    assert rows_of(tmp_path / 'killed', name) == rows_of(tmp_path / 'whole', name)


def test_weights_and_epochs_do_not_decide_the_records_but_whether_sources_are_mixed(
  paths, tmp_path
):
  plain, *mixed = (
    records.fingerprint(data_of(paths, **fields), BYTES, tmp_path)
    for fields in ({}, {'weights': (1, 2, 3, 4)}, {'weights': (1, 1, 1, 1), 'epochs': (5,)},
                   {'epochs': (1, 2, 1, 0.5)}))
  assert len({*mixed}) == 1 and plain not in mixed
  manifest = records.prepare(data_of(paths), BYTES, tmp_path / 'out', progress=False)
  assert not manifest.train.source_records
  assert sum(manifest.train.source_tokens) == manifest.train.tokens


@pytest.mark.parametrize('fields, said', [
  ({'weights': (1, 2, 3)}, r'sources\[3\]\.weight=None, but other sources have one'),
  ({'epochs': (1,)}, r'sources\[1\]\.epochs=None, but other sources have one'),
  ({'weights': (1, 2, 3), 'epochs': (1, 1, 1, 1)}, r'sources\[3\]\.weight=None'),
  ({'weights': (1, 2, 3, 0)}, r'sources\.3=.*weight=0'), ({'epochs': (-1,)}, 'epochs=-1'),
  ({'weights': (1, 2, 3, float('inf'))}, 'weight=inf'),
  ({'validation': ({'location': 'a', 'weight': 1.0},)}, 'validation: only what is trained on'),
  ({'cleaning': {'steps': ('decontaminate',),
                 'evaluation': ({'location': 'a', 'epochs': 1.0},)}},
   'cleaning.evaluation: only what is trained on'),
])
def test_mixtures_that_say_too_little_are_refused(paths, fields, said):
  with pytest.raises(ConfigError, match=said):
    data_of(paths, **fields)
