"""The loss of a run, whatever its objective: (params, frozen, batch, key) -> sums."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxllm.experiment import Distillation, Experiment
from jaxllm.models.decoder import Decoder
from jaxllm.objectives import classification, distillation, next_token, preference
from jaxllm.training import parameters

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]
Loss = Callable[[Any, Any, Batch, jax.Array | None], Sums]


def make_loss(experiment: Experiment) -> Loss:
  """Return the loss that the run minimises.

  Returns:
    A function of what is trained, what is frozen, a batch, and the key of dropout (None: none). It
    gives float32 scalars: `loss_sum`, `weight_sum` (tokens, or examples where a whole answer is
    judged), `cross_entropy_sum` (the loss itself where it is none), `correct_sum` and others of the
    objective.
  """
  sums = make_sums(experiment)

  def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Sums:
    return sums(parameters.variables(experiment, params, frozen, key), frozen, batch, key)

  return loss


def make_sums(experiment: Experiment) -> Loss:
  """Return the same as a function of the model's variables, in the place of what is trained."""
  of = OBJECTIVES[experiment.objective.kind]

  def sums(variables: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Sums:
    loss_sum, weight_sum, aux = of(experiment, variables, frozen, batch, key)
    return {'cross_entropy_sum': loss_sum, **aux, 'loss_sum': loss_sum, 'weight_sum': weight_sum}

  return sums


def flops_per_step(experiment: Experiment) -> float:
  """Return the floating-point operations of matrix products in a step, recomputation left out.

  A forward pass and twice as much backward; once as much where only adapters, small beside the
  model, are trained. A reference and a teacher only go forward.
  """
  length, objective = experiment.data.context_length, experiment.objective
  positions = experiment.training.batch_size * length
  if objective.kind in preference.PREFERENCES:
    positions *= 2
  passes = 3 if experiment.finetune.lora is None else 2
  if objective.kind in preference.NEED_REFERENCE and experiment.finetune.lora is not None:
    passes += 1
  total = passes * positions * experiment.decoder.flops_per_token(length)
  if isinstance(objective, Distillation):
    total += positions * parameters.teacher_config(objective).flops_per_token(length)
  return total


def _next_token(
  experiment: Experiment, variables: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> Any:
  return next_token.next_token_loss(
    experiment.next_token, Decoder(experiment.decoder), variables, dict(batch), key
  )


def _preference(
  experiment: Experiment, variables: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> Any:
  config: Any = experiment.objective
  # Without its adapters the model is the reference; else the batch has what the reference says.
  reference = {'params': variables['params']} if 'lora' in variables else None
  return preference.preference_loss(
    config, Decoder(experiment.decoder), variables, batch, reference, key
  )


def _classifier(
  experiment: Experiment, variables: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> Any:
  config: Any = experiment.objective
  return classification.classification_loss(
    config, Decoder(experiment.decoder), variables, batch, key
  )


def _distillation(
  experiment: Experiment, variables: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> Any:
  config: Any = experiment.objective
  return distillation.distillation_loss(
    config, Decoder(experiment.decoder), variables, batch,
    Decoder(parameters.teacher_config(config)), {'params': frozen[parameters.TEACHER]}, key,
  )


OBJECTIVES: Mapping[str, Callable[..., Any]] = {
  'next_token': _next_token,
  **dict.fromkeys(preference.PREFERENCES, _preference),
  'classifier': _classifier,
  'distillation': _distillation,
}
"""`kind` of the objective -> (experiment, variables, frozen, batch, key) -> (sum, count, aux)."""
