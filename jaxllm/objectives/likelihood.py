"""How likely whole sequences are: what preferences compare and choices are ranked by."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.models.decoder import Decoder
from jaxllm.models.log_probs import target_log_probs

Batch = Mapping[str, jax.Array]


def sequence_log_probs(
  model: Decoder, variables: Any, batch: Batch, dropout_key: jax.Array | None = None,
  max_targets: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Sum the log-probabilities of each row's weighted targets.

  Args:
    model: the decoder.
    variables: of the model.
    batch: tokens, targets, weights, segment_ids and positions, each (B, T).
    dropout_key: None turns dropout off.
    max_targets: K, no row has more weighted targets, and logits are computed for no more; None: T.

  Returns:
    (log_probs_B in nats, counts_B: sums of the weights), float32.
  """
  hidden_BTD: Any = model.apply(
    variables, batch['tokens'], batch['segment_ids'], batch['positions'],
    deterministic=dropout_key is None,
    rngs=None if dropout_key is None else {'dropout': dropout_key}, method='hidden',
  )
  weights_BT, targets_BT = batch['weights'], batch['targets']
  counts_B = jnp.sum(weights_BT, axis=1)
  if max_targets is not None and max_targets < weights_BT.shape[1]:
    _, places_BK = jax.lax.top_k((weights_BT != 0).astype(jnp.int32), max_targets)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, places_BK[..., None], axis=1)
    weights_BT, targets_BT = (
      jnp.take_along_axis(array_BT, places_BK, axis=1) for array_BT in (weights_BT, targets_BT))
  logits_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
  # A target that cannot be (a padding id) has infinite loss, and 0 * inf is NaN.
  log_probs_BT = jnp.where(weights_BT == 0, 0, target_log_probs(logits_BTV, targets_BT))
  return jnp.sum(weights_BT * log_probs_BT, axis=1), counts_B
