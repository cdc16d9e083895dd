"""The seconds of a run by cause sum to its age; traces name the phases of steps."""

import contextlib
import json
import re
import subprocess
import sys
import time
import types

import jax
import pytest

from jaxllm import mistakes, train
from jaxllm.checkpoints import store
from jaxllm.training import goodput, loop, metrics, report
from tests.training import tiny_run as tiny


def ledger(record):
  return {cause: record.get(f'goodput/{cause}_seconds') for cause in goodput.CAUSES}


class Killed(Exception):
  pass


def test_a_killed_and_resumed_run_accounts_for_all_its_time(tmp_path, monkeypatch):
  experiment = tiny.experiment(
    tmp_path, training__num_steps=6, checkpoint__every_steps=3, evaluation__every_steps=3)
  real, calls = store.check, []

  def kill(handle):
    calls.append(1)
    if len(calls) == 5:
      store.wait(handle)
      raise Killed
    real(handle)

  monkeypatch.setattr(store, 'check', kill)
  began = time.time()
  with pytest.raises(Killed):
    loop.train(experiment, tmp_path / 'run', jax.devices()[:1])
  time.sleep(0.5)
  before = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  summary = loop.train(
    experiment, tmp_path / 'run', jax.devices()[:1], profile_steps=(5, 6))
  wall = time.time() - began
  found = ledger(summary['goodput'])
  assert sum(found.values()) == pytest.approx(wall, abs=0.5)
  assert min(found.values()) >= 0
  assert 0.5 <= found['down'] < wall
  # The checkpoint is that of step 3; the useful seconds after it have been in vain.
  assert store.committed_steps(tmp_path / 'run' / 'checkpoints')[0] == 3 < before[-1]["step"]
  assert found['repeated'] > 0
  assert found['skipped'] == 0 and found['start'] > 0 and found['samples'] > 0
  assert summary['goodput']['goodput/fraction'] == pytest.approx(
    found['useful'] / sum(found.values()))
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert all(goodput.CAUSES[cause] in page for cause in ('samples', 'repeated', 'down'))
  ages = [sum(ledger(record).values())
          for record in metrics.read(tmp_path / 'run' / 'metrics.jsonl')]
  assert ages == sorted(ages)
  traces = list((tmp_path / 'run' / 'profile' / 'plugins' / 'profile' / 'steps_5_to_6').iterdir())
  space, = [file for file in traces if file.name.endswith('.xplane.pb')]
  assert space.name.startswith('0-')
  content = space.read_bytes()
  for phase in (b'train', b'data', b'device', b'evaluation', b'checkpoints', b'optimizer',
                b'jvp(loss)', b'transpose(jvp(loss))'):
    assert phase in content, phase


def test_the_report_shows_where_the_time_went(tmp_path):
  record = {'step': 3, 'time': 1e9, 'train/loss': 1.0, 'recompilations/train_step': 2.0,
            **{f'goodput/{cause}_seconds': 0.0 for cause in goodput.CAUSES}}
  record |= {'goodput/fraction': 0.75, 'goodput/useful_seconds': 90.0,
             'goodput/repeated_seconds': 30.0}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
  page = report.write_report(tmp_path).read_text()
  for words in ('01:30, 75.0 %', 'done again after a restart', '00:30, 25.0 %',
                'compiled again: train_step', '2 times'):
    assert words in page, words
  assert goodput.CAUSES['down'] not in page


class Clock:
  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(goodput, 'time', self)

  def monotonic(self):
    return self.now

  def time(self):
    return 1e9 + self.now


def test_a_wall_clock_that_was_set_back_counts_for_nothing():
  """All durations are by the monotonic clock, but the time between two starts."""
  clock = goodput.Goodput()
  clock.resume([{'step': 3, 'time': time.time() + 86_400, 'train/elapsed_seconds': 10.0,
                 'goodput/useful_seconds': 8.0, 'goodput/start_seconds': 2.0}], 3)
  found = clock.scalars()
  clock.close()
  assert ledger(found)['down'] == 0 and 10 <= found['train/elapsed_seconds'] < 20
  assert 10 <= sum(ledger(found).values()) < 20 and 0 < found['goodput/fraction'] <= 1


def test_each_second_has_one_cause_and_a_step_that_was_skipped_is_lost(monkeypatch):
  clock = Clock(monkeypatch)
  with contextlib.closing(goodput.Goodput()) as spent:
    clock.now += 5
    spent.end_step(True)  # The first one: it compiles.
    clock.now += 3
    spent.end_step(True)
    clock.now += 2
    with spent.spend('evaluation'):
      clock.now += 7
      with spent.spend('checkpoints'):
        clock.now += 4
    spent.end_step(False)
    clock.now += 1
    spent._count('/jax/core/compile/backend_compile_duration', 0.5, fun_name='jit(f)')
    assert not spent.recompilations
    spent._count('/jax/core/compile/backend_compile_duration', 0.25, fun_name='jit(f)')
    record = spent.scalars()
  assert {cause: seconds for cause, seconds in ledger(record).items() if seconds} == {
    'start': 5.75, 'useful': 3.25, 'skipped': 2, 'evaluation': 7, 'checkpoints': 4}
  assert record['recompilations/f'] == 1 and record['goodput/fraction'] == 3.25 / 22
  records = [{'step': 10, 'time': 1e9 + 110, 'goodput/useful_seconds': 1.25},
             {'step': 20, 'time': 1e9 + 122, **record}]
  clock.now += 30
  with contextlib.closing(goodput.Goodput()) as resumed:
    resumed.resume(records, 10)
    found = ledger(resumed.scalars())
  assert sum(found.values()) == 52
  assert (found['useful'], found['repeated'], found['down']) == (1.25, 2.0, 30.0)


