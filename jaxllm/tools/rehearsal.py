"""A run on many hosts, rehearsed on one: several processes train a tiny stand-in of an experiment.

One process is told to stop, as before a preemption, and later one is killed; each time all are
started again, as the recipes of `launch` do, and it is said what that has cost.
"""

import math
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from jaxllm import sharding, storage
from jaxllm.checkpoints import store
from jaxllm.data.documents import SourceConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.experiment import Experiment, FinetuneConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.objectives.next_token import NextToken
from jaxllm.training import metrics

STEPS, SAVE_EVERY = 40, 5
_CONTEXT = 64
_TINY = {'embed_dim': 32, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 4, 'head_dim': None,
         'mlp_dim': 64, 'dtype': 'float32', 'attention': 'xla', 'vocab_size': 257,
         'vocab_multiple': 8}
_TIMEOUT_SECONDS = 600
_CPU = {
  'JAX_PLATFORMS': 'cpu',
  # Little is computed, much is compiled.
  'XLA_FLAGS': '--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 '
               '--xla_llvm_disable_expensive_passes=true',
  # Programs of several devices that come from the cache can deadlock on CPU.
  'JAX_COMPILATION_CACHE_DIR': '',
}


def mesh(wanted: sharding.MeshConfig, num_devices: int) -> sharding.MeshConfig:
  """Return a mesh of fewer devices that splits the same axes, in their order, as far as they go."""
  sizes, left = dict.fromkeys(map(str, sharding.MESH_AXES), 1), num_devices
  while left > 1:
    factor = next(number for number in range(2, left + 1) if left % number == 0)
    wide = [axis for axis, size in sizes.items()
            if getattr(wanted, axis) == -1 or getattr(wanted, axis) > size]
    sizes[min(wide or ['data'], key=sizes.__getitem__)] *= factor
    left //= factor
  return wanted.replace(**sizes, slices=math.gcd(sizes['data'], wanted.slices))


def stand_in(experiment: Experiment, directory: pathlib.Path, num_devices: int) -> Experiment:
  """Return a tiny run of the same kind: task, objective, optimizer, schedule, packing, mesh axes.

  It begins with random parameters, and learns next tokens where the objective needs another model.
  Its texts and records are written to `directory`; `num_devices` are those of all processes.
  """
  model, data = experiment.model or DecoderConfig(max_length=_CONTEXT, **_TINY), experiment.data
  length = _CONTEXT if experiment.task is None else max(_CONTEXT, data.context_length)
  changes: dict[str, Any] = {
    'name': 'rehearsal', 'records_dir': str(directory / 'records'),
    'init_from': None, 'finetune': FinetuneConfig(),
    'mesh': mesh(experiment.mesh, num_devices), 'tokenizer': TokenizerConfig(kind='bytes'),
    'model': model.replace(**_TINY, max_length=length),
    'schedule': experiment.schedule.replace(warmup_steps=2, decay_steps=None),
    'training': experiment.training.replace(
      num_steps=STEPS, batch_size=num_devices * experiment.training.microbatches,
      log_every_steps=1),
    'checkpoint': experiment.checkpoint.replace(every_steps=SAVE_EVERY, keep_every=None),
    'evaluation': experiment.evaluation.replace(
      every_steps=STEPS, max_batches=1, batch_size=None, prompts=()),
    'scoring': experiment.scoring.replace(tasks=()), 'best': None}
  if experiment.task is None:
    changes['data'] = data.replace(
      sources=(SourceConfig(location=str(_texts(directory))),),
      validation=data.validation and 0.1, context_length=_CONTEXT)
  if experiment.objective_record.reference or experiment.objective_record.teacher:
    changes['objective'] = NextToken()
  elif experiment.chunk_size:
    changes['objective'] = experiment.objective.replace(chunk_size=None)
  return experiment.replace(**changes)


def _texts(directory: pathlib.Path) -> pathlib.Path:
  """Write a corpus that is large enough for the steps of a rehearsal."""
  pick, path = random.Random(0), directory / 'texts.jsonl'
  words = ('the king', 'a queen', 'speaks', 'and then', 'goes home')
  path.write_text(''.join(f'{{"text": "{" ".join(pick.choices(words, k=80))}"}}\n'
                          for _ in range(100)))
  return path


