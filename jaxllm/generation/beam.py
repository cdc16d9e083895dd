"""Beam search: the most probable continuations, several of them, as Transformers finds them.

On the device a prompt has K running beams and K places for finished ones; each step looks at the
best C candidates of all beams. The caches of beams are rows of one cache, which follow them.
Letters: P prompts, K beams, C candidates.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.generation import decode, decode_state, sampling
from jaxllm.generation.decode import Completion
from jaxllm.generation.decode_state import DecodeState
from jaxllm.generation.rules import RULES
from jaxllm.generation.sampling import SamplingConfig, make_requests
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder

# Worse than any score; finite as in Transformers, so that sums stay numbers.
NEVER = -1e9
# Rules that change how greedy or beam search ranks tokens; the others only shape sampling.
RANKING = tuple(itertools.takewhile('temperature'.__ne__, RULES))


class BeamConfig(Config):
  """How beams compete."""

  num_beams: int = pydantic.Field(default=4, gt=0)
  """Sequences that grow side by side."""
  num_return: int = pydantic.Field(default=1, gt=0)
  """Sequences that are returned, best first; at most `num_beams`."""
  length_penalty: float = 1.0
  """Scores are divided by the number of new tokens to this power: above 0 favours long ones."""
  early_stopping: Literal['yes', 'no', 'never'] = 'no'
  """When a prompt is done: 'yes', once `num_beams` sequences ended; 'no', once no running beam
  would beat them if it ended now; 'never', only when none ever could."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'BeamConfig':
    if self.num_return > self.num_beams:
      raise ValueError(f'num_return={self.num_return} is more than num_beams={self.num_beams}')
    return self


@flax.struct.dataclass
class _Beams:
  """The running beams, rows with their scores, and the best finished ones (`done_`)."""

  rows: Any
  scores_PK: jax.Array  # noqa: N815
  done_tokens_PKS: jax.Array  # noqa: N815
  done_lengths_PK: jax.Array  # noqa: N815
  done_scores_PK: jax.Array  # noqa: N815
  is_done_PK: jax.Array  # noqa: N815
  open_P: jax.Array  # noqa: N815


def beam_search(
  model: Decoder, variables: Any, prompts: Sequence[Sequence[int]], beams: BeamConfig,
  sampling_config: SamplingConfig | None = None, eos_token_ids: Sequence[int] = (),
  bos_id: int | None = None,
) -> list[list[Completion]]:
  """Return the `num_return` most probable continuations found for each prompt, best first.

  Arguments and errors as `decode.generate`, and:

  Args:
    beams: how beams compete.
    sampling_config: `max_new_tokens` and the rules that rank tokens (penalties, n-grams, biases);
      nothing is sampled, so temperature and the like are not read.

  Reference:
    The search of Transformers 5, whose results it equals: scores and stopping included.
  """
  config = sampling_config or SamplingConfig()
  requests = make_requests(model.config, prompts, config, eos_token_ids, bos_id=bos_id)
  # A prompt pads the bucket of prompts, never that of beams.
  used, count = len(requests), beams.num_beams
  if not used:
    return []
  padded = requests + [requests[-1]] * (sampling.power_of_two(used) - used)
  state = decode_state.init_decode_state(
    model.config, [request for request in padded for _ in range(count)],
    not decoder.is_unstacked(variables), exact_rows=True, placement=model.placement)
  found = _search(
    model, variables, state, decode_state.prompt_bucket(state, requests), count,
    max(2, 1 + len(set(eos_token_ids))) * count, beams.early_stopping,
    jnp.float32(beams.length_penalty))
  tokens_PKS, lengths_PK, scores_PK = jax.device_get(
    (found.done_tokens_PKS, found.done_lengths_PK, found.done_scores_PK))
  return [
    [decode.completion(request, tokens_PKS[row, beam], (), lengths_PK[row, beam],
                       score=float(scores_PK[row, beam])) for beam in range(beams.num_return)]
    for row, request in enumerate(requests)]


@functools.partial(
  jax.jit, static_argnames=('model', 'length', 'num_beams', 'num_candidates', 'early_stopping'),
  donate_argnames='rows')
def _search(
  model: Decoder, variables: Any, rows: DecodeState, length: int, num_beams: int,
  num_candidates: int, early_stopping: str, length_penalty: jax.Array,
) -> _Beams:
  """Read the prompts, then step until no prompt can improve."""
  num_rows, width = rows.tokens_BS.shape
  shape = num_rows // num_beams, num_beams
  rows, logits_BV = decode_state.prompt_logits(model, variables, rows, length)
  start = _Beams(
    rows=rows,
    # All beams of a prompt begin equal: only the first may grow at first.
    scores_PK=jnp.broadcast_to(jnp.where(jnp.arange(num_beams) == 0, 0.0, NEVER), shape),
    done_tokens_PKS=rows.tokens_BS.reshape(*shape, width),
    done_lengths_PK=rows.lengths_B.reshape(shape),
    done_scores_PK=jnp.full(shape, NEVER, jnp.float32),
    is_done_PK=jnp.zeros(shape, bool),
    open_P=jnp.ones(shape[0], bool),
  )
  step = functools.partial(_step, num_candidates, early_stopping, length_penalty)

  def body(beams: _Beams) -> _Beams:
    rows, logits_BV = decode_state.next_logits(model, variables, beams.rows)
    return step(dataclasses.replace(beams, rows=rows), logits_BV)

  return jax.lax.while_loop(lambda beams: beams.open_P.any(), body, step(start, logits_BV))


