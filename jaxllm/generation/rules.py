"""Logit rules (logits processors): pure functions `(logits_BV, value, history) -> logits_BV`.

`RULES` lists them in the order in which they apply, that of Transformers: first those that look at
the tokens so far, then those that look at probabilities. `value` holds a setting per row; most are
one number, `Biases` is a table. Letters: W biases per row, N tokens, E stop ids.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

# Fills unused places of tables of ids; no token has this id.
NO_TOKEN = -1


@flax.struct.dataclass
class History:
  """The tokens so far, which a rule may look at.

  Attributes:
    tokens_BS: int32, prompt and continuation; what stands at and past `lengths_B` is undefined.
    prompt_lengths_B: int32, at least 1 in a row that is in use.
    lengths_B: int32, tokens so far, those of the prompt included.
    limits_B: int32, the length at which a row ends.
    stop_ids_BE: int32, tokens that end a row, filled up with NO_TOKEN.
  """

  tokens_BS: jax.Array  # noqa: N815
  prompt_lengths_B: jax.Array  # noqa: N815
  lengths_B: jax.Array  # noqa: N815
  limits_B: jax.Array  # noqa: N815
  stop_ids_BE: jax.Array  # noqa: N815


@flax.struct.dataclass
class Biases:
  """Tokens that get a bias: int32 ids, filled up with NO_TOKEN, and float32 biases."""

  ids_BW: jax.Array  # noqa: N815
  biases_BW: jax.Array  # noqa: N815


class Rule(NamedTuple):
  """A rule, and the value with which it changes nothing."""

  apply: Callable[[jax.Array, Any, History], jax.Array]
  off: float


def biases(logits_BV: jax.Array, value: Biases, _: History) -> jax.Array:
  """Add the biases of tokens."""
  return _rows(logits_BV, value.ids_BW).add(value.biases_BW, mode='drop')


def repetition_penalty(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Divide the logits of tokens that occurred, the prompt's too; multiply them where negative.

  Reference:
    Keskar et al., "CTRL", arXiv 1909.05858, section 4.1; negative ones as in Transformers.
  """
  seen_BS = _seen(history)
  old_BS = jnp.take_along_axis(logits_BV, jnp.maximum(seen_BS, 0), axis=1)
  new_BS = jnp.where(old_BS < 0, old_BS * value_B[:, None], old_BS / value_B[:, None])
  # A token that occurred twice is written twice, the same.
  return _rows(logits_BV, seen_BS).set(new_BS, mode='drop')


