"""Checkpoints on disk: saved asynchronously and atomically, restored onto any mesh.

A directory holds one subdirectory per step, with the items `state` (arrays, see `tree`) and
`bundle` (see `bundle`); it counts only once its commit marker is written, last. The bundle holds a
fingerprint of every array and digests of the rest, which every reading checks.
Orbax writes to a file system and to gs:// itself; for s3:// it writes to a local directory, from
where whole steps are uploaded.

- Writing: `open_store`, `save`, `save_best`, `check`, `wait`, `close`; `save_converted`.
- Reading a run's own state: `latest_step`, `best_step`, `restore`, `quarantine`.
- Reading a model from a path: `find_steps`, `read_bundle`, `restore_params`.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
import pydantic
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import options as ocp_options

from jaxllm import distributed, storage
from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import fingerprints, tree
from jaxllm.checkpoints.bundle import Bundle, CheckpointError, DamagedError
from jaxllm.config import Config
from jaxllm.mistakes import no_such_path
from jaxllm.models.config import DecoderConfig

COMMIT_MARKER = 'commit_success.txt'
DIRECTORY = 'checkpoints'
STATE, BUNDLE = 'state', 'bundle'
BEST = 'best.json'
# After which a save fails where another process neither finishes its part nor says why.
_SAVE_SECONDS = 1200
# What TensorStore's errors begin with that files of a checkpoint do not cause.
_NOT_DAMAGE = ('ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'PERMISSION_DENIED',
               'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED', 'UNAVAILABLE')


class CheckpointConfig(Config):
  """When the state is saved, and what is kept."""

  every_steps: int = pydantic.Field(default=500, gt=0)
  """Steps between two saves; the last step is always saved."""
  every_seconds: float | None = pydantic.Field(default=None, gt=0)
  """Save also when so much time has passed since the last save, by the clock of process 0. Several
  processes compare it every training.log_every_steps steps. None saves by steps alone."""
  keep_last: int = pydantic.Field(default=3, gt=0)
  """How many of the newest checkpoints are kept; so is the newest from which steps were applied."""
  keep_every: int | None = pydantic.Field(default=None, gt=0)
  """Also keep, for good, the checkpoints of steps divisible by this; None keeps no others."""
  asynchronous: bool = True
  """Write in the background while training goes on; the state is copied first."""


@dataclasses.dataclass
class KeptSteps:
  """A policy of Orbax that never deletes `steps`, which may be changed at any time."""

  steps: set[int]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Return for each checkpoint whether it is kept."""
    return [checkpoint.step in self.steps for checkpoint in checkpoints]


@dataclasses.dataclass
class Store:
  """An open checkpoint directory: a handle, like an open file.

  Attributes:
    directory: where the steps lie.
    manager: Orbax's manager of it.
    staging: where Orbax writes, if that is not the directory itself.
    pending: the step being written, if any.
    kept: steps that are never deleted: the best one.
    newest: the newest step that is saved, or being saved.
    good: the newest step after which training is known to have gone on well; never deleted either.
    best: what the steps that are saved say of the best one: its number, its metric and value.
  """

  directory: epath.Path
  manager: ocp.CheckpointManager
  staging: tempfile.TemporaryDirectory[str] | None = None
  pending: int | None = None
  kept: set[int] = dataclasses.field(default_factory=set)
  newest: int | None = None
  good: set[int] = dataclasses.field(default_factory=set)
  best: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_store(directory: str | os.PathLike[str], config: CheckpointConfig) -> Store:
  """Open a checkpoint directory for saving and restoring, creating it where it is missing.

  Raises:
    ValueError: it cannot be written, or several processes would have to write to s3://.
  """
  _quieten_orbax()
  path = _absolute(directory)
  storage.make_writable(path, 'checkpoints: ')
  staging, steps = None, committed_steps(path)
  if _is_staged(path):
    if jax.process_count() > 1:
      raise ValueError(f'checkpoints: {path}: several processes cannot write to s3://; choose '
                       'gs:// or a mounted directory')
    staging = tempfile.TemporaryDirectory(prefix='jaxllm-')
    for step in steps:
      _leave_marker(epath.Path(staging.name) / str(step))
  kept = {step for step in [best_step(path)] if step is not None}
  good = set(steps[-2:-1])  # Nothing is saved while steps are skipped.
  keep: list[Any] = [policies.LatestN(config.keep_last), KeptSteps(kept), KeptSteps(good)]
  if config.keep_every is not None:
    keep.append(policies.EveryNSteps(config.keep_every))
  manager = ocp.CheckpointManager(
    staging.name if staging else path,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(keep),
      enable_async_checkpointing=config.asynchronous,
      async_options=ocp_options.AsyncOptions(
        timeout_secs=_SAVE_SECONDS, barrier_sync_fn=_barrier_of_saves),
      # A rename alone would let any directory with a number for a name pass for a checkpoint.
      atomicity_options=ocp_options.AtomicityOptions(mode=ocp_options.AtomicityMode.COMMIT_FILE),
    ),
  )
  return Store(path, manager, staging, None, kept, max(steps, default=None), good)


