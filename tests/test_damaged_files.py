"""Each file of a run and of its records, damaged, under each program: a sentence or an older step.

A sentence names the file or the step; nothing is ever a traceback, whatever a file holds.
"""

import shutil

import pytest

from jaxllm.training import loop, workdir
from tests import programs
from tests.training import tiny_run as tiny

DEEP = b'[' * 200_000
STEP = 'run/checkpoints/8'
ARRAYS, META = f'{STEP}/state/d/*', f'{STEP}/bundle/metadata'
HALF, GONE = 'half of it', 'gone'
ALL = ('evaluate', 'sample', 'convert', 'serve')
# The file, what it holds now, and what comes of the programs that read it: 2 is a sentence with the
# name of the file or the step; 0 goes on, from an older step or without a file that is only told.
CASES = [
  (ARRAYS, HALF, {**dict.fromkeys(ALL, 2), 'sample run': 0, 'train more': 0}),
  (META, HALF, {**dict.fromkeys(ALL, 2), 'sample run': 0, 'train more': 0}),
  (f'{STEP}/commit_success.txt', GONE, {**dict.fromkeys(ALL, 2), 'sample run': 0}),
  (f'{STEP}/state/_METADATA', DEEP, {'sample': 2}),
  (f'{STEP}/state/_METADATA', b'{"tree_metadata": 3}', {'sample': 2}),
  (f'{STEP}/state/manifest.ocdbt', b'', {'sample': 2}),
  (META, DEEP, {'sample': 2, 'sample run': 0}),
  (META, b'[]', {'sample': 2}),
  (META, b'{"format": 1, "config_json": [], "tokenizer_files": {"a": 3}}', {'sample': 2}),
  (META, b'{"format": 2, "sha256": 7, "tokenizer_files": {}}', {'sample': 2}),
  (META, b'{"format": 1, "config_json": "[[", "tokenizer_files": {}, "manifest": {}}',
   {'sample': 2}),
  (META, b'{"format": 1, "config_json": "{\\"model\\": {\\"vocab_size\\": []}}",'
   b' "tokenizer_files": {}, "manifest": {"converted": 3}}', {'sample': 2, 'convert': 2}),
  (META, b'{"format": 1, "config_json": "{}", "tokenizer_files": {"../x": ""}, "manifest": {},'
   b' "leaves": [3], "best": [[1, 2]]}', {'sample': 2}),
  ('run/config.json', b'{"training": [1]}', {'train': 2}),
  ('run/config.json', DEEP, {'train': 2}),
  ('run/data.json', HALF, {'train': 2}),
  ('run/data.json', DEEP, {'train': 2}),
  ('run/summary.json', HALF, {'train': 2}),
  ('run/summary.json', b'[]', {'train': 2}),
  ('run/passed_over.json', b'{"batches": [{"first": "x"}]}', {'train': 2}),
  ('run/passed_over.json', DEEP, {'train': 2}),
  ('run/metrics.jsonl', DEEP + b'\n{"step": "x"}\n{"step": 8, "validation/loss": []}\n',
   {'train': 0, 'train more': 0}),
  ('run/environment.json', b'{"packages": 3}', {'train more': 0}),
  ('run/running.json', b'{"host": [], "pid": {"x": "\\u0000"}}', {'train': 0}),
  ('run/running.json', DEEP, {'train': 0}),
  ('run/tokenizer/tokenizer.json', b'{"kind": []}', {'train': 0}),
  ('records/**/manifest.json', HALF, {'prepare': 0}),
  ('records/**/manifest.json', DEEP, {'prepare': 0}),
  ('records/**/manifest.json', b'{"data": 3}', {'train': 0}),
  ('records/**/.source_hashes.json', b'{"x": 3}', {'prepare': 0}),
  ('records/**/train-*', HALF, {'train more': 2}),
  ('records/**/tokenizer/*', HALF, {'train': 2}),
]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A finished run, steps 4 and 8, with its records."""
  path = tmp_path_factory.mktemp('base')
  experiment = tiny.experiment(
    path, checkpoint__every_steps='4', evaluation__prompts='[]', data__validation=None)
  loop.train(experiment, path / 'run')
  (path / 'experiment.json').write_text(experiment.to_json())
  (path / 'text.txt').write_text('the king sleeps')
  return path


def command(program, base, path):
  run, step = path / 'run', path / STEP
  training = (f'--config={base}/experiment.json', f'--config.records_dir={path}/records')
  return {
    'train': ('train', *training, f'--workdir={run}'),
    'train more': ('train', *training, f'--workdir={run}', '--config.training.num_steps=9'),
    'prepare': ('prepare', *training),
    'evaluate': ('evaluate', f'--model={step}', f'--text={base}/text.txt'),
    'sample': ('sample', f'--model={step}', '--prompt=the', '--max_new_tokens=1'),
    'sample run': ('sample', f'--model={run}', '--prompt=the', '--max_new_tokens=1'),
    'convert': ('convert', f'--source={step}', f'--target={path}/converted'),
    'serve': ('serve', f'--model={step}', '--anonymous'),
  }[program]


@pytest.mark.parametrize('name, content, codes', CASES, ids=range(len(CASES)))
def test_a_damaged_file_is_a_sentence_or_an_older_step(base, tmp_path, monkeypatch, name, content,
                                                       codes):
  monkeypatch.setattr(workdir, 'STALE_SECONDS', 0)
  for folder in ('run', 'records'):
    shutil.copytree(base / folder, tmp_path / folder)
  for file in list(tmp_path.glob(name)) or [tmp_path / name]:
    if content == GONE:
      file.unlink()
    else:
      half = file.read_bytes()[: file.stat().st_size // 2] if content == HALF else b''
      file.write_bytes(half if content == HALF else content)
  for program, wanted in codes.items():
    code, _, err = programs.run(*command(program, base, tmp_path))
    assert code == wanted and 'Traceback' not in err, (program, err)
    if wanted == 2:
      assert str(tmp_path) in err[err.index('error: '):].split('\n')[0], err
