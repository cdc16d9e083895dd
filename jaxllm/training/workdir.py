"""The directory of a run: opened safely, described by files that a person can read."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from jaxllm import config as config_lib
from jaxllm.experiment import FIXED_FIELDS, Experiment

PACKAGES = ('jaxllm', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def open_workdir(experiment: Experiment, workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Create the directory of a run, or check that the run in it is the same one.

  Writes `config.json` and `environment.json`. Model, data, tokenizer and seed may not change
  between two runs into one directory; the rest (steps, learning rate, devices, ...) may.

  Args:
    experiment: the run.
    workdir: where it goes.

  Returns:
    The path.

  Raises:
    ValueError: the directory cannot be written, or it holds a run with other parameters or data;
      the message lists the fields that differ.
  """
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / 'config.json.new', experiment.to_json())
  except OSError as error:
    raise ValueError(
      f'--workdir={path}: cannot write there ({error.strerror}); choose another directory'
    ) from error
  written = path / 'config.json'
  if written.exists() and has_begun(path):
    try:
      check_same_run(read_config(path), experiment, path)
    except ValueError:
      (path / 'config.json.new').unlink(missing_ok=True)
      raise
  os.replace(path / 'config.json.new', written)
  write_json(path / 'environment.json', environment())
  return path


def has_begun(path: pathlib.Path) -> bool:
  """Return whether there is anything to lose; until then a wrong config can be put right."""
  return (path / 'metrics.jsonl').exists() or any((path / 'checkpoints').glob('*'))


def read_config(workdir: str | os.PathLike[str]) -> Experiment:
  """Read the resolved config of a run.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    return Experiment.from_json(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} cannot be read as the config of a run: {error}') from error


def check_same_run(old: Experiment, new: Experiment, workdir: pathlib.Path) -> None:
  """Raise a ValueError with a table of fields where two experiments cannot share a directory."""
  changed = [
    row for row in config_lib.diff(old, new) if row[0].split('.')[0] in FIXED_FIELDS
    and row[0] not in RUN_DEPENDENT
  ]
  if changed:
    rows = '\n'.join(f'  {path}: {before!r} -> {after!r}' for path, before, after in changed)
    raise ValueError(
      f'--workdir={workdir} holds a run with another config:\n{rows}\n'
      'Choose another --workdir, or give these fields their old values.'
    )


# Fields of the model that change how it runs, not what it is.
RUN_DEPENDENT = ('model.scan_layers', 'model.remat', 'model.attention', 'model.dtype',
                 'model.dropout_rate')


def environment() -> dict[str, Any]:
  """Return versions, devices and the git commit, for environment.json."""
  devices = jax.devices()
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
    'command': ' '.join(sys.argv),
  }


def write_text(path: pathlib.Path, text: str) -> None:
  """Write a file so that it is either whole or not there."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Write indented JSON so that the file is either whole or not there."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def _git_commit() -> str | None:
  try:
    done = subprocess.run(
      ['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=5, check=True,
      cwd=pathlib.Path(__file__).parent,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
