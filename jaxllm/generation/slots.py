"""The decode loop on the device: rows, each at its own place, advanced together.

`Slots` is what is known about every row. `prefill` reads the prompts, `advance` adds tokens until
all rows have ended or a number of steps is done; both are jitted once per shape. Their parts
`feed`, `draw` and `decode_step` are what an engine for continuous batching needs: a prompt can be
fed in chunks, and with an unstacked cache every leaf of `Slots` has the row as its first axis, so
that a finished row can be replaced by another request.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxllm.generation import sampling
from jaxllm.models.decoder import Decoder, KVCache

# Fills unused places of `stop_ids_BE`; no token has this id.
NO_TOKEN = -1


@flax.struct.dataclass
class Slots:
  """Rows in the middle of decoding; S slots in the cache, E stop ids per row.

  Attributes:
    cache: holds all tokens of a row but the last one, which is fed next.
    tokens_BS: int32 (B, S + 1), prompt and continuation.
    logprobs_BS: float32 (B, S + 1), of the tokens of the continuation: the log-probability that the
      model gave, before any rule.
    prompt_lengths_B: int32, at least 1 in a row that is in use.
    lengths_B: int32, tokens known so far.
    limits_B: int32, the length at which a row ends.
    finished_B: bool; a finished row does not change any more.
    stop_ids_BE: int32, tokens that end a row, filled up with NO_TOKEN.
    seeds_B: uint32, of the draws.
    values: rule name -> (B,) values, see `sampling.RULES`.
  """

  cache: KVCache
  tokens_BS: jax.Array  # noqa: N815
  logprobs_BS: jax.Array  # noqa: N815
  prompt_lengths_B: jax.Array  # noqa: N815
  lengths_B: jax.Array  # noqa: N815
  limits_B: jax.Array  # noqa: N815
  finished_B: jax.Array  # noqa: N815
  stop_ids_BE: jax.Array  # noqa: N815
  seeds_B: jax.Array  # noqa: N815
  values: Mapping[str, jax.Array]


def feed(
  model: Decoder, variables: Any, cache: KVCache, tokens_BT: jax.Array, counts_B: jax.Array
) -> tuple[jax.Array, KVCache]:
  """Append tokens to the cache and predict what follows the last one of each row.

  Args:
    model: the decoder.
    variables: its variables, stacked or not like the cache.
    cache: of B rows.
    tokens_BT: int32.
    counts_B: int32, how many of them are real; 0 leaves a row as it is.

  Returns:
    (logits_BV float32, meaningless in rows of count 0; the cache).
  """
  hidden_BTD, cache = model.apply(variables, tokens_BT, cache, counts_B, method='extend')
  last_B11 = jnp.maximum(counts_B - 1, 0)[:, None, None]
  hidden_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
  return model.apply(variables, hidden_BD, method='logits'), cache


def draw(slots: Slots, logits_BV: jax.Array) -> Slots:
  """Draw a token for every row from its logits; finished rows stay as they are."""
  history = sampling.History(slots.tokens_BS, slots.prompt_lengths_B, slots.lengths_B)
  keys_B = sampling.row_keys(slots.seeds_B, slots.lengths_B - slots.prompt_lengths_B)
  ids_B = sampling.sample(keys_B, logits_BV, slots.values, history)
  chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=1)[:, 0]
  logprobs_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
  rows_B = jnp.arange(ids_B.shape[0])
  # A finished row writes past the end, which drops it.
  places_B = jnp.where(slots.finished_B, slots.tokens_BS.shape[1], slots.lengths_B)
  lengths_B = jnp.where(slots.finished_B, slots.lengths_B, slots.lengths_B + 1)
  stopped_B = (ids_B[:, None] == slots.stop_ids_BE).any(axis=1)
  return slots.replace(
    tokens_BS=slots.tokens_BS.at[rows_B, places_B].set(ids_B, mode='drop'),
    logprobs_BS=slots.logprobs_BS.at[rows_B, places_B].set(logprobs_B, mode='drop'),
    lengths_B=lengths_B,
    finished_B=slots.finished_B | stopped_B | (lengths_B >= slots.limits_B),
  )


def decode_step(model: Decoder, variables: Any, slots: Slots) -> Slots:
  """Add one token to every row that has not finished."""
  last_B1 = jnp.take_along_axis(slots.tokens_BS, slots.lengths_B[:, None] - 1, axis=1)
  counts_B = jnp.where(slots.finished_B, 0, 1)
  logits_BV, cache = feed(model, variables, slots.cache, last_B1, counts_B)
  return draw(slots.replace(cache=cache), logits_BV)


@functools.partial(jax.jit, static_argnames=('model', 'length'), donate_argnames='slots')
def prefill(model: Decoder, variables: Any, slots: Slots, length: int) -> Slots:
  """Read the prompts, right-padded to `length`, and add the first token of each continuation."""
  counts_B = jnp.where(slots.finished_B, 0, slots.prompt_lengths_B)
  logits_BV, cache = feed(model, variables, slots.cache, slots.tokens_BS[:, :length], counts_B)
  return draw(slots.replace(cache=cache), logits_BV)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='slots')
def advance(model: Decoder, variables: Any, slots: Slots, num_steps: jax.Array) -> Slots:
  """Take `num_steps` steps, or fewer where all rows finish before."""

  def unfinished(carry: tuple[jax.Array, Slots]) -> jax.Array:
    step, slots = carry
    return (step < num_steps) & ~slots.finished_B.all()

  def body(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
    step, slots = carry
    return step + 1, decode_step(model, variables, slots)

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), slots))[1]


def compilation_count() -> int:
  """Return how many programs `prefill` and `advance` have compiled in this process."""
  return prefill._cache_size() + advance._cache_size()

