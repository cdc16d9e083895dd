"""Reading checkpoints from a path, a run's or any: which steps are whole, and what is in them.

- Steps: `committed_steps`, `best_step`, `find_steps`, `first_whole`.
- What they hold: `read_bundle`, `restore_params` of a model, `restore_state` of a run.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxllm import distributed, mistakes, storage
from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import fingerprints, tree
from jaxllm.checkpoints.bundle import Bundle, CheckpointError, DamagedError

COMMIT_MARKER = 'commit_success.txt'
DIRECTORY = 'checkpoints'
STATE, BUNDLE = 'state', 'bundle'
BEST = 'best.json'
# What TensorStore's errors begin with that files of a checkpoint do not cause.
_NOT_DAMAGE = ('ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'PERMISSION_DENIED',
               'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED', 'UNAVAILABLE')


def committed_steps(directory: str | os.PathLike[str]) -> list[int]:
  """Return the steps that are complete on disk, ascending; anything else there is ignored."""
  path = absolute(directory)
  if not path.is_dir():
    return []
  return sorted(
    int(entry.name) for entry in path.iterdir()
    if entry.name.isdecimal() and (entry / COMMIT_MARKER).exists())


def best_step(directory: str | os.PathLike[str]) -> int | None:
  """Return the best step of a checkpoint directory, if it is there: the newest one names it."""
  steps, path = committed_steps(directory), absolute(directory)
  for newest in reversed(steps):
    with contextlib.suppress(CheckpointError):
      bundle = _bundle_of(path / str(newest))
      # Earlier versions had a file for it.
      best = storage.read_json(path / BEST) if bundle.leaves is None else bundle.best
      return best['step'] if best.get('step') in steps else None
  return None


def find_steps(path: str | os.PathLike[str]) -> list[epath.Path]:
  """Return the directories of the complete steps under a path: the best, then from the newest on.

  Args:
    path: a workdir, its `checkpoints` directory, or one step.

  Raises:
    ValueError: there is none.
  """
  quieten_orbax()
  given = absolute(path)
  if (given / STATE).is_dir() and (given / COMMIT_MARKER).exists():
    return [given]
  for directory in (given / DIRECTORY, given):
    if steps := committed_steps(directory):
      best = best_step(directory)
      for entry in directory.iterdir():
        if entry.name.isdecimal() and int(entry.name) > steps[-1]:
          logging.warning('%s is not complete, and does not count.', entry)
      return [directory / str(step)
              for step in sorted(steps, key=lambda step: (step == best, step), reverse=True)]
  if not given.exists():
    raise ValueError(f'{mistakes.no_such_path(path)} (a model of the Hugging Face hub is hf:NAME)')
  raise ValueError(f'{given} holds no complete checkpoint; give a workdir, its {DIRECTORY}/ '
                   'directory, or one step of that')


def first_whole(path: str | os.PathLike[str], read: Callable[[epath.Path], Any]) -> Any:
  """Return what `read` makes of the first of `find_steps` that is whole, and log the others."""
  steps = find_steps(path)
  for step in steps:
    try:
      found = read(step)
      break
    except DamagedError as error:
      if step == steps[-1]:
        raise
      logging.warning('%s\nStep %s is passed over.', error, step.name)
  if step != steps[0]:
    logging.warning('Step %s is taken.', step.name)
  return found


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
  """Return what travels with the checkpoint under a path; errors as in `restore_params`."""
  return first_whole(path, _bundle_of)


def _bundle_of(step: epath.Path) -> Bundle:
  with _reading(step, BUNDLE):
    for file in [] if storage.is_remote(step) else pathlib.Path(step).rglob('*'):
      if not file.resolve().is_relative_to(step):
        raise ValueError(f'{file} is a link that leads out of the checkpoint')
    return bundle_lib.from_dict(ocp.JsonCheckpointHandler().restore(
      _readable(step / BUNDLE), args=ocp.args.JsonRestore()))


def restore_leaves(step: epath.Path) -> dict[str, jax.Array]:
  """Return path -> array of all that a step holds, on the first local device."""
  bundle = _bundle_of(step)
  return _read(step, _stored_leaves(step, bundle), bundle)


def restore_state(step: epath.Path, abstract_state: Any) -> Any:
  """Return the state of a step, each leaf in the sharding asked for; errors as `store.restore`."""
  expected, bundle = tree.flatten(abstract_state), _bundle_of(step)
  _check_same(expected, _stored_leaves(step, bundle), step)
  restored = _read(step, expected, bundle)
  return jax.tree.unflatten(jax.tree.structure(abstract_state), restored.values())


def restore_params(
  path: str | os.PathLike[str], abstract: Any = None, shardings: Any = None, dtype: Any = None,
  verify: str = 'full',
) -> tuple[Any, Bundle]:
  """Return (parameters, bundle): of the moving average where the run kept one.

  Args:
    path: a workdir, its `checkpoints` directory, or one step; of several, the first whole one.
    abstract: tree of ShapeDtypeStructs to check against, with shardings or without; None takes what
      is stored, as nested dicts.
    shardings: in the form of the parameters; None: those of `abstract`, else one local device.
    dtype: of all that is returned; None: as it is stored.
    verify: 'full' compares the arrays with their fingerprints, 'off' does not.

  Raises:
    ValueError: there is no checkpoint, or leaves differ in path, shape or dtype.
    DamagedError: the files are damaged.
  """
  def read(step: epath.Path) -> tuple[Any, Bundle]:
    bundle = _bundle_of(step)
    stored = tree.nest(_stored_leaves(step, bundle))
    name = 'ema' if 'ema' in stored else 'params'
    if name not in stored:
      raise ValueError(f'{step} holds no params (only {", ".join(stored)})')
    wanted = stored[name] if abstract is None else abstract
    _check_same(tree.flatten(wanted), tree.flatten(stored[name]), step)
    where = tree.flatten(shardings)
    leaves = {f'{name}/{path}': jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where.get(path) or getattr(leaf, 'sharding', None))
      for path, leaf in tree.flatten(wanted).items()}
    parts = [leaves]
    if dtype is not None:  # One by one, so that what is stored larger is never there as a whole.
      parts = [{path: leaf} for path, leaf in leaves.items()]
    restored = [leaf if dtype is None else leaf.astype(dtype)
                for part in parts for leaf in _read(step, part, bundle, verify).values()]
    return jax.tree.unflatten(jax.tree.structure(wanted), restored), bundle

  return first_whole(path, read)


def quieten_orbax() -> None:
  """Keep the log lines of Orbax to itself."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  # Orbax logs every phase, and a failure once per thread with its trace, as asyncio does for it;
  # what matters is raised.
  return not (f'{os.sep}orbax{os.sep}' in record.pathname
              or 'exception was never retrieved' in record.getMessage())


