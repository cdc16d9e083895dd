"""The loss of a run, whatever its objective: (params, frozen, batch, key) -> sums."""

from collections.abc import Callable
from typing import Any

import jax

from jaxllm.experiment import Experiment
from jaxllm.models.decoder import Decoder
from jaxllm.objectives.base import Batch, Sums
from jaxllm.training import parameters
from jaxllm.training.examples import ENCODINGS

Loss = Callable[[Any, Any, Batch, jax.Array | None], Sums]


def make_loss(experiment: Experiment) -> Loss:
  """Return the loss that the run minimises.

  Returns:
    A function of the trained parameters, the frozen ones, a batch, and the key of dropout (None:
    none). It gives float32 scalars: `loss_sum`, `weight_sum` (tokens or examples),
    `cross_entropy_sum` (the loss itself where it is none), `correct_sum` and the objective's own.
  """
  sums = make_sums(experiment)

  def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Sums:
    return sums(parameters.variables(experiment, params, frozen, key), frozen, batch, key)

  return loss


def make_sums(experiment: Experiment) -> Loss:
  """Like `make_loss`, but takes the full model variables instead of the trainable parameters."""
  config, of = experiment.objective, experiment.objective_record

  def sums(variables: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Sums:
    others = {}
    if of.reference and 'lora' in variables:  # Without its adapters the model is the reference.
      others['reference'] = {'params': variables['params']}
    if of.teacher:
      others['teacher'] = {'params': frozen[parameters.TEACHER]}
    loss_sum, weight_sum, more = of.loss(
      config, Decoder(experiment.decoder), variables, batch, key, **others)
    return {'cross_entropy_sum': loss_sum, **more, 'loss_sum': loss_sum, 'weight_sum': weight_sum}

  return sums


def flops_per_step(experiment: Experiment) -> float:
  """Return the floating-point operations of matrix products in a step, recomputation left out.

  A forward pass and twice as much backward; once as much where only adapters, small beside the
  model, are trained. A reference and a teacher only go forward.
  """
  length, of = experiment.data.context_length, experiment.objective_record
  positions = experiment.training.batch_size * length * ENCODINGS[of.examples].sequences
  passes = 3 if experiment.finetune.lora is None else 2 + of.reference
  flops_per_token = passes * experiment.decoder.flops_per_token(length)
  if of.teacher:
    flops_per_token += experiment.objective.decoder.flops_per_token(length)
  return positions * flops_per_token
