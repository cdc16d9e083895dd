"""The lowest versions that may be installed have no known advisory; the locks are above them."""

import configparser
import pathlib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parent.parent
# The first version without the fault.
FIXED = {
  'jinja2': ('3.1.6', 'CVE-2025-27516: a template leaves the sandbox by the attr filter'),
  'sentencepiece': ('0.2.1', 'CVE-2026-1260: a model file writes beyond its buffers'),
  'h11': ('0.16', 'CVE-2025-43859: malformed chunks are taken, so that requests can be smuggled'),
  'pyarrow': ('23.0.1', 'CVE-2026-25087: use after free in files with pre-buffering'),
  'starlette': ('1.0.1', 'CVE-2026-48710: request.url by a malformed Host; CVE-2025-62727: Range'),
  'tqdm': ('4.66.3', 'CVE-2024-34062: arguments are evaluated'),
}


def requirements():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  lines = [config['options']['install_requires'], *config['options.extras_require'].values()]
  for line in '\n'.join(lines).splitlines():
    if line and not line.startswith('#'):
      yield Requirement(line)


@pytest.mark.parametrize('name', FIXED)
def test_a_floor_is_a_fixed_version(name):
  version, reason = FIXED[name]
  found = [one for one in requirements() if one.name == name]
  assert found
  for one in found:
    floors = [Version(part.version) for part in one.specifier if part.operator == '>=']
    assert floors and max(floors) >= Version(version), f'{one}: at least {version} ({reason})'


def test_locks_are_within_the_bounds():
  bounds = {one.name: one.specifier for one in requirements() if not one.marker}
  for lock in (ROOT / 'requirements').glob('py*.txt'):
    locked = {one.name: one for one in map(Requirement, lock.read_text().splitlines())}
    assert set(FIXED) <= set(locked), lock
    for name, one in locked.items():
      pins = [part.version for part in one.specifier if part.operator == '==']
      assert pins and (name not in bounds or bounds[name].contains(pins[0])), f'{lock.name}: {one}'
