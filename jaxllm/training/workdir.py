"""The directory of a run: opened safely, described by files that a person can read."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxllm import config as config_lib
from jaxllm import distributed, storage
from jaxllm.checkpoints import tree
from jaxllm.experiment import Experiment
from jaxllm.training import state as state_lib

DATA, LOCK = 'data.json', 'running.json'
BEAT_SECONDS, STALE_SECONDS = 15, 60
# Packages that decide what a step computes, and which file formats are written.
PACKAGES = ('jaxllm', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def open_workdir(experiment: Experiment, workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Create the directory of a run, or check that the run in it can go on as this experiment.

  Fields that decide the model or the records of each step may not change between two runs into one
  directory; the rest (steps, learning rate, devices, ...) may.

  Raises:
    ValueError: the directory cannot be written, is not the same one in all processes, or a field
      may not change; the message names it.
  """
  path = storage.path(workdir, '--workdir=')
  if distributed.is_first():
    storage.make_writable(path, '--workdir=')
  distributed.barrier('the workdir is there')
  if not storage.is_remote(path) and not path.is_dir():
    raise ValueError(f'--workdir={path} of {socket.gethostname()} is not that of process 0; all '
                     'processes need one directory, on a file system that they share')
  storage.make_writable(path, '--workdir=')
  if (old := begun_as(path)) is not None:
    check_same_run(old, experiment, path)
  return path


def begun_as(path: pathlib.Path) -> Experiment | None:
  """Return the config of the run that has begun in a directory; None: none has."""
  if not has_begun(path) or not (path / 'config.json').exists():
    return None
  return config_lib.load(str(storage.local(path / 'config.json')))


def has_begun(path: pathlib.Path) -> bool:
  """Return whether there is anything to lose; until then a wrong config can be put right."""
  with storage.explained(path):
    return (path / 'metrics.jsonl').exists() or any((path / 'checkpoints').glob('*'))


def begun_with(path: pathlib.Path) -> str | None:
  """Return the fingerprint of the records that the run in a directory has begun with."""
  return storage.read_json(path / DATA, needed=True).get('fingerprint') if has_begun(path) else None


def check_same_run(old: Experiment, new: Experiment, workdir: pathlib.Path) -> None:
  """Raise a ValueError that names the fields where two experiments cannot share a directory."""
  refuse(workdir, [
    row for row in config_lib.diff(old, new)
    if any(f'{row[0]}.'.startswith(f'{field}.') for field in FIXED_FIELDS)
    and not _RUN_DEPENDENT.fullmatch(row[0])
  ], 'decides the model or the order of its records')
  if old.data.mixed != new.data.mixed:
    refuse(workdir, [row for row in config_lib.diff(old, new)
                     if row[0].endswith(('.weight', '.epochs'))],
           'decides whether a record may be of several sources')
  if new.privacy:
    refuse(workdir, [row for row in config_lib.diff(old, new) if row[0] == 'training.batch_size'],
           'decides what differential privacy has promised')


def check_state(old: Experiment, new: Experiment, workdir: pathlib.Path) -> None:
  """Raise a ValueError that names the changed fields which change the arrays of a checkpoint."""
  if (stored := _leaves(old)) == _leaves(new):
    return
  guilty = []
  for row in config_lib.diff(old, new):
    # Of fields that only fit together, each is named.
    with contextlib.suppress(ValueError):
      if _leaves(config_lib.override(old, {row[0]: row[2]})) == stored:
        continue
    guilty.append(row)
  refuse(workdir, guilty, 'decides which arrays its checkpoints hold')


def _leaves(experiment: Experiment) -> dict[str, Any]:
  tx = state_lib.make_optimizer(experiment)
  state = jax.eval_shape(lambda: state_lib.init_state(experiment, tx))
  return {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(state).items()}


def refuse(workdir: pathlib.Path, changed: Sequence[tuple[str, Any, Any]], reason: str) -> None:
  """Raise a ValueError that names changed fields, from `config.diff`, unless there are none."""
  if not changed:
    return
  rows = ', '.join(f'config.{path}: {before!r} -> {after!r}' for path, before, after in changed)
  raise ValueError(f'the run in --workdir={workdir} cannot change {rows}, which {reason}; give '
                   'back what it had, or choose another --workdir')


# Fields that decide the shapes of parameters, the records and their order.
FIXED_FIELDS = ('model', 'data', 'tokenizer', 'finetune', 'seed')
# Of them the fields that change how a model runs, not its function, and where files lie: their
# content is part of the fingerprint of the records.
_RUN_DEPENDENT = re.compile(
  r'model\.(scan_layers|remat(\..*)?|attention|dtype|dropout_rate)'
  r'|data\.(sources|validation)\.\d+\.(location|weight|epochs)|tokenizer\.path'
)


