"""A run before its first step: its fixed parts, and the state that it begins or goes on with."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from jaxllm import config as config_lib
from jaxllm import loading, storage
from jaxllm.checkpoints import reading, store
from jaxllm.checkpoints.bundle import Bundle
from jaxllm.data import tokenizers
from jaxllm.data.batches import Phase, records_before
from jaxllm.experiment import Experiment
from jaxllm.training import pretrained, workdir
from jaxllm.training import state as state_lib
from jaxllm.training.dataset import Dataset
from jaxllm.training.goodput import Goodput
from jaxllm.training.scoring import Selection
from jaxllm.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  """The fixed parts of a run."""

  experiment: Experiment
  path: pathlib.Path
  mesh: Mesh
  tx: optax.GradientTransformation
  dataset: Dataset
  begun: Experiment | None
  store: store.Store
  goodput: Goodput
  profile_steps: tuple[int, int] | None


def accept(run: Run, step: int, selected: Selection) -> None:
  """Describe the run in its directory, once nothing is left that could refuse it."""
  old = run.begun or run.experiment
  rates = [float(state_lib.make_schedule(one)(step)) for one in (old, run.experiment)]
  if rates[0] != rates[1]:
    logging.warning('Learning rate at step %d: %.4g, was to be %.4g.', step, rates[1], rates[0])
  if jax.process_index() == 0:
    for field, before, after in config_lib.diff(old, run.experiment):
      logging.warning('Changed since the last call: config.%s: %r -> %r', field, before, after)
    storage.write_file(run.path / 'config.json', run.experiment.to_json())
    workdir.write_environment(run.path)
    storage.write_json(run.path / workdir.DATA, run.dataset.manifest.model_dump(mode='json'))
    tokenizers.save(run.dataset.tokenizer, run.path / 'tokenizer')
  best = selected.best
  store.mark_best(run.store, best and best[0], selected.facts)


def initial_state(run: Run, latest: int) -> tuple[TrainState, Bundle]:
  """Return the state to continue from, and the bundle of its checkpoints."""
  experiment = run.experiment
  if latest:
    logging.info('Going on from step %d.', latest)
    if run.begun is not None:
      workdir.check_state(run.begun, experiment, run.path)
    frozen, bundle = load_frozen(run, latest)
    abstract = state_lib.abstract_state(experiment, run.tx, run.mesh)
    state = store.restore(run.store, abstract.replace(frozen={}), latest)
    return state.replace(frozen=frozen), bundle
  manifest = run.dataset.manifest.model_dump(mode='json')
  base, teacher, manifest = pretrained.load(
    experiment, run.dataset.tokenizer, manifest, False, run.mesh)
  files = run.dataset.tokenizer.files()
  if experiment.init_from is not None:
    # The chat template and other settings of the model stay beside its tokenizer.
    files = {**loading.describe(experiment.init_from).tokenizer.files(), **files}
  state = state_lib.create_state(experiment, run.tx, run.mesh, base, teacher)
  return state, Bundle(experiment.to_json(), files, manifest)


def load_frozen(run: Run, step: int) -> tuple[Any, Bundle]:
  """Return the frozen parameters, which no checkpoint holds, and the bundle of later ones."""
  bundle = reading.read_bundle(run.store.directory / str(step))
  base, teacher, manifest = pretrained.load(
    run.experiment, run.dataset.tokenizer, bundle.manifest, True, run.mesh)
  return state_lib.freeze(run.experiment, run.mesh, base, teacher), Bundle(
    run.experiment.to_json(), bundle.tokenizer_files, manifest)


def placed(bundle: Bundle, phases: Sequence[Phase], step: int) -> Bundle:
  """Return the bundle of the checkpoint of a step, which holds the position in the data."""
  return dataclasses.replace(
    bundle, position={'records': records_before(phases, step), 'phases': [
      phase if phase.weights else phase[:3] for phase in phases]})
