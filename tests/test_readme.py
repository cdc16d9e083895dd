"""What README, docs and docstrings tell people to type.

What is proven: every `python -m jaxllm.NAME` command has flags that the program knows and accepts,
and for `train` and `prepare` a config that resolves, on a mesh of as many devices as the variant
names; programs of `jaxllm.tools` have the flags; every `make` target, extra, program file, and in
code every `config.FIELD` and every path of the repository exists; every Python block runs by
itself, on tiny stand-ins for the models and with a `jaxllm.train` and a `jaxllm.evaluate` that only
look at what they are given.

What is not: that commands do what the text says (other tests run the programs), that a package
index has what is installed, and blocks that talk to a running server or download a benchmark, which
are compiled only (SERVER_OR_NETWORK).
"""

import configparser
import importlib
import math
import pathlib
import re
import shlex
import typing

import jax
import pytest

import jaxllm
from jaxllm import config, sharding
from jaxllm.interop import huggingface, sources
from jaxllm.models import families
from jaxllm.training import evaluation, loop
from tests import programs
from tests.interop import small

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').rglob('*.md'))]
SOURCES = [*sorted((ROOT / 'experiments').glob('*.py')),
           *(ROOT / 'jaxllm' / f'{name}.py' for name in
             ('prepare', 'train', 'evaluate', 'sample', 'serve', 'convert'))]
SERVER_OR_NETWORK = ('import openai', 'import lm_eval')
COMMAND = re.compile(r'(?:python3? -m jaxllm\.|(?<=\n)jaxllm )(\w+)(?= )')


def commands():
  """Return (file, program, arguments) of every command; `...` and `[` stand for more."""
  for path in [*PAGES, *SOURCES]:
    text = path.read_text(encoding='utf-8')
    for found in COMMAND.finditer(text):
      arguments = whole(text[found.end():], inline=text[found.start() - 1] == '`')
      if found[1] in MAIN and not any('...' in one or one.startswith('[') for one in arguments):
        yield path.relative_to(ROOT), found[1], tuple(arguments)


def whole(text, inline):
  """Return the words of the command that a text begins with, over as many lines as it has."""
  if inline:
    return shlex.split(text.partition('`')[0])
  lines = text.splitlines()
  for end in range(1, len(lines)):
    command = '\n'.join(lines[:end])
    if not command.endswith('\\'):
      for closed in (command, command.removesuffix('"')):
        try:
          return shlex.split(closed.replace('\\\n', ' '), comments=True)
        except ValueError:
          continue  # Within a quotation: the next line belongs to it.
  raise AssertionError(f'no end: {text[:80]}')


MAIN = ('prepare', 'train', 'evaluate', 'sample', 'serve', 'convert')
COMMANDS = sorted(set(commands()), key=str)


def test_there_are_commands_of_every_program():
  assert {program for _, program, _ in COMMANDS} == set(MAIN) and len(COMMANDS) > 30


