"""What the loop writes down about itself: metrics with their clocks, a progress bar, compilations.

Step time leaves out evaluation and checkpoints, which the loop wraps in `pause`; waiting for data
is measured apart.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from jaxllm.evaluation import tables
from jaxllm.experiment import Experiment
from jaxllm.training import losses, metrics

TOLD = {'loss': 'held-out loss', 'perplexity': 'perplexity', 'bits_per_byte': 'bits per byte'}


class Journal:
  """The open journal of a run, from `open_journal`."""

  def __init__(
    self, experiment: Experiment, mesh: Mesh, writer: metrics.MetricsWriter,
    progress: metrics.Progress, started: float, seconds_before: float,
  ):
    training, device = experiment.training, mesh.devices.flat[0]
    self._every = training.log_every_steps
    self._last_step = training.num_steps
    self._flops_per_step = losses.flops_per_step(experiment)
    self._num_devices = mesh.size
    self._peak_flops = metrics.device_peak_flops(device.device_kind, experiment.decoder.dtype)
    self._writer, self._progress = writer, progress
    self._started, self._seconds_before = started, seconds_before
    self._compilations = _count_compilations()
    self._first = True
    self._reset()

  def _reset(self) -> None:
    self._since = time.monotonic()
    self._steps, self._tokens, self._data_wait = 0, 0.0, 0.0

  def wait_for(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield from `batches`, measuring how long each one takes to come."""
    iterator = iter(batches)
    while True:
      asked = time.monotonic()
      try:
        batch = next(iterator)
      except StopIteration:
        return
      self._data_wait += time.monotonic() - asked
      yield batch

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leave what happens inside out of the step time."""
    paused = time.monotonic()
    yield
    self._since += time.monotonic() - paused

  def step(self, step: int, scalars: Mapping[str, float]) -> None:
    """Note the metrics of a step that is done; write them down every `log_every_steps`."""
    if self._first:
      self._first = False
      logging.info('First step after %.1f s.', time.monotonic() - self._started)
      # The first step compiles: its time is told, and no part of the rates.
      self._write(step, scalars, None)
      self._reset()
      return
    self._steps += 1
    self._tokens += scalars['tokens_read']
    if not scalars['applied']:
      self._progress.message(
        f'step {step}: not applied (loss {scalars["loss"]:.4g}, gradient norm '
        f'{scalars["grad_norm"]:.4g}), {scalars["skipped"]:.0f} in all'
      )
    seconds = time.monotonic() - self._since
    self._progress.update(step, scalars['loss'], self._tokens / seconds)
    if step % self._every == 0 or step == self._last_step:
      self._write(step, scalars, seconds)
      self._reset()

  def scores(self, step: int, scores: Mapping[str, float]) -> None:
    """Write down what was measured: 'validation/NAME' and 'task/KIND/NAME'."""
    self._writer.write(step, scores)
    numbers = {name: tables.number(value) for name, value in scores.items()}
    held_out = [f'{text} {numbers[f"validation/{name}"]}' for name, text in TOLD.items()
                if f'validation/{name}' in scores]
    tasks = [f'{name.removeprefix("task/")} {value}' for name, value in numbers.items()
             if name.startswith('task/')]
    for told in filter(None, (held_out, tasks)):
      self._progress.message(f'step {step:,}: {", ".join(told)}')

  def _write(self, step: int, scalars: Mapping[str, float], seconds: float | None) -> None:
    record: dict[str, Any] = {f'train/{name}': value for name, value in scalars.items()}
    record['train/memory_bytes'] = metrics.device_memory_bytes()
    record['train/compilations'] = len(self._compilations)
    record['train/elapsed_seconds'] = self._seconds_before + time.monotonic() - self._started
    if seconds:
      flops_per_second = self._flops_per_step * self._steps / seconds
      record |= {
        'train/tokens_per_second': self._tokens / seconds,
        'train/step_seconds': seconds / self._steps,
        'train/data_wait_seconds': self._data_wait / self._steps,
        'train/mfu': metrics.mfu(flops_per_second, self._num_devices, self._peak_flops),
      }
    self._writer.write(step, record)


@contextlib.contextmanager
def open_journal(
  path: pathlib.Path, experiment: Experiment, mesh: Mesh, step: int, started: float
) -> Iterator[Journal]:
  """Open the journal of a run that continues after `step` steps.

  Args:
    path: the workdir.
    experiment: the run.
    mesh: its devices.
    step: steps taken before.
    started: when this process began, by `time.monotonic`.
  """
  device = mesh.devices.flat[0]
  peak = metrics.device_peak_flops(device.device_kind, experiment.decoder.dtype)
  if peak is None and device.platform != 'cpu':
    logging.info(
      'The peak of a %s in %s is unknown, so utilisation (MFU) is not reported.',
      device.device_kind, experiment.decoder.dtype,
    )
  before = elapsed_seconds(path, step)
  num_steps = experiment.training.num_steps
  with (
    metrics.open_writer(path, step) as writer,
    metrics.Progress(num_steps, step, enabled=jax.process_index() == 0) as progress,
  ):
    yield Journal(experiment, mesh, writer, progress, started, before)


def elapsed_seconds(path: str | os.PathLike[str], step: int) -> float:
  """Return how long a run had taken up to `step`, over all its starts, from its metrics."""
  seconds = 0.0
  for record in metrics.read(pathlib.Path(path) / 'metrics.jsonl'):
    if record['step'] <= step:
      seconds = record.get('train/elapsed_seconds', seconds)
  return seconds


def _count_compilations() -> list[float]:
  """Return a list that grows by the seconds of each program that XLA compiles from now on."""
  seconds: list[float] = []

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      seconds.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return seconds