@pytest.mark.parametrize('text', ['', '10', '15:10', '0:3', 'a:b', '-1:2', '1:2:3', '１:２'])
def test_a_malformed_range_of_steps_is_refused(text):
  with pytest.raises(ValueError, match='expected FIRST:LAST, the numbers of two steps from 1 on'):
    goodput.parse_steps(text)
  assert goodput.parse_steps('10:15') == (10, 15)


def test_steps_past_the_end_are_refused(tmp_path):
  with pytest.raises(ValueError, match='profile_steps=5:9: the run ends with step 8'):
    loop.train(tiny.experiment(tmp_path), tmp_path / 'run', jax.devices()[:1], (5, 9))


@pytest.fixture
def trackers(monkeypatch):
  """Stand-ins of wandb and trackio that record what they are asked."""
  calls = []

  def called(name):
    return lambda *args, **options: calls.append((name, args, options))

  run = types.SimpleNamespace(log=called('wandb.log'), finish=called('wandb.finish'))
  modules = {
    'wandb': {'init': lambda **options: calls.append(('wandb.init', (), options)) or run},
    'trackio': {name: called(f'trackio.{name}') for name in ('init', 'log', 'finish')}}
  for name, functions in modules.items():
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
  return calls


def test_trackers_get_the_metrics_and_a_resumed_run_goes_on_in_theirs(tmp_path, trackers):
  experiment = tiny.experiment(tmp_path, training__writers=('wandb', 'trackio'))
  for step in (0, 4):
    with metrics.open_writer(tmp_path, experiment, step) as write:
      write(step + 2, {'train/loss': 1.5, 'train/mfu': None})
  names = [name for name, *_ in trackers]
  assert names == 2 * ['wandb.init', 'trackio.init', 'wandb.log', 'trackio.log', 'wandb.finish',
                       'trackio.finish']
  options = [options for name, _, options in trackers if name.endswith('init')]
  assert options[:2] == options[2:]
  assert options[0]['resume'] == options[1]['resume'] == 'allow'
  assert options[1]['name'] == f'tiny-{options[0]["id"]}'
  assert options[0]['config']['training']['num_steps'] == 8
  logged = [(args, options) for name, args, options in trackers if name.endswith('log')]
  assert logged == [(({'train/loss': 1.5},), {'step': step}) for step in (2, 2, 6, 6)]
  assert not (tmp_path / 'tensorboard').exists()


def test_only_the_first_process_tells_trackers(tmp_path, trackers, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with metrics.open_writer(tmp_path, tiny.experiment(tmp_path, training__writers=('wandb',))):
    pass
  assert trackers == []


def test_a_missing_tracker_is_told_before_anything_is_computed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'trackio', None)
  with pytest.raises(ImportError) as caught:
    loop.train(tiny.experiment(tmp_path, training__writers=('trackio',)), tmp_path / 'run')
  assert re.fullmatch('the package trackio is not installed: pip install .*trackio.*',
                      mistakes.sentence(caught.value, train.FLAGS.values))
  assert not (tmp_path / 'run').exists()


def test_a_watchdog_says_what_hangs_and_ends_the_process():
  code = """
import contextlib, time
from jaxllm.training import goodput
with contextlib.closing(goodput.Goodput(0.4)) as spent:
  with spent.spend('evaluation'):
    time.sleep(0.8)  # Before the first step nothing is watched.
  spent.end_step(True)
  with spent.spend('evaluation'):
    time.sleep(0.1)
  with spent.spend('data'):
    time.sleep(60)
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=50)
  assert done.returncode == goodput.HUNG
  assert ('error: nothing has moved for 0.4 seconds (config.training.watchdog_seconds) in: waiting '
          'for data; the stacks') in done.stderr
  assert 'most recent call first' in done.stderr and '"<string>", line 11' in done.stderr


def test_a_watchdog_has_more_patience_with_the_start_and_ends_unheard_too():
  code = """
import sys, time
from jaxllm.training import goodput
sys.__stderr__ = open('/dev/full', 'w')  # Where nothing can be written.
spent = goodput.Goodput(0.04)
spent.expect_start()
with spent.spend('data'):
  time.sleep(0.2)
print('patient', flush=True)
time.sleep(60)
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=50)
  assert done.returncode == goodput.HUNG and done.stdout == 'patient\n'
