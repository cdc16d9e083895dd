"""The engine: continuous batching over a slotted cache, in a thread of its own.

Each step of the thread admits waiting requests into free slots, prefills at most `prefill_chunk`
tokens of prompts, and samples one token for every row whose prompt has been prefilled. Rows begin
and end at any step; a row's tokens depend on its own request alone, bit for bit (see `programs`).
"""

import collections
import dataclasses
import logging
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pydantic

from jaxllm.config import Config
from jaxllm.generation.constraint import ConstraintError
from jaxllm.generation.sampling import make_requests
from jaxllm.generation.text import TextPiece
from jaxllm.model import Model
from jaxllm.serving import programs, streams
from jaxllm.serving.batch import Batch, choose_row, chunk_size, pairs
from jaxllm.serving.shares import fits

# Tokens of a row where the config names no number.
DEFAULT_CONTEXT = 2048
# Seconds that a step of the device may take after the engine was told to give up.
LAST_STEP = 10.0


class EngineConfig(Config):
  """How many requests are decoded together, and how many may wait."""

  num_slots: int = pydantic.Field(default=8, gt=0)
  """Rows decoded together."""
  context_length: int | None = pydantic.Field(default=None, gt=0)
  """Tokens that a row can hold, prompt and continuation; None: the model's context up to 2048."""
  max_queue: int = pydantic.Field(default=64, ge=0)
  """Requests that may wait for a slot."""
  prefill_chunk: int = pydantic.Field(default=128, gt=0)
  """Prompt tokens prefilled between two tokens of the rows that are decoded."""
  cache_dtype: Literal['int8'] | None = None
  """How keys and values are stored; None: in the model's dtype."""


@dataclasses.dataclass(frozen=True)
class Statistics:
  """A snapshot of the engine.

  Attributes:
    num_slots: rows that there are; `busy_slots` of them are in use.
    queued: requests that wait for one.
    prompt_tokens: of all requests that have begun, those from the cache included.
    completion_tokens: sampled so far, in `decode_steps`.
    prefix_hit_tokens: prompt tokens whose keys and values were taken over from another request.
    cached_tokens: in the rows that are in use, of `capacity_tokens` in all.
    compilations: programs compiled since the engine was made; constant once it is.
    finished: reason ('stop', 'length', 'cancelled', 'error', 'embedded') -> number of requests.
  """

  num_slots: int
  busy_slots: int
  queued: int
  prompt_tokens: int
  completion_tokens: int
  prefix_hit_tokens: int
  decode_steps: int
  cached_tokens: int
  capacity_tokens: int
  compilations: int
  finished: Mapping[str, int]