def _step(
  num_candidates: int, early_stopping: str, length_penalty: jax.Array, old: _Beams,
  logits_BV: jax.Array,
) -> _Beams:
  """Let every beam of the open prompts grow by one token."""
  rows = old.rows
  prompts, beams = old.scores_PK.shape
  values = {name: value for name, value in rows.values.items() if name in RANKING}
  logprobs_BV = sampling.apply_rules(jax.nn.log_softmax(logits_BV), values, rows)
  total_PKV = logprobs_BV.reshape(prompts, beams, -1) + old.scores_PK[..., None]
  best_PC, place_PC = jax.lax.top_k(total_PKV.reshape(prompts, -1), num_candidates)
  from_PC, ids_PC = jnp.divmod(place_PC, logprobs_BV.shape[1])
  lengths_P, starts_P, limits_P = (leaf_B.reshape(prompts, beams)[:, 0] for leaf_B in (
    rows.lengths_B, rows.prompt_lengths_B, rows.limits_B))
  tokens_PCS = _pick(rows.tokens_BS.reshape(prompts, beams, -1), from_PC)
  tokens_PCS = tokens_PCS.at[jnp.arange(prompts)[:, None], jnp.arange(num_candidates)[None],
                             lengths_P[:, None]].set(ids_PC.astype(jnp.int32), mode='drop')
  stop_ids_PE = rows.stop_ids_BE.reshape(prompts, beams, -1)[:, 0]
  full_P1 = (lengths_P + 1 >= limits_P)[:, None]
  ends_PC = (ids_PC[..., None] == stop_ids_PE[:, None]).any(axis=-1) | full_P1

  running_PK, kept_PK = jax.lax.top_k(best_PC + ends_PC * NEVER, beams)
  ended = _finish(old, early_stopping, length_penalty, tokens_PCS, best_PC, ends_PC,
                  lengths_P + 1 - starts_P, lengths_P + 1)
  open_P = _may_improve(ended, running_PK, early_stopping, length_penalty,
                        lengths_P + 1 - starts_P, limits_P - starts_P) & ~ends_PC.all(axis=1)
  rows_B = (jnp.arange(prompts)[:, None] * beams + _pick(from_PC, kept_PK)).reshape(-1)
  # A prompt that is done stays as it is.
  is_open_B = jnp.repeat(old.open_P, beams)
  tokens_BS = _pick(tokens_PCS, kept_PK).reshape(rows_B.size, -1)
  new = jax.tree.map(
    lambda was, now: jnp.where(old.open_P.reshape(-1, *[1] * (now.ndim - 1)), now, was),
    dataclasses.replace(old, rows=None),
    dataclasses.replace(ended, rows=None, scores_PK=running_PK, open_P=open_P))
  return dataclasses.replace(new, rows=dataclasses.replace(
    rows, cache=_follow(rows.cache, rows_B),
    tokens_BS=jnp.where(is_open_B[:, None], tokens_BS, rows.tokens_BS),
    lengths_B=jnp.where(is_open_B, rows.lengths_B + 1, rows.lengths_B),
    finished_B=~jnp.repeat(new.open_P, beams)))


def _finish(old, early_stopping, length_penalty, tokens_PCS, best_PC, ends_PC, news_P, lengths_P):
  """Put the candidates that ended among the finished sequences, if they are good enough."""
  beams = old.scores_PK.shape[1]
  in_time_PC = ends_PC & (jnp.arange(best_PC.shape[1]) < beams)[None]
  scores_PC = best_PC / (news_P.astype(jnp.float32) ** length_penalty)[:, None]
  if early_stopping == 'yes':
    scores_PC += old.is_done_PK.all(axis=1, keepdims=True) * NEVER
  scores_PC += ~in_time_PC * NEVER
  lengths_PC = jnp.broadcast_to(lengths_P[:, None], best_PC.shape)

  def merge(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([old, new], axis=1)

  scores_PK, kept_PK = jax.lax.top_k(merge(old.done_scores_PK, scores_PC), beams)
  return old.replace(
    done_scores_PK=scores_PK,
    done_tokens_PKS=_pick(merge(old.done_tokens_PKS, tokens_PCS), kept_PK),
    done_lengths_PK=_pick(merge(old.done_lengths_PK, lengths_PC), kept_PK),
    is_done_PK=_pick(merge(old.is_done_PK, in_time_PC), kept_PK),
  )


def _may_improve(old, running_PK, early_stopping, length_penalty, news_P, most_P) -> jax.Array:
  """Return which prompts have a running beam that might still beat the finished ones."""
  lengths_P = news_P
  if early_stopping == 'never':
    lengths_P = jnp.where(length_penalty > 0, most_P, news_P)
  hoped_P = running_PK[:, 0] / lengths_P.astype(jnp.float32) ** length_penalty
  worst_PK = jnp.where(old.is_done_PK, old.done_scores_PK.min(axis=1, keepdims=True), NEVER)
  may_P = old.open_P & (hoped_P[:, None] > worst_PK).any(axis=1)
  return may_P & ~old.is_done_PK.all(axis=1) if early_stopping == 'yes' else may_P


def _pick(values: jax.Array, index_PK: jax.Array) -> jax.Array:
  """Return values[p, index[p, k]]."""
  return jax.vmap(lambda row, index: row[index])(values, index_PK)


def _follow(cache: Any, rows_B: jax.Array) -> Any:
  """Give every row the keys and values of another; lengths are equal within a prompt."""
  axis = 0 if isinstance(cache.keys, tuple) else 1
  take = functools.partial(jnp.take, indices=rows_B, axis=axis)
  lengths_B = cache.lengths_B
  return jax.tree.map(take, cache.replace(lengths_B=None)).replace(lengths_B=lengths_B)
