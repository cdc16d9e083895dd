"""Versions agree wherever they are written, and the files of habits are what their readers take."""

import configparser
import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / 'setup.cfg')


def test_one_version():
  version = SETUP['metadata']['version']
  assert re.fullmatch(r'\d+\.\d+\.\d+', version)
  changelog = (ROOT / 'CHANGELOG.md').read_text()
  released = re.findall(r'^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$', changelog, re.M)
  assert released == sorted(released, reverse=True) and released[0][0] == version
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert (citation['version'], str(citation['date-released'])) == released[0]
  assert citation['license'] == SETUP['metadata']['license']
  assert f'{version.rpartition(".")[0]} is the only series' in (ROOT / 'SECURITY.md').read_text()


def test_experiments_are_packaged():
  """`--config=experiments/x.py` then works wherever the wheel is installed; see config.load."""
  assert "'jaxllm.experiments': 'experiments'" in (ROOT / 'setup.py').read_text()
  assert 'packages' not in SETUP['options'] and not (ROOT / 'jaxllm' / 'experiments').exists()


def test_hooks_and_forms():
  [local] = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
  assert local['repo'] == 'local'
  assert [hook['id'] for hook in local['hooks']] == ['ruff', 'mypy']
  for name in ('bug', 'feature'):
    form = yaml.safe_load((ROOT / f'.github/ISSUE_TEMPLATE/{name}.yml').read_text())
    assert form['name'] and form['description']
    fields = [field['id'] for field in form['body'] if field['type'] != 'markdown']
    assert fields and len(fields) == len(set(fields))


def test_images_have_what_the_package_is_built_from():
  images = [*ROOT.glob('experiments/*/Dockerfile'), *ROOT.glob('jaxllm/tools/recipes/Dockerfile')]
  assert len(images) == 3
  for path in images:
    before = path.read_text().partition('RUN pip install')[0]
    for name in ('setup.py', 'setup.cfg', 'pyproject.toml', 'README.md', 'jaxllm', 'experiments'):
      assert re.search(rf'^COPY .*\b{re.escape(name)}\b', before, re.M), f'{path}: {name}'
