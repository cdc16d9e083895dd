"""Laws of a whole run: stopped and resumed equals never stopped, and nothing is half-written."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm import config as config_lib
from jaxllm import loading, storage
from jaxllm.checkpoints import reading, store
from jaxllm.config import override
from jaxllm.data import batches
from jaxllm.training import dataset, loop, passed_over, state, workdir
from tests import programs
from tests.training import tiny_run as tiny

ONE = slice(0, 1)
WHOLE = {'training__ema_decay': 0.9, 'evaluation__sample_every_steps': 3}


def train(experiment, path):
  return loop.train(experiment, path, jax.devices()[ONE])


def losses(path):
  records = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  return {r['step']: r['train/loss'] for r in records if 'train/loss' in r}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of eight steps that was never stopped."""
  base = tmp_path_factory.mktemp('whole')
  summary = train(tiny.experiment(base, **WHOLE), base / 'run')
  return base, summary


def test_a_run_leaves_all_its_files(whole):
  base, summary = whole
  names = {entry.name for entry in (base / 'run').iterdir()}
  assert names == {
    '.lock', 'config.json', 'tokenizer', 'data.json', 'environment.json', 'environment.jsonl',
    'checkpoints', 'metrics.jsonl', 'tensorboard', 'samples.jsonl', 'summary.json', 'report.html',
  }
  assert summary['complete'] and summary['step'] == 8
  assert list(losses(base / 'run')) == list(range(1, 9))
  scores = summary['validation']
  assert scores['perplexity'] == pytest.approx(np.exp(scores['loss']))
  # Every byte is a token, and each document ends with one more.
  assert scores['bits_per_byte'] == pytest.approx(scores['loss'] / np.log(2), rel=0.02)
  assert config_lib.load(str(base / 'run')) == tiny.experiment(base, **WHOLE)
  lines = (base / 'run' / 'samples.jsonl').read_text().splitlines()
  samples = [json.loads(line) for line in lines]
  assert [(one['step'], one['prompt']) for one in samples] == [
    (3, 'the king'), (6, 'the king'), (8, 'the king')]


def test_a_page_about_the_run_with_a_text_that_it_reads(whole):
  base, _ = whole
  target = base / 'page.html'
  found = programs.run('tools.report', str(base / 'run'), f'--output={target}', '--text=my lord')
  assert found[:2] == (0, f'report: {target}\n')
  page = target.read_text()
  assert page.count('nats" style') == 8 and 'src="data:image/png;base64,iVBOR' in page
  assert not re.search(r'(src|href)="(?!data:)', page) and '<th>layer 1</th>' in page
  assert '<td>layers/attention/query/kernel</td>' in page
  assert re.findall(r'<h3>step (\d+)</h3>', page) == ['3', '6', '8']


@pytest.mark.parametrize(('arguments', 'sentence'), [
  ([], 'name the workdir of a run'),
  (['run', 'nowhere'], "nowhere'"),
  (['records'], 'records holds no metrics.jsonl: no run has begun there'),
  (['run', 'run/../run'], 'is named twice'),
])
def test_a_page_about_no_run_is_one_sentence(whole, arguments, sentence):
  code, out, error = programs.run('tools.report', *(str(whole[0] / name) for name in arguments))
  assert (code, out) == (2, '') and error.startswith('error: ') and error.count('\n') == 1
  assert sentence in error


def test_the_checkpoint_alone_gives_the_model(whole):
  base, _ = whole
  model = loading.load(base / 'run')
  assert model.experiment == tiny.experiment(base, **WHOLE)
  ids = model.encode_prompt('the king')
  assert model.logits(ids).shape == (len(ids), model.config.vocab_size)
  assert model.hidden(ids).shape == (len(ids), model.config.embed_dim)
  assert loading.load(base / 'run' / 'checkpoints' / '8').encode_prompt('x') == (
    model.encode_prompt('x')
  )
  with pytest.raises(ValueError, match='not in the vocabulary'):
    model.logits([model.config.vocab_size])
  alone = loading.generate(model, 'the king', max_new_tokens=8, temperature=0)
  assert loading.generate(
    model, ['the king', 'a'], max_new_tokens=8, temperature=0
  )[0] == alone


