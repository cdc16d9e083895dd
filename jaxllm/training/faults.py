"""Faults on purpose, to see what a set-up makes of them: `config.training.faults`.

Each is NAME@STEP, or NAME@STEP:SECONDS; 'random' as the step is one that the run's seed decides.
It happens once in the life of a run: a file in the workdir tells restarts what has happened.
"""

import os
import pathlib
import random
import re
import resource
import signal
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from jaxllm import storage
from jaxllm.experiment import Experiment

FILE = 'faults.json'


class Faults:
  """The faults that a run has still before it: none, as a rule."""

  def __init__(self, experiment: Experiment, workdir: pathlib.Path):
    self._file = workdir / FILE
    self._happened = list(storage.read_json(self._file, needed=True).get('happened', []))
    self._ahead: dict[str, tuple[str, int, float]] = {}
    for text in experiment.training.faults:
      name, step, seconds = re.findall(r'(\w+)@(\w+):?(.*)', text)[0]
      steps = random.Random(f'{experiment.seed}/{text}')
      at = steps.randint(1, experiment.training.num_steps) if step == 'random' else int(step)
      if text not in self._happened:
        self._ahead[text] = name, at, float(seconds or 0)

  def before_step(self, step: int, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Let what is due happen, and return the batch of the step."""
    for name, seconds in self._due(step, ('kill', 'stall', 'nan')):
      if name == 'kill' and jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
      elif name == 'stall':
        time.sleep(seconds)
      elif name == 'nan':
        batch = {key: np.full_like(array, np.nan) if array.dtype.kind == 'f' else array
                 for key, array in batch.items()}
    return batch

  def before_save(self, step: int) -> None:
    """Let what is due happen to the disk."""
    for name, seconds in self._due(step, ('slow_disk', 'full_disk')):
      time.sleep(seconds)
      if name == 'full_disk':  # Nothing that is written to a file fits any more.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

  def _due(self, step: int, names: tuple[str, ...]) -> list[tuple[str, float]]:
    due = [text for text, (name, at, _) in self._ahead.items() if name in names and step >= at]
    if due:
      logging.warning('config.training.faults at step %d: %s.', step, ', '.join(due))
      self._happened = [*self._happened, *due]
      if jax.process_index() == 0:
        storage.write_json(self._file, {'happened': self._happened})
    found = [self._ahead.pop(text) for text in due]
    return [(name, seconds) for name, _, seconds in found]
