"""A certificate tells a run that went on from one that became another."""

import numpy as np
import pytest

from jaxllm.checkpoints import reading
from jaxllm.tools import rehearsal, verify_resume
from tests import programs
from tests.training import tiny_run

SAME = {'at': [4, 9], 'lost': 0, 'records_equal': True, 'losses': 0.0, 'arrays': 0.0}


@pytest.mark.parametrize('flags, found, code, words', [
  ([], {}, 0, 'losses of all steps: equal bit for bit'),
  ([], {'lost': 1}, 1, 'committed steps lost: 1'),
  ([], {'records_equal': False}, 1, 'records: OTHERS'),
  ([], {'losses': 1e-6}, 1, 'THE RESUMED RUN IS ANOTHER ONE.'),
  ([], {'arrays': 1e-6}, 1, 'arrays of the last checkpoint: largest difference 1e-06'),
  (['--mesh={"data": 1, "tensor": 2}'], {'losses': 1e-5, 'arrays': 1e-4}, 0,
   'The resumed run is the run.'),
  (['--mesh={"data": 1, "tensor": 2}'], {'losses': 1e-2}, 1, 'largest difference 0.01'),
])
def test_what_is_certified(monkeypatch, flags, found, code, words):
  monkeypatch.setattr(verify_resume, 'verify', lambda *_: (*(SAME | found).values(),))
  ended, out, _ = programs.run(
    'tools.verify_resume', '--config=experiments/quickstart.py', *flags)
  assert ended == code and words in out


def test_a_difference_is_the_largest_one():
  first = {'a': np.float32([1, 2]), 'b': np.int32([3])}
  assert verify_resume._difference(first, {name: one.copy() for name, one in first.items()}) == 0
  assert verify_resume._difference(first, first | {'a': np.float32([1, 2.5])}) == 0.5
  assert verify_resume._difference(first, {'a': first['a']}) == np.inf
  assert verify_resume._difference({'a': np.float32([np.nan])}, {'a': np.float32([0])}) == np.inf
  # A loss that was not finite is none in the file.
  assert verify_resume._difference({1: None}, {1: None}) == 0


def test_the_starts_take_turns_between_numbers_of_processes(tmp_path, monkeypatch):
  started = []

  class Job:
    def __init__(self, config, workdir, processes, *_):
      started.append((config.name, processes))

    def codes(self):
      return [0]

    def step(self):
      return experiment.training.num_steps

    def kill(self):
      pass

  monkeypatch.setattr(rehearsal, 'Job', Job)
  experiment = tiny_run.experiment(tmp_path)
  monkeypatch.setattr(reading, 'restore_leaves', lambda step: {})
  verify_resume.verify(experiment, tmp_path, 3, {'data': 1, 'tensor': 2}, [1, 2, 4], 0)
  # The first one is the run that is left alone.
  assert started == [('0.json', 1), ('0.json', 1), ('1.json', 2), ('0.json', 4), ('1.json', 1)]


def test_numbers_of_processes_that_are_none_are_refused():
  code, _, error = programs.run(
    'tools.verify_resume', '--config=experiments/quickstart.py', '--processes=2,0')
  assert code == 2 and '--processes=2,0: expected numbers from 1 on' in error
