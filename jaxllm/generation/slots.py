"""The decode loop on the device: rows, each at its own place, advanced together.

`Slots` is what is known about every row; `lay_out` makes it, in shapes that are powers of two, so
that few programs are ever compiled. `prefill` reads the prompts, `advance` adds tokens until all
rows have ended or a number of steps is done. Their parts `feed`, `draw` and `decode_step` are what
an engine for continuous batching needs: a prompt can be fed in chunks, and with an unstacked cache
every leaf of `Slots` has the row as its first axis, so that a row can be given to another request.
A is a letter for the most probable tokens that are recorded with each token.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generation import sampling
from jaxllm.generation.requests import Request
from jaxllm.generation.rules import NO_TOKEN, History
from jaxllm.generation.sampling import power_of_two as bucket
from jaxllm.models.decoder import Decoder, DecoderConfig, KVCache, init_cache

LEAST_TOKENS, LEAST_STOP_IDS, LEAST_TOP = 16, 4, 4


@flax.struct.dataclass
class Slots:
  """Rows in the middle of decoding; S slots in the cache, E stop ids per row.

  Attributes:
    cache: holds all tokens of a row but the last one, which is fed next.
    tokens_BS: int32 (B, S + 1), prompt and continuation.
    logprobs_BS: float32 (B, S + 1), of the tokens of the continuation: the log-probability that the
      model gave, before any rule.
    top_ids_BSA: int32 (B, S + 1, A), the most probable tokens, before any rule; A may be 0.
    top_logprobs_BSA: float32, their log-probabilities.
    prompt_lengths_B: int32, at least 1 in a row that is in use.
    lengths_B: int32, tokens known so far.
    limits_B: int32, the length at which a row ends.
    finished_B: bool; a finished row does not change any more.
    stop_ids_BE: int32, tokens that end a row, filled up with NO_TOKEN.
    seeds_B: uint32, of the draws.
    values: rule name -> values with the row as first axis, see `sampling.row_values`.
  """

  cache: KVCache
  tokens_BS: jax.Array  # noqa: N815
  logprobs_BS: jax.Array  # noqa: N815
  top_ids_BSA: jax.Array  # noqa: N815
  top_logprobs_BSA: jax.Array  # noqa: N815
  prompt_lengths_B: jax.Array  # noqa: N815
  lengths_B: jax.Array  # noqa: N815
  limits_B: jax.Array  # noqa: N815
  finished_B: jax.Array  # noqa: N815
  stop_ids_BE: jax.Array  # noqa: N815
  seeds_B: jax.Array  # noqa: N815
  values: Mapping[str, Any]


def lay_out(
  config: DecoderConfig, requests: Sequence[Request], stacked: bool, num_top: int = 0,
  cache_dtype: jnp.dtype | None = None, spare_slots: int = 0, exact_rows: bool = False,
) -> Slots:
  """Put requests into rows, before any token is read; rows that only pad have finished already.

  Args:
    config: of the model.
    requests: at least one.
    stacked: whether the variables, and so the cache, are stacked.
    num_top: how many of the most probable tokens are recorded at each place.
    cache_dtype: of keys and values; the model's by default, int8 to quantise them.
    exact_rows: whether the number of rows is that of the requests, and no power of two.
    spare_slots: cache beyond what the rows can fill, for drafts that may be refused.
  """
  used = len(requests)
  rows = used if exact_rows else bucket(used)
  requests = [*requests, *[Request((0,), requests[0].sampling, 0)] * (rows - used)]
  # The last token of a row is never fed, so it needs no slot in the cache.
  limits = [
    min(len(request.prompt) + request.sampling.max_new_tokens, config.max_length + 1)
    for request in requests
  ]
  num_slots = min(bucket(max(limits) - 1, LEAST_TOKENS), config.max_length)
  num_top = min(bucket(num_top, LEAST_TOP), config.vocab_size) if num_top else 0
  num_stop_ids = bucket(max(len(request.stop_ids) for request in requests), LEAST_STOP_IDS)
  tokens_BS = np.zeros((rows, num_slots + 1), np.int32)
  stop_ids_BE = np.full((rows, num_stop_ids), NO_TOKEN, np.int32)
  for row, request in enumerate(requests):
    tokens_BS[row, : len(request.prompt)] = request.prompt
    stop_ids_BE[row, : len(request.stop_ids)] = request.stop_ids
  lengths = [len(request.prompt) for request in requests]
  host = {
    'tokens_BS': tokens_BS,
    'logprobs_BS': np.zeros((rows, num_slots + 1), np.float32),
    'top_ids_BSA': np.zeros((rows, num_slots + 1, num_top), np.int32),
    'top_logprobs_BSA': np.zeros((rows, num_slots + 1, num_top), np.float32),
    'prompt_lengths_B': np.array(lengths, np.int32),
    'lengths_B': np.array(lengths, np.int32),
    'limits_B': np.array(limits, np.int32),
    'finished_B': np.arange(rows) >= used,
    'stop_ids_BE': stop_ids_BE,
    'seeds_B': np.array([request.seed for request in requests], np.uint32),
    'values': sampling.row_values(
      [request.sampling for request in requests], [request.stop_ids for request in requests]
    ),
  }
  cache = init_cache(config, rows, num_slots + spare_slots, cache_dtype, stacked)
  return Slots(cache, **jax.device_put(host))


def prompt_bucket(slots: Slots, longest: int) -> int:
  """Return the length to which prompts are padded when the longest has `longest` tokens."""
  return min(bucket(longest, LEAST_TOKENS), slots.tokens_BS.shape[1] - 1)


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
  extended: Any = model.apply(variables, tokens_BT, cache, counts_B, method='extend')
  hidden_BTD, cache = extended
  last_B11 = jnp.maximum(counts_B - 1, 0)[:, None, None]
  hidden_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
  logits_BV: Any = model.apply(variables, hidden_BD, method='logits')
  return logits_BV, cache


def draw(slots: Slots, logits_BV: jax.Array, allowed_BV: jax.Array | None = None) -> Slots:
  """Draw a token for every row; finished rows stay as they are.

  Args:
    slots: the rows.
    logits_BV: of the model, to which the recorded log-probabilities belong.
    allowed_BV: the same with -inf for tokens that may not come, where the draw is constrained.
  """
  history = History(
    slots.tokens_BS, slots.prompt_lengths_B, slots.lengths_B, slots.limits_B, slots.stop_ids_BE
  )
  keys_B = sampling.row_keys(slots.seeds_B, slots.lengths_B - slots.prompt_lengths_B)
  allowed_BV = logits_BV if allowed_BV is None else allowed_BV
  ids_B = sampling.sample(keys_B, allowed_BV, slots.values, history)
  chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=1)[:, 0]
  total_B = jax.nn.logsumexp(logits_BV, axis=-1)
  rows_B = jnp.arange(ids_B.shape[0])
  # A finished row writes past the end, which drops it.
  places_B = jnp.where(slots.finished_B, slots.tokens_BS.shape[1], slots.lengths_B)
  lengths_B = jnp.where(slots.finished_B, slots.lengths_B, slots.lengths_B + 1)

  def put(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[rows_B, places_B].set(new, mode='drop')

  top_BA, top_ids_BA = jax.lax.top_k(logits_BV, slots.top_ids_BSA.shape[-1])
  stopped_B = (ids_B[:, None] == slots.stop_ids_BE).any(axis=1)
  return dataclasses.replace(
    slots,
    tokens_BS=put(slots.tokens_BS, ids_B),
    logprobs_BS=put(slots.logprobs_BS, chosen_B - total_B),
    top_ids_BSA=put(slots.top_ids_BSA, top_ids_BA),
    top_logprobs_BSA=put(slots.top_logprobs_BSA, top_BA - total_B[:, None]),
    lengths_B=lengths_B,
    finished_B=slots.finished_B | stopped_B | (lengths_B >= slots.limits_B),
  )


def decode_step(model: Decoder, variables: Any, slots: Slots) -> Slots:
  """Add one token to every row that has not finished."""
  last_B1 = jnp.take_along_axis(slots.tokens_BS, slots.lengths_B[:, None] - 1, axis=1)
  counts_B = jnp.where(slots.finished_B, 0, 1)
  logits_BV, cache = feed(model, variables, slots.cache, last_B1, counts_B)
  return draw(dataclasses.replace(slots, cache=cache), logits_BV)


@functools.partial(jax.jit, static_argnames=('model', 'length'), donate_argnames='slots')
def prefill(model: Decoder, variables: Any, slots: Slots, length: int) -> Slots:
  """Read the prompts, right-padded to `length`, and add the first token of each continuation."""
  counts_B = jnp.where(slots.finished_B, 0, slots.prompt_lengths_B)
  logits_BV, cache = feed(model, variables, slots.cache, slots.tokens_BS[:, :length], counts_B)
  return draw(dataclasses.replace(slots, cache=cache), logits_BV)


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
  programs: tuple[Any, ...] = (prefill, advance)
  return sum(program._cache_size() for program in programs)

