"""The doctor: what is wrong has a colour and what mends it; red decides the exit code."""

import functools
import importlib.metadata
import json
import re

import jax
import pytest

from jaxllm import mistakes, versions
from jaxllm.tools import doctor
from jaxllm.training import loop
from tests import programs


@pytest.fixture
def healthy(monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
  for name in ('devices', 'self_test'):
    def check():
      yield 'green', 'good'
    check.__name__ = name
    monkeypatch.setattr(doctor, name, check)


def found(*arguments):
  code, out, _ = programs.run('tools.doctor', '--json')
  return code, {(one['check'], one['colour']): one['said'] for one in json.loads(out)}


def test_a_healthy_machine(healthy):
  code, findings = found()
  assert code == 0 and {colour for _, colour in findings} <= {'green', 'yellow'}
  assert 'tested' in findings['packages', 'green'] and '0 files' in findings['cache', 'green']
  out = programs.run('tools.doctor')[1]
  assert re.search(r'^green   self-test  good$', out, re.M) and '\033' not in out


def test_what_is_wrong_is_told_with_what_mends_it(healthy, monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'file' / 'cache'))
  monkeypatch.setattr(versions, 'mismatch', lambda *_: "jax and flax: pip install 'flax'")
  have = {'optax': '0.1', 'grain': ''}
  monkeypatch.setattr(
    versions, 'installed', lambda name: have.get(name) or (
      '' if name in have else importlib.metadata.version(name)))
  code, findings = found()
  assert code == 1 and findings['cache', 'red'].startswith('JAX_COMPILATION_CACHE_DIR=')
  assert findings['packages', 'red'] == "jax and flax: pip install 'flax'"
  assert re.match(r"optax 0.1, tested: pip install 'optax.*'", findings['packages', 'yellow'])
  said = list(doctor.packages())
  assert [text for colour, text in said if 'grain is missing' in text and colour == 'red']


def test_an_accelerator_that_is_not_used(monkeypatch):
  monkeypatch.setattr('os.path.exists', lambda path: path == '/dev/nvidia0')
  (yellow, said), (green, have) = doctor.devices()
  assert (yellow, green) == ('yellow', 'green') and "pip install 'jaxllm[cuda13]'" in said
  assert '8 x cpu' in have


def test_it_trains_saves_loads_and_samples(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(loop, 'train', functools.partial(loop.train, devices=jax.devices()[:1]))
  ((colour, said),) = doctor.self_test()
  assert colour == 'green' and 'the loss fell from 5' in said


def test_colour_is_for_terminals(monkeypatch):
  class Terminal:
    def isatty(self):
      return True

  monkeypatch.delenv('NO_COLOR', raising=False)
  assert mistakes.paint('x', 'red', Terminal()) == '\033[31mx\033[0m'
  assert mistakes.paint('x', 'red') == 'x'
  monkeypatch.setenv('NO_COLOR', '1')
  assert mistakes.paint('x', 'red', Terminal()) == 'x'
