"""Where the time of a run goes: by cause over all its starts, compilations by name, and traces.

`Watchdog` ends a run in which it goes nowhere. `device_peak_flops`, `flops_per_step` and
`device_memory_bytes` tell how well the devices are used.
"""

import collections
import contextlib
import faulthandler
import math
import os
import pathlib
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from jaxllm import storage
from jaxllm.experiment import Experiment
from jaxllm.training.examples import ENCODINGS

# Causes on which the seconds of a run are spent, as the report calls them.
CAUSES = {
  'useful': 'steps that count',
  'start': 'start-up and compilation',
  'data': 'waiting for data',
  'evaluation': 'evaluation',
  'checkpoints': 'checkpoints',
  'samples': 'samples',
  'skipped': 'steps that were not applied',
  'repeated': 'steps that were done again after a restart',
  'down': 'from a stop to the next start',
}
_USEFUL, _ELAPSED = 'goodput/useful_seconds', 'train/elapsed_seconds'


HUNG = 124  # The exit code of `timeout`.


class Watchdog:
  """Ends this process, with the stacks of all threads, where it is at one thing for too long."""

  def __init__(self, seconds: float | None):
    """Watch from the first `expect` on; None: never."""
    self.closed = threading.Event()
    self._what, self._since, self._times = '', math.inf, 1
    if seconds is not None:
      threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

  def expect(self, what: str, times: int = 1) -> None:
    """Say what is waited for from now on; it may take so many times the seconds."""
    self._what, self._since, self._times = what, time.monotonic(), times

  def _watch(self, seconds: float) -> None:
    while not self.closed.wait(min(1.0, seconds / 4)):
      if time.monotonic() - self._since > seconds * self._times:
        times = f'{self._times} x ' * (self._times > 1)
        try:
          print(f'error: nothing has moved for {times}{seconds:g} seconds (config.training.'
                f'watchdog_seconds) in: {self._what}; the stacks of all threads follow',
                file=sys.__stderr__, flush=True)
          faulthandler.dump_traceback(2)
        finally:  # Nobody may be there to hear it.
          os._exit(HUNG)


