"""A run of a mixture goes on where each source was, whatever is changed, and says what it reads."""

import json
from types import SimpleNamespace

import jax
import pytest

from jaxllm import storage
from jaxllm.checkpoints import reading
from jaxllm.data import batches
from jaxllm.data.batches import Phase
from jaxllm.tools import which_docs
from jaxllm.training import dataset, loop, passed_over
from tests import programs
from tests.training import tiny_run as tiny


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mixture')
  for name, count in (('one', 40), ('two', 2)):
    tiny.write_corpus(directory / name, count)
  for path in (directory / 'two').iterdir():
    path.write_text(path.read_text().replace('scene', 'tale'))
  return directory


def experiment(base, one, two, **changes):
  sources = [{'location': str(base / 'one'), **one}, {'location': str(base / 'two'), **two}]
  return tiny.experiment(base, **{
    'data__sources': sources, 'schedule__warmup_steps': 1, 'evaluation__prompts': (),
    'evaluation__max_batches': 1, 'evaluation__every_steps': 100, **changes})


def train(config, path):
  return loop.train(config, path, jax.devices()[:1])


def test_a_run_whose_mixture_changes_reads_each_record_once_in_each_epoch_of_its_source(
  base, tmp_path, monkeypatch, caplog
):
  read, real = {}, batches.Batches.batch_at

  def batch_at(self, step):
    if self.num_epochs is None:
      read[step] = self.numbers(step)
    return real(self, step)

  monkeypatch.setattr(batches.Batches, 'batch_at', batch_at)
  run = tmp_path / 'run'
  for steps, size, one, two in (
      (2, 8, {'weight': 0.75}, {'weight': 0.25}), (3, 16, {'epochs': 1.0}, {'epochs': 2.0}),
      (7, 8, {'weight': 1, 'epochs': 0.9}, {'weight': 1, 'epochs': 2.0})):
    config = experiment(base, one, two, training__num_steps=steps, training__batch_size=size)
    with caplog.at_level('INFO', logger='absl'), monkeypatch.context() as patch:
      if steps < 7:
        patch.setattr(loop, '_finish', lambda *_: {})
      summary = train(config, run)
  opened = dataset.open_dataset(config)
  counts = opened.manifest.train.source_records
  every = [number for step in range(7) for number in read[step]]
  sources = [[number for number in every if (number < counts[0]) == (source == 0)]
             for source in range(2)]
  assert [sum(number < counts[0] for number in every[at]) for at in (
    slice(16), slice(32, 64))] == [12, 16]
  for own, size in zip(sources, counts, strict=True):
    for start in range(0, len(own), size):
      assert len({*own[start : start + size]}) == len(own[start : start + size])
  assert len(sources[1]) > counts[1] and len(sources[0]) < counts[0]
  position = reading.read_bundle(run / 'checkpoints' / '7').position
  assert [Phase(*row) for row in position['phases']] == [
    Phase(0, 0, 8, 0, [0.75, 0.25]), Phase(2, 16, 16, 16, [counts[0], 2 * counts[1]]),
    Phase(3, 32, 8, 32, [1, 1])]
  told = caplog.text
  assert f'in 7 steps {base / "two"} gives' in told
  assert 'Changed since the last call: config.data.sources.1.weight: None -> 1' in told
  split = json.loads((run / 'data.json').read_text())['train']
  own = [sum(number < counts[0] for number in every)]
  own.append(64 - own[0])
  assert summary['train_tokens'] == round(sum(
    count * tokens / size for count, tokens, size in zip(
      own, split['source_tokens'], counts, strict=True)))
  assert json.loads((run / 'data.json').read_text())['data']['sources'][1]['epochs'] == 2
  # Each step is led back to what it has read, before changes and after.
  found = which_docs.open_run(str(run))
  assert [found.batches.numbers(step) for step in range(7)] == [read[step] for step in range(7)]
  for step in (1, 2, 6):
    for number, spans in zip(read[step], which_docs.originals(read[step], found), strict=True):
      source = int(number >= counts[0])
      for span in spans:
        path = base / ('two' if source else 'one') / f'{span.document:03}.txt'
        assert span.where.startswith(f'{path}, ') and f'of source {source},' in span.where
        assert path.read_text()[slice(*span.characters)] == span.text
  # Too often, or with records of another kind: refused before anything is computed.
  monkeypatch.setattr(loop.start, 'initial_state', None)
  more = {'training__num_steps': 60}
  with pytest.raises(ValueError, match=(
      r"data\.sources: '.*two' has epochs=2, but with weight=1 60 steps visit it \d+\.\d\d times; "
      r'lower its weight or config\.training\.num_steps, or raise its epochs')):
    train(experiment(base, {'weight': 1}, {'weight': 1, 'epochs': 2}, **more), run)
  with pytest.raises(ValueError, match=(
      r'cannot change config\.data\.sources\.0\.weight: 1\.0 -> None, .*decides whether a record')):
    train(experiment(base, {}, {}, **more), run)
  code, shown, error = programs.run('prepare', f'--config={run}')
  assert code == 0 and shown.count('  in 7 steps ') == 2, error


