"""The metrics of a run: metrics.jsonl, TensorBoard and trackers, a progress bar, and utilisation.

- `open_logger` -> `MetricLogger`: logs steps and scores, and measures step times.
- `open_writer`: one record per call, on disk at once; survives a resume. `read` reads them back.
- `Progress`: a bar on a terminal, plain lines elsewhere.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import tqdm
from absl import logging
from jax.sharding import Mesh

from jaxllm import mistakes, storage
from jaxllm.evaluation import tables
from jaxllm.experiment import Experiment
from jaxllm.training import goodput as goodput_lib
from jaxllm.training.goodput import Goodput

# Seconds -> '02:05' or '1:02:05'.
format_duration: Callable[[float], str] = tqdm.tqdm.format_interval
Write = Callable[[int, Mapping[str, Any]], None]
# Of `open_writer`: what writes numbers at a step, and what closes it.
Writer = tuple[Write, Callable[[], None]]
# Files of the workdir that a resumed run goes on with.
_KEPT = ('metrics.jsonl', 'writers.json')

# Scores on held-out text that are printed, and how they are called.
HELD_OUT = {'loss': 'held-out loss', 'perplexity': 'perplexity', 'bits_per_byte': 'bits per byte'}


class MetricLogger:
  """Writes the metrics of a run and shows its progress.

  The time of a step excludes evaluation and checkpoints, which the loop wraps in `pause`; waiting
  for data and for devices is measured apart.
  """

  def __init__(
    self, experiment: Experiment, mesh: Mesh, write: Write, progress: 'Progress',
    goodput: Goodput, upload: Callable[[], None] = lambda: None,
  ):
    device = mesh.devices.flat[0]
    self._training = experiment.training
    self._flops_per_step = goodput_lib.flops_per_step(experiment)
    self._num_devices = mesh.size
    self._peak_flops = goodput_lib.device_peak_flops(device.device_kind, experiment.decoder.dtype)
    if self._peak_flops is None and device.platform != 'cpu':
      logging.info('The peak of a %s in %s is unknown, so utilisation (MFU) is not reported.',
                   device.device_kind, experiment.decoder.dtype)
    self._write, self._progress, self.upload = write, progress, upload
    self._goodput = goodput
    self.pending: Any = None
    self._first = True
    self._reset()

  def _reset(self) -> None:
    self._since = time.monotonic()
    self._steps, self._tokens, self._data_wait, self._device_wait = 0, 0.0, 0.0, 0.0

  def wait_for(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield from `batches`, measuring how long each one takes to come.

    While the devices are still computing the `pending` array, no time is lost.
    """
    iterator, end = iter(batches), object()
    while True:
      asked = time.monotonic()
      with self._goodput.spend('data'):
        batch = next(iterator, end)
      if batch is end:
        return
      waited = time.monotonic() - asked
      self._data_wait += waited
      if self.pending is not None and not self.pending.is_ready():
        self._goodput.move('data', 'useful', waited)
      yield batch

  @contextlib.contextmanager
  def pause(self, cause: str) -> Iterator[None]:
    """Exclude the time inside, spent on `cause`, from the step time."""
    paused = time.monotonic()
    with self._goodput.spend(cause):
      yield
    self._since += time.monotonic() - paused

  def fetch(self, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Return the metrics of a step as numbers, measuring how long the devices take."""
    asked = time.monotonic()
    with jax.profiler.TraceAnnotation('device'):
      scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
    self._device_wait += time.monotonic() - asked
    return scalars

  def log_step(self, step: int, scalars: Mapping[str, float]) -> None:
    """Take the metrics of a finished step; write them every `log_every_steps`."""
    self._goodput.end_step(bool(scalars['applied']))
    if self._first:
      self._first = False
      logging.info('First step after %.1f s.', time.monotonic() - self._goodput.started)
      # The first step compiles, so that its time is no part of the rates.
      self._write_step(step, scalars, None)
      return
    self._steps += 1
    self._tokens += scalars['tokens_read']
    if not scalars['applied']:
      self._progress.message(
        f'step {step}: not applied (loss {scalars["loss"]:.4g}, gradient norm '
        f'{scalars["grad_norm"]:.4g}), {scalars["skipped"]:.0f} in all')
    seconds = time.monotonic() - self._since
    self._progress.update(step, scalars['loss'], self._tokens / seconds)
    if step % self._training.log_every_steps == 0 or step == self._training.num_steps:
      self._write_step(step, scalars, seconds)

  def log_goodput(self, step: int) -> None:
    """Write what the time of the run has gone into."""
    self._write(step, self._goodput.scalars())

  def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
    """Write scores named 'validation/NAME' and 'task/KIND/NAME'."""
    self._write(step, {**scores, **self._goodput.scalars()})
    numbers = {name: tables.number(value) for name, value in scores.items()}
    held_out = [f'{text} {numbers[f"validation/{name}"]}' for name, text in HELD_OUT.items()
                if f'validation/{name}' in scores]
    tasks = [f'{name.removeprefix("task/")} {value}' for name, value in numbers.items()
             if name.startswith('task/')]
    for parts in filter(None, (held_out, tasks)):
      self._progress.message(f'step {step:,}: {", ".join(parts)}')

  def _write_step(self, step: int, scalars: Mapping[str, float], seconds: float | None) -> None:
    record: dict[str, Any] = {f'train/{name}': value for name, value in scalars.items()}
    record['train/memory_bytes'] = goodput_lib.device_memory_bytes()
    record['train/compilations'] = self._goodput.compilations.total()
    if seconds:
      # Model FLOPs utilisation: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
      flops_per_second = self._flops_per_step * self._steps / seconds / self._num_devices
      record |= {
        'train/tokens_per_second': self._tokens / seconds,
        'train/step_seconds': seconds / self._steps,
        'train/data_wait_seconds': self._data_wait / self._steps,
        'train/device_wait_seconds': self._device_wait / self._steps,
        'train/host_seconds': (seconds - self._data_wait - self._device_wait) / self._steps,
        'train/mfu': self._peak_flops and flops_per_second / self._peak_flops,
      }
    self._write(step, record | self._goodput.scalars())
    self._reset()


@contextlib.contextmanager
def open_logger(
  path: pathlib.Path, experiment: Experiment, mesh: Mesh, step: int, goodput: Goodput
) -> Iterator[MetricLogger]:
  """Open the metrics of a run that continues after `step` steps.

  Args:
    step: steps taken before.
    goodput: of the run, with what its earlier starts have spent.
  """
  progress = Progress(experiment.training.num_steps, step, enabled=jax.process_index() == 0)
  kept = _KEPT if jax.process_index() == 0 else ()
  failed: set[str] = set()
  with storage.buffered(path, kept) as (folder, send), \
       open_writer(folder, experiment, step) as write, contextlib.closing(progress):

    def upload() -> None:
      with spared(f'{path}/metrics.jsonl', failed):
        send()

    log = MetricLogger(experiment, mesh, write, progress, goodput, upload)
    log.log_goodput(step)  # Kept where the records of steps that are lost are dropped.
    yield log


@contextlib.contextmanager
def open_writer(
  workdir: str | os.PathLike[str], experiment: Experiment, step: int = 0
) -> Iterator[Write]:
  """Open the writers of a run that continues after `step` steps.

  Records of later steps, from a run that ended before its next checkpoint, are dropped: from
  metrics.jsonl in one atomic replacement, from TensorBoard by its purge event.

  Yields:
    A function of the steps taken and of name -> number that writes one record, on disk when it
    returns: None is left out, a number that is not finite becomes null in the JSON. It writes
    nothing in processes other than the first. What cannot be written is missing, and never ends
    the run: of a failure there is one warning, after which a tracker is left alone.
  """
  if jax.process_index() != 0:
    yield lambda step, scalars: None
    return
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  _drop_later(path, step)
  failed: set[str] = set()
  others: dict[str, Writer] = {}

  def write(step: int, scalars: Mapping[str, Any]) -> None:
    values = {name: float(value) for name, value in scalars.items() if value is not None}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    with spared(str(path), failed):
      _append(path, {'step': int(step), 'time': time.time(), **finite})
    for target, (send, _) in others.items():
      if target not in failed:
        with spared(target, failed):
          send(int(step), values)

  try:
    for name in experiment.training.writers:
      others[str(path.with_name(name))] = WRITERS[name](experiment, path.parent, step)
    yield write
  finally:
    for target, (_, close) in others.items():
      with spared(target, failed):
        close()


@contextlib.contextmanager
def spared(name: str, failed: set[str]) -> Iterator[None]:
  """Let an error inside cost what is written there and not the run; warn of the first one.

  Args:
    name: of what is written.
    failed: the names that have failed; this one is added.
  """
  try:
    yield
  except Exception as error:  # Trackers raise errors of their own.
    if name not in failed:
      failed.add(name)
      logging.warning('%s cannot be written: %s; the run goes on without it.', name,
                      mistakes.said(error))


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Add a record to a JSONL file, whole or not at all."""
  with path.open('ab', buffering=0) as file:
    size, line = file.tell(), json.dumps(record, allow_nan=False).encode() + b'\n'
    if file.write(line) < len(line):  # The disk is full.
      file.truncate(size)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _tensorboard(experiment: Experiment, workdir: pathlib.Path, step: int) -> Writer:
  from tensorboardX.event_file_writer import EventsWriter  # Takes a tenth of a second.
  from tensorboardX.proto import event_pb2, summary_pb2

  folder = workdir / 'tensorboard'
  folder.mkdir(exist_ok=True)
  # Written at once, not by its thread, which dies of a full disk in silence. Two files of the same
  # second would otherwise have the same name.
  events = EventsWriter(str(folder / 'events'), f'.{time.time_ns()}')
  events.write_event(event_pb2.Event(
    wall_time=time.time(), step=step + 1,
    session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))

  def write(step: int, values: Mapping[str, float]) -> None:
    summary = [summary_pb2.Summary.Value(tag=tag, simple_value=value)
               for tag, value in values.items()]
    events.write_event(event_pb2.Event(
      wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=summary)))
    events.flush()

  return write, events.close


