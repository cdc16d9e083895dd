"""Files of a workdir damaged in every way, then loaded and resumed on another mesh: what is said?

  python experiments/benchmarks/corruption.py [--count=300] [--seed=0] [--minutes=60]

A tiny run is trained once. Each trial copies it, damages one file (a bit flipped, cut off, zeroed,
emptied, deleted, or the same file of another step in its place) and loads the model (the best
step), reads a step by its name, and restores the newest state onto another mesh as a resumed run
does, under the run's lock and with its records. An outcome is one of

- same: what was saved came back, unharmed by the damage;
- older: an older whole step came back, and its number was said;
- refused: an error of one sentence with the name of the file or step;
- SILENT: other numbers, tokenizer, config or manifest than of any step that was saved;
- TRACEBACK: any other error.

The same damage to the same arrays saved by Orbax alone stands beside it.
"""

import os

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import collections
import json
import logging
import pathlib
import random
import shutil
import tempfile
import time

from absl import app, flags

COUNT = flags.DEFINE_integer('count', 300, 'Trials.')
MINUTES = flags.DEFINE_float('minutes', 600, 'After which no further trial begins.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the damage.')
OUTPUT = flags.DEFINE_string('output', 'runs/corruption.jsonl', 'Gets a line for each trial.')

STEPS = (4, 8)
CLASSES = ('arrays', 'metadata', 'bundle', 'commit marker', 'workdir', 'records', 'lock')
DAMAGES = ('flip', 'flip', 'flip', 'truncate', 'zero', 'empty', 'delete', 'swap')


def main(_) -> None:
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  end = time.monotonic() + 60 * MINUTES.value
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as folder, path.open('w') as lines:
    base = pathlib.Path(folder)
    experiment, truth = make(base)
    counts = collections.defaultdict(collections.Counter)
    rng, trial = random.Random(SEED.value), base / 'trial'
    begun = json.loads((base / 'run' / 'data.json').read_text())['fingerprint']
    for number in range(COUNT.value):
      if time.monotonic() > end:
        break
      shutil.rmtree(trial, ignore_errors=True)
      shutil.copytree(base / 'run', trial)
      shutil.copytree(base / 'records', trial / 'records')
      (trial / 'running.json').write_text(json.dumps(DEAD))
      name, file, damage = harm(trial, CLASSES[number % len(CLASSES)], rng)
      ways = {
        'load': (lambda: load(trial), truth['load']),
        'named step': (lambda: load(trial / 'checkpoints' / '8'), truth['load'][-1:]),
        'resume': (lambda: resume(experiment, trial), truth['resume']),
        'records': (lambda: records(experiment, trial, begun), truth['records'])}
      found = {way: outcome(trial, read, true) for way, (read, true) in ways.items()}
      if name in ('arrays', 'metadata'):
        plain = base / 'plain-trial'
        shutil.rmtree(plain, ignore_errors=True)
        shutil.copytree(base / 'plain', plain)
        rest = [path for path in sorted(plain.rglob('*')) if path.is_file() and (
          path.stat().st_size > 2000) == (name == 'arrays')]
        apply(rng.choice(rest), damage, rng)
        found['plain Orbax'] = outcome(
          plain, lambda plain=plain: orbax(plain), truth['orbax'], closed=False)
      for way, said in found.items():
        counts[f'{name}: {way}'][said[0]] += 1
      trial_said = {'class': name, 'file': str(file), 'damage': damage, **found}
      print(json.dumps(trial_said), file=lines, flush=True)
  print_table(counts)
  print(f'{sum(counts[f"{name}: load"].total() for name in CLASSES)} trials in {path}')


# What a run leaves that was killed on another host.
DEAD = {'host': 'elsewhere', 'boot': 'x', 'pid': 77, 'started': '5', 'beat': 3,
        'since': '2026-01-01 00:00:00'}