def _barrier_of_saves(*, key: str, timeout_ms: int) -> None:
  """Wait for the other processes, unless this one is leaving a save that has failed: it tells."""
  if sys.exc_info()[1] is None:
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _is_staged(path: epath.Path) -> bool:
  return os.fspath(path).startswith('s3://')


def _leave_marker(step: epath.Path) -> None:
  """Leave nothing of a staged step but the sign that it is complete."""
  step.rmtree(missing_ok=True)
  step.mkdir()
  (step / COMMIT_MARKER).write_text('')


def _publish(store: Store, step: int) -> None:
  """Upload a step that Orbax has staged, and remove those that it has deleted."""
  if store.staging is None:
    return
  staged = epath.Path(store.staging.name)
  storage.upload(pathlib.Path(staged / str(step)), store.directory / str(step))
  _leave_marker(staged / str(step))
  for old in set(committed_steps(store.directory)) - set(committed_steps(staged)):
    # First its marker, so that no half of it ever counts.
    (store.directory / str(old) / COMMIT_MARKER).unlink()
    storage.remove(store.directory / str(old))


def save(store: Store, step: int, state: Any, bundle: Bundle) -> bool:
  """Begin to save a state; the arrays may be donated or deleted as soon as this returns.

  Waits for the previous save, if that is still being written.

  Args:
    step: the number that names the checkpoint.
    state: pytree of arrays of any sharding; None and empty nodes are not stored.
    bundle: what travels with it.

  Returns:
    False where this step is already stored, and is left as it is.

  Raises:
    CheckpointError: this save could not begin, or the previous one failed.
  """
  wait(store)
  if step in committed_steps(store.directory):
    return False
  leaves = tree.flatten(state)
  store.pending = store.newest = step
  try:
    bundle = dataclasses.replace(bundle, best=store.best, leaves=fingerprints.fingerprints(leaves))
    store.manager.save(step, force=True, args=ocp.args.Composite(**{
      STATE: ocp.args.PyTreeSave(tree.nest(leaves)),
      BUNDLE: ocp.args.JsonSave(bundle_lib.to_dict(bundle)),
    }))
  except Exception as error:
    raise _failed(store, error) from error
  return True


def save_best(
  store: Store, step: int, state: Any, bundle: Bundle, facts: Mapping[str, Any]
) -> None:
  """Save the best state so far, and mark it so: it is kept, and what `find_steps` finds first.

  Returns once it is on disk; until then the best one before is kept too. Arguments and errors as in
  `save`; `facts`, JSON-able, say what it is the best by.
  """
  store.kept.add(step)
  store.best = {'step': step, **facts}
  save(store, step, state, bundle)
  wait(store)
  mark_best(store, step, facts)


def mark_best(store: Store, step: int | None, facts: Mapping[str, Any]) -> None:
  """Let the next steps name a step as the best, or none where it is None or not there."""
  store.kept.intersection_update({step})
  store.best = {}
  if step in committed_steps(store.directory):
    store.kept.add(step)
    store.best = {'step': step, **facts}


def confirm(store: Store, step: int) -> None:
  """Take the newest save before `step`, which went well, for good."""
  if store.newest is not None and store.newest < step:
    store.good.clear()
    store.good.add(store.newest)


def go_back(store: Store) -> int:
  """Rename the steps after the last good one, and return that; 0 where there is none."""
  wait(store)
  target = max(store.good.intersection(committed_steps(store.directory)), default=0)
  later = [step for step in committed_steps(store.directory) if step > target]
  distributed.barrier('later checkpoints are known')
  for step in later:
    if jax.process_index() == 0:
      _set_aside(store.directory / str(step), 'suspect')
    if store.staging is not None:
      epath.Path(store.staging.name, str(step)).rmtree(missing_ok=True)
  distributed.barrier('later checkpoints are renamed')
  store.manager.reload()
  store.newest = target or None
  return target