def stop_after_five_steps(experiment, path, devices):
  """Train until two steps after the checkpoint of step 3."""
  calls = []

  class Stop(Exception):
    pass

  real = store.check

  def stop_after_five(handle):
    calls.append(1)
    if len(calls) == 5:
      store.wait(handle)
      raise Stop
    real(handle)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store, 'check', stop_after_five)
    with pytest.raises(Stop):
      loop.train(experiment, path, devices)
  assert store.committed_steps(path / 'checkpoints') == [3]


def test_stopped_moved_and_resumed_equals_never_stopped_bit_for_bit(whole):
  base, _ = whole
  experiment = tiny.experiment(base, training__ema_decay=0.9, checkpoint__every_steps=3)
  stop_after_five_steps(experiment, base / 'before', jax.devices()[ONE])
  (base / 'before').rename(base / 'resumed')
  shutil.copytree(experiment.records_path, base / 'copied' / experiment.name)
  moved = override(experiment, {'records_dir': str(base / 'copied')})
  train(moved, base / 'resumed')
  assert [path.name for path in (base / 'copied').iterdir()] == [experiment.name]
  assert losses(base / 'resumed') == losses(base / 'run')
  params = [reading.restore_params(base / name)[0] for name in ('resumed', 'run')]
  jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_run_resumes_on_another_mesh(whole):
  base, summary = whole
  experiment = tiny.experiment(base, training__ema_decay=0.9, checkpoint__every_steps=3)
  split = experiment.replace(mesh={'data': 1, 'fsdp': 4, 'tensor': 2})
  stop_after_five_steps(split, base / 'moved', jax.devices())
  found = train(experiment, base / 'moved')
  expected = losses(base / 'run')
  assert losses(base / 'moved') == pytest.approx(expected, rel=1e-5)
  assert found['validation'] == pytest.approx(summary['validation'], rel=1e-5)


def test_a_second_call_says_that_the_run_is_complete(whole, caplog):
  base, summary = whole
  before = (base / 'run' / 'metrics.jsonl').read_bytes()
  again = train(tiny.experiment(base, **WHOLE), base / 'run')
  assert again == summary
  assert (base / 'run' / 'metrics.jsonl').read_bytes() == before


def contents(path):
  """Return all that describes a run, and would be a lie where a call was refused."""
  names = ('config.json', 'environment.json', 'data.json')
  return {name: (path / name).read_bytes() for name in names if (path / name).exists()}


@pytest.mark.parametrize('field, value, told', [
  ('model.num_layers', 3, 'config.model.num_layers: 2 -> 3'),
  ('seed', 1, 'config.seed: 0 -> 1'),
  ('data.shuffle', False, 'config.data.shuffle: True -> False'),
  ('training.ema_decay', None, 'config.training.ema_decay: 0.9 -> None'),
  ('optimizer.name', 'lion', "config.optimizer.name: 'adamw' -> 'lion'"),
  ('optimizer.clip_norm', None, 'config.optimizer.clip_norm: 1.0 -> None'),
  ('optimizer.momentum_dtype', 'bfloat16', "momentum_dtype: None -> 'bfloat16'"),
])
def test_what_a_run_cannot_change_is_refused_by_field(whole, field, value, told):
  base, _ = whole
  before = contents(base / 'run')
  changes = {'training.num_steps': 20, 'optimizer.weight_decay': 0.0, 'training.ema_decay': 0.9}
  other = override(tiny.experiment(base), {**changes, field: value})
  with pytest.raises(ValueError) as error:
    train(other, base / 'run')
  assert told in str(error.value) and str(error.value).count('->') == 1
  assert contents(base / 'run') == before