@pytest.mark.parametrize('where, program, arguments', COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_is_one_that_the_program_takes(where, program, arguments, monkeypatch):
  monkeypatch.chdir(ROOT)
  module = programs.load(program)
  arguments = [one for one in arguments if one != '--help']
  partial = program in ('train', 'prepare') and not any('--workdir' in one for one in arguments)
  if partial:
    arguments.append('--workdir=runs/x')
  if program == 'prepare':
    arguments.remove('--workdir=runs/x')
  left = config.parse_flags([program, *arguments], module.FLAGS)
  passed_on = f'--{module.FLAGS.passed_on}='
  assert len(left) == 1 or passed_on in ' '.join(arguments), f'{where}: {left}'
  if program in ('train', 'prepare'):
    experiment = config.from_flags(module.CONFIG.value)
    if any('--config.mesh' in one for one in arguments):
      sharding.abstract_mesh(experiment.mesh, devices_of(module.CONFIG.value))


TOOL = re.compile(r'python3? -m (jaxllm\.tools\.\w+)((?:[^`#\n]|\\\n)*)')


def test_tools_have_the_flags():
  found = 0
  for path in PAGES:
    for name, arguments in TOOL.findall(path.read_text(encoding='utf-8')):
      known = set(importlib.import_module(name).FLAGS.values)
      for flag in re.findall(r'--(\w+)', arguments):
        assert flag in known, f'{path.name}: {name} --{flag}'
        found += 1
  assert found > 10


def field_classes(annotation):
  """Yield the config classes that an annotation speaks of."""
  if isinstance(annotation, type) and issubclass(annotation, config.Config):
    yield annotation
  for part in typing.get_args(annotation):
    yield from field_classes(part)


def has_field(classes, names):
  if not names:
    return True
  fields = [one.model_fields[names[0]] for one in classes if names[0] in one.model_fields]
  return any(has_field([*field_classes(field.annotation)], names[1:]) for field in fields)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_fields_and_files_that_stand_in_code_exist(path):
  text = re.sub(r'```python\n.*?```', '', path.read_text(encoding='utf-8'), flags=re.S)
  code = ' '.join(re.findall(r'`([^`]+)`', text.replace('```', '`')))
  for name in re.findall(r'(?<![\w./-])(?:--)?config\.([a-z_]+(?:\.[a-z_]+)*)(?![\w(/])', code):
    if name not in ('json', 'py', 'a.b', 'load'):
      assert has_field([jaxllm.Experiment], name.split('.')), f'{path.name}: config.{name}'
  places = r'(?:experiments|jaxllm|tests|docs|colab|requirements)/[\w./-]*\w'
  for name in re.findall(rf'(?<![\w./-])({places})(?![\w*])', code):
    exists = (ROOT / name).exists() or (ROOT / f'{name}.py').exists()
    assert exists or 'NAME' in name or name.startswith('jaxllm/jaxllm'), f'{path.name}: {name}'


def devices_of(location):
  """Return how many devices the variant of an experiment is for."""
  name, _, variant = location.partition(':')
  topology = getattr(config.load_module(name).VARIANTS[variant], 'topology', None)
  return math.prod(map(int, topology.partition(':')[2].split('x'))) if topology else 1


def test_targets_extras_and_files_exist():
  makefile = (ROOT / 'Makefile').read_text()
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  extras = set(parser['options.extras_require'])
  for path in PAGES:
    text = path.read_text(encoding='utf-8')
    for target in re.findall(r'(?:`|\n)make ([\w-]+)', text):
      assert f'\n{target}:' in makefile, f'{path.name}: make {target}'
    for names in re.findall(r"""['"](?:jaxllm|\.)\[([\w,]+)\]['"]""", text):
      assert set(names.split(',')) <= extras, f'{path.name}: {names}'
    for program, arguments in re.findall(r'python (experiments/[\w/]+\.py)([^`#\n]*)', text):
      code = (ROOT / program).read_text()
      for other in re.findall(r'^import (\w+)$', code, re.M):  # Flags of a program beside it count.
        beside = (ROOT / program).with_name(f'{other}.py')
        code += beside.read_text() if beside.exists() else ''
      for flag in re.findall(r'--(\w+)', arguments):
        assert f"'{flag}'" in code or f"'--{flag}'" in code, f'{path.name}: {program} --{flag}'


def test_the_set_up_has_what_the_page_of_use_needs():
  """The server's packages and the reader of GGUF, which README's first commands use."""
  assert "--editable '.[serve,gguf]'" in (ROOT / 'Makefile').read_text()
  readme = (ROOT / 'README.md').read_text()
  assert '. .venv/bin/activate' in readme and "pip install -e '.[serve,gguf]'" in readme


def test_the_data_of_every_experiment_exist():
  """TFDS knows the data sets, the extra `demo` the packages; files are named in the docstring."""
  import tensorflow_datasets

  folders = [pathlib.Path(tensorflow_datasets.__file__).parent / name
             for name in ('text', 'datasets', 'translate', 'summarization', 'question_answering')]
  demo = (ROOT / 'setup.cfg').read_text().partition('\ndemo =')[2].partition('\n\n')[0]
  for path in sorted((ROOT / 'experiments').glob('*.py')):
    module = config.load_module(str(path))
    for variant in getattr(module, 'VARIANTS', {None: None}):
      experiment = module.get_config(*[variant] if variant else [])
      held_out = experiment.data.validation
      for source in (*experiment.data.sources, *(held_out if isinstance(held_out, tuple) else ())):
        kind, _, rest = source.location.partition(':')
        name = re.split(r'[/?]', rest)[0]
        if kind == 'tfds':
          assert any((folder / f'{name}.py').exists() or (folder / name).is_dir()
                     for folder in folders), f'{path.name}: TFDS has no {name}'
        elif kind == 'package':
          listed = name.replace('_', '-')
          assert re.search(rf'^\s+{listed}\b', demo, re.M | re.I), f'{path.name}: {name}'
        elif kind != 'stdlib':
          assert pathlib.Path(kind).parts[0] in module.__doc__, f'{path.name}: {source.location}'


def blocks():
  for path in PAGES:
    for index, code in enumerate(re.findall(r'```python\n(.*?)```', path.read_text(), re.S)):
      yield pytest.param(code, id=f'{path.name}-{index}')


DOCSTRINGS = ('jaxllm', 'jaxllm.pipelines')


def docstring_blocks():
  """The examples in the docstrings of the public face: lines that are indented."""
  for name in DOCSTRINGS:
    lines = (importlib.import_module(name).__doc__ or '').split('\n')
    code = '\n'.join(line.removeprefix('    ') for line in lines if line.startswith('    '))
    assert code, name
    yield pytest.param(f'import jaxllm\nfrom jaxllm import pipeline\n{code}', id=name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a tiny model wherever a page says that there is one."""
  base = tmp_path_factory.mktemp('readme')
  (base / 'experiments').symlink_to(ROOT / 'experiments')
  template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
  shape = small.CONFIGS['llama']
  huggingface.save(base / 'model', shape, small.variables(shape), small.files(template),
                          model_type='llama')
  for name in ('runs/mine', 'runs/sentiment', 'runs/translation', 'path/to/gpt2', 'path/to/llama',
               'path/to/chat_model'):
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).symlink_to(base / 'model')
  return base


@pytest.mark.parametrize('code', [*blocks(), *docstring_blocks()])
def test_a_python_block_runs_by_itself(code, folder, monkeypatch):
  compiled = compile(code, 'block', 'exec')
  if code.startswith(SERVER_OR_NETWORK) or any(f'\n{one}' in code for one in SERVER_OR_NETWORK):
    return
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sources, 'fetch', lambda name, revision: folder / 'model')
  monkeypatch.setitem(families.PRESETS, 'gpt2_124m', small.CONFIGS['gpt2'])
  trained = []
  monkeypatch.setattr(loop, 'train', lambda experiment, path: trained.append((experiment, path)))
  monkeypatch.setattr(evaluation, 'evaluate', lambda path: {'loss': float(path == 'runs/mine')})
  exec(compiled, {'experiment': config.load('experiments/quickstart.py')})
  assert all(isinstance(experiment, jaxllm.Experiment) for experiment, _ in trained)
  assert jax.config.jax_numpy_rank_promotion == 'raise'
