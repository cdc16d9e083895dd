"""Differential privacy: DP-SGD, and what it promises.

Each row of a batch gives one gradient, that of its mean loss, clipped to a norm; their sum gets
Gaussian noise in proportion. What is protected is a row: a record of `context_length` tokens, in
which several short documents may be packed, and over several of which a long one may go.

Reference:
  Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pydantic

from jaxllm.config import Config


class PrivacyConfig(Config):
  """Train with differential privacy."""

  noise_multiplier: float = pydantic.Field(gt=0)
  """Standard deviation of the noise in a sum of gradients, in units of `clip_norm`."""
  clip_norm: float = pydantic.Field(default=1.0, gt=0)
  """Largest norm of the gradient of a row's mean loss."""
  delta: float = pydantic.Field(default=1e-5, gt=0, lt=1)
  """Probability that the promise of epsilon does not hold; to be well below 1 / records."""


def clipped_sum(
  gradients: Callable[..., tuple[Any, Any]], config: PrivacyConfig
) -> Callable[..., tuple[Any, Any]]:
  """Return a function that adds up the clipped gradients of the rows of a batch.

  Args:
    gradients: (params, batch, key) -> (gradient of the summed loss, sums), with `weight_sum`.
    config: gives the norm.

  Returns:
    A function like `gradients`. A row whose gradient is not finite counts as zero.
  """
  def by_row(params: Any, batch: Any, key: Any) -> tuple[Any, Any]:
    def of_row(row: Any, row_key: jax.Array) -> tuple[Any, Any]:
      grads, sums = gradients(params, jax.tree.map(lambda x: x[None], row), row_key)
      scale = 1 / jnp.maximum(sums['weight_sum'], 1)
      finite = jnp.isfinite(optax.global_norm(grads) * scale)
      return jax.tree.map(lambda x: jnp.where(finite, x * scale, 0), grads), sums

    rows = jax.tree.leaves(batch)[0].shape[0]
    grads, sums = jax.vmap(of_row)(batch, jax.random.split(key, rows))
    leaves, structure = jax.tree.flatten(grads)
    added, _ = optax.per_example_global_norm_clip(leaves, config.clip_norm)
    return jax.tree.unflatten(structure, added), jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

  return by_row


def add_noise(summed: Any, config: PrivacyConfig, key: jax.Array) -> Any:
  """Add Gaussian noise to a tree of float32 sums of clipped gradients."""
  leaves, structure = jax.tree.flatten(summed)
  deviation = config.noise_multiplier * config.clip_norm
  return jax.tree.unflatten(structure, [
    leaf + deviation * jax.random.normal(one, leaf.shape, leaf.dtype)
    for leaf, one in zip(leaves, jax.random.split(key, len(leaves)), strict=True)])


def epsilon(config: PrivacyConfig, steps: int, batch_size: int, records: int) -> dict[str, float]:
  """Return what the parameters of a run promise at `config.delta`.

  Two runs are compared in one of which a record is empty.

  Args:
    steps: how many have been taken.
    batch_size: records in each.
    records: how many there are.

  Returns:
    'epsilon': of batches as they are, shuffled anew in each epoch, so that a record is seen once in
    it; no secrecy of the order is counted. 'epsilon_if_sampled': what the same noise would promise
    if each batch were a Poisson sample of the records. It is no promise of this run.

  Raises:
    ImportError: the extra `privacy` is missing.
  """
  import dp_accounting
  from dp_accounting import pld

  def spent(*events: tuple[Any, int]) -> float:
    accountant = pld.PLDAccountant()
    for event, count in events:
      if count:
        accountant.compose(event, count)
    return float(accountant.get_epsilon(config.delta))

  if not steps:
    return {'epsilon': 0.0, 'epsilon_if_sampled': 0.0}
  epochs, sigma = math.ceil(steps * batch_size / records), config.noise_multiplier
  # A batch that goes over the end of an epoch may hold a record twice.
  twice = epochs // 2 if records % batch_size else 0
  gaussian = dp_accounting.GaussianDpEvent
  sampled = dp_accounting.PoissonSampledDpEvent(min(batch_size / records, 1), gaussian(sigma))
  return {
    'epsilon': spent((gaussian(sigma), epochs - 2 * twice), (gaussian(sigma / 2), twice)),
    'epsilon_if_sampled': spent((sampled, steps))}
