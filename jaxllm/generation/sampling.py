"""From logits to the next token: rules that change logits, and the draw.

A rule is a pure function `(logits_BV, value_B, history) -> logits_BV`. `RULES` lists them in the
order in which they apply; each row has its own value, so that one batch mixes requests. A new rule
is a function, an entry there and a field of `SamplingConfig`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from jaxllm.config import Config

MAX_SEED = 2**32 - 1


class SamplingConfig(Config):
  """How a continuation is drawn."""

  max_new_tokens: int = pydantic.Field(default=128, gt=0)
  """Tokens after which a row ends; it ends earlier where the context of the model is full."""
  temperature: float = pydantic.Field(default=1.0, ge=0)
  """Logits are divided by this; 0 always takes the most probable token."""
  top_k: int = pydantic.Field(default=0, ge=0)
  """Draw from this many most probable tokens only (equals of the last one included); 0: all."""
  top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
  """Draw from the smallest set of most probable tokens whose probabilities add up to this."""
  min_p: float = pydantic.Field(default=0.0, ge=0, le=1)
  """Draw from tokens at least this fraction as probable as the most probable one."""
  seed: int = pydantic.Field(default=0, ge=0, le=MAX_SEED)
  """Seeds the draws."""


@flax.struct.dataclass
class History:
  """What a rule may look at besides the logits.

  Attributes:
    tokens_BS: int32, prompt and continuation; what stands at and past `lengths_B` is undefined.
    prompt_lengths_B: int32, tokens of the prompt.
    lengths_B: int32, tokens so far, those of the prompt included.
  """

  tokens_BS: jax.Array  # noqa: N815
  prompt_lengths_B: jax.Array  # noqa: N815
  lengths_B: jax.Array  # noqa: N815


class Rule(NamedTuple):
  """A rule, and the value with which it changes nothing."""

  apply: Callable[[jax.Array, jax.Array, History], jax.Array]
  off: float


def temperature(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Divide logits, shifted so that the largest is 0, by the temperature; 0 leaves them as they are.

  Reference:
    Ackley, Hinton, Sejnowski, "A Learning Algorithm for Boltzmann Machines", 1985.
  """
  del history
  shifted_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
  return shifted_BV / jnp.where(value_B > 0, value_B, 1.0)[:, None]


def top_k(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Keep the `value_B` largest logits, and any equal to the smallest of them.

  Reference:
    Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", arXiv 1805.04833.
  """
  del history
  return _keep_top(logits_BV, jnp.ones_like(logits_BV), value_B.astype(jnp.float32))


def top_p(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Keep the smallest set of largest logits whose probabilities reach `value_B`.

  Reference:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
  """
  del history
  return _keep_top(logits_BV, jax.nn.softmax(logits_BV), value_B)


def min_p(logits_BV: jax.Array, value_B: jax.Array, history: History) -> jax.Array:
  """Keep tokens whose probability is at least `value_B` times the largest one.

  Reference:
    Nguyen et al., "Turning Up the Heat: Min-p Sampling", arXiv 2407.01082.
  """
  del history
  least_B = logits_BV.max(axis=-1) + jnp.log(value_B)
  return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)


RULES: Mapping[str, Rule] = {
  'temperature': Rule(temperature, 1.0),
  'top_k': Rule(top_k, 0),
  'top_p': Rule(top_p, 1.0),
  'min_p': Rule(min_p, 0.0),
}


def row_values(configs: Sequence[SamplingConfig]) -> dict[str, np.ndarray]:
  """Return the value of every rule for each row, name -> (B,)."""
  return {
    name: np.asarray([getattr(config, name) for config in configs], np.asarray(rule.off).dtype)
    .astype(np.float32 if isinstance(rule.off, float) else np.int32)
    for name, rule in RULES.items()
  }


def apply_rules(
  logits_BV: jax.Array, values: Mapping[str, jax.Array], history: History
) -> jax.Array:
  """Apply the rules in order; one that no row asks for costs nothing at run time.

  Args:
    logits_BV: float32.
    values: name of a rule -> (B, ...) values; a rule without an entry is left out.
    history: the tokens so far.

  Returns:
    logits_BV with -inf where a rule excludes the token. Rows with a rule's off value pass it
    unchanged.
  """
  for name, rule in RULES.items():
    if name not in values:
      continue
    value = values[name]
    active_B = (value != rule.off).reshape(value.shape[0], -1).any(axis=1)

    def change(logits_BV, rule=rule, value=value, active_B=active_B):
      return jnp.where(active_B[:, None], rule.apply(logits_BV, value, history), logits_BV)

    logits_BV = jax.lax.cond(active_B.any(), change, lambda logits_BV: logits_BV, logits_BV)
  return logits_BV


def row_keys(seeds_B: jax.Array, index_B: jax.Array) -> jax.Array:
  """Return the key of each row's draw number `index_B`, independent of the rest of the batch."""
  # Threefry by name: other generators do not give under vmap what they give alone.
  return jax.vmap(
    lambda seed, index: jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), index)
  )(seeds_B, index_B)


def sample(
  keys_B: jax.Array, logits_BV: jax.Array, values: Mapping[str, jax.Array], history: History
) -> jax.Array:
  """Draw the next token of every row.

  Args:
    keys_B: one key per row (see `row_keys`).
    logits_BV: float32 logits of the model.
    values: rule values (see `apply_rules`); temperature 0 takes the largest logit.
    history: the tokens so far.

  Returns:
    ids_B int32.
  """
  logits_BV = apply_rules(logits_BV, values, history)
  greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  drawing_B = values['temperature'] > 0 if 'temperature' in values else jnp.ones_like(greedy_B) > 0

  def draw(logits_BV):
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    return jnp.where(drawing_B, drawn_B, greedy_B)

  return jax.lax.cond(drawing_B.any(), draw, lambda _: greedy_B, logits_BV)


def _keep_top(logits_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
  """Keep the fewest largest logits whose weights add up to a target; all, if they never do.

  The threshold is found bit by bit, from the highest: 32 passes over the row, which cost less than
  sorting it and are exact.
  """
  bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
  top_bit = jnp.uint32(1 << 31)
  # Unsigned integers in the order of the floats.
  order_BV = jnp.where(bits_BV >= top_bit, ~bits_BV, bits_BV | top_bit)

  def refine(index: jax.Array, threshold_B: jax.Array) -> jax.Array:
    higher_B = threshold_B | (top_bit >> index.astype(jnp.uint32))
    sum_B = jnp.sum(weights_BV * (order_BV >= higher_B[:, None]), axis=-1)
    return jnp.where(sum_B >= target_B, higher_B, threshold_B)

  threshold_B = jax.lax.fori_loop(0, 32, refine, jnp.zeros(logits_BV.shape[0], jnp.uint32))
  return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