def test_what_a_run_changes_is_told_and_a_complete_call_changes_nothing(whole, caplog):
  base, _ = whole
  shutil.copytree(base / 'run', base / 'longer')
  before = contents(base / 'longer')
  changes = {'training__ema_decay': 0.9, 'evaluation__prompts': (), 'optimizer__clip_norm': 0.5}
  train(tiny.experiment(base, **changes), base / 'longer')
  assert contents(base / 'longer') == before
  longer = tiny.experiment(base, training__num_steps=9, training__microbatches=2, **changes)
  with caplog.at_level('INFO', logger='absl'):
    assert train(longer, base / 'longer')['step'] == 9
  assert config_lib.load(str(base / 'longer')) == longer
  told = [r.getMessage() for r in caplog.records]
  assert 'Changed since the last call: config.training.num_steps: 8 -> 9' in told
  assert 'Changed since the last call: config.optimizer.clip_norm: 1.0 -> 0.5' in told
  rates = [float(state.make_schedule(tiny.experiment(base, training__num_steps=n))(8))
           for n in (9, 8)]
  assert f'Learning rate at step 8: {rates[0]:.4g}, was to be {rates[1]:.4g}.' in told
  assert not [text for text in told if 'model' in text or 'batch_size' in text]


def test_a_run_that_changes_its_batch_size_goes_on_where_it_was(tmp_path, monkeypatch):
  read, real = [], batches.Batches.batch_at

  def batch_at(self, step):
    if self.num_epochs is None:
      read.append((step, self.numbers(step)))
    return real(self, step)

  monkeypatch.setattr(batches.Batches, 'batch_at', batch_at)
  for steps, size in ((2, 8), (3, 16), (5, 8), (9, 8)):
    changes = {'training__num_steps': steps, 'training__batch_size': size}
    summary = train(tiny.experiment(
      tmp_path, **changes, schedule__warmup_steps=1, evaluation__prompts=(),
      evaluation__max_batches=1), tmp_path / 'run')
  stored = dataset.open_dataset(tiny.experiment(tmp_path)).stored('train')
  order = batches.make_batches(stored, 1, 0)
  expected = [number for step in range(80) for number in order.numbers(step)]
  read.sort()  # Two threads read ahead.
  assert [number for _, numbers in read for number in numbers] == expected
  assert [step for step, _ in read] == [*range(9)] and len(stored.rows) > 40
  split = json.loads((tmp_path / 'run' / 'data.json').read_text())['train']
  assert summary['train_tokens'] == round(80 * split['tokens'] / split['records'])
  position = reading.read_bundle(tmp_path / 'run' / 'checkpoints' / '9').position
  assert position == {'records': 80, 'phases': [[0, 0, 8], [2, 16, 16], [3, 32, 8]]}


def test_places_that_are_passed_over_are_in_order_and_none_twice():
  old = [{'first': 4, 'last': 6}, {'first': 3, 'last': 7}]  # Of a time of one batch size.
  new = [{'first': 1, 'last': 1, 'places': [12, 15]}, {'first': 0, 'last': 0, 'places': [2, 3]}]
  phases = [batches.Phase(0, 0, 4), batches.Phase(9, 36, 8)]
  assert passed_over.places([*old, *new], phases) == [(2, 3), (12, 31)]


def test_checkpoints_of_before_have_read_their_batch_size_each_step(tmp_path, monkeypatch):
  old = tiny.experiment(tmp_path)
  monkeypatch.setattr(reading, 'read_bundle', lambda path: store.Bundle(old.to_json(), {}, {}))
  records = SimpleNamespace(weights=())
  for size, phases in ((8, [(0, 0, 8)]), (16, [(0, 0, 8), (5, 40, 16)])):
    new = override(old, {'training.batch_size': size})
    assert passed_over.phases(tmp_path, 5, new, records) == [
      batches.Phase(*phase) for phase in phases]
    assert passed_over.phases(tmp_path, 0, new, records) == [batches.Phase(0, 0, size)]


def test_with_privacy_the_batch_size_is_refused(tmp_path):
  changes = {'privacy': {'noise_multiplier': 1.0}, 'training.spike': None}
  old = override(tiny.experiment(tmp_path), changes)
  workdir.check_same_run(old, old, tmp_path)
  with pytest.raises(ValueError, match='training.batch_size: 8 -> 16, which decides what diff'):
    workdir.check_same_run(old, override(old, {'training.batch_size': 16}), tmp_path)


