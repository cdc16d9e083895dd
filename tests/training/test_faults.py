"""Faults on purpose happen when they are due, once in the life of a run."""

import json
import resource
import signal

import jax
import pytest

from jaxllm.checkpoints import store
from jaxllm.config import ConfigError
from jaxllm.training import faults, loop, metrics
from tests.training import tiny_run as tiny


def train(experiment, path):
  return loop.train(experiment, path, jax.devices()[:1])


def test_faults_happen_once_and_a_resumed_run_is_spared(tmp_path, monkeypatch, caplog):
  class Killed(Exception):
    pass

  def kill(process, number):
    assert number == signal.SIGKILL
    raise Killed

  slept = []
  monkeypatch.setattr(faults.os, 'kill', kill)
  monkeypatch.setattr(faults.time, 'sleep', slept.append)
  experiment = tiny.experiment(
    tmp_path, training__faults=('nan@3', 'stall@2:7', 'slow_disk@3:5', 'kill@6'),
    checkpoint__every_steps=4, evaluation__prompts=())
  with pytest.raises(Killed):
    train(experiment, tmp_path / 'run')
  assert slept.count(7.0) == slept.count(5.0) == 1
  assert json.loads((tmp_path / 'run/faults.json').read_text())['happened'] == [
    'stall@2:7', 'nan@3', 'slow_disk@3:5', 'kill@6']
  assert 'config.training.faults at step 3: nan@3.' in caplog.text
  assert train(experiment, tmp_path / 'run')['complete']
  applied = {record['step']: record['train/applied']
             for record in metrics.read(tmp_path / 'run/metrics.jsonl') if 'train/loss' in record}
  assert applied == {step: float(step != 3) for step in range(1, 9)}


def test_a_full_disk_is_one_sentence_and_older_steps_are_whole(tmp_path):
  experiment = tiny.experiment(
    tmp_path, training__faults=('full_disk@4',), checkpoint__every_steps=2,
    evaluation__prompts=(), checkpoint__asynchronous=False)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    with pytest.raises(store.CheckpointError, match='saving step 4 .*\\n.*step 2 is whole'):
      train(experiment, tmp_path / 'run')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert store.committed_steps(tmp_path / 'run/checkpoints') == [2]
  assert train(experiment, tmp_path / 'run')['complete']  # There is room again.


def test_a_random_step_is_decided_by_the_seed(tmp_path):
  def steps(seed):
    experiment = tiny.experiment(
      tmp_path, training__faults=('kill@random', 'nan@random'), training__num_steps=1000, seed=seed)
    return [step for _, step, _ in faults.Faults(experiment, tmp_path)._ahead.values()]

  assert steps(0) == steps(0) != steps(1)
  assert all(1 <= step <= 1000 for step in steps(0))


@pytest.mark.parametrize('text', ['kill', 'kill@', 'explode@3', 'stall@3', 'nan@3:5', 'kill@x'])
def test_what_is_no_fault_is_refused(tmp_path, text):
  with pytest.raises(ConfigError, match='faults'):
    tiny.experiment(tmp_path, training__faults=(text,))
