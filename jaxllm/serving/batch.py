"""The batch on the device, as the engine drives it: state between calls, one method per program.

A prompt is prefilled on a grid: whole chunks from its first token on, then small ones for a short
rest. What a whole chunk leaves in the cache is a function of the tokens up to its end alone,
computed by one program at one place of the grid. So a prompt that shares whole chunks with a row
may take over its keys and values, and goes on exactly as if it had computed them.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.generation.decode import Top
from jaxllm.generation.sampling import Request, SamplingConfig
from jaxllm.model import Model
from jaxllm.serving import programs

# A chunk for short prompts has this share of a whole one, but at least so many tokens.
SMALL_SHARE, LEAST_SMALL = 4, 8


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A piece of a prompt that has been prefilled: hidden states on the device, where it is."""

  hidden_TD: jax.Array  # noqa: N815
  start: int
  end: int


class Batch:
  """Rows of a cache that many requests share; compiles all programs when it is made.

  Each of `num_slots` rows holds `context_length` tokens; a whole chunk of a prompt has `chunk`.
  """

  def __init__(
    self, model: Model, num_slots: int, context_length: int, chunk: int, cache_dtype: Any
  ):
    self.num_slots, self.context_length = num_slots, context_length
    self.chunk = min(chunk, context_length)
    self.small = min(max(self.chunk // SMALL_SHARE, LEAST_SMALL), self.chunk)
    self.held: list[Sequence[int]] = [()] * num_slots
    """Tokens of each row whose keys and values another prompt of its client may take over."""
    self._clients = [''] * num_slots
    self._config, self._model = model.config, model.decoder
    self._variables = model.unstacked
    self._state, self._logits_BV = programs.init_state(
      self._model, num_slots, context_length, cache_dtype)
    self._compiled_before = programs.compilation_count()
    self._warm_up()

  @property
  def compilations(self) -> int:
    """How many programs were compiled since the batch was made, its own included."""
    return programs.compilation_count() - self._compiled_before

  def held_by(self, client: str) -> list[Sequence[int]]:
    """Return `held`, with nothing in rows of other clients, who must not learn from the time."""
    return [tokens if client == other else ()
            for tokens, other in zip(self.held, self._clients, strict=True)]

  def start(self, row: int, request: Request, client: str, reuse: bool) -> int:
    """Give a row to a request, reusing what is cached; return how many tokens that spares."""
    source, cached = row, 0
    if reuse:
      source, cached = best_row(
        request.prompt, self.held_by(client), self.chunk, [row, *range(self.num_slots)])
    if cached and source != row:
      self._state = programs.copy_prefix(self._state, np.int32(source), np.int32(row))
    self.held[row], self._clients[row] = request.prompt[:cached], client
    fields = programs.row_fields(request, self.context_length)
    self._state = programs.start_row(self._state, np.int32(row), fields, np.int32(cached))
    return cached

  def prefill(self, row: int, prompt: Sequence[int], start: int) -> Chunk:
    """Prefill the chunk of a row's prompt that begins at `start`."""
    size = chunk_size(len(prompt), start, self.chunk, self.small)
    end = min(start + size, len(prompt))
    self._state, hidden_TD = programs.prefill_chunk(
      self._model, self._variables, self._state, np.int32(row), _padded(prompt[start:], size),
      np.int32(end - start))
    if end - start == self.chunk:
      self.held[row] = prompt[:end]
    return Chunk(hidden_TD, start, end)

  def finish_prefill(self, row: int, chunk: Chunk) -> None:
    """Predict what follows the last chunk of a prompt; its row is decoded from now on."""
    self._state, self._logits_BV = programs.finish_prefill(
      self._model, self._variables, self._state, self._logits_BV, np.int32(row), chunk.hidden_TD,
      np.int32(chunk.end - chunk.start - 1))

  def score(
    self, chunk: Chunk, prompt: Sequence[int], num_top: int
  ) -> tuple[list[float], list[Top]]:
    """Return log-probabilities and most probable tokens of what follows each token of a chunk."""
    targets_T = _padded(prompt[chunk.start + 1 :], len(chunk.hidden_TD))
    found = programs.score_chunk(self._model, self._variables, chunk.hidden_TD, targets_T)
    count = min(chunk.end, len(prompt) - 1) - chunk.start
    logprobs_T, _, ids_TA, top_TA = (leaf[:count] for leaf in jax.device_get(found))
    top = [pairs(ids, top, num_top) for ids, top in zip(ids_TA, top_TA, strict=True)]
    return logprobs_T.tolist(), top if num_top else []

  def pool(self, chunk: Chunk) -> np.ndarray:
    """Return the sum (D,) of a chunk's hidden states."""
    return np.asarray(programs.pool_chunk(chunk.hidden_TD, np.int32(chunk.end - chunk.start)))

  def decode_step(
    self, rows: Collection[int], masks: Mapping[int, np.ndarray], wants_top: bool, goes_on: bool
  ) -> programs.Sampled:
    """Sample a token for rows, returned on the host while the device works on the next.

    Args:
      rows: that go on; all others are closed for good.
      masks: bool (vocab_size,) for rows that are constrained.
      wants_top: whether the most probable tokens are found.
      goes_on: whether any row can take another token after this one.
    """
    live_B = np.zeros(self.num_slots, bool)
    live_B[list(rows)] = True
    top = programs.top_logprobs(self._logits_BV) if wants_top else None
    masked_BV = self._logits_BV
    if masks:
      allowed_BV = np.ones((self.num_slots, self._config.padded_vocab_size), bool)
      for row, mask in masks.items():
        allowed_BV[row] = False
        allowed_BV[row, : len(mask)] = mask
      masked_BV = programs.mask_logits(self._logits_BV, allowed_BV)
    self._state, sampled = programs.sample_rows(self._state, self._logits_BV, masked_BV, live_B)
    if goes_on:
      self._state, self._logits_BV = programs.decode_step(
        self._model, self._variables, self._state)
    return jax.device_get(sampled._replace(top=top))

  def _warm_up(self) -> None:
    """Compile everything, and again where arrays come back differently from how they went in."""
    count = -1
    while count != programs.compilation_count():
      count = programs.compilation_count()
      for length in {self.chunk, self.small}:
        prompt = (0,) * length
        self.start(0, Request(prompt, SamplingConfig(), 0), '', reuse=False)
        chunk = self.prefill(0, prompt, 0)
        self.score(chunk, prompt, 1)
        self.pool(chunk)
        self.finish_prefill(0, chunk)
      row = np.int32(0)
      self._state = programs.copy_prefix(self._state, row, row)
      mask = np.ones(self._config.vocab_size, bool)
      self.decode_step([0], {0: mask}, wants_top=True, goes_on=True)
      self.decode_step([], {}, wants_top=False, goes_on=True)
    self.held = [()] * self.num_slots


def pairs(ids_A: np.ndarray, logprobs_A: np.ndarray, count: int) -> Top:
  """Return the first `count` of the most probable tokens at one place."""
  return [*zip(ids_A[:count].tolist(), logprobs_A[:count].tolist(), strict=True)]


def _padded(tokens: Sequence[int], size: int) -> np.ndarray:
  padded_T = np.zeros(size, np.int32)
  padded_T[: min(len(tokens), size)] = tokens[:size]
  return padded_T


def chunk_size(length: int, prefilled: int, chunk: int, small: int) -> int:
  """Return how many tokens of a prompt are prefilled next, padding included.

  A whole `chunk`, or `small` where that would be half empty.
  """
  on_grid = prefilled % chunk == 0
  return chunk if on_grid and 2 * (length - prefilled) > chunk else small


def shared(prompt: Sequence[int], held: Sequence[int], chunk: int) -> int:
  """Return how many tokens of a prompt whole chunks of the tokens `held` in the cache cover.

  At least one token is left over: what follows the prompt is predicted from it.
  """
  count, most = 0, min(len(prompt) - 1, len(held))
  while count + chunk <= most and prompt[count : count + chunk] == held[count : count + chunk]:
    count += chunk
  return count


def best_row(
  prompt: Sequence[int], held: Sequence[Sequence[int]], chunk: int, rows: Sequence[int]
) -> tuple[int, int]:
  """Return (row, number of tokens) of the row that holds most of a prompt; the first of equals."""
  counts = {row: shared(prompt, held[row], chunk) for row in rows}
  row = max(rows, key=lambda row: counts[row])
  return row, counts[row]


def choose_row(
  prompt: Sequence[int], held: Sequence[Sequence[int]], free: Sequence[int], chunk: int
) -> int:
  """Return the row, of those that are `free`, to which a prompt goes.

  It is the one that holds the prompt's beginning, unless more than half of what it holds would be
  lost; else the first.
  """
  row, count = best_row(prompt, held, chunk, free)
  return row if count and 2 * count >= len(held[row]) else free[0]
