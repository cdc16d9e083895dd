"""Speculation: drafts of several tokens, checked by one pass of the model.

Drafts come from the row's own text (`lookup`) or from a smaller model. Tokens are sampled from the
model's logits with the key of their position, as without any draft; a draft only saves the pass
when it guessed that sample. So the result is, token for token, that of plain decoding with the same
seed, greedy or not, and its distribution is the same.

A draft model samples with the same keys, which makes the two agree as often as their distributions
overlap allows in practice. Letter: J drafted tokens.

Reference:
  Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv
  2211.17192. Where they accept at random, here both samples share their noise; the distribution of
  the result is the model's by construction.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.generation import decode, decode_state
from jaxllm.generation.decode import Completion
from jaxllm.generation.decode_state import DecodeState
from jaxllm.generation.sampling import SamplingConfig, make_requests
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder


class SpeculationConfig(Config):
  """How tokens are guessed."""

  num_drafted: int = pydantic.Field(default=4, gt=0)
  """Tokens that are guessed before each pass of the model."""
  longest_ngram: int = pydantic.Field(default=3, gt=0)
  """Without a draft model: look for the last place with the same tokens, up to this many."""


@dataclasses.dataclass(frozen=True)
class Draft:
  """A smaller model of the same vocabulary, and its variables."""

  model: Decoder
  variables: Any


def generate(
  model: Decoder, variables: Any, prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig], speculation: SpeculationConfig,
  draft: Draft | None = None, eos_token_ids: Sequence[int] = (), seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
) -> tuple[list[Completion], float]:
  """Continue prompts as `decode.generate` does, with fewer passes of the model.

  Args:
    speculation: how tokens are guessed.
    draft: a model that guesses; None: guesses are looked up in the row itself.

  Returns:
    (one continuation per prompt, new tokens per row and pass of the model).

  Raises:
    ValueError: as `decode.generate`, or the draft has another vocabulary or a shorter context.
  """
  if draft is not None:
    ours, theirs = model.config, draft.model.config
    if ours.vocab_size != theirs.vocab_size or ours.max_length > theirs.max_length:
      raise ValueError(
        f'the draft has a vocabulary of {theirs.vocab_size} and a context of {theirs.max_length}, '
        f'the model {ours.vocab_size} and {ours.max_length}; they need the same tokenizer, and the '
        'draft must read all that the model reads')
  requests = make_requests(model.config, prompts, sampling, eos_token_ids, seeds, bos_id)
  if not requests:
    return [], 0.0
  init = functools.partial(
    decode_state.init_decode_state, spare_positions=speculation.num_drafted + 1)
  state = init(model.config, requests, not decoder.is_unstacked(variables),
               placement=model.placement)
  draft_cache = None
  if draft is not None:
    config = draft.model.config.replace(max_length=model.config.max_length)
    draft_cache = init(config, requests, not decoder.is_unstacked(draft.variables),
                       placement=draft.model.placement).cache
  state, passes_B = _speculate(
    model, variables, state, draft.model if draft else None, draft.variables if draft else None,
    draft_cache, decode_state.prompt_bucket(state, requests), speculation)
  tokens_BS, logprobs_BS, lengths_B, passes_B = jax.device_get(
    (state.tokens_BS, state.logprobs_BS, state.lengths_B, passes_B))
  results = [decode.completion(request, tokens_BS[row], logprobs_BS[row], int(lengths_B[row]))
             for row, request in enumerate(requests)]
  new = sum(int(lengths_B[row]) - len(request.prompt) for row, request in enumerate(requests))
  return results, new / int(passes_B[: len(requests)].sum())


def lookup(state: DecodeState, num_drafted: int, longest: int) -> jax.Array:
  """Guess drafts_BJ: what followed the last earlier occurrence of the row's last tokens.

  Args:
    state: rows in the middle of decoding.
    num_drafted: J.
    longest: tokens that are compared at most; the longest match wins, then the latest.
  """
  tokens_BS, lengths_B = state.tokens_BS, state.lengths_B
  place_1S = jnp.arange(tokens_BS.shape[1])[None]
  matched_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
  same_BS = (place_1S >= 1) & (place_1S < lengths_B[:, None])
  for back in range(1, longest + 1):
    last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B[:, None] - back, 0), axis=1)
    same_BS &= (jnp.roll(tokens_BS, back, axis=1) == last_B1) & (place_1S >= back)
    matched_BS += same_BS
  start_B = jnp.argmax(matched_BS * tokens_BS.shape[1] + place_1S * (matched_BS > 0), axis=1)
  places_BJ = start_B[:, None] + jnp.arange(num_drafted)[None]
  # Beyond the end, a text that repeats itself goes on as it did.
  period_B1 = jnp.maximum(lengths_B - start_B, 1)[:, None]
  places_BJ = jnp.where(places_BJ < lengths_B[:, None], places_BJ,
                        start_B[:, None] + (places_BJ - start_B[:, None]) % period_B1)
  return jnp.take_along_axis(tokens_BS, places_BJ, axis=1)


@functools.partial(
  jax.jit, static_argnames=('model', 'draft_model', 'length', 'speculation'),
  donate_argnames='state')
def _speculate(
  model: Decoder, variables: Any, state: DecodeState, draft_model: Decoder | None,
  draft_variables: Any, draft_cache: Any, length: int, speculation: SpeculationConfig,
) -> tuple[DecodeState, jax.Array]:
  """Read the prompts and decode until all rows have ended; return the passes of each row too."""
  if draft_model is not None:
    draft_state = dataclasses.replace(state, cache=draft_cache)
    draft_state, _ = decode_state.prompt_logits(draft_model, draft_variables, draft_state, length)
    draft_cache = draft_state.cache
  state = decode_state.sample_step(
    *decode_state.prompt_logits(model, variables, state, length))

  def body(carry: tuple[DecodeState, Any, jax.Array]) -> tuple[DecodeState, Any, jax.Array]:
    state, draft_cache, passes_B = carry
    if draft_model is None:
      drafts_BJ = lookup(state, speculation.num_drafted, speculation.longest_ngram)
    else:
      drafts_BJ, draft_cache = _guess(
        draft_model, draft_variables, state, draft_cache, speculation.num_drafted)
    passes_B = passes_B + ~state.finished_B
    return _check(model, variables, state, drafts_BJ), draft_cache, passes_B

  state, _, passes_B = jax.lax.while_loop(
    lambda carry: ~carry[0].finished_B.all(), body,
    (state, draft_cache, jnp.ones_like(state.lengths_B)))
  return state, passes_B


def _guess(
  model: Decoder, variables: Any, state: DecodeState, cache: Any, num_drafted: int
) -> tuple[jax.Array, Any]:
  """Sample a draft with the draft model, with the keys and rules of the row."""
  # Its cache may hold tokens that were refused, and lack the last one or two.
  known_B = jnp.minimum(cache.lengths_B, state.lengths_B - 2)
  places_B2 = known_B[:, None] + jnp.arange(2)[None]
  counts_B = jnp.where(state.finished_B, 0, state.lengths_B - known_B)
  tokens_B2 = jnp.take_along_axis(
    state.tokens_BS, jnp.clip(places_B2, 0, state.tokens_BS.shape[1] - 1), axis=1)
  logits_BV, cache = decode_state.last_logits(
    model, variables, dataclasses.replace(cache, lengths_B=known_B), tokens_B2, counts_B)
  # Rows go on, past their ends too, in a copy that is thrown away.
  own = dataclasses.replace(
    state, cache=cache, tokens_BS=jnp.pad(state.tokens_BS, ((0, 0), (0, num_drafted))))
  drafts = []
  for index in range(num_drafted):
    own = dataclasses.replace(own, finished_B=state.finished_B)
    if index:
      own, logits_BV = decode_state.next_logits(model, variables, own)
    own = decode_state.sample_step(own, logits_BV)
    drafts.append(own.last_tokens_B)
  return jnp.stack(drafts, axis=1), own.cache


def _check(model: Decoder, variables: Any, state: DecodeState, drafts_BJ: jax.Array) -> DecodeState:
  """Sample the next tokens as long as the draft guessed the ones before."""
  num_drafted = drafts_BJ.shape[1]
  tokens_BT = jnp.concatenate([state.last_tokens_B[:, None], drafts_BJ], axis=1)
  counts_B = jnp.where(state.finished_B, 0, num_drafted + 1)
  extended: Any = model.apply(variables, tokens_BT, state.cache, counts_B, method='extend')
  hidden_BTD, cache = extended
  logits_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
  state = dataclasses.replace(state, cache=cache)
  right_B = ~state.finished_B
  for index in range(num_drafted + 1):
    # Rows whose draft was wrong wait, as finished ones do.
    ended_B = state.finished_B
    sampled = decode_state.sample_step(
      dataclasses.replace(state, finished_B=ended_B | ~right_B), logits_BTV[:, index])
    state = dataclasses.replace(sampled, finished_B=jnp.where(right_B, sampled.finished_B, ended_B))
    if index < num_drafted:
      right_B &= (state.last_tokens_B == drafts_BJ[:, index]) & ~state.finished_B
  # The cache forgets what was refused, and does not hold the newest token.
  held_B = jnp.where(counts_B > 0, state.lengths_B - 1, state.cache.lengths_B)
  return dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths_B=held_B))
