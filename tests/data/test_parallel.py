"""Processes do what one does, in order; none is left behind, whatever ends it all."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxllm.data import parallel


def working(setting):
  """What processes are told to do: `setting` times the item, or what its name says."""
  def work(item):
    if item == 'die':
      os.kill(os.getpid(), signal.SIGKILL)
    if item == 'hang':
      pathlib.Path('hanging').touch()
      time.sleep(1e6)
    if item == 'fail':
      raise ValueError(f'{setting} fails')
    if item == 'strange':
      return threading.Lock() if os.getpid() != int(setting) else ['here', os.getpid()]
    print('said by a library', end='')
    return [item * int(setting), os.getpid()]
  return work


def _alive(pid):
  with contextlib.suppress(OSError):
    return 'Z' not in pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2][:3]
  return False


def test_processes_give_results_in_order_and_end():
  items = ['a' * i for i in range(40)]
  with parallel.processes(working, '3', 2) as run:
    found = [*run(items)]
    again = [*run(items)]
  assert [text for text, _ in found] == [3 * item for item in items]
  pids = {pid for _, pid in (*found, *again)}
  assert len(pids) == 2 and os.getpid() not in pids  # The same for both.
  assert not any(map(_alive, pids))


@pytest.mark.parametrize('count', [None, 1])
def test_what_takes_no_time_is_done_here(count):
  with parallel.processes(working, '3', count) as run:
    assert [pid for _, pid in run('abc')] == [os.getpid()] * 3


def test_what_takes_long_is_done_elsewhere(monkeypatch):
  monkeypatch.setattr(parallel, 'cores', lambda: 2)
  clock = iter(range(1000))
  monkeypatch.setattr(parallel.time, 'perf_counter', lambda: 0.4 * next(clock))
  with parallel.processes(working, '3') as run:
    assert [pid == os.getpid() for _, pid in run('abcdef')] == [True] * 3 + [False] * 3


def test_failures_and_deaths_are_told_in_their_place():
  with parallel.processes(working, '3', 2) as run:
    found = run(['a', 'b', 'fail', 'c'])
    assert [next(found)[0] for _ in range(2)] == ['aaa', 'bbb']
    with pytest.raises(ValueError, match='3 fails'):
      next(found)
    with pytest.raises(ChildProcessError, match='was ended by SIGKILL; the system does so where'):
      [*run(['a', 'b', 'die', *'cdefghijklm'])]


def test_what_cannot_be_sent_is_done_here():
  with parallel.processes(working, f'{os.getpid()}', 2) as run:
    assert [*run(['strange', 'strange'])] == [['here', os.getpid()]] * 2
  with parallel.processes(lambda _: lambda item: 'here', '', 1) as run:
    assert [*run([threading.Lock()])] == ['here']


PROGRAM = """
import os, signal, sys, test_parallel
from jaxllm.data import parallel

# Who runs the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
print('once')
with parallel.processes(test_parallel.working, '1', 2) as run:
  for text, pid in run(['a', 'b', 'c', 'd', *sys.argv[1:]]):
    print(text, pid, flush=True)
"""


@pytest.mark.parametrize('ended_by', [None, signal.SIGINT, signal.SIGKILL])
def test_a_program_without_a_guard_starts_them_and_takes_them_with_it(tmp_path, ended_by):
  (tmp_path / 'program.py').write_text(PROGRAM)
  paths = os.pathsep.join([str(pathlib.Path(__file__).parent), os.getcwd(), *sys.path])
  program = subprocess.Popen(
    [sys.executable, 'program.py', *(['hang', 'hang'] if ended_by else [])], cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, start_new_session=True)
  if ended_by:
    while not (tmp_path / 'hanging').exists():
      time.sleep(0.01)
    # As a terminal does it.
    os.killpg(program.pid, ended_by)
  out, err = program.communicate(timeout=60)
  first, *lines = out.split('\n')[:-1]
  assert first == 'once' and [line[0] for line in lines] == ['a', 'b', 'c', 'd'][:len(lines)]
  assert ended_by or len(lines) == 4
  assert program.returncode == -(ended_by or 0)
  assert err.count('Traceback') == err.count('KeyboardInterrupt') == (ended_by == signal.SIGINT)
  deadline = time.monotonic() + 10
  while any(_alive(int(line.split()[1])) for line in lines):
    assert time.monotonic() < deadline and ended_by == signal.SIGKILL
    time.sleep(0.01)