def environment() -> dict[str, Any]:
  """Return versions, devices and the git commit, for environment.json."""
  devices = jax.devices()
  spec = sys.modules['__main__'].__spec__
  return {
    'python': sys.version.split()[0],
    'platform': platform.platform(),
    'cpus': os.cpu_count(),
    'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
    'backend': devices[0].platform,
    'device_kind': devices[0].device_kind,
    'devices': len(devices),
    'processes': jax.process_count(),
    'git_commit': _git_commit(),
    'command': shlex.join(['python', '-m', spec.name, *sys.argv[1:]] if spec else sys.argv),
  }


def write_environment(path: pathlib.Path) -> None:
  """Write environment.json, append it to the starts of the run, and log what has changed."""
  old, new = storage.read_json(path / 'environment.json'), environment()
  packages = old.get('packages')
  before = {**old, **(packages if isinstance(packages, dict) else {})}
  after = {**new, **new['packages']}
  for name in sorted(before.keys() & after.keys() - {'packages', 'command'}):
    if before[name] != after[name]:
      logging.warning('Changed since the last call: %s: %s -> %s', name, before[name], after[name])
  storage.write_json(path / 'environment.json', new)
  starts = path / 'environment.jsonl'
  lines = starts.read_text() if starts.exists() else ''
  storage.write_file(starts, lines + json.dumps({'time': time.time(), **new}) + '\n')


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[None]:
  """Hold the directory of a run inside, in process 0; a ValueError says who else has it.

  A holder that died on this host is told by its process; one of another host by its sign of life,
  renewed every BEAT_SECONDS, for which STALE_SECONDS are waited.
  """
  if not distributed.is_first():
    yield
    return
  lock, closed = path / LOCK, threading.Event()
  mine: dict[str, Any] = {
    'host': socket.gethostname(), 'boot': _text('/proc/sys/kernel/random/boot_id'),
    'pid': os.getpid(), 'started': _started(os.getpid()), 'beat': 0,
    'since': time.strftime('%Y-%m-%d %H:%M:%S')}
  with storage.locked(path):  # Of two that start at once, one sees what the other wrote.
    if lock.exists() and _is_alive(lock, mine):
      other = storage.read_json(lock)
      raise ValueError(f'--workdir={path} is held by process {other.get("pid")} of '
                       f'{other.get("host")} since {other.get("since")}; stop that run, or choose '
                       'another --workdir')
    storage.write_json(lock, mine)

  def beat() -> None:
    while not closed.wait(BEAT_SECONDS):
      mine['beat'] += 1
      with contextlib.suppress(Exception):  # A full disk is told by what has to be written.
        storage.write_json(lock, mine)

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    closed.set()
    thread.join()
    lock.unlink(missing_ok=True)


def _is_alive(lock: pathlib.Path, mine: dict[str, Any]) -> bool:
  before, other = _text(lock), storage.read_json(lock)
  if all(other.get(name) == mine[name] for name in ('host', 'boot')):
    return other.get('started') == _started(other.get('pid'))
  logging.warning('%s is of another host, %s; waiting %d seconds for a sign of life.', lock,
                  other.get('host', 'unknown'), STALE_SECONDS)
  time.sleep(STALE_SECONDS)
  return _text(lock) not in ('', before)


def _started(pid: Any) -> str:
  """Return when a process of this host began, as the kernel counts; '' where there is none."""
  return ''.join(_text(f'/proc/{pid}/stat').rpartition(')')[2].split()[19:20]) or (
    str(pid) if not os.path.isdir('/proc') else '')


def _text(path: str | pathlib.Path) -> str:
  try:
    return storage.path(path).read_text(errors='replace')
  except (OSError, ValueError):
    return ''


def same_everywhere(experiment: Experiment, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Return what must be the same in all processes of a run, by name."""
  source = pathlib.Path(config_lib.__file__).parent
  code = hashlib.sha256()
  for path in sorted(source.rglob('*.py')):
    code.update(f'{path.relative_to(source)}\0'.encode() + path.read_bytes())
  return {
    '--workdir': str(workdir),
    **{f'config.{path}': value for path, value in config_lib.leaves(experiment)},
    'the code of jaxllm': code.hexdigest()[:12],
    'python': '.'.join(map(str, sys.version_info[:2])),
    **{f'package {name}': importlib.metadata.version(name) for name in PACKAGES},
  }


def _git_commit() -> str | None:
  try:
    done = subprocess.run(
      ['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=5, check=True,
      cwd=pathlib.Path(__file__).parent)
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
