"""Notebooks are stored without what running them leaves behind; `make notebooks` runs them."""

import json
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / 'colab').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path):
  notebook = json.loads(path.read_text(encoding='utf-8'))
  assert set(notebook['metadata']) == {'kernelspec', 'language_info'}
  assert set(notebook['metadata']['language_info']) == {'name'}  # Not the version that ran it.
  for cell in notebook['cells']:
    assert cell['metadata'] == {}, cell['id']
    if cell['cell_type'] == 'code':
      assert (cell['outputs'], cell['execution_count']) == ([], None), cell['id']


def test_all_begin_alike():
  """The first cell installs what is missing, and differs in the packages of data alone."""
  begins = set()
  for path in NOTEBOOKS:
    title, first, *_ = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert f'/colab/{path.name})' in ''.join(title['source'])  # The badge opens this notebook.
    own = ('DATA = ', "os.environ['XLA_FLAGS']", 'import os')
    shared = (line for line in first['source'] if line.strip() and not line.startswith(own))
    begins.add(''.join(shared))
  assert len(NOTEBOOKS) == 6 and len(begins) == 1, begins


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.name)
def test_there_is_no_flag(path):
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
  assert 'absl' not in code and 'FLAGS' not in code.replace('XLA_FLAGS', '')
