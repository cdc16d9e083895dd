"""Seconds and peak memory of a command and all processes that it starts."""

import os
import pathlib
import subprocess
import time


def run(command: list[str], log: pathlib.Path, **environment: str) -> tuple[float, int]:
  """Run a command; return its seconds and the peak of its processes' memory, in bytes."""
  begin, peak = time.perf_counter(), 0
  with log.open('w') as file:
    child = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
    while child.poll() is None:
      peak = max(peak, sum(map(_memory, _family(child.pid))))
      time.sleep(0.05)
  if child.returncode:
    raise SystemExit(f'{command} ended with {child.returncode}:\n{log.read_text()}')
  return time.perf_counter() - begin, peak


def _family(pid: int) -> list[int]:
  """Return a process and those that it has started."""
  try:
    tasks = list(pathlib.Path(f'/proc/{pid}/task').iterdir())
    children = ' '.join((task / 'children').read_text() for task in tasks).split()
  except OSError:
    return []
  return [pid, *(one for child in children for one in _family(int(child)))]


def _memory(pid: int) -> int:
  """Return the memory of a process, what it shares divided by the number of sharers, in bytes."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
  except OSError:
    return 0
  return 1024 * next((int(line.split()[1]) for line in lines if line.startswith('Pss:')), 0)
