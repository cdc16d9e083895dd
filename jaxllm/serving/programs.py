"""The programs that the engine runs on the device: few, of fixed shapes, each compiled once.

`start_row` puts a request into a row, `copy_prefix` may bring keys and values of another row,
`prefill_chunk` reads the prompt piece by piece, `finish_prefill` predicts what follows. Then each
step `sample_rows` samples a token for all open rows and `decode_step` feeds them. A row's numbers
never depend on the others: every program has one shape, whatever is in the batch, and its
arithmetic goes row by row. All are pure functions of (model, variables, state). A is a letter for
the most probable tokens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generation import decode_state, sampling
from jaxllm.generation.decode_state import DecodeState, pin
from jaxllm.generation.rules import RULES, Biases
from jaxllm.generation.sampling import Request
from jaxllm.models import log_probs
from jaxllm.models.decoder import Decoder, init_cache
from jaxllm.sharding import active, constrain

# Room in the arrays of every row, powers of two.
MAX_STOP_IDS, MAX_BIASES = 16, 512
# Top logprobs that are computed where any request wants some.
NUM_TOP = 20


class Sampled(NamedTuple):
  """One token of every open row.

  Attributes:
    ids_B: int32.
    logprobs_B: float32, before any rule.
    finished_B: bool, whether a stop id came or the row's limit is reached.
    top: (ids_BA, logprobs_BA) of the most probable tokens, where a row wants them.
  """

  ids_B: Any  # noqa: N815
  logprobs_B: Any  # noqa: N815
  finished_B: Any  # noqa: N815
  top: tuple[Any, Any] | None = None


def init_state(
  model: Decoder, num_slots: int, context_length: int, cache_dtype: Any
) -> tuple[DecodeState, jax.Array]:
  """Return rows of which none is open, and their logits."""
  fields = row_fields(Request((0,), sampling.SamplingConfig(), 0), context_length)
  host = jax.tree.map(lambda leaf: np.stack([leaf] * num_slots), fields)
  config, placement = model.config, model.placement
  cache = init_cache(
    config, num_slots, context_length, cache_dtype, stacked=False, placement=placement)
  logits_BV = np.zeros((num_slots, config.padded_vocab_size), np.float32)
  where = placement and placement.sharding(logits_BV.shape, 'batch', None)
  return decode_state.put_state(cache, host, placement), jax.device_put(logits_BV, where)


def row_fields(request: Request, context_length: int) -> dict[str, Any]:
  """Return the fields of `DecodeState` for the row of a request.

  Raises:
    ValueError: there are more stop ids or biases than a row has room for.
  """
  if len(request.stop_token_ids) > MAX_STOP_IDS:
    raise ValueError(f'stop_token_ids: {len(request.stop_token_ids)} tokens; at most '
                     f'{MAX_STOP_IDS} are served')
  values = sampling.row_values([request.sampling], every_rule=True, least_biases=MAX_BIASES)
  if values['biases'].ids_BW.size > MAX_BIASES:
    raise ValueError(f'logit_bias: more than {MAX_BIASES} entries; at most that many are served')
  values = {name: jax.tree.map(lambda leaf: leaf[0], value) for name, value in values.items()}
  fields = decode_state.row_arrays([request], context_length, context_length, MAX_STOP_IDS)
  return {name: leaf[0] for name, leaf in fields.items()} | {'values': values}


@functools.partial(jax.jit, donate_argnames='slots')
def start_row(
  slots: DecodeState, row: jax.Array, fields: dict[str, Any], cached: jax.Array
) -> DecodeState:
  """Give a row to a request; it is not open yet.

  Args:
    row: which one.
    fields: from `row_fields`.
    cached: tokens of the prompt whose keys and values are in the row already.
  """
  old = {name: getattr(slots, name) for name in fields}
  new = jax.tree.map(lambda leaf, value: leaf.at[row].set(value), old, fields)
  lengths_B = slots.cache.lengths_B.at[row].set(cached)
  cache = dataclasses.replace(slots.cache, lengths_B=lengths_B)
  return pin(dataclasses.replace(slots, cache=cache, **new))


@functools.partial(jax.jit, donate_argnames='slots')
def copy_prefix(slots: DecodeState, source: jax.Array, target: jax.Array) -> DecodeState:
  """Copy keys and values of one row to another."""
  lengths_B = slots.cache.lengths_B

  def copy(leaf: jax.Array) -> jax.Array:
    row = jax.lax.dynamic_slice_in_dim(leaf, source, 1)
    return jax.lax.dynamic_update_slice_in_dim(leaf, row, target, 0)

  cache = dataclasses.replace(jax.tree.map(copy, slots.cache), lengths_B=lengths_B)
  return pin(dataclasses.replace(slots, cache=cache))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='slots')
def prefill_chunk(
  model: Decoder, variables: Any, slots: DecodeState, row: jax.Array, tokens_T: jax.Array,
  count: jax.Array,
) -> tuple[DecodeState, jax.Array]:
  """Append the first `count` tokens to a row; return (slots, hidden_TD, normalised)."""
  cache = slots.cache
  start, length = cache.lengths_B[row], tokens_T.shape[0]
  view = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), cache)
  extended: Any = model.apply(variables, tokens_T[None], view, count[None], method='extend')
  hidden_1TD, view = extended

  def put_back(old: jax.Array, new: jax.Array) -> jax.Array:
    if old.ndim == 1:
      return jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)
    # Only what is new. Near the end of the context both places are clamped in the same way.
    new = jax.lax.dynamic_slice_in_dim(new, start, length, 2)
    return jax.lax.dynamic_update_slice(old, new, (row, 0, start, 0))

  slots = dataclasses.replace(slots, cache=jax.tree.map(put_back, cache, view))
  return pin(slots), hidden_1TD[0]


@functools.partial(jax.jit, static_argnames='model', donate_argnames=('slots', 'logits_BV'))
def finish_prefill(
  model: Decoder, variables: Any, slots: DecodeState, logits_BV: jax.Array, row: jax.Array,
  hidden_TD: jax.Array, last: jax.Array,
) -> tuple[DecodeState, jax.Array]:
  """Open a row: return (slots, logits_BV of all rows) after place `last` of its last chunk."""
  hidden_1D = jax.lax.dynamic_slice_in_dim(hidden_TD, last, 1)
  logits_1V: Any = model.apply(variables, hidden_1D, method='logits')
  logits_BV = jax.lax.dynamic_update_slice_in_dim(logits_BV, logits_1V, row, 0)
  with active(model.placement):
    logits_BV = constrain(logits_BV, 'batch', None)
  slots = dataclasses.replace(slots, finished_B=slots.finished_B.at[row].set(False))
  return pin(slots), logits_BV


@jax.jit
def mask_logits(logits_BV: jax.Array, allowed_BV: jax.Array) -> jax.Array:
  """Return logits with -inf for tokens that may not come."""
  return jnp.where(allowed_BV, logits_BV, -jnp.inf)


@functools.partial(jax.jit, donate_argnames='slots')
def sample_rows(
  slots: DecodeState, logits_BV: jax.Array, allowed_BV: jax.Array, live_B: jax.Array
) -> tuple[DecodeState, Sampled]:
  """Sample a token for every open row.

  Args:
    logits_BV: of the model.
    allowed_BV: the same array, or what `mask_logits` made of it.
    live_B: bool; other rows are closed, if they were open.
  """
  finished_B = slots.finished_B | ~live_B
  values = {name: _rest(name, value, finished_B) for name, value in slots.values.items()}
  before = dataclasses.replace(slots, finished_B=finished_B, values=values)
  after = decode_state.sample_step(before, logits_BV, allowed_BV)

  def last(leaf_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(leaf_BS, after.lengths_B[:, None] - 1, axis=1)[:, 0]

  sampled = Sampled(last(after.tokens_BS), last(after.logprobs_BS), after.finished_B)
  return dataclasses.replace(after, values=slots.values), sampled


def _rest(name: str, value: Any, finished_B: jax.Array) -> Any:
  """Turn a rule off in rows that are closed: one that no row asks for costs nothing."""
  if isinstance(value, Biases):
    biases_BW = jnp.where(finished_B[:, None], 0.0, value.biases_BW)
    return dataclasses.replace(value, biases_BW=biases_BW)
  off = 0.0 if name == 'temperature' else RULES[name].off
  return jnp.where(finished_B, jnp.asarray(off, value.dtype), value)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='slots')
def decode_step(
  model: Decoder, variables: Any, slots: DecodeState
) -> tuple[DecodeState, jax.Array]:
  """Feed the last token of every open row; return (slots, logits_BV), meaningless in others."""
  slots, logits_BV = decode_state.next_logits(model, variables, slots)
  return pin(slots), logits_BV


@jax.jit
def top_logprobs(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (ids_BA, logprobs_BA) of the most probable tokens, best first."""
  return log_probs.top_log_probs(logits_BV, NUM_TOP)


@functools.partial(jax.jit, static_argnames='model')
def score_chunk(
  model: Decoder, variables: Any, hidden_TD: jax.Array, targets_T: jax.Array
) -> log_probs.TokenScores:
  """Score the tokens that follow each place of a chunk."""
  return log_probs.score_tokens(model, variables, hidden_TD, targets_T, NUM_TOP)


@jax.jit
def pool_chunk(hidden_TD: jax.Array, count: jax.Array) -> jax.Array:
  """Return the sum, in float32, of the first `count` hidden states."""
  is_real_T1 = jnp.arange(hidden_TD.shape[0])[:, None] < count
  return jnp.where(is_real_T1, hidden_TD, 0).astype(jnp.float32).sum(axis=0)


def compilation_count() -> int:
  """Return how many programs of this file were compiled in this process."""
  programs: tuple[Any, ...] = (
    start_row, copy_prefix, prefill_chunk, finish_prefill, mask_logits, sample_rows, decode_step,
    top_logprobs, score_chunk, pool_chunk)
  return sum(program._cache_size() for program in programs)
