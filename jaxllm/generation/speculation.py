"""Speculation: drafts of several tokens, checked by one pass of the model.

Drafts come from the row's own text (`lookup`) or from a smaller model. Tokens are drawn from the
model's logits with the key of their place, as `slots.draw` does without any draft; a draft only
saves the pass when it guessed what that draw gives. So the result is, token for token, that of
plain decoding with the same seed, greedy or not, and its distribution is the same.

A draft model draws with the same keys, which makes the two agree as often as their distributions
overlap allows in practice. Letter: J drafted tokens.

Reference:
  Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv
  2211.17192. Where they accept at random, here both draws share their noise; the distribution of
  the result is the model's by construction.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from jaxllm.config import Config
from jaxllm.generation import slots as slots_lib
from jaxllm.generation.decode import Generation
from jaxllm.generation.requests import make_requests
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.slots import Slots
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
  model: Decoder,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  speculation: SpeculationConfig,
  draft: Draft | None = None,
  eos_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
) -> tuple[list[Generation], float]:
  """Continue prompts as `decode.generate` does, with fewer passes of the model.

  Args:
    model: the decoder.
    variables: its variables.
    prompts: token ids.
    sampling: one config for all rows, or one per row.
    speculation: how tokens are guessed.
    draft: a model that guesses; None: guesses are looked up in the row itself.
    eos_ids: tokens that end a row.
    seeds: one per row.
    bos_id: what an empty prompt begins with.

  Returns:
    (one continuation per prompt, new tokens per row and pass of the model).

  Raises:
    ValueError: as `decode.generate`, or the draft has another vocabulary or a shorter context.
  """
  if draft is not None:
    _check_draft(model, draft)
  requests = make_requests(model.config, prompts, sampling, eos_ids, seeds, bos_id)
  if not requests:
    return [], 0.0
  spare = speculation.num_drafted + 1
  lay_out = functools.partial(slots_lib.lay_out, spare_slots=spare)
  slots = lay_out(model.config, requests, _is_stacked(variables))
  draft_slots = None
  if draft is not None:
    config = draft.model.config.replace(max_length=model.config.max_length)
    draft_slots = lay_out(config, requests, _is_stacked(draft.variables)).cache
  longest = max(len(request.prompt) for request in requests)
  slots, passes_B = _speculate(
    model, variables, slots, draft.model if draft else None, draft.variables if draft else None,
    draft_slots, slots_lib.prompt_bucket(slots, longest), speculation,
  )
  host = jax.device_get((slots.tokens_BS, slots.logprobs_BS, slots.lengths_B, passes_B))
  results = [_to_generation(request, *(leaf[row] for leaf in host[:3]))
             for row, request in enumerate(requests)]
  new = sum(int(host[2][row]) - len(request.prompt) for row, request in enumerate(requests))
  return results, new / int(host[3][: len(requests)].sum())


def compilation_count() -> int:
  """Return how many programs `generate` has compiled in this process."""
  program: Any = _speculate
  return program._cache_size()


def lookup(slots: Slots, num_drafted: int, longest: int) -> jax.Array:
  """Guess what comes next: what followed the last earlier occurrence of the row's last tokens.

  Args:
    slots: rows in the middle of decoding.
    num_drafted: J.
    longest: tokens that are compared at most; the longest match wins, then the latest.

  Returns:
    drafts_BJ int32; without a match, whatever stands at the beginning.
  """
  tokens_BS, lengths_B = slots.tokens_BS, slots.lengths_B
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
  donate_argnames='slots',
)
def _speculate(
  model: Decoder, variables: Any, slots: Slots, draft_model: Decoder | None,
  draft_variables: Any, draft_cache: Any, length: int, speculation: SpeculationConfig,
) -> tuple[Slots, jax.Array]:
  """Read the prompts and decode until all rows have ended; return the passes of each row too."""
  prompts_BT = slots.tokens_BS[:, :length]
  counts_B = jnp.where(slots.finished_B, 0, slots.prompt_lengths_B)
  logits_BV, cache = slots_lib.feed(model, variables, slots.cache, prompts_BT, counts_B)
  slots = slots_lib.draw(dataclasses.replace(slots, cache=cache), logits_BV)
  if draft_model is not None:
    _, draft_cache = slots_lib.feed(
      draft_model, draft_variables, draft_cache, prompts_BT, counts_B)

  def body(carry: tuple[Slots, Any, jax.Array]) -> tuple[Slots, Any, jax.Array]:
    slots, draft_cache, passes_B = carry
    if draft_model is None:
      drafts_BJ = lookup(slots, speculation.num_drafted, speculation.longest_ngram)
    else:
      drafts_BJ, draft_cache = _guess(
        draft_model, draft_variables, slots, draft_cache, speculation.num_drafted)
    passes_B = passes_B + ~slots.finished_B
    return _check(model, variables, slots, drafts_BJ), draft_cache, passes_B

  slots, _, passes_B = jax.lax.while_loop(
    lambda carry: ~carry[0].finished_B.all(), body,
    (slots, draft_cache, jnp.ones_like(slots.lengths_B)))
  return slots, passes_B


def _guess(
  model: Decoder, variables: Any, slots: Slots, cache: Any, num_drafted: int
) -> tuple[jax.Array, Any]:
  """Draw a draft with the draft model, with the keys and rules of the row."""
  # Its cache may hold tokens that were refused, and lack the last one or two.
  known_B = jnp.minimum(cache.lengths_B, slots.lengths_B - 2)
  places_B2 = known_B[:, None] + jnp.arange(2)[None]
  counts_B = jnp.where(slots.finished_B, 0, slots.lengths_B - known_B)
  cache = dataclasses.replace(cache, lengths_B=known_B)
  tokens_B2 = jnp.take_along_axis(
    slots.tokens_BS, jnp.clip(places_B2, 0, slots.tokens_BS.shape[1] - 1), axis=1)
  logits_BV, cache = slots_lib.feed(model, variables, cache, tokens_B2, counts_B)
  # Rows draw on, past their ends too, into a copy that is thrown away.
  own = dataclasses.replace(
    slots, cache=cache, tokens_BS=jnp.pad(slots.tokens_BS, ((0, 0), (0, num_drafted))))
  drafts = []
  for index in range(num_drafted):
    if index:
      last_B1 = jnp.take_along_axis(own.tokens_BS, own.lengths_B[:, None] - 1, axis=1)
      counts_B = jnp.where(slots.finished_B, 0, 1)
      logits_BV, cache = slots_lib.feed(model, variables, own.cache, last_B1, counts_B)
      own = dataclasses.replace(own, cache=cache)
    own = slots_lib.draw(dataclasses.replace(own, finished_B=slots.finished_B), logits_BV)
    drafts.append(jnp.take_along_axis(own.tokens_BS, own.lengths_B[:, None] - 1, axis=1)[:, 0])
  return jnp.stack(drafts, axis=1), own.cache


def _check(model: Decoder, variables: Any, slots: Slots, drafts_BJ: jax.Array) -> Slots:
  """Draw the next tokens as long as the draft guessed the ones before."""
  num_drafted = drafts_BJ.shape[1]
  last_B1 = jnp.take_along_axis(slots.tokens_BS, slots.lengths_B[:, None] - 1, axis=1)
  tokens_BT = jnp.concatenate([last_B1, drafts_BJ], axis=1)
  counts_B = jnp.where(slots.finished_B, 0, num_drafted + 1)
  extended: Any = model.apply(variables, tokens_BT, slots.cache, counts_B, method='extend')
  hidden_BTD, cache = extended
  logits_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
  slots = dataclasses.replace(slots, cache=cache)
  right_B = ~slots.finished_B
  for index in range(num_drafted + 1):
    # Rows whose draft was wrong wait, as finished ones do.
    ended_B = slots.finished_B
    drawn = slots_lib.draw(
      dataclasses.replace(slots, finished_B=ended_B | ~right_B), logits_BTV[:, index])
    slots = dataclasses.replace(drawn, finished_B=jnp.where(right_B, drawn.finished_B, ended_B))
    if index < num_drafted:
      newest_B = jnp.take_along_axis(slots.tokens_BS, slots.lengths_B[:, None] - 1, axis=1)[:, 0]
      right_B &= (newest_B == drafts_BJ[:, index]) & ~slots.finished_B
  # What was refused is forgotten: only the newest token is still to be fed.
  held_B = jnp.where(counts_B > 0, slots.lengths_B - 1, slots.cache.lengths_B)
  return dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, lengths_B=held_B))


def _check_draft(model: Decoder, draft: Draft) -> None:
  ours, theirs = model.config, draft.model.config
  if ours.vocab_size != theirs.vocab_size:
    raise ValueError(f'the draft has a vocabulary of {theirs.vocab_size} and the model one of '
                     f'{ours.vocab_size}; they need the same tokenizer')
  if theirs.max_length < ours.max_length:
    raise ValueError(f'the draft has a context of {theirs.max_length} and the model one of '
                     f'{ours.max_length}; the draft must read all that the model reads')


def _is_stacked(variables: Any) -> bool:
  return '0' not in variables['params']['layers']


def _to_generation(
  request: Any, tokens_S: np.ndarray, logprobs_S: np.ndarray, stop: int
) -> Generation:
  start = len(request.prompt)
  ended = int(tokens_S[stop - 1]) in request.stop_ids
  stop = stop - 1 if ended else stop
  return Generation(tokens_S[start:stop].tolist(), logprobs_S[start:stop].tolist(),
                    'stop' if ended else 'length')