def test_tokens_are_counted_as_they_are_in_the_records(whole):
  base, summary = whole
  train_split = json.loads((base / 'run' / 'data.json').read_text())['train']
  assert summary['train_tokens'] == round(
    8 * 8 * train_split['tokens'] / train_split['records'])


def test_the_best_checkpoint_is_marked_in_the_moment_that_it_is_committed(tmp_path):
  experiment = tiny.experiment(
    tmp_path, training__num_steps=4, evaluation__every_steps=2, evaluation__prompts=(),
    best={'metric': 'validation/loss'})

  class Kill(Exception):
    pass

  def kill(*_):
    raise Kill

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store, 'mark_best', lambda opened, step, facts: step and kill())
    with pytest.raises(Kill):
      train(experiment, tmp_path / 'run')
  assert store.best_step(tmp_path / 'run' / 'checkpoints') == 2
  # Nothing that comes is better, so that only what is there can be marked.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.scoring, 'take', lambda *_: {'validation/loss': 1e9})
    assert train(experiment, tmp_path / 'run')['best_step'] == 2


class BadBatches:
  """Batches of which some have a loss that is not finite; `seen` are their places in the order."""

  def __init__(self, monkeypatch, bad):
    self.seen, self.bad, real = [], bad, batches.Batches.batch_at

    def batch_at(stored, step):
      found = real(stored, step)
      if stored.num_epochs is None:
        index = stored.places(step)[0] // stored.phases[-1].batch_size
        self.seen.append(index)
        if index in self.bad:
          found['weights'] = np.full_like(found['weights'], np.nan)
      return found

    monkeypatch.setattr(batches.Batches, 'batch_at', batch_at)


def test_bad_batches_are_passed_over_and_a_resumed_run_passes_over_the_same(
  tmp_path, monkeypatch, caplog
):
  changes = {'checkpoint__every_steps': 2, 'checkpoint__keep_last': 1,
             'training__max_skipped_steps': 1, 'evaluation__prompts': ()}
  experiment = tiny.experiment(tmp_path, **changes)
  read = BadBatches(monkeypatch, {5, 6})
  summary = train(experiment, tmp_path / 'run')
  assert summary['complete'] and summary['step'] == 8
  # Steps 6 and 7 were skipped; step 5 is suspected; no save at 6. The last good step is 4.
  batch = experiment.training.batch_size
  text = f'passing over batches 4 to 6, places {4 * batch} to {7 * batch - 1} in the order'
  assert f'Going back to step 4 and {text}' in caplog.text
  # The records and the texts in them are named too, whole batches of the seed's order.
  passed, = passed_over.read(tmp_path / 'run')
  texts = ''.join(path.read_text() for path in (tmp_path / 'corpus').iterdir())
  stored = dataset.open_dataset(experiment).stored('train')
  order = batches.make_batches(stored, batch, experiment.seed)
  assert passed['records'] == [number for index in (4, 5, 6) for number in order.numbers(index)]
  assert len(passed['texts']) >= 3 * batch and all(text in texts for text in passed['texts'])
  assert f'records {passed["records"][0]}, {passed["records"][1]}, ' in caplog.text
  assert max(read.seen) == 10
  records = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert all(r['train/applied'] == 1 for r in records if 'train/loss' in r)
  assert records[-1]['goodput/repeated_seconds'] > 0
  # The batches that are passed over are never read again: whole ones in their place change nothing.
  shutil.copytree(tmp_path / 'run', tmp_path / 'again')
  for step in store.committed_steps(tmp_path / 'again/checkpoints'):
    shutil.rmtree(tmp_path / 'again/checkpoints' / str(step))
  read.bad = set()
  train(experiment, tmp_path / 'again')
  assert losses(tmp_path / 'again') == losses(tmp_path / 'run')