def _wandb(experiment: Experiment, workdir: pathlib.Path, step: int) -> Writer:
  import wandb

  run = wandb.init(
    project='jaxllm', name=experiment.name, id=_run_id(workdir), resume='allow', dir=str(workdir),
    config=experiment.model_dump(mode='json'))
  return lambda step, values: run.log(dict(values), step=step), run.finish


def _trackio(experiment: Experiment, workdir: pathlib.Path, step: int) -> Writer:
  import trackio

  trackio.init(
    project='jaxllm', name=f'{experiment.name}-{_run_id(workdir)}', resume='allow',
    config=experiment.model_dump(mode='json'))
  return lambda step, values: trackio.log(dict(values), step=step), trackio.finish


WRITERS: Mapping[str, Callable[[Experiment, pathlib.Path, int], Writer]] = {
  'tensorboard': _tensorboard, 'wandb': _wandb, 'trackio': _trackio}


def _run_id(workdir: pathlib.Path) -> str:
  """Return the name by which trackers know the run, stored so that a resumed one goes on in it."""
  path = workdir / 'writers.json'
  found = storage.read_json(path).get('id')
  if not isinstance(found, str):
    found = uuid.uuid4().hex[:8]
    storage.write_json(path, {'id': found})
  return found


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Return the records of a metrics.jsonl; see `read_lines`."""
  return [record for record in read_lines(path) if isinstance(record.get('step'), int)
          and all(isinstance(value, int | float | None) for value in record.values())]


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Return the objects of a JSONL file, without lines torn by a crash; none where it is absent."""
  try:
    lines = storage.path(path).read_bytes().decode(errors='replace').split('\n')[:-1]
  except FileNotFoundError:
    return []
  found = []
  for line in lines:
    with contextlib.suppress(ValueError, RecursionError):
      found.append(json.loads(line))
  if len(found) < len(lines):
    logging.warning('%s: %d damaged lines are left out.', path, len(lines) - len(found))
  return [value for value in found if isinstance(value, dict)]


