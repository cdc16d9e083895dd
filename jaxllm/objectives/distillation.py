"""Distillation: a student learns the distribution that a teacher gives to the next token."""

from typing import Any

import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.models.decoder import Decoder
from jaxllm.objectives.base import Batch, Sums, hidden_states, with_aux


class DistillationConfig(Config):
  """How the teacher's distribution and the text itself are weighed.

  Reference:
    Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
  """

  temperature: float = pydantic.Field(default=1.0, gt=0)
  """Both distributions are softened by it; the divergence is multiplied by its square, so that
  gradients keep their size."""
  weight: float = pydantic.Field(default=1.0, gt=0, le=1)
  """Weight of the divergence; the rest is that of the text's own cross-entropy."""


def distillation_loss(
  config: DistillationConfig,
  model: Decoder,
  variables: Any,
  batch: Batch,
  teacher: Decoder,
  teacher_variables: Any,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Sums]:
  """Sum the divergence of the student from the teacher, KL(teacher || student), per token.

  Args:
    config: temperature and weight.
    model: the student.
    variables: the student's.
    batch: tokens, targets, weights, segment_ids and positions, each (B, T).
    teacher: another decoder with the same vocabulary; it is not trained.
    teacher_variables: the teacher's.
    dropout_key: the student's; None turns dropout off.

  Returns:
    The float32 sums of weighted loss and of weights, and {'cross_entropy_sum', 'correct_sum',
    'divergence_sum'} (at the temperature, in nats).

  Raises:
    ValueError: the vocabularies differ.
  """
  vocab_size = model.config.vocab_size
  if teacher.config.vocab_size != vocab_size:
    raise ValueError(f'the teacher has a vocabulary of {teacher.config.vocab_size} tokens, the '
                     f'student one of {vocab_size}; both must use the same tokenizer')
  hidden_BTD, aux = hidden_states(model, variables, batch, dropout_key)
  student_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
  hidden_BTD, _ = hidden_states(teacher, teacher_variables, batch, None)
  teacher_BTV: Any = jax.lax.stop_gradient(
    teacher.apply(teacher_variables, hidden_BTD, method='logits'))
  student_BTV, teacher_BTV = student_BTV[..., :vocab_size], teacher_BTV[..., :vocab_size]

  soft_BTV = jax.nn.log_softmax(student_BTV / config.temperature)
  wanted_BTV = jax.nn.log_softmax(teacher_BTV / config.temperature)
  divergence_BT = jnp.sum(jnp.exp(wanted_BTV) * (wanted_BTV - soft_BTV), axis=-1)
  log_probs_BTV = jax.nn.log_softmax(student_BTV)
  target_BT = jnp.take_along_axis(log_probs_BTV, batch['targets'][..., None], axis=-1)[..., 0]
  loss_BT = (config.weight * config.temperature**2 * divergence_BT
             - (1 - config.weight) * target_BT)
  weights_BT = batch['weights']
  sums = {
    'cross_entropy_sum': -jnp.sum(weights_BT * target_BT),
    'correct_sum': jnp.sum(weights_BT * (target_BT >= log_probs_BTV.max(axis=-1))),
    'divergence_sum': jnp.sum(weights_BT * divergence_BT),
  }
  return with_aux(jnp.sum(weights_BT * loss_BT), weights_BT.sum(), sums, aux)
