"""Start runs of several processes at once, stop them, and count what goes wrong.

  python experiments/benchmarks/starts.py [--processes=2,4,16] [--starts=30] [--signals=10]
      [--minutes=10]

Each start is a new workdir and new records that all processes open at once, up to the first steps
(--opening: until all is open and nothing is compiled, which takes most of the time); it fails where
any of them ends in an error. A part of the runs gets SIGTERM or SIGINT, sent to one process at a
random moment: all must save the same step and end with the exit code 75. Processes are forked from
one that has imported everything, so that they come at the same moment. What does not fit into the
minutes is left out, and the table says how many there were.
"""

import gc
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import app, flags

PROCESSES = flags.DEFINE_list('processes', ['2', '4'], 'Numbers of processes.')
STARTS = flags.DEFINE_integer('starts', 30, 'Starts with each number, of two steps.')
OPENING = flags.DEFINE_bool('opening', False, 'Whether the starts end before they compile.')
SIGNALS = flags.DEFINE_integer('signals', 10, 'Runs with each number that get a signal.')
OUTPUT = flags.DEFINE_string('output', 'runs/starts.json', 'Where the JSON goes.')
MINUTES = flags.DEFINE_float('minutes', 60, 'How long for each number of processes, at most.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the moments and the processes that get a signal.')
LIMIT_SECONDS = 300
CPU = {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': '',
       'XLA_FLAGS': '--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 '
                    '--xla_llvm_disable_expensive_passes=true'}


def import_all(cache: pathlib.Path | None = None) -> None:
  """Import what a run needs, once for all processes that are forked from this one."""
  os.environ |= CPU
  if cache is not None:  # Of compiled programs: all of them, however small.
    os.environ |= {'JAX_COMPILATION_CACHE_DIR': str(cache),
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
                   'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  import tensorboardX  # noqa: F401

  from jaxllm import train  # noqa: F401
  from jaxllm.training import loop  # noqa: F401

  gc.collect()
  gc.freeze()  # What is there already is not looked through again in each process.


def main(_) -> None:
  import_all()
  rows, pick = {}, random.Random(SEED.value)
  print(f'{"processes":>9} {"starts":>7} {"failed":>7} {"signals":>8} {"same step, 75":>14} '
        f'{"seconds p50":>12} {"p99":>6}')
  with tempfile.TemporaryDirectory() as directory:
    for number in map(int, PROCESSES.value):
      base, deadline = pathlib.Path(directory), time.monotonic() + 60 * MINUTES.value
      started = [start(base, number, 2) for _ in in_time(STARTS.value, deadline)]
      stopped = [stop(base, number, pick) for _ in in_time(SIGNALS.value, deadline)]
      seconds = sorted(run['seconds'] for run in stopped)
      good = [run for run in stopped if run['good']]
      rows[number] = {'starts': started, 'stopped': stopped}
      failed = sum(not run['good'] for run in started)
      p50 = f'{statistics.median(seconds):.1f}' if seconds else '-'
      p99 = f'{seconds[round(0.99 * (len(seconds) - 1))]:.1f}' if seconds else '-'
      print(f'{number:>9} {len(started):>7} {failed:>7} {len(stopped):>8} {len(good):>14} '
            f'{p50:>12} {p99:>6}', flush=True)
      for run in [*started, *stopped]:
        if not run['good']:
          print(f'  exit codes {run["codes"]}: {run["said"]}')
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows, indent=2) + '\n')
  print(f'wrote {path}')


def in_time(number: int, deadline: float) -> Iterator[int]:
  """Count to a number, or until a deadline."""
  return itertools.takewhile(lambda _: time.monotonic() < deadline, range(number))


def start(directory: pathlib.Path, number: int, num_steps: int) -> dict:
  """Start a run of two steps, and wait for its end."""
  children, log = begin(directory, number, num_steps)
  codes = wait(children)
  good = not any(codes) if not OPENING.value else set(codes) == {75}
  return {'codes': codes, 'good': good, 'said': said(log, codes)}