class Job:
  """The processes of one start; their output goes to `log`.0, `log`.1, ..."""

  def __init__(
    self, location: pathlib.Path, workdir: str, processes: int, log: pathlib.Path,
    environment: Mapping[str, str] = _CPU,
  ):
    """Start them; a single one is told of no others. `environment` is added to that of this one."""
    self._metrics = storage.path(workdir) / 'metrics.jsonl'
    self._logs = [log.with_name(f'{log.name}.{number}') for number in range(processes)]
    with socket.socket() as free:
      free.bind(('localhost', 0))
      coordinator = f'localhost:{free.getsockname()[1]}'
    command = [sys.executable, '-m', 'jaxllm.train', f'--config={location}', f'--workdir={workdir}']
    others = [f'--coordinator={coordinator}', f'--num_processes={processes}']
    self.processes = []
    for number, path in enumerate(self._logs):
      own = [*others, f'--process_id={number}'] if processes > 1 else []
      with path.open('w') as file:
        self.processes.append(subprocess.Popen(
          [*command, *own], env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
          stdout=file, stderr=subprocess.STDOUT))

  def step(self) -> int:
    """Return the last step whose metrics are written."""
    return max((record['step'] for record in metrics.read(self._metrics)), default=0)

  def reach(self, step: int) -> None:
    """Wait until `step` steps are taken; a RuntimeError says why they are not."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while self.step() < step:
      late = time.monotonic() > deadline
      if late or any(process.poll() is not None for process in self.processes):
        raise RuntimeError(f'before step {step} {"nothing happened" if late else "one has ended"}; '
                           f'they said:\n{self.said()}')
      time.sleep(0.05)

  def codes(self) -> list[int]:
    """Wait until all processes have ended, and return their exit codes."""
    return [process.wait(_TIMEOUT_SECONDS) for process in self.processes]

  def kill(self) -> None:
    """Kill what still runs."""
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self) -> str:
    """Return the last line of each process."""
    lines = [path.read_text(errors='replace').strip().split('\n')[-1] for path in self._logs]
    return '\n'.join(f'  process {number}: {line[:300]}' for number, line in enumerate(lines))


def rehearse(
  experiment: Experiment, workdir: str, directory: str, processes: int, seed: int = 0
) -> dict[str, Any]:
  """Train a stand-in with several processes, disturb it twice, and print what that has cost.

  Args:
    workdir: of the stand-in.
    directory: for its texts, records and logs.
    processes: how many, each with one virtual device.
    seed: decides which process is stopped and killed, and when.

  Returns:
    For 'SIGTERM' and 'SIGKILL' the `codes`, `steps_lost` and `seconds`; the last `step`.

  Raises:
    RuntimeError: a process failed that was not meant to.
  """
  base, pick = pathlib.Path(directory), random.Random(seed)
  small, location = stand_in(experiment, base, processes), base / 'config.json'
  location.write_text(small.to_json())
  sizes = ', '.join(f'{axis}={size}' for axis in sharding.MESH_AXES
                    if (size := getattr(small.mesh, axis)) != 1)
  print(f'{processes} processes train {STEPS} steps of a stand-in of {experiment.name} on {sizes}; '
        f'a save every {SAVE_EVERY} steps', flush=True)
  found: dict[str, Any] = {}
  job = Job(location, workdir, processes, base / 'start')
  try:
    for number, first in ((signal.SIGTERM, 6), (signal.SIGKILL, 18)):
      job.reach(first + pick.randrange(8))
      victim, since = pick.randrange(processes), time.monotonic()
      job.processes[victim].send_signal(number)
      codes, step, seconds = job.codes(), job.step(), time.monotonic() - since
      print(f'{number.name} to process {victim} at step {step}: exit codes {codes} after '
            f'{seconds:.1f} s\n{job.said()}', flush=True)
      saved = max(store.committed_steps(storage.path(workdir) / store.DIRECTORY), default=0)
      job = Job(location, workdir, processes, base / f'after-{number.name}')
      job.reach(step + 1)
      seconds = time.monotonic() - since
      found[number.name] = {'codes': codes, 'steps_lost': step - saved, 'seconds': seconds}
      print(f'  started again from step {saved}: {step - saved} steps and {seconds:.1f} s lost',
            flush=True)
    if any(codes := job.codes()):
      raise RuntimeError(f'the run has not finished (exit codes {codes}):\n{job.said()}')
    print(f'finished: {job.step()} steps; {workdir}')
    return {**found, 'step': job.step()}
  finally:
    job.kill()