def presence_penalty(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Subtract the penalty from the logit of every token of the continuation so far."""
  return logits_BV - value_B[:, None] * (_counts(logits_BV, history) > 0)


def frequency_penalty(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Subtract the penalty for each time that a token occurs in the continuation so far."""
  return logits_BV - value_B[:, None] * _counts(logits_BV, history)


def no_repeat_ngram_size(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Mask tokens that would complete a sequence of `value_B` tokens for the second time.

  Reference:
    Paulus, Xiong, Socher, "A Deep Reinforced Model for Abstractive Summarization", arXiv
    1705.04304, section 2.5; the prompt counts too.
  """
  tokens_BS, lengths_B = history.tokens_BS, history.lengths_B
  place_1S = jnp.arange(tokens_BS.shape[1])[None]
  completes_BS = (place_1S < lengths_B[:, None]) & (place_1S >= value_B[:, None] - 1)

  def narrow(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Keep places before which stand the same tokens as at the end, `back` from there."""
    back, completes_BS = carry
    place_B1 = jnp.clip(lengths_B[:, None] - back, 0, tokens_BS.shape[1] - 1)
    wanted_B1 = jnp.take_along_axis(tokens_BS, place_B1, axis=1)
    same_BS = jnp.roll(tokens_BS, back, axis=1) == wanted_B1
    return back + 1, completes_BS & (same_BS | (back >= value_B)[:, None])

  more = lambda carry: carry[0] < value_B.max()  # noqa: E731
  _, completes_BS = jax.lax.while_loop(more, narrow, (jnp.int32(1), completes_BS))
  long_enough_B1 = lengths_B[:, None] + 1 >= value_B[:, None]
  return _mask_logits(logits_BV, jnp.where(completes_BS & long_enough_B1, tokens_BS, NO_TOKEN))


def min_new_tokens(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Mask tokens that end the row until it has `value_B` new ones."""
  early_B1 = (history.lengths_B - history.prompt_lengths_B < value_B)[:, None]
  return _mask_logits(logits_BV, jnp.where(early_B1, history.stop_ids_BE, NO_TOKEN))


def temperature(logits_BV: jax.Array, value_B: jax.Array, _: History) -> jax.Array:
  """Divide logits, shifted so that the largest is 0, by the temperature; 0 leaves them as they are.

  Reference:
    Ackley, Hinton, Sejnowski, "A Learning Algorithm for Boltzmann Machines", 1985.
  """
  shifted_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
  return shifted_BV / jnp.where(value_B > 0, value_B, 1.0)[:, None]


def top_k(logits_BV: jax.Array, value_B: jax.Array, _: History) -> jax.Array:
  """Keep the `value_B` largest logits, and any equal to the smallest of them.

  Reference:
    Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", arXiv 1805.04833.
  """
  return _keep_largest(logits_BV, logits_BV, jnp.ones_like(logits_BV), value_B.astype(jnp.float32))


def top_p(logits_BV: jax.Array, value_B: jax.Array, _: History) -> jax.Array:
  """Keep the smallest set of largest logits whose probabilities reach `value_B`.

  Reference:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
  """
  return _keep_largest(logits_BV, logits_BV, jax.nn.softmax(logits_BV), value_B)


def min_p(logits_BV: jax.Array, value_B: jax.Array, _: History) -> jax.Array:
  """Keep tokens whose probability is at least `value_B` times the largest one.

  Reference:
    Nguyen et al., "Turning Up the Heat: Min-p Sampling", arXiv 2407.01082.
  """
  least_B = logits_BV.max(axis=-1) + jnp.log(value_B)
  return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)


RULES: Mapping[str, Rule] = {
  'biases': Rule(biases, 0.0),
  'repetition_penalty': Rule(repetition_penalty, 1.0),
  'presence_penalty': Rule(presence_penalty, 0.0),
  'frequency_penalty': Rule(frequency_penalty, 0.0),
  'no_repeat_ngram_size': Rule(no_repeat_ngram_size, 0),
  'min_new_tokens': Rule(min_new_tokens, 0),
  'temperature': Rule(temperature, 1.0),
  'top_k': Rule(top_k, 0),
  'top_p': Rule(top_p, 1.0),
  'min_p': Rule(min_p, 0.0),
}

# Rules that are part of every program; the others come together, where any row asks for one.
BASIC = ('temperature', 'top_k', 'top_p', 'min_p')


def _seen(history: History, start: jax.Array | int = 0) -> jax.Array:
  """Return the tokens from place `start` on, with NO_TOKEN in all other places."""
  place_1S = jnp.arange(history.tokens_BS.shape[1])[None]
  is_seen_BS = (place_1S >= start) & (place_1S < history.lengths_B[:, None])
  return jnp.where(is_seen_BS, history.tokens_BS, NO_TOKEN)


def _counts(logits_BV: jax.Array, history: History) -> jax.Array:
  """Return how often each token occurs in the continuation."""
  new_BS = _seen(history, history.prompt_lengths_B[:, None])
  return _rows(jnp.zeros_like(logits_BV), new_BS).add(1.0, mode='drop')


def _rows(logits_BV: jax.Array, ids_BN: jax.Array) -> Any:
  """Return `logits_BV.at[...]` of these ids; updates must drop what is out of bounds (NO_TOKEN)."""
  ids_BN = jnp.where(ids_BN < 0, logits_BV.shape[1], ids_BN)
  return logits_BV.at[jnp.arange(ids_BN.shape[0])[:, None], ids_BN]


def _mask_logits(logits_BV: jax.Array, ids_BN: jax.Array) -> jax.Array:
  return _rows(logits_BV, ids_BN).set(-jnp.inf, mode='drop')


def _keep_largest(
  logits_BV: jax.Array, scores_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array
) -> jax.Array:
  """Keep the fewest largest scores whose weights add up to a target; all, if they never do."""
  # The threshold is found bit by bit: 32 passes over the row, exact and cheaper than sorting.
  bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.uint32)
  top_bit = jnp.uint32(1 << 31)
  # Unsigned integers in the order of the floats.
  order_BV = jnp.where(bits_BV >= top_bit, ~bits_BV, bits_BV | top_bit)

  def refine(index: jax.Array, threshold_B: jax.Array) -> jax.Array:
    higher_B = threshold_B | (top_bit >> index.astype(jnp.uint32))
    sum_B = jnp.sum(weights_BV * (order_BV >= higher_B[:, None]), axis=-1)
    return jnp.where(sum_B >= target_B, higher_B, threshold_B)

  threshold_B = jax.lax.fori_loop(0, 32, refine, jnp.zeros(scores_BV.shape[0], jnp.uint32))
  return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