def test_a_new_mixture_begins_after_what_is_passed_over(tmp_path, monkeypatch):
  old = tiny.experiment(tmp_path)
  position = {'phases': [[0, 0, 8], [3, 24, 8, 0, [1.0, 3.0]]]}
  monkeypatch.setattr(reading, 'read_bundle', lambda path: reading.Bundle(
    old.to_json(), {}, {}, position=position))
  begun = [Phase(0, 0, 8), Phase(3, 24, 8, 0, (1.0, 3.0))]
  for places, weights, added in (
      ([], (1.0, 3.0), []), ([], (1.0, 1.0), [Phase(5, 40, 8, 40, (1.0, 1.0))]),
      ([[10, 11]], (1.0, 1.0), [Phase(5, 40, 8, 42, (1.0, 1.0))]),
      ([[10, 11], [50, 59]], (1.0, 1.0), [Phase(5, 40, 8, 60, (1.0, 1.0))])):
    storage.write_json(tmp_path / passed_over.FILE, {'batches': [
      {'first': 0, 'last': 0, 'places': place} for place in places]})
    found = passed_over.phases(tmp_path, 5, old, SimpleNamespace(weights=weights))
    assert found == [*begun, *added]
  # Another batch size changes nothing in the order.
  larger = tiny.experiment(tmp_path, training__batch_size=16)
  found = passed_over.phases(tmp_path, 5, larger, SimpleNamespace(weights=(1.0, 3.0)))
  assert found == [*begun, Phase(5, 40, 16, 0, (1.0, 3.0))]


def test_a_source_without_records_and_privacy_are_refused(base, tmp_path):
  (tmp_path / 'empty.txt').write_text(' ')
  one, two = {'weight': 1}, {'weight': 1, 'location': str(tmp_path / 'empty.txt')}
  with pytest.raises(ValueError, match=r"data\.sources: '.*empty\.txt' gives no training record"):
    train(experiment(base, one, two, data__cleaning__steps=('whitespace',)), tmp_path / 'run')
  with pytest.raises(ValueError, match='data.sources with weights or epochs: with privacy'):
    experiment(base, one, one, privacy={'noise_multiplier': 1.0}, training__spike=None)


def test_a_dry_run_says_what_each_source_will_give(base):
  sources = [{'location': str(base / name), 'weight': weight} for name, weight in (
    ('one', 3), ('two', 1))]
  code, _, said = programs.run(
    'prepare', '--config=experiments/quickstart.py', '--dry_run',
    f'--config.data.sources={json.dumps(sources)}', '--config.training.num_steps=1000',
    '--config.training.batch_size=16')
  assert code == 0, said
  assert '  weight=3: 75.0% of what is read, 12,000 records' in said