def make(base: pathlib.Path):
  """Train the run, save its state by Orbax alone too; return what each way of reading must give."""
  import orbax.checkpoint as ocp

  import jaxllm
  from jaxllm.checkpoints import store, tree
  from jaxllm.config import override
  from jaxllm.experiment import Experiment

  (base / 'corpus').mkdir()
  words = random.Random(1)
  for index in range(40):
    text = ' '.join(words.choice(('the king', 'a queen', 'speaks', 'sleeps')) for _ in range(40))
    (base / 'corpus' / f'{index}.txt').write_text(text)
  experiment = Experiment.from_json(json.dumps({
    'name': 'corruption', 'records_dir': str(base / 'records'),
    'model': {'vocab_size': 300, 'vocab_multiple': 8, 'embed_dim': 32, 'num_layers': 2,
              'num_heads': 4, 'num_kv_heads': 2, 'mlp_dim': 64, 'max_length': 32},
    'data': {'sources': [{'location': str(base / 'corpus')}], 'validation': 0.2,
             'context_length': 32},
    'tokenizer': {'kind': 'sentencepiece', 'vocab_size': 290},
    'training': {'num_steps': 8, 'batch_size': 8, 'spike': None},
    'checkpoint': {'every_steps': 4}, 'evaluation': {'every_steps': 4, 'prompts': []},
    'best': {'metric': 'validation/loss'}}))
  jaxllm.train(experiment, base / 'run')
  experiment = override(experiment, {'mesh.data': '2', 'mesh.fsdp': '2', 'mesh.tensor': '2'})
  logging.disable(logging.INFO)
  truth = {'load': [], 'resume': [], 'records': [records(experiment, base, None)]}
  for step in STEPS:
    directory = base / f'only-{step}'
    shutil.copytree(base / 'run', directory)
    for other in STEPS:
      if other != step:
        shutil.rmtree(directory / 'checkpoints' / str(other))
    truth['load'].append(load(directory))
    truth['resume'].append(resume(experiment, directory))
  _, state, _ = _restored(experiment, base / 'only-8')
  arrays = tree.nest({path: leaf for path, leaf in tree.flatten(state).items()})
  ocp.PyTreeCheckpointer().save(base / 'plain', arrays)
  truth['orbax'] = [orbax(base / 'plain')]
  assert store.best_step(base / 'run' / 'checkpoints') == 8
  return experiment, truth


def load(path: pathlib.Path) -> tuple:
  """Return what is known of a loaded model: its numbers, its tokenizer, its config."""
  import jax

  import jaxllm

  model = jaxllm.load(path)
  return (_digest(jax.tree.leaves(model.variables)), model.tokenizer.fingerprint,
          model.config.to_json(), model.records)


def _restored(experiment, path: pathlib.Path):
  from jaxllm import sharding
  from jaxllm.checkpoints import reading, store
  from jaxllm.training import state

  mesh = sharding.make_mesh(experiment.mesh)
  abstract = state.abstract_state(experiment, state.make_optimizer(experiment), mesh)
  opened = store.open_store(path / 'checkpoints', experiment.checkpoint)
  try:
    while True:
      step = store.latest_step(opened)
      try:
        bundle = reading.read_bundle(opened.directory / str(step))
        return step, store.restore(opened, abstract.replace(frozen={}), step), bundle
      except store.DamagedError as error:
        store.quarantine(opened, error)
  finally:
    store.close(opened)


def resume(experiment, path: pathlib.Path) -> tuple:
  """Return the state that a resumed run goes on from, on a mesh of eight devices."""
  import jax

  from jaxllm.training import workdir

  workdir.STALE_SECONDS = 0
  begun = workdir.begun_as(path)
  if begun is not None:
    workdir.check_same_run(begun, experiment, path)
  with workdir.held(path):
    _, state, bundle = _restored(experiment, path)
  return (_digest(jax.tree.leaves(state)), sorted(bundle.tokenizer_files.items()),
          json.dumps(bundle.manifest, sort_keys=True))