def _drop_later(path: pathlib.Path, step: int) -> None:
  """Keep the whole records of a metrics.jsonl up to `step`."""
  if not path.exists():
    return
  kept = [json.dumps(record) + '\n' for record in read(path) if record['step'] <= step]
  if ''.join(kept) != path.read_text(encoding='utf-8', errors='replace'):
    storage.write_file(path, ''.join(kept))


class Progress:
  """Shows steps, loss, tokens/s and time left on stderr.

  A bar where stderr is a terminal; elsewhere a line when `line_seconds` have passed, and at the
  end. Time left is judged by the steps since the first update, which compilation precedes.
  """

  def __init__(
    self, num_steps: int, step: int = 0, enabled: bool = True, line_seconds: float = 10.0
  ):
    """Start at `step` of `num_steps`; where not `enabled` (other processes), show nothing."""
    self._num_steps, self._line_seconds, self._enabled = num_steps, line_seconds, enabled
    self._started: tuple[int, float] | None = None
    self._last_line = -math.inf
    self._bar = tqdm.tqdm(
      total=num_steps, initial=step, dynamic_ncols=True, file=sys.stderr,
      bar_format='{percentage:3.0f}% |{bar}| {desc}', disable=None if enabled else True)

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Show that `step` steps are done."""
    if not self._enabled:
      return
    now = time.monotonic()
    first_step, first_time = self._started = self._started or (step, now)
    left = 'done' if step >= self._num_steps else ''
    if first_step < step < self._num_steps:
      seconds = (now - first_time) / (step - first_step) * (self._num_steps - step)
      left = f'{format_duration(seconds)} left'
    text = (f'step {step:,}/{self._num_steps:,}  loss {loss:.3f}  {tokens_per_second:,.0f} '
            f'tokens/s  {left}')
    self._bar.n = step
    self._bar.set_description_str(text, refresh=False)
    self._bar.update(0)
    late = now - self._last_line >= self._line_seconds or step == self._num_steps
    if self._bar.disable and late:
      self._last_line = now
      self.message(text)

  def message(self, text: str) -> None:
    """Print a line without tearing the bar; where it cannot be printed, nobody misses it."""
    if self._enabled:
      with contextlib.suppress(OSError):
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

  def close(self) -> None:
    """Leave the bar as it stands."""
    self._bar.refresh()
    self._bar.close()
