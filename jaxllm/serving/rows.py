"""The host's side of a row: how far it is, and where its results go.

A `Generation` continues a prompt, an `Embedding` only reads some; a `Row` is either.
"""

import concurrent.futures
from collections.abc import Sequence

import numpy as np

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation.decode import FinishReason, Top
from jaxllm.generation.text import TextDecoder, TextPiece, text_of
from jaxllm.serving.batch import Batch, Chunk
from jaxllm.serving.streams import Request, RequestStream


class _Row:
  def __init__(self, request: Request):
    self.request = request
    self.slot, self.prefilled, self.new_tokens = -1, 0, 0
    self.started = False


class Generation(_Row):
  """A prompt that is continued: request number `index` of a stream, checked."""

  def __init__(self, request: Request, stream: RequestStream, index: int, tokenizer: Tokenizer):
    super().__init__(request)
    self.reuse = not request.score_prompt
    self.stream, self._index, self._tokenizer = stream, index, tokenizer
    self._decoder = TextDecoder(tokenizer, request.stop, request.prompt)
    self._prompt_logprobs: list[float | None] = [None]
    self._prompt_top: list[Top] = [[]] if request.num_top else []

  @property
  def is_cancelled(self) -> bool:
    """Whether the client has gone."""
    return self.stream.cancelled

  def after_chunk(self, batch: Batch, chunk: Chunk) -> None:
    """Score the chunk where that was asked for, and give the whole prompt after the last one."""
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

  def fail(self, error: Exception | None) -> None:
    """End the row early; None: because it was cancelled."""
    self.stream.put(error)


class Embedding(_Row):
  """Prompts whose hidden states are averaged to (D,) float32, one after the other in one slot."""

  reuse = False

  def __init__(
    self, future: 'concurrent.futures.Future[list[np.ndarray]]', requests: Sequence[Request]
  ):
    super().__init__(requests[0])
    self._future, self._waiting = future, [*requests[1:]]
    self._means: list[np.ndarray] = []
    self._sum_D = np.zeros((), np.float32)

  @property
  def is_cancelled(self) -> bool:
    """Whether the client has gone."""
    return self._future.cancelled()

  def after_chunk(self, batch: Batch, chunk: Chunk) -> None:
    """Add up hidden states; after the last chunk turn to the next prompt."""
    self._sum_D = self._sum_D + batch.pool(chunk)
    if chunk.end < len(self.request.prompt):
      return
    self._means.append(self._sum_D / np.float32(chunk.end))
    self._sum_D = np.zeros((), np.float32)
    if self._waiting:
      self.request = self._waiting.pop(0)
      self.prefilled, self.started = 0, False

  def deliver(self) -> None:
    """Resolve the future."""
    if self._future.set_running_or_notify_cancel():
      self._future.set_result(self._means)

  def fail(self, error: Exception | None) -> None:
    """End the row early; None: because it was cancelled."""
    if error is not None and self._future.set_running_or_notify_cancel():
      self._future.set_exception(error)


Row = Generation | Embedding
