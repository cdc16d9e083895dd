"""A request to the engine, and the stream that answers it: `Request`, `RequestStream`, errors."""

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable

from jaxllm.generation import sampling
from jaxllm.generation.constraint import Constraint
from jaxllm.generation.text import TextPiece


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
  """

  stop: tuple[str, ...] = ()
  num_top: int = 0
  score_prompt: bool = False
  constraint: Constraint | None = None


class RequestStream:
  """Text of requests that were submitted together: `async for piece in stream`, by one listener.

  Nothing is lost while nobody listens. A listener that goes away cancels the requests.

  Args of the constructor:
    num_rows: number of the requests; `TextPiece.row` says to which one a piece belongs.
    on_cancel: tells the engine to look for cancelled requests.
  """

  def __init__(self, num_rows: int, on_cancel: Callable[[], None]):
    self.cancelled = False
    self._on_cancel, self._num_open = on_cancel, num_rows
    self._lock = threading.Lock()
    self._pieces: collections.deque[TextPiece | Exception] = collections.deque()
    self._wake: Callable[[], object] | None = None

  async def __aiter__(self) -> AsyncIterator[TextPiece]:
    """Yield text as it grows; the last piece of a row has a `finish_reason`, unless cancelled.

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

  def put(self, piece: TextPiece | Exception | None) -> None:
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