def stop(directory: pathlib.Path, number: int, pick: random.Random) -> dict:
  """Start a run that does not end by itself, and send one of its processes a signal."""
  children, log = begin(directory, number, 10**6)
  metrics, deadline = directory / 'run' / 'metrics.jsonl', time.monotonic() + LIMIT_SECONDS
  while not (metrics.exists() and metrics.read_text().count('\n') > 2):
    if time.monotonic() > deadline:
      return {'codes': wait(children, 0), 'good': False, 'said': 'no step', 'seconds': 0.0}
    time.sleep(0.02)
  time.sleep(pick.uniform(0, 1))
  os.kill(pick.choice(children), pick.choice([signal.SIGTERM, signal.SIGINT]))
  since = time.monotonic()
  codes = wait(children)
  seconds = time.monotonic() - since
  last = [json.loads(line)['step'] for line in metrics.read_text().splitlines()][-1]
  saved = [path.parent.name for path in directory.glob('run/checkpoints/*/commit_success.txt')]
  good = codes == [75] * number and saved == [str(last)]
  return {'codes': codes, 'good': good, 'said': f'saved {saved}, last step {last}; '
          f'{said(log, codes)}', 'seconds': seconds}


def begin(directory: pathlib.Path, number: int, num_steps: int) -> tuple[list[int], pathlib.Path]:
  for name in ('run', 'records'):
    shutil.rmtree(directory / name, ignore_errors=True)
  config = write_config(directory, number, num_steps)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  return [fork(directory, [
    f'--config={config}', f'--workdir={directory / "run"}', f'--coordinator=localhost:{port}',
    f'--num_processes={number}', f'--process_id={process}'], process)
    for process in range(number)], directory


def write_config(directory: pathlib.Path, number: int, num_steps: int) -> pathlib.Path:
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.evaluation.perplexity import EvaluationConfig
  from jaxllm.experiment import Experiment, TrainingConfig
  from jaxllm.models.decoder import DecoderConfig
  from jaxllm.optim.optimizers import ScheduleConfig

  texts = directory / 'texts'
  texts.mkdir(exist_ok=True)
  for name in range(40):  # No two records of them are equal.
    (texts / f'{name:03}.txt').write_text(' '.join(f'{name}.{k}' for k in range(80)))
  experiment = Experiment(
    name='starts', records_dir=str(directory / 'records'),
    model=DecoderConfig(vocab_size=257, vocab_multiple=8, embed_dim=16, num_layers=1, num_heads=2,
                        mlp_dim=32, max_length=32, tied_head=True),
    data=DataConfig(sources=(SourceConfig(location=str(texts)),), validation=None,
                    context_length=32),
    tokenizer=TokenizerConfig(kind='bytes'),
    training=TrainingConfig(num_steps=num_steps, batch_size=number, log_every_steps=1, spike=None),
    schedule=ScheduleConfig(warmup_steps=1), evaluation=EvaluationConfig(every_steps=10**6))
  path = directory / 'config.json'
  path.write_text(experiment.to_json())
  return path


def fork(directory: pathlib.Path, arguments: list[str], process: int) -> int:
  """Run `jaxllm.train` in a child of this process, and return its id."""
  import jax

  from jaxllm import config, train
  from jaxllm.training import loop, scoring, start

  sys.stdout.flush()
  if child := os.fork():
    return child
  code = 1
  try:
    with open(directory / f'said-{process}.txt', 'w') as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ['train', *arguments]
    if OPENING.value:
      start.initial_state = lambda *_: (None, None)
      loop._loop = lambda *_: (0, None, scoring.Selection())
    try:
      config.run_program(train.main, train.FLAGS)
      code = 0
    except SystemExit as ended:
      code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
      print(ended.code)
    jax.distributed.shutdown()  # As at the exit of any other process.
  finally:
    os._exit(code)


def wait(children: list[int], limit: float = LIMIT_SECONDS) -> list[int]:
  """Return the exit codes; what still runs after `limit` seconds is killed."""
  deadline, codes = time.monotonic() + limit, {}
  while len(codes) < len(children):
    for child in children:
      if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
        codes[child] = os.waitstatus_to_exitcode(ended[1])
      elif child not in codes and time.monotonic() > deadline:
        os.kill(child, signal.SIGKILL)
    time.sleep(0.01)
  return [codes[child] for child in children]


def said(directory: pathlib.Path, codes: list[int]) -> list[str]:
  """Return the last lines of the processes that ended in an error."""
  return [(directory / f'said-{process}.txt').read_text(errors='replace')[-300:]
          for process, code in enumerate(codes) if code not in (0, 75)]


if __name__ == '__main__':
  app.run(main)
