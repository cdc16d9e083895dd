"""What a user gets wrong, over all programs: one sentence, what was meant, exit code 2.

`CASES` are command lines; each program runs inside this process (`tests.programs`), up to the first
thing that is wrong, which for all of these comes before data, weights and compilation.
"""

import importlib
import logging
import os
import pathlib
import re
import socket
import subprocess
import sys
import warnings

import jax
import pytest
import tqdm

from jaxllm import config, mistakes
from jaxllm.checkpoints import store
from jaxllm.data import preparing, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.models import decoder
from jaxllm.training import loop
from tests import programs
from tests.training import tiny_run as tiny

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = f'--config={ROOT}/experiments/quickstart.py'
RUN = (QUICKSTART, '--workdir=w')

FILES = {
  'plain': 'x',
  'syntax.py': 'def get_config():\n  return (\n',
  'name.py': 'import os\n\n\ndef get_config():\n  return Experimnt()\n',
  'nothing.py': 'x = 1\n',
  'field.py': 'from jaxllm.experiment import TrainingConfig\n\ndef get_config():\n'
              '  return TrainingConfig(num_step=3, batch_size=1)\n',
  'module.py': 'x = 1\nimport not_installed_anywhere\n',
  'helper.py': 'def divide():\n  return 1 / 0\n',
  'deep.py': 'import sys\nsys.path.insert(0, ".")\nimport helper\n\ndef get_config():\n'
             '  return helper.divide()\n',
  'dict.py': 'def get_config():\n  return {}\n',
  'variant.py': 'def get_config(variant):\n  return {"a": 1}[variant]\n',
  'binary.py': '\0',
  'flags.txt': '--config.training.num_step=3\n',
  'broken/config.json': '{"name": "x", "trainng": {}, "data": {"context_length": 8}}',
}