class Goodput:
  """The seconds of a run by cause: each moment goes to one, so that they sum to the run's age.

  Attributes:
    started: when this process began, by `time.monotonic`.
    elapsed: how long the run had taken at its last record, without what was in vain.
    compilations: of this process, by name of the function.
    recompilations: those in steps after the first, of functions that had been compiled before.
  """

  def __init__(self, watchdog_seconds: float | None = None) -> None:
    self._watchdog = Watchdog(watchdog_seconds)
    self.started = self._began = self._since = time.monotonic()
    self.elapsed = 0.0
    self._seconds = dict.fromkeys(CAUSES, 0.0)
    self.compilations = collections.Counter[str]()
    self.recompilations = collections.Counter[str]()
    self._cause, self._useful_before = 'start', 0.0
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def resume(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
    """Go on from the records of a run restored to `step`; what came after was in vain.

    What a killed process did after its last record counts as time until the restart.
    """
    kept = [one for one in records if one['step'] <= step]
    self.elapsed = next((one[_ELAPSED] for one in reversed(kept) if _ELAPSED in one), 0.0)
    self._began -= self.elapsed
    found = [one for one in records if _USEFUL in one]
    if not found:
      return
    for cause in CAUSES:
      self._seconds[cause] += found[-1].get(f'goodput/{cause}_seconds', 0.0)
    self.lose(kept)
    ago = time.time() - found[-1]['time'] - (time.monotonic() - self.started)
    self._seconds['down'] += max(0.0, ago)

  def lose(self, kept: Sequence[Mapping[str, Any]]) -> None:
    """Count as in vain what came after the records that are kept."""
    useful = next((one[_USEFUL] for one in reversed(kept) if _USEFUL in one), 0.0)
    self.move('useful', 'repeated', self._seconds['useful'] - useful)
    self._useful_before = useful

  def expect_start(self) -> None:
    """Count as start-up, and watch with ten times the patience, until a step is taken."""
    self._settle()
    self._cause = 'start'
    self._watchdog.expect('restoring, reading the first batch and compiling', times=10)

  def _settle(self) -> None:
    now = time.monotonic()
    self._seconds[self._cause] += now - self._since
    self._since = now

  def move(self, source: str, target: str, seconds: float) -> None:
    """Count seconds for another cause after all."""
    self._seconds[source] -= seconds
    self._seconds[target] += seconds

  @contextlib.contextmanager
  def spend(self, cause: str) -> Iterator[None]:
    """Count the time inside for `cause`, which is its name in traces too."""
    self._settle()
    outer, self._cause = self._cause, cause
    if outer != 'start':  # That takes as long as it takes.
      self._watchdog.expect(CAUSES[cause])
    try:
      with jax.profiler.TraceAnnotation(cause):
        yield
    finally:
      self._settle()
      self._cause = outer
      if outer != 'start':
        self._watchdog.expect('a step')

  def end_step(self, applied: bool) -> None:
    """Count the time since the step before; that of the first step of a process is start-up."""
    self._settle()
    if self._cause == 'start':
      self._cause = 'useful'
    elif not applied:
      self.move('useful', 'skipped', self._seconds['useful'] - self._useful_before)
    self._useful_before = self._seconds['useful']
    self._watchdog.expect('a step')

  def scalars(self) -> dict[str, float]:
    """Return what a record in metrics.jsonl tells about time so far."""
    self._settle()
    self.elapsed = self._since - self._began
    return {
      _ELAPSED: self.elapsed,
      'goodput/fraction': self._seconds['useful'] / max(sum(self._seconds.values()), 1e-9),
      **{f'goodput/{cause}_seconds': value for cause, value in self._seconds.items()},
      **{f'recompilations/{name}': float(n) for name, n in self.recompilations.items()}}

  def close(self) -> None:
    """Count compilations no longer, and end the watch."""
    self._watchdog.closed.set()
    jax.monitoring.unregister_event_duration_listener(self._count)

  def _count(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event != '/jax/core/compile/backend_compile_duration':
      return
    name = re.sub(r'^\w*\((.*)\)$', r'\1', str(kwargs.get('fun_name', 'unknown')))
    self.compilations[name] += 1
    if self._cause != 'useful':
      return
    self.move('useful', 'start', duration_secs)
    if self.compilations[name] > 1:
      self.recompilations[name] += 1
      logging.info('Compiled again, in %.1f s: %s.', duration_secs, name)


def parse_steps(text: str) -> tuple[int, int]:
  """Read FIRST:LAST, two steps from 1 on in order; refuse anything else."""
  found = re.fullmatch(r'(\d+):(\d+)', text, re.ASCII)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(f'--profile_steps={text}: expected FIRST:LAST, the numbers of two steps from '
                     '1 on, as in --profile_steps=10:15')
  return first, last


@contextlib.contextmanager
def tracing(
  workdir: pathlib.Path, steps: tuple[int, int] | None
) -> Iterator[Callable[[int, Any], None]]:
  """Trace the first to the last of `steps` into `profile/`, where xprof looks for traces.

  Yields:
    A function to be called before each step with its number, and with arrays of the step before,
    whose work still belongs to it.
  """
  first, last = steps or (0, 0)
  with contextlib.ExitStack() as stack:
    def write(written: str) -> None:
      jax.profiler.stop_trace()
      target = workdir / 'profile/plugins/profile' / f'steps_{first}_to_{last}'
      for file in pathlib.Path(written).rglob('*.*'):
        storage.write_file(target / f'{jax.process_index()}-{file.name}', file.read_bytes())
      logging.info('Traced; to look at it: xprof --logdir=%s', workdir / 'profile')

    def before(step: int, pending: Any) -> None:
      if steps and step == first:
        written = stack.enter_context(tempfile.TemporaryDirectory(prefix='jaxllm-'))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Calls of Python functions would hide the phases.
        jax.profiler.start_trace(written, profiler_options=options)
        stack.callback(write, written)
      elif steps and step == last + 1:
        jax.block_until_ready(pending)
        stack.close()

    yield before


# Dense peak per JAX device in FLOP/s, (bfloat16, float32), by `device_kind`; None: no such figure.
# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "Peak compute per chip (bf16)"; a TPU7x
# chip is two devices. A float32 product there runs as bfloat16 passes, for which no peak is given.
# NVIDIA: half of the data sheets' "with sparsity" Tensor Core figures, BFLOAT16 and TF32; XLA's
# default precision runs float32 products in TF32. A100: A100 datasheet (June 2021). H100: H100
# datasheet (SXM, PCIe, NVL). H200: H200 datasheet (SXM, NVL). B200: Blackwell architecture brief
# (HGX B200). L4, L40S: their datasheets.
_PEAK_FLOPS: Mapping[str, tuple[float, float | None]] = {
  'TPU v4': (275e12, None),
  **dict.fromkeys(('TPU v5 lite', 'TPU v5e'), (197e12, None)),
  **dict.fromkeys(('TPU v5', 'TPU v5p'), (459e12, None)),
  **dict.fromkeys(('TPU v6 lite', 'TPU v6e'), (918e12, None)),
  'TPU7x': (2307e12 / 2, None),
  **dict.fromkeys((
    'NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM4-80GB', 'NVIDIA A100-PCIE-40GB',
    'NVIDIA A100 80GB PCIe'), (312e12, 156e12)),
  **dict.fromkeys(('NVIDIA H100 80GB HBM3', 'NVIDIA H200'), (1979e12 / 2, 989e12 / 2)),
  'NVIDIA H100 PCIe': (1513e12 / 2, 756e12 / 2),
  **dict.fromkeys(('NVIDIA H100 NVL', 'NVIDIA H200 NVL'), (1671e12 / 2, 835e12 / 2)),
  'NVIDIA B200': (4500e12 / 2, 2200e12 / 2),
  'NVIDIA L4': (242e12 / 2, 120e12 / 2),
  'NVIDIA L40S': (733e12 / 2, 366e12 / 2),
}


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
  """Return the vendor's dense peak of one JAX device in FLOP/s, None where there is no figure.

  Args:
    device_kind: as `jax.Device.device_kind` gives it.
    dtype: of the matrix products, 'bfloat16' or 'float32'.
  """
  if device_kind not in _PEAK_FLOPS or dtype not in ('bfloat16', 'float32'):
    return None
  return _PEAK_FLOPS[device_kind][dtype == 'float32']


def flops_per_step(experiment: Experiment) -> float:
  """Return the floating-point operations of matrix products in a step, recomputation left out.

  A forward pass and twice as much backward; once as much where only adapters, small beside the
  model, are trained. A reference and a teacher only go forward.
  """
  length, of = experiment.data.context_length, experiment.objective_record
  positions = experiment.training.batch_size * length * ENCODINGS[of.examples].sequences
  passes = 3 if experiment.finetune.lora is None else 2 + of.reference
  flops_per_token = passes * experiment.decoder.flops_per_token(length)
  if of.teacher:
    flops_per_token += experiment.objective.decoder.flops_per_token(length)
  return positions * flops_per_token


def device_memory_bytes() -> int:
  """Return the peak memory of this process's fullest device; on CPU, of the whole process."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max(stat.get('peak_bytes_in_use', 0) for stat in stats)
  if peak:
    return peak
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
