"""Who may import whom: lower floors never import higher ones, and nothing heavy is imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'jaxllm'

# Floors from the ground up; rooms of one floor do not import each other, except where a later set
# of the same floor stands for rooms that may import the earlier ones.
FLOORS: list[set[str]] = [
  {'versions'},
  {'mistakes'},
  {'help_page', 'validation'},
  {'config'},
  {'sharding', 'storage', 'distributed'},
  {'models', 'data', 'optim'},
  {'objectives', 'adapters', 'checkpoints', 'generation'},
  {'model'},
  {'interop', 'tasks', 'evaluation'},
  {'experiment'},
  {'loading', 'recipes', 'inspect'},
  {'training', 'serving', 'pipelines'},
  {'__main__'},
  {'tools'},
  {'prepare', 'train', 'evaluate', 'sample', 'serve', 'convert', '__init__'},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {'torch', 'tensorflow', 'transformers', 'pickle', 'clu', 'ml_collections'}
FLAX_ROOM = 'models'


def _room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def _imports(path: pathlib.Path) -> list[tuple[int, str]]:
  found = []
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: relative import'
      if node.module == 'jaxllm':
        found += [(node.lineno, f'jaxllm.{alias.name}') for alias in node.names]
      else:
        found.append((node.lineno, node.module or ''))
  return found


FILES = sorted(PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
  room = _room(path)
  assert room in FLOOR, f'{room} has no floor: add it to FLOORS'
  for line, name in _imports(path):
    where = f'{path.relative_to(PACKAGE.parent)}:{line}'
    root = name.split('.')[0]
    assert root not in FORBIDDEN, f'{where} imports {name}'
    if name.startswith('flax.linen') or name.startswith('flax.nnx'):
      assert room == FLAX_ROOM, f'{where}: only {FLAX_ROOM}/ may import {name}'
    if root == 'jaxllm' and name != 'jaxllm':
      target = name.split('.')[1]
      if target != room:
        assert FLOOR[target] < FLOOR[room], f'{where}: {room} may not import {target}'


def test_import_is_light_and_starts_no_backend():
  code = (
    'import sys, jaxllm\n'
    'heavy = {"torch", "tensorflow", "transformers", "flax", "optax", "orbax", "grain"}\n'
    'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
    'from jaxllm import training, sharding\n'
    'import jaxllm.training.loop\n'
    'assert not {"torch", "tensorflow", "transformers"} & set(sys.modules)\n'
    'from jax._src import xla_bridge\n'
    'assert not xla_bridge._backends, xla_bridge._backends\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_lines_are_split_at_line_feeds_alone():
  """`splitlines` also ends them at U+2028, U+0085, form feeds: inside of texts and of JSON."""
  found = [f'{path.name}:{node.lineno}' for path in PACKAGE.rglob('*.py')
           for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
           if isinstance(node, ast.Attribute) and node.attr == 'splitlines']
  assert not found


def test_only_storage_renames():
  renames = {'os.replace', 'os.rename', 'shutil.move'}
  found = [f'{path.name}:{node.lineno}' for path in PACKAGE.rglob('*.py')
           for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
           if isinstance(node, ast.Attribute)
           and (ast.unparse(node) in renames or node.attr in ('rename', 'renames'))]
  assert {place.partition(':')[0] for place in found} == {'storage.py'}, found
