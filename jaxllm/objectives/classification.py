"""A trained head on pooled hidden states: classification without words.

The head is {'kernel': (D, C), 'bias': (C,)}, kept beside the decoder's parameters under the name
`classifier`. Axis letter: C, classes.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives.next_token import Batch, Sums, hidden_states, with_aux


class ClassifierConfig(Config):
  """The head."""

  kind: Literal['classifier'] = 'classifier'
  num_classes: int = pydantic.Field(ge=2)
  """C."""
  pooling: Literal['last', 'mean'] = 'last'
  """Which hidden state is read: that of the last token, or the mean over all."""
  label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=1)
  """Share of the target probability that is spread evenly over the classes."""


AXES = {'kernel': ('embed', None), 'bias': (None,)}
"""Logical axes of the head's parameters."""


def init(config: ClassifierConfig, model: DecoderConfig, key: jax.Array) -> dict[str, jax.Array]:
  """Return the parameters of a new head, float32."""
  kernel = jax.random.normal(key, (model.embed_dim, config.num_classes)) * model.embed_dim**-0.5
  return {'kernel': kernel, 'bias': jnp.zeros(config.num_classes)}


def class_logits(
  config: ClassifierConfig, model: Decoder, variables: Any, batch: Batch,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
  """Return the logits (B, C), float32, of one text per row, and the model's aux scalars.

  Args:
    variables: {'params': ...} with the head at params/classifier.
    batch: `tokens` and `segment_ids` (0 = padding, on the right), (B, T).
    dropout_key: None turns dropout off.
  """
  hidden_BTD, aux = hidden_states(model, variables, batch, dropout_key)
  hidden_BTD = hidden_BTD.astype(jnp.float32)
  real_BT = (batch['segment_ids'] > 0).astype(jnp.float32)
  if config.pooling == 'last':
    last_B1 = jnp.maximum(real_BT.sum(axis=1, keepdims=True).astype(jnp.int32) - 1, 0)
    pooled_BD = jnp.take_along_axis(hidden_BTD, last_B1[..., None], axis=1)[:, 0]
  else:
    total_BD = jnp.einsum('BT,BTD->BD', real_BT, hidden_BTD)
    pooled_BD = total_BD / jnp.maximum(real_BT.sum(axis=1, keepdims=True), 1)
  head = variables['params']['classifier']
  return pooled_BD @ head['kernel'] + head['bias'][None], aux


def classification_loss(
  config: ClassifierConfig, model: Decoder, variables: Any, batch: Batch,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Sums]:
  """Sum the cross-entropy of a batch; arguments as in `class_logits`.

  The batch also has `labels` (B, 1) int32; a negative label has no loss.

  Returns:
    The float32 sum of losses, the number of labels, and {'cross_entropy_sum', 'correct_sum'}.
  """
  logits_BC, aux = class_logits(config, model, variables, batch, dropout_key)
  labels_B = batch['labels'][:, 0]
  weights_B = (labels_B >= 0).astype(jnp.float32)
  log_probs_BC = jax.nn.log_softmax(logits_BC)
  target_B = jnp.take_along_axis(log_probs_BC, jnp.maximum(labels_B, 0)[:, None], axis=1)[:, 0]
  smoothing = config.label_smoothing
  loss_B = -(1 - smoothing) * target_B - smoothing * log_probs_BC.mean(axis=1)
  sums = {
    'cross_entropy_sum': -jnp.sum(weights_B * target_B),
    'correct_sum': jnp.sum(weights_B * (logits_BC.argmax(axis=1) == labels_B)),
  }
  return with_aux(jnp.sum(weights_B * loss_B), weights_B.sum(), sums, aux)
