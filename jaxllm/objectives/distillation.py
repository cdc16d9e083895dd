"""Distillation: a student learns the distribution that a teacher gives to the next token."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives.next_token import Batch, Sums, hidden_states, with_aux


class Distillation(Config):
  """Learn the distributions of another model.

  Reference:
    Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
  """

  kind: Literal['distillation'] = 'distillation'
  teacher: str
  """The other model, anything that `jaxllm.load` takes, with the same tokenizer."""
  teacher_model: DecoderConfig | None = None
  """Its decoder; None: as `teacher` says."""
  temperature: float = pydantic.Field(default=1.0, gt=0)
  """Both distributions are softened by it; the divergence is multiplied by its square, so that
  gradients keep their size."""
  weight: float = pydantic.Field(default=1.0, gt=0, le=1)
  """Weight of the divergence; the rest is that of the text's own cross-entropy."""

  @property
  def decoder(self) -> DecoderConfig:
    """The teacher's decoder, once it is known; a ValueError before."""
    if self.teacher_model is None:
      raise ValueError('config.objective.teacher_model=None: it is read from the teacher when '
                       'training starts')
    return self.teacher_model


def distillation_loss(
  config: Distillation, model: Decoder, variables: Any, batch: Batch,
  dropout_key: jax.Array | None = None, teacher: Any = None,
) -> tuple[jax.Array, jax.Array, Sums]:
  """Sum the divergence of the student from the teacher, KL(teacher || student), per token.

  Args:
    config: names the teacher's decoder, which must have the same vocabulary.
    model: the student.
    variables: the student's.
    batch: tokens, targets, weights, segment_ids and positions, each (B, T).
    dropout_key: the student's; None turns dropout off.
    teacher: the teacher's variables, which are not trained.

  Returns:
    The float32 sums of weighted loss and of weights, and {'cross_entropy_sum', 'correct_sum',
    'divergence_sum'} (at the temperature, in nats).

  Raises:
    ValueError: the vocabularies differ.
  """
  vocab_size = model.config.vocab_size
  if config.decoder.vocab_size != vocab_size:
    raise ValueError(f'the teacher has a vocabulary of {config.decoder.vocab_size} tokens, the '
                     f'student one of {vocab_size}; both must use the same tokenizer')
  hidden_BTD, aux = hidden_states(model, variables, batch, dropout_key)
  student_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
  taught = Decoder(config.decoder)
  hidden_BTD, _ = hidden_states(taught, teacher, batch, None)
  teacher_BTV: Any = jax.lax.stop_gradient(taught.apply(teacher, hidden_BTD, method='logits'))
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