def test_a_run_that_is_ruined_again_and_again_stops_and_keeps_its_good_checkpoint(
  tmp_path, monkeypatch
):
  changes = {'checkpoint__every_steps': 1, 'checkpoint__keep_last': 1,
             'training__max_skipped_steps': 2, 'evaluation__prompts': ()}
  BadBatches(monkeypatch, set(range(5, 100)))
  experiment = tiny.experiment(tmp_path, training__max_rollbacks=1, **changes)
  with pytest.raises(loop.TrainingStopped, match='gone back 1 times .*max_rollbacks=1.*is step 4'):
    train(experiment, tmp_path / 'run')
  assert store.committed_steps(tmp_path / 'run/checkpoints') == [4]
  assert (tmp_path / 'run/checkpoints/5.suspect').is_dir()  # It may be good: nothing is deleted.


@pytest.mark.parametrize('changes, message', [
  ({'mesh': {'data': 3}}, 'config.mesh .* needs a multiple of 3 devices'),
  ({'training__batch_size': 6}, 'config.training.batch_size .* 6 rows, .*8 devices'),
  ({'mesh': {'data': 1, 'context': 8}, 'data__context_length': 28},
   'config.data.context_length is 28 tokens, .*8 devices .*context'),
  ({'seed': 2**32}, 'seed=4294967296: .*less than or equal to 4294967295'),
  ({'seed': -1}, 'seed=-1: .*greater than or equal to 0'),
  ({'model__vocab_size': 100}, 'tokenizer has 257 tokens but config.model.vocab_size=100'),
  ({'mesh': {'data': 1, 'tensor': 8}}, 'kv_heads.*8 devices'),
])
def test_what_does_not_fit_is_refused_before_any_step(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    loop.train(tiny.experiment(tmp_path, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_a_refused_config_can_be_put_right_in_the_same_workdir(tmp_path):
  with pytest.raises(ValueError, match='vocab_size'):
    loop.train(tiny.experiment(tmp_path, model__vocab_size=100), tmp_path / 'run')
  right = tiny.experiment(tmp_path, training__num_steps=3, evaluation__prompts=())
  assert train(right, tmp_path / 'run')['step'] == 3


def test_changed_text_is_refused(tmp_path):
  experiment = tiny.experiment(tmp_path, training__num_steps=3, evaluation__prompts=())
  train(experiment, tmp_path / 'run')
  (tmp_path / 'corpus' / '000.txt').write_text('Another text altogether. ' * 40)
  records = sorted((tmp_path / 'records').rglob('*'))
  with pytest.raises(ValueError, match='trained on other records'):
    train(experiment, tmp_path / 'run')
  assert sorted((tmp_path / 'records').rglob('*')) == records


def test_a_run_goes_on_from_its_records_when_its_corpus_is_gone_or_moved(tmp_path):
  experiment = tiny.experiment(tmp_path)
  begun = dataset.open_dataset(experiment).manifest.fingerprint
  (tmp_path / 'corpus').rename(tmp_path / 'moved')
  moved = override(experiment, {'data.sources': [{'location': str(tmp_path / 'moved')}]})
  workdir.check_same_run(experiment, moved, tmp_path)
  assert dataset.open_dataset(moved, begun).manifest.fingerprint == begun
  found = dataset.open_dataset(experiment, begun)
  assert found.manifest.fingerprint == begun
  assert found.make_batches('train', 2, True, None).batch_at(0)['tokens'].shape == (2, 32)
  # Another run needs the text, and a run without records too.
  for other in (None, 'another'):
    with pytest.raises(ValueError, match='corpus'):
      dataset.open_dataset(experiment, other)
  shutil.rmtree(tmp_path / 'records')
  with pytest.raises(ValueError, match='corpus'):
    dataset.open_dataset(experiment, begun)


def test_an_unwritable_workdir_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='--workdir=.*cannot write there'):
    train(tiny.experiment(tmp_path), tmp_path / 'file' / 'run')


SCRIPT = '''
import jax, pathlib, sys
sys.path.insert(0, {root!r})
from tests import programs
from tests.training import tiny_run as tiny
from jaxllm.training import loop
base = pathlib.Path({base!r})
summary = loop.train(tiny.experiment(base, training__num_steps=100000), base / 'run')
print('SUMMARY', summary)
'''


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_zero(tmp_path, number):
  root = str(pathlib.Path(__file__).parents[2])
  environment = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('=8', '=1')}
  tiny.experiment(tmp_path)  # Writes the corpus.
  process = subprocess.Popen(
    [sys.executable, '-c', SCRIPT.format(root=root, base=str(tmp_path))],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
  )
  for line in process.stderr:
    if line.startswith('step '):
      break
  process.send_signal(number)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and "'complete': False" in output
  step = store.committed_steps(tmp_path / 'run' / 'checkpoints')[-1]
  assert step > 0 and f"'step': {step}," in output


@pytest.mark.parametrize('complete, code', [(False, 75), (True, 0)])
def test_the_exit_code_tells_stopped_from_finished(tmp_path, complete, code):
  summary = {'step': 3, 'num_steps': 8, 'complete': complete, 'parameters': 1}
  program = f"""
import sys
from jaxllm import config, train
from jaxllm.training import loop
loop.train = lambda *_, **__: {summary}
sys.argv = ['train', '--config=experiments/quickstart.py', '--workdir={tmp_path}']
config.run_program(train.main, train.FLAGS)
"""
  done = subprocess.run([sys.executable, '-c', program], cwd=pathlib.Path(__file__).parents[2],
                        capture_output=True, text=True, check=False)
  assert done.returncode == code, done.stderr


def test_fewer_steps_than_were_taken_are_refused(whole):
  base, _ = whole
  config = tiny.experiment(base, training__ema_decay=0.9, training__num_steps=5)
  with pytest.raises(ValueError, match='has taken 8 steps, more than config.training.num_steps=5'):
    train(config, base / 'run')


def test_a_run_begins_with_the_parameters_of_another(whole):
  base, summary = whole
  changes = {'init_from': str(base / 'run'), 'training__ema_decay': 0.9, 'evaluation__prompts': ()}
  fixed = {'optimizer__learning_rate': 1e-30, 'optimizer__weight_decay': 0.0}
  train(tiny.experiment(base, training__num_steps=3, **fixed, **changes), base / 'tuned')
  for got, want in zip(
    jax.tree.leaves(reading.restore_params(base / 'tuned')[0]),
    jax.tree.leaves(loading.load(base / 'run').variables['params']), strict=True,
  ):
    np.testing.assert_allclose(got, want, atol=1e-6)
  with pytest.raises(ValueError, match=r'init_from.*does not fit.*\n.*layers/attention'):
    train(tiny.experiment(base, model__num_layers=1, **changes), base / 'smaller')
  other = tiny.experiment(
    base, tokenizer={'kind': 'sentencepiece', 'model_type': 'char', 'byte_fallback': False},
    records_dir=str(base / 'r2'),
    **changes,
  )
  with pytest.raises(ValueError, match='another tokenizer'):
    train(other, base / 'retokenised')


def test_checkpoints_by_time_are_between_those_by_step(tmp_path, monkeypatch):
  hours = iter(range(0, 3600 * 10**6, 3600))
  monkeypatch.setattr(loop.time, 'monotonic', lambda: next(hours))
  # A clock on the wall that goes back is not asked.
  monkeypatch.setattr(loop.time, 'time', lambda: 0.0)
  timed = tiny.experiment(
    tmp_path, training__num_steps=4, checkpoint__every_steps=4, checkpoint__every_seconds=1.0,
    checkpoint__keep_last=9, evaluation__every_steps=9, evaluation__prompts=())
  train(timed, tmp_path / 'timed')
  assert store.committed_steps(tmp_path / 'timed' / 'checkpoints') == [1, 2, 3, 4]
  patient = override(timed, {'checkpoint.every_seconds': 1e9})
  train(patient, tmp_path / 'patient')
  assert store.committed_steps(tmp_path / 'patient' / 'checkpoints') == [4]


def test_several_processes_save_by_the_clock_of_the_first(tmp_path, monkeypatch):
  experiment = tiny.experiment(
    tmp_path, training__log_every_steps=5, checkpoint__every_seconds=10.0)
  monkeypatch.setattr(loop.jax, 'process_count', lambda: 2)
  asked = []
  monkeypatch.setattr(
    loop.multihost_utils, 'broadcast_one_to_all', lambda due: asked.append(due) or True)
  assert loop._is_late(experiment, 5, since=time.monotonic())
  assert asked == [False], 'process 0 has said so'
  assert not loop._is_late(experiment, 6, since=0.0) and len(asked) == 1


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
  changes = {'checkpoint__every_steps': 4, 'evaluation__prompts': (), 'schedule__name': 'constant'}
  train(tiny.experiment(tmp_path, **changes), tmp_path / 'run')
  want = losses(tmp_path / 'run')
  damage(tmp_path / 'run' / 'checkpoints' / '8')
  longer = tiny.experiment(tmp_path, training__num_steps=9, **changes)
  with caplog.at_level('WARNING'):
    assert train(longer, tmp_path / 'run')['step'] == 9
  assert 'It is called 8.damaged now' in caplog.text
  assert store.committed_steps(tmp_path / 'run' / 'checkpoints') == [4, 8, 9]
  found = losses(tmp_path / 'run')
  assert all(found[step] == loss for step, loss in want.items()) and len(found) == len(want) + 1
  starts = (tmp_path / 'run' / 'environment.jsonl').read_text().split('\n')
  assert len(starts) == 3 and not (tmp_path / 'run' / workdir.LOCK).exists()


def damage(step):
  """Flip a bit in the largest file of a step."""
  file = max((path for path in step.rglob('*') if path.is_file() and path.parent.name != 'bundle'),
             key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def test_a_second_start_says_who_holds_the_directory(tmp_path, monkeypatch):
  with workdir.held(tmp_path):
    with pytest.raises(ValueError, match=f'is held by process {os.getpid()} of .* since 20'):
      with workdir.held(tmp_path):
        pass
    holder = storage.read_json(tmp_path / workdir.LOCK)
  assert not (tmp_path / workdir.LOCK).exists()
  # A process that is gone, or another one of its number.
  for change in ({'pid': 2**22 + 1}, {'started': '1'}):
    storage.write_json(tmp_path / workdir.LOCK, {**holder, **change})
    with workdir.held(tmp_path):
      pass
  killed = subprocess.Popen(['sleep', '60'])
  storage.write_json(tmp_path / workdir.LOCK, {
    **holder, 'pid': killed.pid, 'started': workdir._started(killed.pid)})
  with pytest.raises(ValueError, match=f'is held by process {killed.pid}'):
    with workdir.held(tmp_path):
      pass
  killed.kill()
  killed.wait()
  with workdir.held(tmp_path):
    pass
  # Another host, or nobody knows which: alive while its sign of life changes.
  monkeypatch.setattr(workdir, 'STALE_SECONDS', 0.05)
  elsewhere = {**holder, 'host': 'elsewhere'}
  for content in (json.dumps(elsewhere), '{"host', ''):
    (tmp_path / workdir.LOCK).write_text(content)
    with workdir.held(tmp_path):
      pass
  (tmp_path / workdir.LOCK).write_text('{"host')
  monkeypatch.setattr(workdir.time, 'sleep', lambda _: storage.write_json(
    tmp_path / workdir.LOCK, {**elsewhere, 'beat': 1}))
  with pytest.raises(ValueError, match='of elsewhere since'):
    with workdir.held(tmp_path):
      pass


def test_devices_without_memory_are_one_sentence_and_a_page(tmp_path, monkeypatch):
  def make(*_):
    def step(*_):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAt')
    return step

  monkeypatch.setattr(loop.step_lib, 'make_train_step', make)
  said = 'Out of memory allocating 9 bytes.*microbatches'
  with pytest.raises(loop.TrainingStopped, match=said) as stopped:
    train(tiny.experiment(tmp_path), tmp_path / 'run')
  assert 'GiB per device  0.00 of' in str(stopped.value)
