"""What the host knows about a row: how far it is, and what goes to whoever waits for it.

`Row` is what all rows have in common, `Generation` continues a prompt, `Embedding` only reads.
"""

import abc
import concurrent.futures
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation.decode import FinishReason, Top
from jaxllm.generation.requests import Request
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.text import TextDecoder, TextPiece, text_of
from jaxllm.serving.batch import Batch, Chunk
from jaxllm.serving.tickets import Ticket


class Row(abc.ABC):
  """A request that waits, or has a slot.

  Args of the constructor:
    request: what is read, and how it goes on.
    reuse: whether keys and values of the prompt may be taken over instead of computed.
  """

  def __init__(self, request: Request, reuse: bool):
    self.request, self.reuse = request, reuse
    self.slot, self.fed, self.new_tokens = -1, 0, 0
    self.started = False

  @property
  @abc.abstractmethod
  def is_cancelled(self) -> bool:
    """Whether nobody waits for it any more."""

  @abc.abstractmethod
  def after_chunk(self, batch: Batch, chunk: Chunk) -> None:
    """Use a piece of the prompt that has been read."""

  @abc.abstractmethod
  def fail(self, error: Exception | None) -> None:
    """Tell whoever waits that nothing more comes; None: because it was cancelled."""


class Generation(Row):
  """A prompt that is continued.

  Args of the constructor:
    ticket: where pieces go.
    request: its job, checked, with all tokens that end it.
    tokenizer: gives the text.
  """

  def __init__(self, ticket: Ticket, request: Request, tokenizer: Tokenizer):
    super().__init__(request, reuse=not ticket.job.score_prompt)
    self.ticket, self.job = ticket, ticket.job
    self._tokenizer = tokenizer
    self._decoder = TextDecoder(tokenizer, ticket.job.stop, request.prompt)
    self._logprobs: list[Any] = [None]
    self._top: list[Top] = [[]] if ticket.job.num_top else []

  @property
  def is_cancelled(self) -> bool:  # noqa: D102
    return self.ticket.cancelled

  def after_chunk(self, batch: Batch, chunk: Chunk) -> None:
    """Score the chunk where that was asked for, and give the whole prompt after the last one."""
    if not self.job.score_prompt:
      return
    prompt = self.request.prompt
    logprobs, top = batch.score(chunk, prompt, self.job.num_top)
    self._logprobs += logprobs
    self._top += top
    if chunk.start + chunk.count == len(prompt):
      text = text_of(self._tokenizer, prompt)
      self.ticket.put(TextPiece(0, text, [*prompt], self._logprobs, self._top, None))

  def mask(self) -> np.ndarray | None:
    """Return which tokens may come next; None: all."""
    return None if self.job.constraint is None else self.job.constraint.allowed()

  def take(self, token: int, logprob: float, top: Top, is_last: bool) -> TextPiece:
    """Return what the token that was drawn adds."""
    self.new_tokens += 1
    if is_last and token in self.request.stop_ids:
      return self.stop()
    text = self._decoder.push(token)
    if is_last:
      text += self._decoder.finish()
    reason: FinishReason | None = 'length' if is_last else None
    if self._decoder.stop is not None:
      reason = 'stop'
    elif self.job.constraint is not None:
      self.job.constraint.advance(token)
    tops = [top] if self.job.num_top else []
    return TextPiece(0, text, [token], [logprob], tops, reason, self._decoder.stop)

  def stop(self) -> TextPiece:
    """Return the end of a row without another token."""
    return TextPiece(0, self._decoder.finish(), [], [], [], 'stop', self._decoder.stop)

  def fail(self, error: Exception | None) -> None:  # noqa: D102
    self.ticket.put(error)


class Embedding(Row):
  """Prompts whose hidden states are averaged, one after the other in one slot.

  Args of the constructor:
    future: of a list of (D,) float32 arrays, one per prompt.
    prompts: checked token ids.
  """

  def __init__(
    self, future: 'concurrent.futures.Future[list[np.ndarray]]', prompts: Sequence[tuple[int, ...]]
  ):
    super().__init__(Request(prompts[0], SamplingConfig(max_new_tokens=1), 0), reuse=False)
    self._future, self._waiting = future, [*prompts[1:]]
    self._means: list[np.ndarray] = []
    self._sum_D = np.zeros((), np.float32)

  @property
  def is_cancelled(self) -> bool:  # noqa: D102
    return self._future.cancelled()

  def after_chunk(self, batch: Batch, chunk: Chunk) -> None:
    """Add up hidden states; after the last chunk turn to the next prompt."""
    self._sum_D = self._sum_D + batch.pool(chunk)
    length = len(self.request.prompt)
    if chunk.start + chunk.count < length:
      return
    self._means.append(self._sum_D / np.float32(length))
    self._sum_D = np.zeros((), np.float32)
    if self._waiting:
      self.request = Request(self._waiting.pop(0), self.request.sampling, 0)
      self.fed, self.started = 0, False

  def deliver(self) -> None:
    """Give all means to whoever waits."""
    if self._future.set_running_or_notify_cancel():
      self._future.set_result(self._means)

  def fail(self, error: Exception | None) -> None:  # noqa: D102
    if error is not None and self._future.set_running_or_notify_cancel():
      self._future.set_exception(error)