def best_step(directory: str | os.PathLike[str]) -> int | None:
  """Return the best step of a checkpoint directory, if it is there: the newest one names it."""
  steps, path = committed_steps(directory), _absolute(directory)
  for newest in reversed(steps):
    with contextlib.suppress(CheckpointError):
      bundle = _bundle_of(path / str(newest))
      # Earlier versions had a file for it.
      best = storage.read_json(path / BEST) if bundle.leaves is None else bundle.best
      return best['step'] if best.get('step') in steps else None
  return None


def quarantine(store: Store, error: DamagedError) -> None:
  """Rename a damaged step, which then never counts; raise the error again where it is the last."""
  if error.step is None or error.step.parent != store.directory:
    raise error
  step, steps = error.step.name, committed_steps(store.directory)
  if len(steps) < 2:
    raise DamagedError(f'{error}\nNo other checkpoint is there; to begin anew, choose another '
                       '--workdir') from error
  distributed.barrier('the damage is seen')
  if jax.process_index() == 0:
    _set_aside(error.step, 'damaged')
  if store.staging is not None:
    epath.Path(store.staging.name, step).rmtree(missing_ok=True)
  distributed.barrier('the damaged step is renamed')
  store.manager.reload()
  store.newest = latest_step(store)
  logging.warning('%s\nIt is called %s.damaged now; the run goes back to an older step.', error,
                  step)


def _set_aside(step: epath.Path, word: str) -> None:
  """Rename a step, so that it never counts again, and is there to be looked at."""
  names = (f'{step.name}.{word}{number or ""}' for number in itertools.count())
  free = next(name for name in names if not (step.parent / name).exists())
  storage.move(step, step.parent / free)


def check(store: Store) -> None:
  """Raise a CheckpointError where a background save has failed; costs nothing at each step."""
  # `manager.check_for_errors` would take the error away from the thread that is about to delete
  # old steps, which must see it.
  if store.pending is not None and not store.manager.is_saving_in_progress():
    wait(store)


def wait(store: Store) -> None:
  """Return once the pending save, if any, is on disk; raise a CheckpointError where it failed."""
  if store.pending is None:
    return
  try:
    store.manager.wait_until_finished()
    _publish(store, store.pending)
    if store.pending not in committed_steps(store.directory):
      raise OSError(f'no {COMMIT_MARKER} was written')
  except Exception as error:
    raise _failed(store, error) from error
  store.pending = None


def close(store: Store) -> None:
  """Wait for the pending save, as `wait` does, and release the threads."""
  try:
    wait(store)
  finally:
    with contextlib.suppress(Exception):  # It raises what `wait` has raised before.
      store.manager.close()
    if store.staging is not None:
      store.staging.cleanup()


def committed_steps(directory: str | os.PathLike[str]) -> list[int]:
  """Return the steps that are complete on disk, ascending; anything else there is ignored."""
  path = _absolute(directory)
  if not path.is_dir():
    return []
  return sorted(
    int(entry.name) for entry in path.iterdir()
    if entry.name.isdecimal() and (entry / COMMIT_MARKER).exists())


def latest_step(store: Store) -> int | None:
  """Return the newest complete step, or None where there is none."""
  steps = committed_steps(store.directory)
  return steps[-1] if steps else None


def restore(store: Store, abstract_state: Any, step: int | None = None) -> Any:
  """Return a stored state in the form of `abstract_state`, each leaf in the sharding asked for.

  Args:
    abstract_state: pytree of ShapeDtypeStructs with shardings of any mesh.
    step: which one; the newest by default.

  Raises:
    ValueError: there is no such step, or leaves differ in path, shape or dtype; the message lists
      all of them.
    CheckpointError: the files are damaged.
  """
  wait(store)
  steps = committed_steps(store.directory)
  if not steps or step not in (None, *steps):
    wanted = 'checkpoint' if step is None else f'step {step}'
    raise ValueError(f'{store.directory} holds no complete {wanted} (steps: {steps or "none"})')
  path = store.directory / str(steps[-1] if step is None else step)
  expected, bundle = tree.flatten(abstract_state), _bundle_of(path)
  _check_same(expected, _stored_leaves(path, bundle), path)
  restored = _read(path, expected, bundle)
  return jax.tree.unflatten(jax.tree.structure(abstract_state), restored.values())


