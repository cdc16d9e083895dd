"""The decode loop on the device: rows, each at its own position, advanced together.

`init_decode_state` makes a `DecodeState`, in shapes that are powers of two, so that few programs
are ever compiled. `prefill` reads the prompts, `decode_steps` adds tokens until all rows have ended
or a number of steps is done. Their parts `last_logits`, `next_logits` and `sample_step` are what
an engine for continuous batching needs: a prompt can be read in chunks, and with an unstacked cache
the row is the first axis of all leaves of `DecodeState`, so that another request can have it.
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
from jaxllm.generation.rules import NO_TOKEN, History
from jaxllm.generation.sampling import Request, power_of_two
from jaxllm.models import cache as kv_cache
from jaxllm.models import log_probs
from jaxllm.models.decoder import Decoder, DecoderConfig, KVCache, init_cache
from jaxllm.sharding import Placement, active, constrain, replicated

LEAST_TOKENS, LEAST_STOP_IDS = 16, 4


@flax.struct.dataclass
class DecodeState(History):
  """Rows in the middle of decoding; their tokens have S + 1 places, and their cache S positions.

  Attributes:
    cache: holds all tokens of a row but the last one.
    logprobs_BS: float32 (B, S + 1), log-probability of each token of the continuation under the
      model, before any logit rule.
    finished_B: bool; a finished row does not change any more.
    seeds_B: uint32.
    values: rule name -> values with the row as first axis, see `sampling.row_values`.
    placement: the devices of the model: they split the cache, and each has all the rest.
  """

  cache: KVCache
  logprobs_BS: jax.Array  # noqa: N815
  finished_B: jax.Array  # noqa: N815
  seeds_B: jax.Array  # noqa: N815
  values: Mapping[str, Any]
  placement: Placement | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def last_tokens_B(self) -> jax.Array:  # noqa: N802
    """The newest token of each row, which the cache does not hold yet."""
    return jnp.take_along_axis(self.tokens_BS, self.lengths_B[:, None] - 1, axis=1)[:, 0]


def pin(state: DecodeState) -> DecodeState:
  """Keep the shardings of rows, so that no program is compiled for others."""
  if state.placement is None:
    return state
  with active(state.placement):
    cache = kv_cache.constrain(state.cache)
    pinned = jax.tree.map(lambda leaf: constrain(leaf, *[None] * leaf.ndim), state)
  return dataclasses.replace(pinned, cache=cache)


def put_state(cache: KVCache, host: Mapping[str, Any], placement: Placement | None) -> DecodeState:
  """Return rows with their host arrays on the devices of a placement, or on the default one."""
  arrays = jax.device_put(host, placement and replicated(placement.mesh))
  return DecodeState(cache=cache, placement=placement, **arrays)


def init_decode_state(
  config: DecoderConfig, requests: Sequence[Request], stacked: bool,
  cache_dtype: jnp.dtype | None = None, spare_positions: int = 0, exact_rows: bool = False,
  placement: Placement | None = None,
) -> DecodeState:
  """Put requests into rows, before any token is read; rows that only pad have finished already.

  Args:
    requests: at least one.
    stacked: whether the variables, and so the cache, are stacked.
    cache_dtype: dtype of keys and values; the model's by default, int8 to quantise them.
    spare_positions: cache beyond what the rows can fill, for drafts that may be refused.
    exact_rows: whether the number of rows is that of the requests, and no power of two.
    placement: the devices of the model.
  """
  used = len(requests)
  rows = used if exact_rows else power_of_two(used)
  requests = [*requests, *[Request((0,), requests[0].sampling, 0)] * (rows - used)]
  stop_token_ids = [request.stop_token_ids for request in requests]
  # The last token of a row is never read, so it needs no position in the cache.
  longest = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
  cache_length = min(power_of_two(min(longest, config.max_length + 1) - 1, LEAST_TOKENS),
                     config.max_length)
  num_stop = power_of_two(max(map(len, stop_token_ids)), LEAST_STOP_IDS)
  host = row_arrays(requests, cache_length, config.max_length, num_stop)
  host['finished_B'] = np.arange(rows) >= used
  host['values'] = sampling.row_values([one.sampling for one in requests])
  cache = init_cache(config, rows, cache_length + spare_positions, cache_dtype, stacked, placement)
  return put_state(cache, host, placement)


def row_arrays(
  requests: Sequence[Request], cache_length: int, max_length: int, num_stop: int
) -> dict[str, Any]:
  """Return the arrays of closed rows of a `DecodeState`, but for the values of rules."""
  shape = len(requests), cache_length + 1
  tokens_BS = np.zeros(shape, np.int32)
  stop_ids_BE = np.full((shape[0], num_stop), NO_TOKEN, np.int32)
  for row, request in enumerate(requests):
    tokens_BS[row, : len(request.prompt)] = request.prompt
    stop_ids_BE[row, : len(request.stop_token_ids)] = request.stop_token_ids
  lengths_B = np.array([len(request.prompt) for request in requests], np.int32)
  limits = [min(len(request.prompt) + request.sampling.max_new_tokens, max_length + 1)
            for request in requests]
  return {
    'tokens_BS': tokens_BS,
    'logprobs_BS': np.zeros(shape, np.float32),
    'prompt_lengths_B': lengths_B,
    'lengths_B': lengths_B.copy(),
    'limits_B': np.array(limits, np.int32),
    'finished_B': np.ones(shape[0], bool),
    'stop_ids_BE': stop_ids_BE,
    'seeds_B': np.array([request.seed for request in requests], np.uint32),
  }


def prompt_bucket(state: DecodeState, requests: Sequence[Request]) -> int:
  """Return the length to which the prompts of requests are padded."""
  longest = max(len(request.prompt) for request in requests)
  return min(power_of_two(longest, LEAST_TOKENS), state.tokens_BS.shape[1] - 1)


def last_logits(
  model: Decoder, variables: Any, cache: KVCache, tokens_BT: jax.Array, counts_B: jax.Array
) -> tuple[jax.Array, KVCache]:
  """Append tokens to the cache and predict what follows the last one of each row.

  Of row b the first `counts_B[b]` tokens are real; 0 leaves it as it is, with meaningless logits.
  """
  extended: Any = model.apply(variables, tokens_BT, cache, counts_B, method='extend')
  hidden_BTD, cache = extended
  last_B11 = jnp.maximum(counts_B - 1, 0)[:, None, None]
  hidden_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
  logits_BV: Any = model.apply(variables, hidden_BD, method='logits')
  with active(model.placement):
    return constrain(logits_BV, 'batch', None), cache


def prompt_logits(
  model: Decoder, variables: Any, state: DecodeState, length: int
) -> tuple[DecodeState, jax.Array]:
  """Read the prompts, right-padded to `length`, into the cache and predict what follows them."""
  counts_B = jnp.where(state.finished_B, 0, state.prompt_lengths_B)
  logits_BV, cache = last_logits(
    model, variables, state.cache, state.tokens_BS[:, :length], counts_B)
  return dataclasses.replace(state, cache=cache), logits_BV


def next_logits(
  model: Decoder, variables: Any, state: DecodeState
) -> tuple[DecodeState, jax.Array]:
  """Read the last token of every row that has not finished and predict what follows it."""
  counts_B = jnp.where(state.finished_B, 0, 1)
  logits_BV, cache = last_logits(
    model, variables, state.cache, state.last_tokens_B[:, None], counts_B)
  return dataclasses.replace(state, cache=cache), logits_BV


def sample_step(
  state: DecodeState, logits_BV: jax.Array, allowed_BV: jax.Array | None = None
) -> DecodeState:
  """Sample a token for every row; finished rows stay as they are.

  Args:
    logits_BV: of the model, to which the recorded log-probabilities belong.
    allowed_BV: the same with -inf for tokens that may not come, where sampling is constrained.
  """
  keys_B = sampling.row_keys(state.seeds_B, state.lengths_B - state.prompt_lengths_B)
  allowed_BV = logits_BV if allowed_BV is None else allowed_BV
  ids_B = sampling.sample(keys_B, allowed_BV, state.values, state)
  rows_B = jnp.arange(ids_B.shape[0])
  # A finished row writes past the end, which drops it.
  places_B = jnp.where(state.finished_B, state.tokens_BS.shape[1], state.lengths_B)
  lengths_B = jnp.where(state.finished_B, state.lengths_B, state.lengths_B + 1)

  def put(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[rows_B, places_B].set(new, mode='drop')

  stopped_B = (ids_B[:, None] == state.stop_ids_BE).any(axis=1)
  return pin(dataclasses.replace(
    state,
    tokens_BS=put(state.tokens_BS, ids_B),
    logprobs_BS=put(state.logprobs_BS, log_probs.target_log_probs(logits_BV, ids_B)),
    lengths_B=lengths_B,
    finished_B=state.finished_B | stopped_B | (lengths_B >= state.limits_B),
  ))


@functools.partial(jax.jit, static_argnames=('model', 'length'), donate_argnames='state')
def prefill(model: Decoder, variables: Any, state: DecodeState, length: int) -> DecodeState:
  """Read the prompts, right-padded to `length`, and add the first token of each continuation."""
  return sample_step(*prompt_logits(model, variables, state, length))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def decode_steps(
  model: Decoder, variables: Any, state: DecodeState, num_steps: jax.Array
) -> DecodeState:
  """Add a token to every unfinished row `num_steps` times, or until all rows have finished."""

  def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
    step, state = carry
    return (step < num_steps) & ~state.finished_B.all()

  def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
    step, state = carry
    return step + 1, sample_step(*next_logits(model, variables, state))

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
