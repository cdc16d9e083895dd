"""The loss of a run, whatever its objective: (params, frozen, batch, key) -> sums."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxllm.experiment import Experiment
from jaxllm.models.decoder import Decoder
from jaxllm.objectives import next_token
from jaxllm.training import finetune

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]
Loss = Callable[[Any, Any, Batch, jax.Array | None], Sums]


def make_loss(experiment: Experiment) -> Loss:
  """Return the loss that the run minimises.

  Returns:
    A function of what is trained, what is frozen, a batch, and the key of dropout (None: none). It
    gives float32 scalars: `loss_sum`, `weight_sum`, `cross_entropy_sum`, `correct_sum` and others
    of the objective.
  """
  model = Decoder(experiment.decoder)

  def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Sums:
    variables = finetune.variables(experiment, params, frozen, key)
    loss_sum, weight_sum, aux = next_token.next_token_loss(
      experiment.objective, model, variables, dict(batch), dropout_key=key
    )
    return aux | {'loss_sum': loss_sum, 'weight_sum': weight_sum}

  return loss
