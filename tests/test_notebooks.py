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