def find_steps(path: str | os.PathLike[str]) -> list[epath.Path]:
  """Return the directories of the complete steps under a path: the best, then from the newest on.

  Args:
    path: a workdir, its `checkpoints` directory, or one step.

  Raises:
    ValueError: there is none.
  """
  _quieten_orbax()
  given = _absolute(path)
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
    raise ValueError(f'{no_such_path(path)} (a model of the Hugging Face hub is hf:NAME)')
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


def restore_params(
  path: str | os.PathLike[str], abstract: Any = None, shardings: Any = None, dtype: Any = None,
  verify: str = 'full',
) -> tuple[Any, Bundle]:
  """Return (parameters, bundle): of the moving average where the run kept one.

  Args:
    path: a workdir, its `checkpoints` directory, or one step; of several, the first whole one.
    abstract: tree of ShapeDtypeStructs to check against, with shardings or without; None takes what
      is stored, as nested dicts.
    shardings: in the form of the parameters; None: those of `abstract`, else the first local
      device.
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


def save_converted(
  directory: str | os.PathLike[str], config: DecoderConfig, variables: Mapping[str, Any],
  files: Mapping[str, bytes], origin: Mapping[str, Any],
) -> None:
  """Write a model as checkpoint 0 of a workdir without an experiment, since there was none.

  Args:
    directory: the workdir.
    variables: {'params': ...}.
    files: of the tokenizer, and what tells how to use it.
    origin: JSON-able: where it comes from; `model_type` is used when it is written back.

  Raises:
    ValueError: the directory cannot be written.
    CheckpointError: the disk is full.
  """
  model = json.dumps({'model': json.loads(config.to_json())}, indent=2)
  bundle = Bundle(model, dict(files), {bundle_lib.CONVERTED: dict(origin)})
  store = open_store(os.path.join(directory, DIRECTORY), CheckpointConfig(asynchronous=False))
  try:
    save(store, 0, {'params': variables['params']}, bundle)
  finally:
    close(store)


def _quieten_orbax() -> None:
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  # Orbax logs every phase, and a failure once per thread with its trace, as asyncio does for it;
  # what matters is raised.
  return not (f'{os.sep}orbax{os.sep}' in record.pathname
              or 'exception was never retrieved' in record.getMessage())


def _absolute(path: str | os.PathLike[str]) -> epath.Path:
  found = epath.Path(storage.path(path))
  return found if storage.is_remote(found) else found.resolve()


def _readable(path: epath.Path) -> epath.Path:
  """Return where Orbax can read an item of a step: in s3:// it cannot."""
  return epath.Path(storage.local(path)) if _is_staged(path) else path


@contextlib.contextmanager
def _reading(step: epath.Path, item: str) -> Iterator[None]:
  """Turn what reading raises into a CheckpointError: of all processes, if one of them has one.

  It is a DamagedError unless memory, the network or a permission may be what is missing.
  """
  error: Exception | None = None
  try:
    yield
  except CheckpointError:
    raise
  except Exception as caught:
    error = caught
  elsewhere = (
    isinstance(error, MemoryError | RuntimeError)
    and not isinstance(error, RecursionError | NotImplementedError)) or (
    isinstance(error, OSError) and not isinstance(error, FileNotFoundError)) or (
    str(error).startswith(_NOT_DAMAGE))
  worst = distributed.from_all(
    '' if error is None else f'{1 if elsewhere else 2}{_reason(error)}', max)
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
      sharding=leaf.sharding or default, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
    ),
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


def _failed(store: Store, error: Exception) -> CheckpointError:
  """Remove what a failed save left, and say what happened."""
  step, store.pending = store.pending, None
  partial, kept = store.directory / str(step), 'what is left there cannot be seen either'
  with contextlib.suppress(OSError), storage.explained(store.directory):
    if jax.process_index() == 0 and partial.is_dir() and not (partial / COMMIT_MARKER).exists():
      storage.remove(partial)
    # The manager has already crossed out the old steps that this save would have replaced.
    store.manager.reload()
    last = latest_step(store)
    kept = ('no older checkpoint exists' if last is None
            else f'the checkpoint of step {last} is whole')
  return CheckpointError(
    f'saving step {step} to {store.directory} failed: {_reason(error)}\n'
    f'Check the space and the permissions there; {kept}.')


def _reason(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return text if len(text) <= 400 else f'{text[:400]} ...'
