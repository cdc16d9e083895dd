"""Shared parts of losses: their types, the hidden states that they read, the model's aux losses."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxllm.models.decoder import Decoder

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]

AUX_WEIGHTS: Mapping[str, float] = {}
"""Name of a scalar that layers report (`Decoder.hidden`) -> its weight in every loss. What is not
named is no part of the loss."""


def hidden_states(
  model: 'Decoder', variables: Any, batch: Batch, dropout_key: jax.Array | None
) -> tuple[jax.Array, Sums]:
  """Return (hidden_BTD, aux) of a batch; without a key there is no dropout."""
  return model.apply(  # type: ignore[return-value]
    variables, batch['tokens'], batch['segment_ids'], batch.get('positions'),
    deterministic=dropout_key is None,
    rngs=None if dropout_key is None else {'dropout': dropout_key}, method='hidden',
  )


def with_aux(
  loss_sum: jax.Array, weight_sum: jax.Array, sums: Sums, aux: Sums
) -> tuple[jax.Array, jax.Array, Sums]:
  """Return (loss_sum, weight_sum, sums) with the model's aux scalars.

  Each is a mean over a batch and counts as often as the batch has weight, so that it is averaged as
  the loss is over microbatches and devices.
  """
  for name, value in aux.items():
    loss_sum = loss_sum + AUX_WEIGHTS.get(name, 0.0) * value * weight_sum
  return loss_sum, weight_sum, {
    **sums, **{f'{name}_sum': value * weight_sum for name, value in aux.items()}}


def scan_sum(f: Callable[..., Any], *parts: Any) -> Any:
  """Add up the trees `f` of each part, one after another; parts are stacked on axis 0."""
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(f, *first))

  def add(carry: Any, part: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, f(*part)), None

  return jax.lax.scan(add, zeros, parts)[0]


def average(total: jax.Array, count: jax.Array) -> jax.Array:
  """Divide a sum by its count; 0 where nothing was counted."""
  return total / jnp.where(count == 0, 1, count)
