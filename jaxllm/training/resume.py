"""What a run that goes on must have in common with itself, and what it may change."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxllm import config as config_lib
from jaxllm import loading
from jaxllm.checkpoints import tree
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.training import finetune, workdir
from jaxllm.training import state as state_lib


def check_state(experiment: Experiment, path: pathlib.Path) -> None:
  """Check that no changed field changes which arrays a checkpoint holds.

  Raises:
    ValueError: one does; the message names the fields.
  """
  old = workdir.begun_as(path)
  if old is None or (stored := _leaves(old)) == _leaves(experiment):
    return
  guilty = []
  for row in config_lib.diff(old, experiment):
    # Of fields that only fit together, each is named.
    with contextlib.suppress(ValueError):
      if _leaves(config_lib.override(old, {row[0]: row[2]})) == stored:
        continue
    guilty.append(row)
  workdir.refuse(path, guilty, 'decides which arrays its checkpoints hold')


def _leaves(experiment: Experiment) -> dict[str, Any]:
  tx = state_lib.make_optimizer(experiment)
  state = jax.eval_shape(lambda: state_lib.init_state(experiment, tx))
  return {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(state).items()}


class Others(NamedTuple):
  """The models besides the one that is trained.

  Attributes:
    base: parameters of `init_from`, where they are read.
    teacher: parameters of the teacher, where there is one.
    manifest: the manifest of the run, with fingerprints of those that every step depends on.
  """

  base: Any
  teacher: Any
  manifest: Mapping[str, Any]

  def freeze(self, experiment: Experiment, mesh: Mesh) -> Any:
    """Return `TrainState.frozen`, which no checkpoint holds."""
    return state_lib.freeze(experiment, mesh, self.base, self.teacher)


def load_others(
  experiment: Experiment, tokenizer: Tokenizer, manifest: Mapping[str, Any], begun: bool
) -> Others:
  """Load the model that a run begins with or is compared with in every step, and its teacher.

  Args:
    experiment: the run.
    tokenizer: of its records, which must be that of these models.
    manifest: of its records or its checkpoint.
    begun: whether it has taken its first step.

  Raises:
    ValueError: a model cannot be loaded, or is not the one that the run has begun with.
  """
  found, marks = {}, {}
  lasting = {loading.BASE: experiment.reads_base, loading.TEACHER: True}
  teacher = getattr(experiment.objective, 'teacher', None)
  for key, field, path in ((loading.BASE, 'init_from', experiment.init_from),
                           (loading.TEACHER, 'objective.teacher', teacher)):
    if path is None or (begun and not lasting[key]):
      continue
    model = loading.load(path)
    finetune.check_vocabulary(field, path, model.tokenizer, tokenizer)
    found[key] = model.variables['params']
    if lasting[key]:
      marks[key] = loading.check_model(field, path, found[key], manifest.get(key))
  return Others(found.get(loading.BASE), found.get(loading.TEACHER), {**manifest, **marks})
