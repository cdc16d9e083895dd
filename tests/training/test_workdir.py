"""What a run says of itself: the command can be typed again."""

import importlib.machinery
import sys

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
