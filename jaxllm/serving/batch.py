"""The rows on the device, as the engine drives them: from the host, one call at a time."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.generation.decode import Top
from jaxllm.generation.requests import Request
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.model import Model
from jaxllm.serving import prefixes, programs

# A chunk for short prompts has this share of a whole one, but at least so many tokens.
SMALL_SHARE, LEAST_SMALL = 4, 8


class Round(NamedTuple):
  """One token of every open row, on the host.

  Attributes:
    ids_B: int32.
    logprobs_B: float32.
    finished_B: bool.
    top: (ids_BA, logprobs_BA) of the most probable tokens, where a row wants them.
  """

  ids_B: np.ndarray  # noqa: N815
  logprobs_B: np.ndarray  # noqa: N815
  finished_B: np.ndarray  # noqa: N815
  top: tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A piece of a prompt that has been read.

  Attributes:
    hidden_TD: on the device.
    start: its place in the prompt.
    count: how many of its tokens are real.
  """

  hidden_TD: jax.Array  # noqa: N815
  start: int
  count: int


class Batch:
  """Rows of a cache that many requests share; compiles all programs when it is made.

  Args of the constructor:
    model: from `loading`.
    num_slots: rows.
    context_length: tokens that each can hold.
    chunk: tokens of a whole chunk of a prompt.
    cache_dtype: of keys and values; the model's by default.
  """

  def __init__(
    self, model: Model, num_slots: int, context_length: int, chunk: int, cache_dtype: Any
  ):
    self.num_slots, self.context_length = num_slots, context_length
    self.chunk = min(chunk, context_length)
    self.small = min(max(self.chunk // SMALL_SHARE, LEAST_SMALL), self.chunk)
    self.held: list[Sequence[int]] = [()] * num_slots
    """Tokens of each row whose keys and values another prompt may take over."""
    self._config, self._model = model.config, model.decoder
    self._variables = model.unstacked
    self._slots, self._logits_BV = programs.empty_rows(
      model.config, num_slots, context_length, cache_dtype)
    before = programs.compilation_count()
    self._warm()
    self._compiled_before = before

  @property
  def compilations(self) -> int:
    """How many programs were compiled since the batch was made, its own included."""
    return programs.compilation_count() - self._compiled_before

  def size(self, length: int, fed: int) -> int:
    """Return how many tokens the next chunk of a prompt takes, padding included."""
    return prefixes.chunk_size(length, fed, self.chunk, self.small)

  def start(self, row: int, request: Request, reuse: bool) -> int:
    """Give a row to a request, and take over what the cache has of its prompt.

    Args:
      row: which one; nobody else may use it.
      request: what is asked.
      reuse: whether anything is taken over.

    Returns:
      How many tokens of the prompt need not be read.
    """
    fields = programs.row_fields(request, self.context_length)
    source, cached = row, 0
    if reuse:
      source, cached = prefixes.best(request.prompt, self.held, self.chunk, row)
    if cached and source != row:
      self._slots = programs.copy_prefix(self._slots, np.int32(source), np.int32(row))
    self.held[row] = request.prompt[:cached]
    self._slots = programs.start_row(self._slots, np.int32(row), fields, np.int32(cached))
    return cached

  def feed(self, row: int, prompt: Sequence[int], fed: int) -> Chunk:
    """Read the next chunk of a row's prompt, after its first `fed` tokens."""
    size = self.size(len(prompt), fed)
    count = min(size, len(prompt) - fed)
    self._slots, hidden_TD = programs.feed_row(
      self._model, self._variables, self._slots, np.int32(row), _padded(prompt[fed:], size),
      np.int32(count))
    if count == self.chunk:
      self.held[row] = prompt[: fed + count]
    return Chunk(hidden_TD, fed, count)

  def open(self, row: int, chunk: Chunk) -> None:
    """Predict what follows the last chunk of a row's prompt; the row takes part from now on."""
    self._slots, self._logits_BV = programs.open_row(
      self._model, self._variables, self._slots, self._logits_BV, np.int32(row), chunk.hidden_TD,
      np.int32(chunk.count - 1))

  def score(
    self, chunk: Chunk, prompt: Sequence[int], num_top: int
  ) -> tuple[list[float], list[Top]]:
    """Return log-probabilities and most probable tokens of what follows each token of a chunk."""
    targets_T = _padded(prompt[chunk.start + 1 :], len(chunk.hidden_TD))
    found = programs.score_chunk(self._model, self._variables, chunk.hidden_TD, targets_T)
    count = min(chunk.count, len(prompt) - 1 - chunk.start)
    logprobs_T, _, ids_TA, top_TA = (leaf[:count] for leaf in jax.device_get(found))
    top = [first(ids, top, num_top) for ids, top in zip(ids_TA, top_TA, strict=True)]
    return logprobs_T.tolist(), top if num_top else []

  def pool(self, chunk: Chunk) -> np.ndarray:
    """Return the sum (D,) of a chunk's hidden states."""
    return np.asarray(programs.pool_chunk(chunk.hidden_TD, np.int32(chunk.count)))

  def round(
    self, rows: Collection[int], masks: Mapping[int, np.ndarray], wants_top: bool, goes_on: bool
  ) -> Round:
    """Draw a token for rows that are open, and have the device work on the next while they travel.

    Args:
      rows: that go on; all others are closed for good.
      masks: bool (vocab_size,) for rows that are constrained.
      wants_top: whether the most probable tokens are found.
      goes_on: whether any row can take another token after this one.
    """
    live_B = np.zeros(self.num_slots, bool)
    live_B[list(rows)] = True
    top = programs.most_probable(self._logits_BV) if wants_top else None
    allowed_BV = self._logits_BV
    if masks:
      allowed_BV = programs.forbid(self._logits_BV, self._stacked(masks))
    self._slots, drawn = programs.draw_rows(self._slots, self._logits_BV, allowed_BV, live_B)
    if goes_on:
      self._slots, self._logits_BV = programs.step_rows(self._model, self._variables, self._slots)
    (ids_B, logprobs_B, finished_B), top = jax.device_get((drawn, top))
    return Round(ids_B, logprobs_B, finished_B, top)

  def _stacked(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
    allowed_BV = np.ones((self.num_slots, self._config.padded_vocab_size), bool)
    for row, mask in masks.items():
      allowed_BV[row] = False
      allowed_BV[row, : len(mask)] = mask
    return allowed_BV

  def _warm(self) -> None:
    """Compile everything, and again where arrays come back differently from how they went in."""
    count = -1
    while count != programs.compilation_count():
      count = programs.compilation_count()
      for length in {self.chunk, self.small}:
        prompt = (0,) * length
        self.start(0, Request(prompt, SamplingConfig(), 0), reuse=False)
        chunk = self.feed(0, prompt, 0)
        self.score(chunk, prompt, 1)
        self.pool(chunk)
        self.open(0, chunk)
      row = np.int32(0)
      self._slots = programs.copy_prefix(self._slots, row, row)
      mask = np.ones(self._config.vocab_size, bool)
      self.round([0], {0: mask}, wants_top=True, goes_on=True)
      self.round([], {}, wants_top=False, goes_on=True)
    self.held = [()] * self.num_slots


def first(ids_A: np.ndarray, logprobs_A: np.ndarray, count: int) -> Top:
  """Return the first `count` of the most probable tokens at one place."""
  return [*zip(ids_A[:count].tolist(), logprobs_A[:count].tolist(), strict=True)]


def _padded(tokens: Sequence[int], size: int) -> np.ndarray:
  padded_T = np.zeros(size, np.int32)
  tokens = tokens[:size]
  padded_T[: len(tokens)] = tokens
  return padded_T
