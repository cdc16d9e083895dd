"""Continue prompts: `generate` returns whole continuations, `stream` yields tokens as they come.

This is the host's side of decoding, and `decode_state` the device's. `text` turns tokens into text.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxllm import sharding
from jaxllm.generation import decode_state
from jaxllm.generation.sampling import Request, SamplingConfig, make_requests
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder

FinishReason = Literal['stop', 'length']
# The most probable tokens at one position, best first, with their log-probabilities.
Top = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """What a row gained since its last piece; the text may lag behind the tokens.

  Attributes:
    row: number of the prompt.
    text: whole characters that no stop string can begin in any more; '' where only tokens are made.
    tokens: new ids, without the stop token.
    logprobs: natural log-probability of each under the model, before any logit rule.
    top: the most probable tokens at each position, where a server finds them.
    finish_reason: 'stop' (a stop string or token came), 'length', or None: more follows.
    stop: the stop string that ended the row.
  """

  row: int
  text: str
  tokens: list[int]
  logprobs: list[float]
  top: list[Top]
  finish_reason: FinishReason | None
  stop: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
  """A finished continuation.

  Attributes:
    text: without the stop string; '' from `generate`.
    tokens: new ids, those of a stop string included.
    logprobs: of each, before any logit rule.
    finish_reason: as in `TextPiece`.
    stop: as in `TextPiece`.
    score: of beam search: the sum of log-probabilities, after all rules, by the length penalty.
  """

  text: str = ''
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finish_reason: FinishReason = 'length'
  stop: str | None = None
  score: float | None = None


def generate(
  model: Decoder, variables: Any, prompts: Sequence[Sequence[int]], *args: Any, **options: Any
) -> list[Completion]:
  """Continue each prompt to its end; arguments and errors as `stream`."""
  options = {'steps_per_piece': model.config.max_length, **options}
  return collect(stream(model, variables, prompts, *args, **options), len(prompts))


def stream(
  model: Decoder, variables: Any, prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig], eos_token_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None, bos_id: int | None = None, steps_per_piece: int = 1,
  cancelled: Collection[int] = (), cache_dtype: Any = None,
) -> Iterator[TextPiece]:
  """Yield continuations while they grow; the pieces of a row add up to what `generate` returns.

  A row gives what it would give alone: its samples depend on its seed and its own tokens. (Logits
  of differently shaped batches may differ in the last bits; a tie that close can fall either way.)
  Programs are compiled per power-of-two bucket of rows, prompt length and total length.

  Args:
    variables: its variables; pass them through `decoder.unstack` once, which decodes faster.
    prompts: token ids, special tokens included.
    sampling: one config for all rows, or one per row. A `max_new_tokens` beyond what the context
      holds means: until the context is full.
    eos_token_ids: tokens that end a row.
    seeds: one per row; by default that of its config, plus the row's number where all share one.
    bos_id: what an empty prompt begins with.
    steps_per_piece: decode steps between two pieces of a row.
    cancelled: rows that are to end; the caller may add to it between pieces.
    cache_dtype: dtype of keys and values; the model's by default, int8 to quantise them.

  Raises:
    ValueError: at the call: a prompt is longer than the context, or empty while there is no
      `bos_id`; an id is not in the vocabulary; the numbers of prompts, configs and seeds differ.
  """
  requests = make_requests(model.config, prompts, sampling, eos_token_ids, seeds, bos_id)
  return _stream(model, variables, requests, steps_per_piece, cancelled, cache_dtype)


def collect(pieces: Iterable[TextPiece], rows: int) -> list[Completion]:
  """Join the pieces of each row."""
  results = [Completion() for _ in range(rows)]
  for piece in pieces:
    old = results[piece.row]
    results[piece.row] = Completion(
      old.text + piece.text, old.tokens + piece.tokens, old.logprobs + piece.logprobs,
      piece.finish_reason or 'length', piece.stop)
  return results


def completion(
  request: Request, tokens_S: np.ndarray, logprobs_S: Sequence[float] | np.ndarray, length: int,
  start: int | None = None, is_finished: bool = True, score: float | None = None,
) -> Completion:
  """Cut the continuation, or what it gained after the first `start` tokens, out of a row."""
  start = len(request.prompt) if start is None else start
  is_stopped = is_finished and int(tokens_S[length - 1]) in request.stop_token_ids
  new = slice(start, length - is_stopped)
  return Completion(
    tokens=tokens_S[new].tolist(), logprobs=[*map(float, logprobs_S[new])],
    finish_reason='stop' if is_stopped else 'length', score=score)


def _stream(
  model: Decoder, variables: Any, requests: Sequence[Request], steps_per_piece: int,
  cancelled: Collection[int], cache_dtype: Any,
) -> Iterator[TextPiece]:
  if not requests:
    return
  state = decode_state.init_decode_state(
    model.config, requests, not decoder.is_unstacked(variables), cache_dtype,
    placement=model.placement)
  state = decode_state.prefill(model, variables, state, decode_state.prompt_bucket(state, requests))
  seen = [len(request.prompt) for request in requests]
  live = list(range(len(requests)))
  while True:
    tokens_BS, logprobs_BS, lengths_B, finished_B = sharding.to_host(
      (state.tokens_BS, state.logprobs_BS, state.lengths_B, state.finished_B))
    for row in live:
      if row not in cancelled:
        length = int(lengths_B[row])
        gained = completion(requests[row], tokens_BS[row], logprobs_BS[row], length, seen[row],
                            finished_B[row])
        yield TextPiece(row, '', gained.tokens, gained.logprobs, [],
                        gained.finish_reason if finished_B[row] else None)
    seen = lengths_B
    ended = [row for row in live if row in cancelled and not finished_B[row]]
    live = [row for row in live if not finished_B[row] and row not in cancelled]
    if not live:
      return
    if ended:
      state = dataclasses.replace(
        state, finished_B=state.finished_B.at[np.array(ended)].set(True))
    state = decode_state.decode_steps(model, variables, state, jnp.int32(steps_per_piece))