def absolute(path: str | os.PathLike[str]) -> epath.Path:
  """Return an absolute path, of a bucket too."""
  found = epath.Path(storage.path(path))
  return found if storage.is_remote(found) else found.resolve()


def is_staged(path: epath.Path) -> bool:
  """Return whether Orbax cannot read or write there itself."""
  return os.fspath(path).startswith('s3://')


def _readable(path: epath.Path) -> epath.Path:
  """Return where Orbax can read an item of a step: in s3:// it cannot."""
  return epath.Path(storage.local(path)) if is_staged(path) else path


@contextlib.contextmanager
def _reading(step: epath.Path, item: str) -> Iterator[None]:
  """Turn what reading raises into a CheckpointError: of all processes, if one of them has one."""
  error: Exception | None = None
  try:
    yield
  except CheckpointError:
    raise
  except Exception as caught:
    error = caught
  # Memory, the network or a permission may be what is missing; else the files are damaged.
  elsewhere = (
    isinstance(error, MemoryError | RuntimeError)
    and not isinstance(error, RecursionError | NotImplementedError)) or (
    isinstance(error, OSError) and not isinstance(error, FileNotFoundError)) or (
    str(error).startswith(_NOT_DAMAGE))
  worst = distributed.from_all(
    '' if error is None else f'{1 if elsewhere else 2}{mistakes.said(error, 400)}', max)
  if worst:
    failure = (CheckpointError, DamagedError)[int(worst[0]) - 1](
      f'{step / item} cannot be read: {worst[1:]}')
    failure.step = step
    raise failure from error


def _stored_leaves(step: epath.Path, bundle: Bundle) -> dict[str, jax.ShapeDtypeStruct]:
  """Return path -> shape and dtype of what a step holds."""
  with _reading(step, STATE):
    metadata = ocp.PyTreeCheckpointHandler().metadata(_readable(step / STATE)).tree
    found = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
             for path, leaf in tree.flatten(metadata).items()}
    _compare(bundle, {path: tree.describe(leaf) for path, leaf in found.items()},
             lambda text: text.rpartition(' ')[0])
    if bundle.leaves is not None and (lost := bundle.leaves.keys() - found):
      raise ValueError(f'{sorted(lost)[0]} is missing')
  return found


def _check_same(expected: Mapping[str, Any], stored: Mapping[str, Any], step: epath.Path) -> None:
  lines = tree.differences(expected, stored)
  if lines:
    raise ValueError(
      f'the checkpoint {step} does not fit: {len(lines)} leaves differ\n{tree.listing(lines)}\n'
      'Use the config that it was saved with, or another directory.')


def _read(
  step: epath.Path, leaves: Mapping[str, jax.ShapeDtypeStruct], bundle: Bundle, verify: str = 'full'
) -> dict[str, jax.Array]:
  """Read the named leaves of a step into their shardings, and compare their fingerprints."""
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = tree.nest(leaves)
  restore_args = jax.tree.map(
    lambda leaf: ocp.ArrayRestoreArgs(
      sharding=leaf.sharding or default, global_shape=leaf.shape, dtype=leaf.dtype, strict=True),
    target,
  )
  with _reading(step, STATE):
    restored = tree.flatten(ocp.PyTreeCheckpointHandler().restore(
      _readable(step / STATE),
      args=ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True),
    ))
    found = {path: restored[path] for path in leaves}
    # What may fail in one process alone; the rest is the same in all.
    sums = fingerprints.own_sums(found if verify == 'full' and bundle.leaves is not None else {})
  if len(sums):
    with _reading(step, STATE):
      _compare(bundle, fingerprints.fingerprints(found, sums))
  elif verify == 'full':
    logging.info('%s was saved without fingerprints; its arrays are not verified.', step)
  return found


def _compare(
  bundle: Bundle, found: Mapping[str, str], part: Callable[[str], str] = lambda text: text
) -> None:
  """Raise a ValueError that names leaves that are not what a bundle says of them."""
  changed = [] if bundle.leaves is None else [
    path for path, text in found.items() if part(bundle.leaves.get(path, '')) != text]
  if changed:
    raise ValueError(f'{", ".join(changed[:5])} changed after it was saved')
