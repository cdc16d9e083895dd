"""What a run says of itself: the command can be typed again."""

import importlib.machinery
import sys
import threading
from concurrent import futures

import pytest

from jaxllm.training import workdir


@pytest.mark.parametrize('name, said', [
  ('jaxllm.train', "python -m jaxllm.train '--prompt=To be' --workdir=runs/x"),
  (None, "/a/b.py '--prompt=To be' --workdir=runs/x"),
])
def test_the_command_can_be_typed_again(name, said, monkeypatch):
  spec = importlib.machinery.ModuleSpec(name, None) if name else None
  monkeypatch.setattr(sys.modules['__main__'], '__spec__', spec)
  monkeypatch.setattr(sys, 'argv', ['/a/b.py', '--prompt=To be', '--workdir=runs/x'])
  assert workdir.environment()['command'] == said


def test_of_starts_at_once_one_has_the_directory(tmp_path):
  start, end = threading.Barrier(8), threading.Event()

  def enter(_):
    start.wait()
    with workdir.held(tmp_path):
      end.wait(5)

  with futures.ThreadPoolExecutor(8) as pool:
    entered = [pool.submit(enter, number) for number in range(8)]
    refused = [one for one, _ in zip(futures.as_completed(entered), range(7), strict=False)]
    end.set()
  assert all('is held by process' in str(one.exception()) for one in refused)
  assert sum(one.exception() is None for one in entered) == 1
