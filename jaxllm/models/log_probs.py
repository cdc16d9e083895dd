"""The log-probability of given tokens, which losses, scores, the server and lm-eval share."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxllm.models.decoder import Decoder

# Positions whose logits exist at a time: the head's kernel is read once for so many.
TOGETHER = 64


class TokenScores(NamedTuple):
  """Scores of N given tokens, JAX or NumPy arrays; A most probable tokens were asked for.

  Attributes:
    log_probs_N: float32, in nats.
    is_greedy_N: bool, whether the token is the most probable one.
    top_ids_NA: int32, the most probable tokens, best first.
    top_log_probs_NA: float32, theirs.
  """

  log_probs_N: Any  # noqa: N815
  is_greedy_N: Any  # noqa: N815
  top_ids_NA: Any  # noqa: N815
  top_log_probs_NA: Any  # noqa: N815


def target_log_probs(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
  """Return the log-probabilities (..., N) of targets under logits (..., N, V)."""
  target_N, log_partition_N, _ = target_parts(logits_NV, targets_N)
  return target_N - log_partition_N


def target_parts(
  logits_NV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the logits (..., N) of targets, the log-partitions, and the largest logits.

  With its gradient twice as fast on CPU as `jax.nn.logsumexp`; a gather is twice as fast as
  comparing with an iota, and its gradient is added in place.
  """
  largest_N1 = jax.lax.stop_gradient(jnp.max(logits_NV, axis=-1, keepdims=True))
  log_partition_N = jnp.log(jnp.sum(jnp.exp(logits_NV - largest_N1), axis=-1)) + largest_N1[..., 0]
  target_N = jnp.take_along_axis(logits_NV, targets_N[..., None], axis=-1)[..., 0]
  return target_N, log_partition_N, largest_N1[..., 0]


def top_log_probs(logits_NV: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array]:
  """Return (ids_NA, log_probs_NA) of the most probable tokens, best first."""
  top_NA, ids_NA = jax.lax.top_k(logits_NV, min(num_top, logits_NV.shape[-1]))
  return ids_NA, top_NA - jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)


def score_tokens(
  model: 'Decoder', variables: Any, hidden_ND: jax.Array, targets_N: jax.Array, num_top: int = 0
) -> TokenScores:
  """Return scores of targets_N by the hidden states before them, a few positions at a time.

  Args:
    variables: its variables, stacked or not.
    hidden_ND: (..., N, D), from the method `hidden`.
    targets_N: int32 (..., N), the tokens.
    num_top: how many of the most probable tokens are found for each position.
  """
  total, shape = targets_N.size, targets_N.shape
  together = min(TOGETHER, total)
  pad = -total % together

  def split(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(total, *leaf.shape[len(shape) :])
    padded = jnp.pad(flat, ((0, pad), *[(0, 0)] * (flat.ndim - 1)))
    return padded.reshape(-1, together, *flat.shape[1:])

  def look(inputs: tuple[jax.Array, jax.Array]) -> TokenScores:
    hidden_CD, targets_C = inputs
    logits_CV: Any = model.apply(variables, hidden_CD, method='logits')
    # The first of the largest, as argmax, which is six times slower on CPU.
    is_best_CV = logits_CV == jnp.max(logits_CV, axis=-1, keepdims=True)
    ids_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
    best_C = jnp.min(jnp.where(is_best_CV, ids_CV, logits_CV.shape[1]), axis=-1)
    return TokenScores(target_log_probs(logits_CV, targets_C), best_C == targets_C,
                       *top_log_probs(logits_CV, num_top))

  def join(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(total + pad, *leaf.shape[2:])
    return flat[:total].reshape(*shape, *leaf.shape[2:])

  return jax.tree.map(join, jax.lax.map(look, (split(hidden_ND), split(targets_N))))
