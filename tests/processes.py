"""Runs of several processes, forked from one that has imported all, so that each starts at once.

`run` starts that process; it is this file, and reads what it is to do as JSON.
"""

import json
import os
import pathlib
import re
import resource
import signal as signals
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
# Little is computed, much is compiled.
XLA_FLAGS = ('--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0 '
             '--xla_llvm_disable_expensive_passes=true')


def run(*starts, devices=1):
  """Start `jaxllm.train` several times, one after the other.

  Args:
    *starts: dicts with `config` (a config.json), `workdir`, `processes`; `own` (number of a process
      -> its further arguments), `absent` (numbers that do not come), `full` (number of a process ->
      most bytes that it may write into a file) and `signal` (its name, number of the process that
      gets it, steps that are taken before).
    devices: of each process.

  Returns:
    For each start, a (exit code, output) per process.
  """
  environment = os.environ | {
    'XLA_FLAGS': XLA_FLAGS.format(devices), 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': ''}
  done = subprocess.run(
    [sys.executable, __file__, json.dumps(starts)], env=environment, text=True, check=True,
    stdout=subprocess.PIPE, timeout=600)
  return [[tuple(one) for one in start] for start in json.loads(done.stdout)]


def _start(config, workdir, processes, own=None, absent=(), full=None, signal=None):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  before, children = _steps(workdir), {}
  for number in range(processes):
    if number in absent:
      continue
    arguments = [
      f'--config={config}', f'--workdir={workdir}', f'--coordinator=localhost:{port}',
      f'--num_processes={processes}', f'--process_id={number}',
      *(own or {}).get(str(number), ())]
    log = pathlib.Path(config).with_name(f'said-{number}.txt')
    children[number] = (_fork(arguments, log, full and full.get(str(number), -1)), log)
  if signal:
    name, victim, more = signal
    _await(lambda: _steps(workdir) >= before + more)
    os.kill(children[victim][0], getattr(signals, name))
  codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children.values()]
  return [(code, log.read_text(errors='replace'))
          for code, (_, log) in zip(codes, children.values(), strict=True)]


def _steps(workdir):
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  found = re.findall(r'"step": (\d+),', path.read_text()) if path.exists() else []
  return int(found[-1]) if found else 0


def _await(done):
  deadline = time.monotonic() + 120
  while not done():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def _fork(arguments, log, most_bytes=None):
  import jax

  from jaxllm import config, train

  if child := os.fork():
    return child
  code = 1
  if most_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
  try:
    with log.open('w', buffering=1) as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ['train', *arguments]
    try:
      config.run_program(train.main, train.FLAGS)
      code = 0
    except SystemExit as ended:
      code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
      if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
    jax.distributed.shutdown()  # As at the exit of any other process.
  finally:
    os._exit(code)


if __name__ == '__main__':
  import tensorboardX  # noqa: F401

  from jaxllm import train  # noqa: F401
  from jaxllm.training import loop  # noqa: F401

  print(json.dumps([_start(**start) for start in json.loads(sys.argv[1])]))
