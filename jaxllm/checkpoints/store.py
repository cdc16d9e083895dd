"""Checkpoints on disk: saved asynchronously and atomically, restored onto any mesh.

A directory holds one subdirectory per step, with the items `state` (arrays, see `tree`) and
`bundle` (see `bundle`); it counts only once its commit marker is written, last. The bundle holds a
fingerprint of every array and digests of the rest, which every reading checks.
Orbax writes to a file system and to gs:// itself; for s3:// it writes to a local directory, from
where whole steps are uploaded.

- Writing: `open_store`, `save`, `save_best`, `check`, `wait`, `close`; `save_converted`.
- Going on: `latest_step`, `restore`, `go_back`, `quarantine`; `reading` is for all who only read.
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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
import pydantic
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import options as ocp_options

from jaxllm import distributed, mistakes, storage
from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import fingerprints, reading, tree
from jaxllm.checkpoints.bundle import Bundle, CheckpointError, DamagedError
from jaxllm.checkpoints.reading import DIRECTORY, best_step, committed_steps
from jaxllm.config import Config
from jaxllm.models.config import DecoderConfig

# After which a save fails where another process neither finishes its part nor says why.
_SAVE_SECONDS = 1200


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
  reading.quieten_orbax()
  path = reading.absolute(directory)
  storage.make_writable(path, 'checkpoints: ')
  staging, steps = None, committed_steps(path)
  if reading.is_staged(path):
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


def _leave_marker(step: epath.Path) -> None:
  """Leave nothing of a staged step but the sign that it is complete."""
  step.rmtree(missing_ok=True)
  step.mkdir()
  (step / reading.COMMIT_MARKER).write_text('')


def _publish(store: Store, step: int) -> None:
  """Upload a step that Orbax has staged, and remove those that it has deleted."""
  if store.staging is None:
    return
  staged = epath.Path(store.staging.name)
  storage.upload(pathlib.Path(staged / str(step)), store.directory / str(step))
  _leave_marker(staged / str(step))
  for old in set(committed_steps(store.directory)) - set(committed_steps(staged)):
    # First its marker, so that no half of it ever counts.
    (store.directory / str(old) / reading.COMMIT_MARKER).unlink()
    storage.remove(store.directory / str(old))


def save(store: Store, step: int, state: Any, bundle: Bundle) -> bool:
  """Begin to save a state; the arrays may be donated or deleted as soon as this returns.

  Waits for the previous save, if that is still being written.

  Args:
    step: the number that names the checkpoint.
    state: pytree of arrays of any sharding; None and empty nodes are not stored.

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
      reading.STATE: ocp.args.PyTreeSave(tree.nest(leaves)),
      reading.BUNDLE: ocp.args.JsonSave(bundle_lib.to_dict(bundle)),
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
  steps = committed_steps(store.directory)
  target = max(store.good.intersection(steps), default=0)
  _set_aside(store, [step for step in steps if step > target], 'suspect')
  return target


def quarantine(store: Store, error: DamagedError) -> None:
  """Rename a damaged step, which then never counts; raise the error again where it is the last."""
  if error.step is None or error.step.parent != store.directory:
    raise error
  if len(committed_steps(store.directory)) < 2:
    raise DamagedError(f'{error}\nNo other checkpoint is there; to begin anew, choose another '
                       '--workdir') from error
  step = int(error.step.name)
  _set_aside(store, [step], 'damaged')
  logging.warning('%s\nIt is called %d.damaged now; the run goes back to an older step.', error,
                  step)


def _set_aside(store: Store, steps: Iterable[int], word: str) -> None:
  """Rename steps, so that they never count again, and are there to be looked at."""
  distributed.barrier(f'{word} checkpoints are known')
  for step in map(str, steps):
    if jax.process_index() == 0:
      names = (f'{step}.{word}{number or ""}' for number in itertools.count())
      free = next(name for name in names if not (store.directory / name).exists())
      storage.move(store.directory / step, store.directory / free)
    if store.staging is not None:
      epath.Path(store.staging.name, step).rmtree(missing_ok=True)
  distributed.barrier(f'{word} checkpoints are renamed')
  store.manager.reload()
  store.newest = latest_step(store)


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
      raise OSError(f'no {reading.COMMIT_MARKER} was written')
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
    ValueError: there is no such step, or leaves differ in path, shape or dtype, all of them listed.
    CheckpointError: the files are damaged.
  """
  wait(store)
  steps = committed_steps(store.directory)
  if not steps or step not in (None, *steps):
    wanted = 'checkpoint' if step is None else f'step {step}'
    raise ValueError(f'{store.directory} holds no complete {wanted} (steps: {steps or "none"})')
  path = store.directory / str(steps[-1] if step is None else step)
  return reading.restore_state(path, abstract_state)


def save_converted(
  directory: str | os.PathLike[str], config: DecoderConfig, variables: Mapping[str, Any],
  files: Mapping[str, bytes], origin: Mapping[str, Any],
) -> None:
  """Write a model as checkpoint 0 of a workdir without an experiment, since there was none.

  Args:
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


def _failed(store: Store, error: Exception) -> CheckpointError:
  """Remove what a failed save left, and say what happened."""
  step, store.pending = store.pending, None
  partial, kept = store.directory / str(step), 'what is left there cannot be seen either'
  with contextlib.suppress(OSError), storage.explained(store.directory):
    is_half = partial.is_dir() and not (partial / reading.COMMIT_MARKER).exists()
    if jax.process_index() == 0 and is_half:
      storage.remove(partial)
    # The manager has already crossed out the old steps that this save would have replaced.
    store.manager.reload()
    last = latest_step(store)
    kept = ('no older checkpoint exists' if last is None
            else f'the checkpoint of step {last} is whole')
  return CheckpointError(
    f'saving step {step} to {store.directory} failed: {mistakes.said(error, 400)}\n'
    f'Check the space and the permissions there; {kept}.')

