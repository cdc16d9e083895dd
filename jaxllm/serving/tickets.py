"""What is asked of the engine, and the stream that answers: `Job`, `Ticket` and the errors."""

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable

from jaxllm.generation.constraint import Constraint
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.text import TextPiece


class QueueFullError(RuntimeError):
  """As many requests wait as may wait; try again later."""


class ClosedError(RuntimeError):
  """The engine takes no requests any more."""


class FailedError(ClosedError):
  """The engine failed; the cause is attached and in the log."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A prompt to continue: one row.

  Attributes:
    prompt: token ids, at least one.
    sampling: how tokens are drawn, and how many.
    seed: of the draws, in place of the config's.
    stop: strings that end the row, across the borders of tokens.
    stop_ids: tokens that end the row, besides the model's own.
    num_top: how many of the most probable tokens come with each token.
    score_prompt: whether the first piece is the prompt itself, with its log-probabilities (None for
      the first token) and most probable tokens.
    constraint: says which tokens may come; the engine's alone from now on.
  """

  prompt: tuple[int, ...]
  sampling: SamplingConfig
  seed: int
  stop: tuple[str, ...] = ()
  stop_ids: tuple[int, ...] = ()
  num_top: int = 0
  score_prompt: bool = False
  constraint: Constraint | None = None


class Ticket:
  """The stream of one row: `async for piece in ticket`, by one listener.

  Nothing is lost while nobody listens. A listener that goes away cancels the row.

  Args of the constructor:
    job: what was asked for.
    on_cancel: tells the engine to look at its cancelled tickets.
  """

  def __init__(self, job: Job, on_cancel: Callable[[], None]):
    self.job = job
    self.cancelled = False
    self._on_cancel = on_cancel
    self._lock = threading.Lock()
    self._pieces: collections.deque[TextPiece | Exception | None] = collections.deque()
    self._ended = False
    self._wake: Callable[[], object] | None = None

  async def __aiter__(self) -> AsyncIterator[TextPiece]:
    """Yield what the row gains; the last piece has a `finish_reason`, unless it was cancelled.

    Raises:
      FailedError: the engine failed.
      ClosedError: the engine was closed before the row ended.
      ConstraintError: no token continues the form that the row is bound to.
      RuntimeError: the row failed, and no other.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    with self._lock:
      self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
    try:
      while True:
        arrived.clear()
        ended = self._ended
        while self._pieces:
          piece = self._pieces.popleft()
          if piece is None:
            return
          if isinstance(piece, Exception):
            raise piece
          yield piece
          if piece.finish_reason is not None:
            return
        if ended:
          return
        await arrived.wait()
    finally:
      with self._lock:
        self._wake = None
      self.cancel()

  def cancel(self) -> None:
    """End the row, if it has not ended: its slot is free at the next step."""
    if not self._ended and not self.cancelled:
      self.cancelled = True
      self._on_cancel()

  def put(self, piece: TextPiece | Exception | None) -> None:
    """Add a piece, an error, or None for the end of a cancelled row; for the engine alone."""
    with self._lock:
      self._pieces.append(piece)
      self._ended = not isinstance(piece, TextPiece) or piece.finish_reason is not None
      try:
        if self._wake is not None:
          self._wake()
      except RuntimeError:
        # The loop that listened has been closed.
        self.cancelled = True