def records(experiment, path: pathlib.Path, begun: str | None) -> tuple:
  """Return the batches and the tokenizer that a run that has begun with some records reads."""
  from jaxllm.config import override
  from jaxllm.training import dataset

  opened = dataset.open_dataset(override(
    experiment, {'records_dir': str(path / 'records')}), begun)
  batches = opened.make_batches('train', 8, True, None)
  held_out = opened.make_batches('validation', 8, False, 1)
  leaves = [value for one in (batches.batch_at(0), batches.batch_at(9), held_out.batch_at(0))
            for _, value in sorted(one.items())]
  return _digest(leaves), opened.tokenizer.fingerprint, opened.manifest.fingerprint


def orbax(path: pathlib.Path) -> tuple:
  """Return what Orbax alone restores."""
  import jax
  import orbax.checkpoint as ocp

  return (_digest(jax.tree.leaves(ocp.PyTreeCheckpointer().restore(path))),)


def _digest(leaves) -> str:
  import hashlib

  import numpy as np

  digest = hashlib.sha256()
  for leaf in leaves:
    array = np.asarray(leaf)
    digest.update(f'{array.dtype} {array.shape}'.encode() + array.tobytes())
  return digest.hexdigest()


def harm(trial: pathlib.Path, name: str, rng: random.Random):
  """Damage a file of one class; return (class, file, damage)."""
  step = trial / 'checkpoints' / str(rng.choice((8, 8, 8, 4)))
  if name == 'workdir':
    files = [trial / one for one in ('config.json', 'data.json', 'environment.json')]
    files += [path for path in (trial / 'tokenizer').iterdir()]
  elif name == 'records':
    files = [path for path in sorted((trial / 'records').rglob('*'))
             if path.is_file() and path.stat().st_size]
  elif name == 'lock':
    files = [trial / 'running.json']
  elif name == 'commit marker':
    files = [step / 'commit_success.txt']
  elif name == 'bundle':
    files = [path for path in (step / 'bundle').rglob('*') if path.is_file()]
  else:
    files = [path for path in sorted(step.rglob('*')) if path.is_file() and (
      path.parent.name != 'bundle') and path.name != 'commit_success.txt' and (
      path.stat().st_size > 2000) == (name == 'arrays')]
  file, damage = rng.choice(files), rng.choice(DAMAGES)
  apply(file, damage, rng)
  return name, file.relative_to(trial), damage


def apply(file: pathlib.Path, damage: str, rng: random.Random) -> None:
  content = bytearray(file.read_bytes())
  if damage == 'delete':
    file.unlink()
    return
  if damage == 'swap':
    root = next(path for path in file.parents if path.name in ('trial', 'plain-trial'))
    others = [path.read_bytes() for path in sorted(root.rglob(file.name)) if path.is_file()]
    others = [other for other in others if other != bytes(content)]
    content = bytearray(rng.choice(others)) if others else content[::-1]
  elif damage == 'empty' or not content:
    content = bytearray()
  elif damage == 'flip':
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  elif damage == 'truncate':
    del content[rng.randrange(len(content)) :]
  else:
    at = rng.randrange(len(content))
    size = min(len(content) - at, rng.choice((16, 512, 4096)))
    content[at : at + size] = bytes(size)
  file.write_bytes(content)


def outcome(trial: pathlib.Path, read, truths: list, closed: bool = True) -> tuple[str, str]:
  """Return what became of a reading, and what was said."""
  from jaxllm import mistakes

  try:
    found = read()
  except Exception as error:  # noqa: BLE001
    said = mistakes.sentence(error)
    if not closed:  # Orbax's errors are its own.
      return 'refused', str(error)[:200]
    if said is None or trial.name not in said:
      return 'TRACEBACK', f'{type(error).__name__}: {str(error)[:300]}'
    return 'refused', said[:300]
  if found == truths[-1]:
    return 'same', ''
  return ('older', '') if found in truths else ('SILENT', '')


def print_table(counts) -> None:
  kinds = ('same', 'older', 'refused', 'SILENT', 'TRACEBACK')
  print(f'{"damaged: read by":32}' + ''.join(f'{kind:>11}' for kind in kinds))
  for name in sorted(counts):
    print(f'{name:32}' + ''.join(f'{counts[name][kind]:11}' for kind in kinds))


if __name__ == '__main__':
  app.run(main)
