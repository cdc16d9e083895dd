"""Continue prompts: `generate` returns whole continuations, `stream` yields tokens as they come.

This is the host's side of decoding, and `slots` the device's.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generation import slots as slots_lib
from jaxllm.generation.requests import Request, make_requests
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.slots import compilation_count
from jaxllm.models.decoder import Decoder

__all__ = ['Generation', 'Piece', 'compilation_count', 'generate', 'run', 'stream']

FinishReason = Literal['stop', 'length']
# The most probable tokens at one place, best first, with their log-probabilities.
Top = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Generation:
  """A finished continuation.

  Attributes:
    tokens: new ids, without the prompt and without the token that ended it.
    logprobs: natural log-probability of each under the model, before any sampling rule.
    finish_reason: 'stop' (a token of `eos_ids` came) or 'length'.
    top: the most probable tokens at each place, where they were asked for.
  """

  tokens: list[int]
  logprobs: list[float]
  finish_reason: FinishReason
  top: list[Top] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one row gained since its last piece; only the last one has a `finish_reason`."""

  row: int
  tokens: list[int]
  logprobs: list[float]
  finish_reason: FinishReason | None
  top: list[Top] = dataclasses.field(default_factory=list)


def generate(
  model: Decoder,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  eos_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
) -> list[Generation]:
  """Continue every prompt until it stops, has its number of tokens, or fills the context.

  A row gives what it would give alone: its draws depend on its seed and its own tokens. (Logits of
  differently shaped batches may differ in the last bits; a tie that close can fall either way.)
  Programs are compiled per power-of-two bucket of rows, prompt length and total length.

  Args:
    model: the decoder.
    variables: its variables; pass them through `decoder.unstack` once, which decodes faster.
    prompts: token ids, special tokens included.
    sampling: one config for all rows, or one per row. A `max_new_tokens` beyond what the context
      holds means: until the context is full.
    eos_ids: tokens that end a row.
    seeds: one per row; by default that of the row's config, plus the row's number where one config
      serves all.
    bos_id: what an empty prompt begins with.

  Returns:
    One continuation per prompt, in order.

  Raises:
    ValueError: a prompt is longer than the context, or empty while there is no `bos_id`; an id is
      not in the vocabulary; the numbers of prompts, configs and seeds differ.
  """
  results = [Generation([], [], 'length') for _ in prompts]
  steps = model.config.max_length
  for piece in stream(model, variables, prompts, sampling, eos_ids, seeds, bos_id, steps):
    result = results[piece.row]
    results[piece.row] = Generation(
      result.tokens + piece.tokens, result.logprobs + piece.logprobs,
      piece.finish_reason or result.finish_reason,
    )
  return results


def stream(
  model: Decoder,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  eos_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
  steps_per_piece: int = 1,
) -> Iterator[Piece]:
  """Yield continuations while they grow; the pieces of a row add up to what `generate` returns.

  Args:
    model: as in `generate`, like all that follow but the last.
    variables: see there.
    prompts: see there.
    sampling: see there.
    eos_ids: see there.
    seeds: see there.
    bos_id: see there.
    steps_per_piece: decoding steps between two pieces of a row.

  Raises:
    ValueError: as `generate`, at the call and not at the first piece.
  """
  requests = make_requests(model.config, prompts, sampling, eos_ids, seeds, bos_id)
  return run(model, variables, requests, steps_per_piece)


def run(
  model: Decoder, variables: Any, requests: Sequence[Request], steps_per_piece: int,
  num_top: int = 0, cancelled: Collection[int] = (), cache_dtype: Any = None,
) -> Iterator[Piece]:
  """Yield continuations of checked requests while they grow.

  Args:
    model: the decoder.
    variables: its variables.
    requests: from `make_requests`.
    steps_per_piece: decoding steps between two pieces of a row.
    num_top: how many of the most probable tokens come with each token.
    cancelled: rows that are to end; the caller may add to it between pieces. They get no more
      pieces.
    cache_dtype: of keys and values; the model's by default.
  """
  if not requests:
    return
  stacked = '0' not in variables['params']['layers']
  slots = slots_lib.lay_out(model.config, requests, stacked, num_top, cache_dtype)
  longest = max(len(request.prompt) for request in requests)
  slots = slots_lib.prefill(model, variables, slots, slots_lib.prompt_bucket(slots, longest))
  seen = [len(request.prompt) for request in requests]
  live = list(range(len(requests)))
  while True:
    host = jax.device_get((slots.tokens_BS, slots.logprobs_BS, slots.top_ids_BSA,
                           slots.top_logprobs_BSA, slots.lengths_B, slots.finished_B))
    for row in live:
      if row not in cancelled:
        yield _piece(requests[row], row, seen[row], num_top, *(leaf[row] for leaf in host))
    *_, seen, finished_B = host
    ended = [row for row in live if row in cancelled and not finished_B[row]]
    live = [row for row in live if not finished_B[row] and row not in cancelled]
    if not live:
      return
    if ended:
      slots = slots.replace(finished_B=slots.finished_B.at[np.array(ended)].set(True))
    slots = slots_lib.advance(model, variables, slots, jnp.int32(steps_per_piece))


def _piece(
  request: Request,
  row: int,
  start: int,
  num_top: int,
  tokens_S: np.ndarray,
  logprobs_S: np.ndarray,
  top_ids_SA: np.ndarray,
  top_logprobs_SA: np.ndarray,
  stop: int,
  finished: bool,
) -> Piece:
  """Cut out what a row gained after its first `start` tokens."""
  reason: FinishReason | None = None
  if finished:
    reason = 'stop' if int(tokens_S[stop - 1]) in request.stop_ids else 'length'
    stop = stop - 1 if reason == 'stop' else stop
  top = [
    [*zip(ids[:num_top].tolist(), logprobs[:num_top].tolist(), strict=True)]
    for ids, logprobs in zip(top_ids_SA[start:stop], top_logprobs_SA[start:stop], strict=True)
  ]
  return Piece(row, tokens_S[start:stop].tolist(), logprobs_S[start:stop].tolist(), reason,
               top if num_top else [])
