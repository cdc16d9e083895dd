"""Runs what comes from outside and is a program where it can take neither all time nor memory."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

_idle: list['subprocess.Popen[bytes]'] = []
# Two processes would read each other's answers.
os.register_at_fork(after_in_child=_idle.clear)


class SandboxError(ValueError):
  """A task failed or exceeded its limits; the message says why."""


def run(task: str, cpu_seconds: int, memory_bytes: int, **request: Any) -> Any:
  """Return the result of a task of `sandbox_worker`.

  Args:
    task: 'render' or 'compile'.
    cpu_seconds: how long it may compute.
    memory_bytes: how much its process may take, Python itself included (about 100 MB).
    **request: what the task needs, as JSON.

  Raises:
    SandboxError: it failed, or takes more than it may.
  """
  limits = {'task': task, 'cpu_seconds': cpu_seconds, 'memory_bytes': memory_bytes}
  line = json.dumps(limits | request).encode() + b'\n'
  worker = _worker()
  try:
    worker.stdin.write(line)  # type: ignore[union-attr]
    worker.stdin.flush()  # type: ignore[union-attr]
    answer = json.loads(worker.stdout.readline())  # type: ignore[union-attr]
  except (OSError, ValueError):  # It was ended from outside, such as for want of memory.
    worker.kill()
    answer = {}
  else:
    _idle.append(worker)
  if 'result' in answer:
    return answer['result']
  raise SandboxError(answer.get('error') or f'it takes more than {cpu_seconds} s of CPU time or '
                     f'{memory_bytes} bytes of memory')


def _worker() -> 'subprocess.Popen[bytes]':
  """Return a process that waits for a request: one that is left over, or a new one."""
  while True:
    try:
      worker = _idle.pop()
    except IndexError:
      path = pathlib.Path(__file__).with_name('sandbox_worker.py')
      return subprocess.Popen(
        [sys.executable, '-I', str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={})
    if worker.poll() is None:
      return worker