CASES = [
  (('train',), '--config=... is missing: Experiment file'),
  (('train', QUICKSTART), '--workdir=... is missing: Directory'),
  (('train', *RUN, '--confg=x'), '--confg: there is no such flag; did you mean --config?'),
  (('train', *RUN, '--num_steps=5'), 'did you mean --config.training.num_steps?'),
  (('train', *RUN, '--steps=5'), 'or --config.training.num_steps?'),
  (('train', *RUN, '--training.num-steps=5'), 'did you mean --config.training.num_steps?'),
  (('train', *RUN, '--noconfig.model.scan_layers'), 'did you mean --config.model.scan_layers?'),
  (('train', *RUN, '--config.batch_sise=5'), 'has no field'),
  (('train', *RUN, '--config.num_steps=5'), 'did you mean --config.training.num_steps?'),
  (('train', *RUN, '--config.training.num_step=5'), 'did you mean config.training.num_steps?'),
  (('train', *RUN, '--flagfile=flags.txt'), 'did you mean config.training.num_steps?'),
  (('train', *RUN, '--flagfile=nowhere.txt'), "No such file or directory: 'nowhere.txt'"),
  (('train', *RUN, '--config.training.num_steps=many'), 'config.training.num_steps=many'),
  (('train', *RUN, '--config.training.num_steps'), 'num_steps: a value is missing'),
  (('train', *RUN, '--config.seed', '--config.name=x'), '--config.seed: a value is missing'),
  (('train', *RUN, 'quickstart'), "unexpected argument 'quickstart'"),
  (('train', '--config=missing.py', '--workdir=w'), "no such file or directory: 'missing.py'"),
  (('train', '--config=synta.py', '--workdir=w'), "did you mean 'syntax.py'?"),
  (('train', '--config=plain', '--workdir=w'), 'neither a Python file nor a run'),
  (('train', '--config=syntax.py', '--workdir=w'), 'syntax.py, line 2: SyntaxError:'),
  (('train', '--config=name.py', '--workdir=w'), "name.py, line 5: NameError: name 'Experimnt'"),
  (('train', '--config=nothing.py', '--workdir=w'), 'defines no get_config()'),
  (('train', '--config=field.py', '--workdir=w'),
   "field.py, line 4: TrainingConfig.num_step: no such field; did you mean 'num_steps'?"),
  (('train', '--config=module.py', '--workdir=w'), 'module.py, line 2: ModuleNotFoundError'),
  (('train', '--config=deep.py', '--workdir=w'), 'deep.py, line 6: ZeroDivisionError'),
  (('train', '--config=dict.py', '--workdir=w'), 'returned dict, expected a jaxllm config'),
  (('train', '--config=variant.py:b', '--workdir=w'), "variant.py, line 2: KeyError: 'b'"),
  (('train', '--config=variant.py', '--workdir=w'), "'variant.py' needs a variant"),
  (('train', '--config=binary.py', '--workdir=w'), 'binary.py: SyntaxError'),
  (('train', '--config=broken', '--workdir=w'), "trainng: no such field; did you mean 'training'?"),
  (('train', '--config=.', '--workdir=w'), "no such file or directory: 'config.json'"),
  (('train', f'{QUICKSTART}:big', '--workdir=w'), "takes no variant, but 'big' is given"),
  (('train', f'--config={ROOT}/experiments/gpt3.py:124m', '--workdir=w'),
   "175b; did you mean '125m'?"),
  (('train', *RUN, '--config.evaluation.prompts=a,b'), 'written as JSON: ["a", "b"]'),
  (('train', *RUN, '--config.name=../elsewhere'), 'config.name=../elsewhere'),
  (('train', *RUN, '--config.objective.kind=dpo'), "needs a task of the kind 'preference'"),
  (('train', *RUN, '--config.objective.kind=dqo'), 'dqo'),
  (('prepare',), '--config=... is missing'),
  (('prepare', QUICKSTART, '--config.data.source=x'), 'did you mean config.data.sources?'),
  (('sample',), '--model=... is missing: A workdir'),
  (('sample', '--modle=x'), 'did you mean --model?'),
  (('sample', '--model=x', '--max-new-tokens=5'), 'did you mean --max_new_tokens?'),
  (('sample', '--model=x', '--config.seed=1'), '--config.seed: there is no such flag'),
  (('sample', '--model'), '--model: a value is missing'),
  (('sample', '--model=nowhere'), "no such file or directory: 'nowhere'"),
  (('sample', '--model=plai'), "did you mean 'plain'?"),
  (('sample', '--model=x', '--temperature=hot'), '--temperature=hot: a number is needed'),
  (('sample', '--model=x', '--chat=perhaps'), '--chat=perhaps: true or false is needed'),
  (('sample', '--model=x', '--quantize=int5'), "--quantize=int5: one of int8, int4; did you "),
  (('sample', '--model=plain', '--top_p=0'), 'top_p=0'),
  (('sample', '--model=plain', '--top_p=1.5'), '--top_p=1.5'),
  (('sample', '--model=plain', '--temperature=-1'), '--temperature=-1'),
  (('sample', '--model=plain', '--max_new_tokens=0'), '--max_new_tokens=0'),
  (('sample', '--model=plain', '--sampling={'), 'not valid JSON'),
  (('sample', '--model=plain', '--sampling={"top": 1}'), "did you mean 'top_p'"),
  (('sample', '--model=plain', '--num_beams=2', '--num_samples=3'), 'num_return=3'),
  (('sample', '--model=plain', '--num_beams=2', '--top_k=3'), 'top_k works without num_beams only'),
  (('sample', '--model=plain', '--draft=nowhere'), "no such file or directory: 'nowhere'"),
  (('evaluate', '--model=plain', '--baseline=nowhere'), "no such file or directory: 'nowhere'"),
  (('evaluate', '--model=plain', '--tasks=sentimnt'), "did you mean 'sentiment'?"),
  (('evaluate', '--model=plain', '--tasks=nowhere.json'), 'tasks=nowhere.json'),
  (('evaluate', '--model=plain', '--text=nowhere.txt'), "'nowhere.txt'"),
  (('evaluate', '--model=plain', '--tasks=sentiment', '--data=nowhere.csv'), "'nowhere.csv'"),
  (('evaluate', '--model=plain', '--output=plain/scores.json'), '--output=plain/scores.json'),
  (('evaluate', '--model=x', '--task=sentiment'), 'did you mean --tasks?'),
  (('evaluate', '--model=x', '--limit=0'), '--limit=0'),
  (('serve', '--model=x', '--port=99999'), '--port=99999'),
  (('serve', '--model=x', '--port=web'), '--port=web: a whole number is needed'),
  (('serve', '--model=plain', '--limits={"max_row": 1}'), "did you mean 'max_rows'?"),
  (('serve', '--model=plain', '--host=0.0.0.0'), '--host=0.0.0.0: without API keys'),
  (('serve', '--model=plain', '--anonymous', '--host=256.0.0.1'), '--host=256.0.0.1 --port=8000'),
  (('serve', '--model=plain', '--api_keys_file=nowhere'), 'nowhere'),
  (('convert', '--source=nowhere', '--target=y'), "no such file or directory: 'nowhere'"),
  (('convert', '--source=plain', '--target=plain'), '--target='),
  (('convert', '--source=plain', '--target=plain/y'), '--target='),
  (('convert', '--source=plain', '--target=y', '--buckets=8,x'), '--buckets=8,x'),
  (('convert', '--source=plain', '--target=y', '--revision=v1'), "revision='v1' is for hf:NAME"),
  (('train', *RUN, '--config.schedule.warmup_steps=900'), 'schedule.warmup_steps=900'),
  (('train', *RUN, '--config.model.vocab_size=100'),
   'tokenizer.vocab_size=2048 is larger than model.vocab_size=100'),
  (('train', *RUN, '--config.mesh={"data": 7}'), 'config.mesh'),
  (('train', QUICKSTART, '--workdir=plain'), '--workdir=plain'),
  (('convert', '--source=x'), '--target=... is missing'),
  (('convert', '--source=x', '--target=y', '--format=hf'), '--format=hf'),
  (('convert', '--source=x', '--target=y', '--format=hugingface'), "did you mean 'huggingface'?"),
  (('convert', '--source=nothing.py', '--target=y'), 'nothing.py holds no complete checkpoint'),
  (('train', QUICKSTART, '--workdir='), '--workdir=: a value is missing'),
  (('train', QUICKSTART, '--workdir=ftp://x'), '--workdir=ftp://x: a path is local, gs://'),
  (('train', *RUN, '--dry_run=perhaps'), '--dry_run=perhaps: true or false is needed'),
  (('train', *RUN, '--profile_steps=5:2'), '--profile_steps=5:2: expected FIRST:LAST'),
  (('train', *RUN, '--num_processes=2'), '--process_id=None: all three are needed'),
  (('prepare', QUICKSTART, '--config.data.sources=nowhere/*.txt'), "no files in 'nowhere/*.txt'"),
  (('prepare', QUICKSTART, '--config.data.sources=package:nope'), "'package:nope'"),
  (('train', *RUN, '--config.data.sources='), 'data.sources=() and task=None: set one of them'),
  (('train', *RUN, '--config.optimizer.name=adamv'), "muon, sgd; did you mean 'adamw'?"),
  (('train', *RUN, '--config.schedule.name=cosin'), "did you mean 'cosine'?"),
  (('train', *RUN, '--config.tokenizer.kind=byte'), "one of sentencepiece, byte_level_bpe, gpt2, "
                                                    "json, bytes; did you mean 'bytes'?"),
  (('train', *RUN, '--config.task.kind=sentimnt'), "did you mean 'sentiment'?"),
  (('train', *RUN, '--config.objective.kind=classifer'), "did you mean 'classifier'?"),
  (('train', *RUN, '--config.model.dtype=float16'), "one of float32, bfloat16; did you mean '"),
  (('train', *RUN, '--config.model.num_heads=5'), 'num_heads=5 does not divide embed_dim=192'),
  (('train', *RUN, '--config.training.writers=["wandbb"]'), "did you mean 'wandb'?"),
  (('prepare', *RUN), '--workdir: there is no such flag'),
  (('prepare', QUICKSTART, '--config.records_dir=plain'), 'cannot write: Not a directory'),
  (('evaluate', '--model='), '--model=: a value is missing'),
  (('evaluate', '--model=x', '--stride=0'), '--stride=0: 0 is not a positive integer'),
  (('sample', '--model=plain', '--seed=-1'), '--seed=-1'),
  (('sample', '--model=plain', '--num_drafted=2', '--num_beams=2'), 'choose one'),
  (('sample', '--model=plain', '--chat', '--num_samples=2'), '--num_samples works without --chat'),
  (('serve', '--model=x', '--num_slots=0'), '--num_slots=0'),
  (('serve', '--model=plain', '--limits=[]'), 'LimitsConfig: expected a JSON object, got list'),
  (('tools.plan', QUICKSTART, '--topology=v9:1'), '--topology=v9:1: a generation of v4, v5e'),
  (('tools.plan', QUICKSTART, '--topology=v5e:3x5'), 'slices of v5e have shapes such as'),
  (('tools.plan', QUICKSTART, '--config.mesh.data=64'), 'needs a multiple of 64 devices'),
  (('tools.launch', QUICKSTART), '--for=... is missing'),
  (('tools.launch', QUICKSTART, '--for=slurmm'), "did you mean 'slurm'?"),
  (('tools.launch', QUICKSTART, '--for=tpuvm'), 'names no TPU slice; give --topology=v5e:4x4'),
  (('tools.launch', QUICKSTART, '--for=local', '--processes=1'), '1 is not an integer >= 2'),
  (('tools.report',), 'name the workdir of a run'),
  (('tools.report', 'brokn'), "no such file or directory: 'brokn'; did you mean 'broken'?"),
  (('tools.report', 'plain'), 'plain is no directory: name that of a run'),
  (('tools.which_docs', '--workdir=broken', '--step=3'), '--workdir=broken: there is no run'),
  (('tools.which_docs', '--workdir=broken'), 'give one of --step and --text'),
  (('tools.audit',), '--model is needed'),
  (('tools.verify_resume', QUICKSTART, '--mesh={'), '--mesh={: Expecting property name'),
  (('tools.verify_resume', QUICKSTART, '--mesh={"dat": 1}'), "did you mean 'data'?"),
  (('tools.verify_resume', QUICKSTART, '--processes=a'), '--processes=a: expected numbers'),
  (('tools.models', 'gpt2'), "unexpected argument 'gpt2'; flags are written --name=value"),
  (('tools.models', '--like=lamma3'), "--like=lamma3: no preset has this in its name"),
  (('tools.doctor', '--jsn'), 'did you mean --json?'),
  (('tools.selfcheck', '--config=nowhere.py'), "no such file or directory: 'nowhere.py'"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  for name, text in FILES.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('command, said', CASES, ids=range(len(CASES)))
def test_one_sentence_and_exit_code_2(folder, command, said):
  code, out, err = programs.run(*command)
  assert (code, out) == (2, '') and said in err
  assert err.startswith('error: ') and err.count('\n') == 1 and 'Traceback' not in err
  assert not (folder / 'w').exists()


def test_the_port_is_taken_before_weights_are_read(folder):
  with socket.create_server(('127.0.0.1', 0)) as other:
    port = other.getsockname()[1]
    code, _, err = programs.run('serve', '--model=plain', f'--port={port}')
  assert code == 2 and f'--port={port}: cannot listen there (Address already in use)' in err


@pytest.mark.parametrize('model', ['nowhere', 'run'])
def test_init_from_is_there_and_fits_before_data_are_read(folder, model, monkeypatch):
  """A model that is gone or of another size is refused before sources are read."""
  tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  store.save_converted(
    folder / 'run', tiny.MODEL, decoder.init(tiny.MODEL, jax.random.key(0)), tokenizer.files(), {})
  said = {'nowhere': 'config.init_from: no such file',
          'run': 'does not fit config.model: .* parameters differ'}[model]
  monkeypatch.setattr(preparing, 'prepare', lambda *_: pytest.fail('data were read'))
  experiment = tiny.experiment(
    folder, init_from=model, model=tiny.MODEL.replace(mlp_dim=2 * tiny.MODEL.mlp_dim))
  with pytest.raises(ValueError, match=said):
    loop.train(experiment, folder / 'w', jax.devices()[:1])


def test_a_vocabulary_is_too_small_before_data_are_read(folder, monkeypatch):
  """Of a tokenizer with files, whose size no field says; the message names both fields."""
  monkeypatch.setattr(preparing, 'prepare', lambda *_: pytest.fail('data were read'))
  experiment = tiny.experiment(
    folder, tokenizer=TokenizerConfig(kind='bytes'), model=tiny.MODEL.replace(vocab_size=100))
  with pytest.raises(ValueError, match='(?s)config.model.vocab_size=100.*config.tokenizer'):
    loop.train(experiment, folder / 'w', jax.devices()[:1])


def test_what_is_a_fault_of_ours_keeps_its_traceback(monkeypatch):
  """Refusals of ours and of the system are sentences; a bug is raised as it is."""
  sample = programs.load('sample')
  package = pathlib.Path(mistakes.__file__).parent

  def raised(text, where):
    """Return what is raised by a line of code that lies in a file."""
    try:
      exec(compile(text, str(where), 'exec'), {})
    except Exception as error:
      return error

  assert mistakes.sentence(raised('int("x")', package / 'loading.py')) is None
  for text in ('{}["x"]', 'None.x', '1 / 0', 'import jaxllm.nothing_there', 'assert False'):
    assert mistakes.sentence(raised(text, package / 'loading.py')) is None, text
  assert mistakes.sentence(raised('open("/nowhere")', 'x.py')) == (
    '/nowhere: No such file or directory')
  assert 'codec' in mistakes.sentence(raised(r'b"\xff".decode()', 'x.py'))
  assert mistakes.sentence(raised('import uvicorn.not_there', 'x.py')).endswith(
    "pip install 'jaxllm[serve]'")
  with pytest.raises(KeyError):
    monkeypatch.setattr(sample, 'main', lambda _: {}['x'])
    programs.run_loaded(sample, '--model=x')
  assert config.ConfigError('x').__class__.__module__ == 'jaxllm.validation'


def test_one_voice(capsys, monkeypatch):
  """Our lines are plain and leave a progress bar whole; of others only errors are heard."""
  root = logging.getLogger()
  levels = root.level, logging.getLogger('absl').level
  monkeypatch.setattr(root, 'handlers', [])
  with warnings.catch_warnings():
    mistakes.speak_plainly()
    ours = str(pathlib.Path(mistakes.__file__).with_name('loading.py'))
    with tqdm.tqdm(total=2, file=sys.stderr, ncols=40) as bar:
      bar.update()
      for level, where, text in (
          (logging.INFO, ours, 'Loading x.'), (logging.WARNING, ours, 'odd'),
          (logging.WARNING, '/other/orbax/store.py', 'noise'),
          (logging.INFO, '/other/a.py', 'noise'),
          (logging.ERROR, '/other/a.py', 'it broke')):
        root.handle(logging.LogRecord('absl', level, where, 1, text, (), None))
    warnings.warn('of another package', stacklevel=1)
  root.setLevel(levels[0])
  logging.getLogger('absl').setLevel(levels[1])
  written = capsys.readouterr().err
  lines = [line.strip() for line in re.split(r'[\r\n]+', written)]
  told = [line for line in lines if line and '%|' not in line]
  assert told == ['Loading x.', 'warning: odd', 'error: it broke']
  assert all(line.startswith(('0%', '50%')) for line in lines if '%|' in line)


def test_a_backend_that_does_not_start(monkeypatch):
  from jax._src import xla_bridge

  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  for body in ('assert False', 'raise RuntimeError("no\\ndevice")'):
    try:
      exec(compile(body, xla_bridge.__file__, 'exec'), {})
    except Exception as error:
      said = mistakes.sentence(error)
    assert said.startswith('JAX_PLATFORMS=cuda: JAX cannot start') and 'JAX_PLATFORMS=cpu' in said
    assert '\n' not in said


def test_programs_are_importable_together_and_find_a_backend_deep_inside_of_jax():
  names = ('prepare', 'train', 'evaluate', 'sample', 'serve', 'convert')
  code = (f'import {", ".join(f"jaxllm.{name}" for name in names)}\n'
          'main = lambda _: __import__("jax").random.key(0)\n'
          'jaxllm.config.run_program(main, jaxllm.sample.FLAGS)')
  environment = {**os.environ, 'JAX_PLATFORMS': 'cuda'}
  done = subprocess.run([sys.executable, '-c', code, '--model=x'], env=environment,
                        capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith('error: JAX_PLATFORMS=cuda'), done.stderr


def test_the_name_of_a_program(monkeypatch, capsys):
  main = importlib.import_module('jaxllm.__main__')
  monkeypatch.setattr('sys.argv', ['jaxllm', 'trian'])
  with pytest.raises(SystemExit) as stopped:
    main.main()
  said = capsys.readouterr().err
  assert stopped.value.code == 2 and "no program 'trian'; did you mean 'train'?" in said


def test_another_kind_and_none_as_people_write_them(tmp_path):
  experiment = tiny.experiment(tmp_path)
  tuned = config.override(experiment, {
    'task.kind': 'preference', 'data.sources': '[]', 'objective.kind': 'simpo',
    'objective.beta': '3.0', 'training.ema_decay': 'none'})
  assert (tuned.objective.kind, tuned.objective.beta) == ('simpo', 3.0)
  assert tuned.task.kind == 'preference' and tuned.training.ema_decay is None


def test_what_may_not_be_read(folder):
  if os.geteuid() == 0:
    pytest.skip('root may read everything')
  (folder / 'name.py').chmod(0)
  code, _, err = programs.run('train', '--config=name.py', '--workdir=w')
  assert code == 2 and 'name.py: Permission denied' in err
