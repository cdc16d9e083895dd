"""A request to the engine, the stream that answers it, and the rows in which it is worked on."""

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation import sampling
from jaxllm.generation.constraint import Constraint
from jaxllm.generation.decode import FinishReason, Top
from jaxllm.generation.text import TextDecoder, TextPiece, text_of
from jaxllm.serving.batch import Batch, Chunk


class QueueFullError(RuntimeError):
  """As many requests wait as may wait; try again later."""


class ClosedError(RuntimeError):
  """The engine takes no requests any more."""


class FailedError(ClosedError):
  """The engine failed; the cause is attached and in the log."""


@dataclasses.dataclass(frozen=True)
class Request(sampling.Request):
  """A prompt to continue, in a row of its own.

  Attributes besides the base's, whose `stop_token_ids` come on top of the model's:
    stop: strings that end the text, across the borders of tokens.
    num_top: how many of the most probable tokens come with each token.
    score_prompt: whether the first piece is the prompt itself, with its log-probabilities (None for
      the first token) and most probable tokens.
    constraint: masks tokens; the engine's alone from now on.
    pool: whether nothing is wanted but the mean of the prompt's hidden states.
  """

  stop: tuple[str, ...] = ()
  num_top: int = 0
  score_prompt: bool = False
  constraint: Constraint | None = None
  pool: bool = False


class Pooled(NamedTuple):
  """The mean, (D,) float32, of the final hidden states of prompt number `row`."""

  row: int
  mean_D: np.ndarray  # noqa: N815


class RequestStream:
  """Text of requests that were submitted together: `async for piece in stream`, by one listener.

  Nothing is lost while nobody listens. A listener that goes away cancels the requests, which
  `on_cancel` tells the engine.
  """

  def __init__(self, num_rows: int, on_cancel: Callable[[], None]):
    self.cancelled = False
    self._on_cancel, self._num_open = on_cancel, num_rows
    self._lock = threading.Lock()
    self._pieces: collections.deque[TextPiece | Pooled | Exception] = collections.deque()
    self._wake: Callable[[], object] | None = None

  async def __aiter__(self) -> AsyncIterator[Any]:
    """Yield text as it grows, a `TextPiece`; or `Pooled` where only that was asked for.

    The last piece of a row has a `finish_reason`, unless it was cancelled.

    Raises:
      FailedError: the engine failed.
      ClosedError: the engine was closed before the last row ended.
      ConstraintError: no token continues the JSON that a row is bound to.
      RuntimeError: a row failed, and no other request.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    with self._lock:
      self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
    try:
      while True:
        arrived.clear()
        ended = not self._num_open
        while self._pieces:
          piece = self._pieces.popleft()
          if isinstance(piece, Exception):
            raise piece
          yield piece
        if ended:
          return
        await arrived.wait()
    finally:
      with self._lock:
        self._wake = None
      self.cancel()

  def cancel(self) -> None:
    """End the rows that have not ended: their slots are free at the next step."""
    if self._num_open and not self.cancelled:
      self.cancelled = True
      self._on_cancel()

  def put(self, piece: TextPiece | Pooled | Exception | None) -> None:
    """Add a piece, an error, or None for the end of a cancelled row; for the engine alone."""
    with self._lock:
      if piece is not None:
        self._pieces.append(piece)
      if not isinstance(piece, TextPiece) or piece.finish_reason is not None:
        self._num_open -= 1
      try:
        if self._wake is not None:
          self._wake()
      except RuntimeError:
        # The loop that listened has been closed.
        self.cancelled = True


class Row:
  """A prompt in work: request number `index` of a stream, checked."""

  def __init__(self, request: Request, client: str, stream: RequestStream, index: int,
               tokenizer: Tokenizer):
    self.request, self.client, self.stream = request, client, stream
    self.slot, self.prefilled, self.new_tokens = -1, 0, 0
    self.started = False
    # What is cached has no hidden states.
    self.reuse = not (request.score_prompt or request.pool)
    self._index, self._tokenizer = index, tokenizer
    self._decoder = TextDecoder(tokenizer, request.stop, request.prompt)
    self._prompt_logprobs: list[float | None] = [None]
    self._prompt_top: list[Top] = [[]] if request.num_top else []
    self._sum_D = np.zeros((), np.float32)

  def after_chunk(self, batch: Batch, chunk: Chunk) -> None:
    """Average or score the chunk where that was asked for; give all scores after the last one."""
    if self.request.pool:
      self._sum_D = self._sum_D + batch.pool(chunk)
    if not self.request.score_prompt:
      return
    prompt = self.request.prompt
    logprobs, top = batch.score(chunk, prompt, self.request.num_top)
    self._prompt_logprobs += logprobs
    self._prompt_top += top
    if chunk.end == len(prompt):
      self.stream.put(TextPiece(self._index, text_of(self._tokenizer, prompt), [*prompt],
                                self._prompt_logprobs, self._prompt_top, None))  # type: ignore[arg-type]

  def take(self, token: int, logprob: float, top: Top, is_last: bool) -> TextPiece:
    """Return what a sampled token adds."""
    self.new_tokens += 1
    if is_last and token in self.request.stop_token_ids:
      return self.stop()
    text = self._decoder.push(token)
    if is_last:
      text += self._decoder.finish()
    reason: FinishReason | None = 'length' if is_last else None
    if self._decoder.stop is not None:
      reason = 'stop'
    elif self.request.constraint is not None:
      self.request.constraint.advance(token)
    tops = [top] if self.request.num_top else []
    return TextPiece(self._index, text, [token], [logprob], tops, reason, self._decoder.stop)

  def stop(self) -> TextPiece:
    """Return the end of a row without another token."""
    return TextPiece(self._index, self._decoder.finish(), [], [], [], 'stop', self._decoder.stop)

  def pooled(self) -> Pooled:
    """Return the mean of the hidden states."""
    return Pooled(self._index, self._sum_D / np.float32(len(self.request.prompt)))