class Engine:
  """Serves one model to many clients. All methods are thread-safe and, but `close`, never block.

  The constructor compiles every program, then starts the thread.

  Raises:
    ValueError: the model's context is shorter than the config's.
  """

  def __init__(self, model: Model, config: EngineConfig | None = None):
    self.config = config or EngineConfig()
    longest = model.config.max_length
    self.context_length = self.config.context_length or min(longest, DEFAULT_CONTEXT)
    if self.context_length > longest:
      raise ValueError(f'context_length={self.context_length} but the context of the model is '
                       f'{longest}; lower it')
    self._model = model
    self._batch = Batch(model, self.config.num_slots, self.context_length,
                        self.config.prefill_chunk, self.config.cache_dtype)
    # Guards the queue and the four flags; everything else belongs to the thread.
    self._changed = threading.Condition()
    self._queue: list[streams.Row] = []
    self._closing = self._abandoned = False
    self._failure: Exception | None = None
    # Free slots, the least recently used first.
    self._free = list(range(self.config.num_slots))
    self._prefilling: collections.deque[streams.Row] = collections.deque()
    self._decoding: list[streams.Row] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._finished: collections.Counter[str] = collections.Counter()
    self._thread = threading.Thread(target=self._run, name='jaxllm-engine', daemon=True)
    self._thread.start()

  def submit(self, requests: Sequence[streams.Request], client: str = '') -> streams.RequestStream:
    """Take requests, all or none.

    A free row goes to the client that has the fewest, and of its requests to those that were
    submitted with the fewest in work, the oldest first.

    Args:
      requests: to be served.
      client: whose they are. What one client left in the cache is not reused for another, and none
        gets all rows or the whole queue; '' stands for a client that may.

    Raises:
      ValueError: a request cannot be served: its prompt is empty or too long, an id is not in the
        vocabulary, or it asks for more than a row has room for.
      QueueFullError: too many requests wait.
      ClosedError: the engine was closed; or it failed (FailedError).
    """
    stream = streams.RequestStream(len(requests), self._notify)
    self._enqueue([
      streams.Row(self._checked(request), client, stream, index, self._model.tokenizer)
      for index, request in enumerate(requests)], client)
    return stream

  def statistics(self) -> Statistics:
    """Return a snapshot."""
    with self._changed:
      queued = sum(not row.stream.cancelled for row in self._queue)
      rows = [*self._prefilling, *self._decoding]
    counts = {name: self._counts[name] for name in (
      'prompt_tokens', 'completion_tokens', 'prefix_hit_tokens', 'decode_steps')}
    return Statistics(
      num_slots=self.config.num_slots, busy_slots=len(rows), queued=queued,
      cached_tokens=sum(row.prefilled + row.new_tokens for row in rows),
      capacity_tokens=self.config.num_slots * self.context_length,
      compilations=self._batch.compilations, finished=dict(self._finished), **counts)

  def close(self, timeout_seconds: float) -> None:
    """Refuse new requests, finish those that were taken, and stop the thread.

    What is not finished in time ends with a ClosedError.
    """
    with self._changed:
      self._closing = True
      self._changed.notify_all()
    self._thread.join(timeout_seconds)
    with self._changed:
      self._abandoned = True
      self._changed.notify_all()
    self._thread.join(LAST_STEP)

  def _checked(self, request: streams.Request) -> streams.Request:
    """Return a request with all tokens that end it, or raise the ValueError of `submit`."""
    if len(request.prompt) > self.context_length:
      raise ValueError(f'prompt: {len(request.prompt)} tokens, but a row holds '
                       f'{self.context_length}; shorten it')
    if not 0 <= request.num_top <= programs.NUM_TOP:
      raise ValueError(f'num_top={request.num_top}: between 0 and {programs.NUM_TOP} are given')
    stop_token_ids = dict.fromkeys((*self._model.tokenizer.eos_token_ids, *request.stop_token_ids))
    plain, = make_requests(
      self._model.config, [request.prompt], [request.sampling], [*stop_token_ids], [request.seed])
    programs.row_fields(plain, self.context_length)
    return dataclasses.replace(request, prompt=plain.prompt, stop_token_ids=plain.stop_token_ids)

  def _enqueue(self, rows: Sequence[streams.Row], client: str) -> None:
    with self._changed:
      if self._failure is not None:
        raise streams.FailedError('the engine failed; see its log') from self._failure
      if self._closing:
        raise streams.ClosedError('the engine is closed')
      waiting = [row.client for row in self._queue if not row.stream.cancelled]
      room = len(self._free) + self.config.max_queue - len(waiting)
      if not fits(len(rows), room, waiting.count(client), client):
        raise streams.QueueFullError(
          f'{len(waiting)} requests wait, and {len(rows)} more are too many '
          f'(max_queue={self.config.max_queue}); try again later')
      self._queue.extend(rows)
      self._changed.notify_all()

  def _notify(self) -> None:
    with self._changed:
      self._changed.notify_all()

  # What follows runs in the thread.

  def _run(self) -> None:
    try:
      while self._admit():
        self._prefill()
        self._decode_step()
    except Exception as error:
      # Not the message, which may repeat a prompt.
      logging.error('the engine failed: %s\n%s', type(error).__name__,
                    ''.join(traceback.format_tb(error.__traceback__)))
      with self._changed:
        self._failure = error
    finally:
      self._end_all()

  def _admit(self) -> bool:
    """Block until work arrives and admit queued requests. Returns False on shutdown."""
    with self._changed:
      self._sweep()
      while not (self._queue or self._prefilling or self._decoding or self._closing):
        self._changed.wait()
        self._sweep()
      while self._free and (row := self._next()) is not None:
        self._queue.remove(row)
        row.slot = choose_row(
          row.request.prompt, self._batch.held_by(row.client), self._free, self._batch.chunk)
        self._free.remove(row.slot)
        self._prefilling.append(row)
      return not self._abandoned and bool(self._prefilling or self._decoding)

  def _next(self) -> streams.Row | None:
    """Return the row that is admitted next; None: no client may have more."""
    working = [*self._prefilling, *self._decoding]
    held = collections.Counter(row.client for row in working)
    groups = collections.Counter(id(row.stream) for row in working)
    allowed = [row for row in self._queue
               if fits(1, len(self._free), held[row.client], row.client)]
    return min(allowed, key=lambda row: (held[row.client], groups[id(row.stream)]), default=None)

  def _sweep(self) -> None:
    """Release cancelled rows."""
    working = (*self._queue, *self._prefilling, *self._decoding)
    gone = [row for row in working if row.stream.cancelled]
    if gone:
      self._queue = [row for row in self._queue if row not in gone]
    for row in gone:
      self._release(row, 'cancelled')
      row.stream.put(None)

  def _release(self, row: streams.Row, reason: str) -> None:
    self._finished[reason] += 1
    with self._changed:
      if row in self._prefilling:
        self._prefilling.remove(row)
      if row in self._decoding:
        self._decoding.remove(row)
      if row.slot >= 0:
        self._free.append(row.slot)

  def _prefill(self) -> None:
    """Prefill prompts, the oldest first, for as many tokens as a step has."""
    left = self._batch.chunk
    while self._prefilling:
      row = self._prefilling[0]
      if not row.started:
        row.started = True
        row.prefilled = self._batch.start(row.slot, row.request, row.client, row.reuse)
        self._counts['prefix_hit_tokens'] += row.prefilled
        self._counts['prompt_tokens'] += len(row.request.prompt)
      left -= chunk_size(
        len(row.request.prompt), row.prefilled, self._batch.chunk, self._batch.small)
      if left < 0:
        return
      chunk = self._batch.prefill(row.slot, row.request.prompt, row.prefilled)
      row.prefilled = chunk.end
      row.after_chunk(self._batch, chunk)
      if row.prefilled < len(row.request.prompt):
        continue
      if row.request.pool:
        self._release(row, 'embedded')
        row.stream.put(row.pooled())
      else:
        self._batch.finish_prefill(row.slot, chunk)
        with self._changed:
          self._prefilling.popleft()
          self._decoding.append(row)

  def _decode_step(self) -> None:
    """Sample one token for every row that is decoded."""
    masks = self._masks()
    rows = list(self._decoding)
    if not rows:
      return
    # The last token of a row is never fed.
    goes_on = any(row.new_tokens + 1 < min(
      row.request.sampling.max_new_tokens, self.context_length + 1 - len(row.request.prompt))
      for row in rows)
    wants_top = any(row.request.num_top for row in rows)
    sampled = self._batch.decode_step([row.slot for row in rows], masks, wants_top, goes_on)
    self._counts['decode_steps'] += 1
    self._counts['completion_tokens'] += len(rows)
    for row in rows:
      slot = row.slot
      top = [] if sampled.top is None else pairs(
        sampled.top[0][slot], sampled.top[1][slot], row.request.num_top)
      try:
        piece = row.take(int(sampled.ids_B[slot]), float(sampled.logprobs_B[slot]), top,
                         bool(sampled.finished_B[slot]))
      except Exception as error:
        self._fail_one(row, error)
      else:
        self._give(row, piece)

  def _masks(self) -> dict[int, np.ndarray]:
    """Return the masks of constrained rows; a row whose mask allows no token ends."""
    masks = {}
    for row in list(self._decoding):
      if row.request.constraint is None:
        continue
      try:
        mask = row.request.constraint.allowed()
      except Exception as error:
        self._fail_one(row, error)
        continue
      if mask.any():
        masks[row.slot] = mask
      else:
        self._give(row, row.stop())
    return masks

  def _give(self, row: streams.Row, piece: TextPiece) -> None:
    # The slot is free before the client sees the last piece.
    if piece.finish_reason is not None:
      self._release(row, piece.finish_reason)
    row.stream.put(piece)

  def _fail_one(self, row: streams.Row, error: Exception) -> None:
    """End one row whose constraint or text failed; clients see the message of a ConstraintError."""
    failure: Exception = error
    if not isinstance(error, ConstraintError):
      failure = RuntimeError(f'this request failed on the server: {type(error).__name__}')
      failure.__cause__ = error
    self._release(row, 'error')
    row.stream.put(failure)

  def _end_all(self) -> None:
    """End all rows that are left with an error."""
    with self._changed:
      self._closing = True
      rows = [*self._queue, *self._prefilling, *self._decoding]
      self._queue.clear()
    for row in rows:
      self._release(row, 'error')
      error: Exception = streams.ClosedError(
        'the engine was closed before this request was finished')
      if self._failure is not None:
        error = streams.FailedError('the engine failed; see its log')
        error.__cause__ = self._failure
      row.stream.put(error)
