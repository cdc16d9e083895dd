"""The engine: continuous batching over a slotted cache, in a thread of its own.

Each turn of the thread admits what waits into free slots, reads at most `prefill_chunk` tokens of
prompts, and draws one token for every row whose prompt has been read. Rows begin and end at any
turn; a row's tokens depend on its own job alone, bit for bit (see `programs`).
"""

import collections
import concurrent.futures
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
from jaxllm.generation.requests import Request, make_requests
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.text import TextPiece
from jaxllm.model import Model
from jaxllm.serving import prefixes, programs
from jaxllm.serving.batch import Batch, Chunk, first
from jaxllm.serving.rows import Embedding, Generation, Row
from jaxllm.serving.tickets import ClosedError, FailedError, Job, QueueFullError, Ticket

__all__ = [
  'ClosedError', 'Engine', 'EngineConfig', 'FailedError', 'Job', 'QueueFullError', 'Statistics',
  'Ticket',
]

# Cache slots per row where the config names no number.
DEFAULT_CONTEXT = 2048
# Seconds that a step of the device may take after the engine was told to give up.
LAST_STEP = 10.0


class EngineConfig(Config):
  """How many requests are decoded together, and how many may wait."""

  num_slots: int = pydantic.Field(default=8, gt=0)
  """Rows decoded together."""
  context_length: int | None = pydantic.Field(default=None, gt=0)
  """Tokens that a row can hold, prompt and continuation; None: the model's context, at most
  2048."""
  max_queue: int = pydantic.Field(default=64, ge=0)
  """Requests that may wait for a slot."""
  prefill_chunk: int = pydantic.Field(default=128, gt=0)
  """Prompt tokens read between two tokens of the rows that are under way."""
  cache_dtype: Literal['int8'] | None = None
  """How keys and values are stored; None: in the model's dtype."""


@dataclasses.dataclass(frozen=True)
class Statistics:
  """A snapshot of the engine.

  Attributes:
    num_slots: rows that there are.
    busy_slots: rows that are in use.
    queued: requests that wait for one.
    prompt_tokens: of all requests that have begun, those from the cache included.
    completion_tokens: drawn.
    prefix_hit_tokens: prompt tokens whose keys and values were taken over from another request.
    decode_steps: rounds in which every open row got a token.
    cached_tokens: in the rows that are in use.
    capacity_tokens: that all rows can hold.
    compilations: programs compiled since the engine was made; constant once it is.
    finished: how many requests ended for which reason: 'stop', 'length', 'cancelled', 'error',
      'embedded'.
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
  """Serves one model to many listeners. All methods are thread-safe and, but `close`, never block.

  The constructor compiles every program, then starts the thread.

  Args of the constructor:
    model: from `loading`.
    config: sizes.

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
    self._queue: collections.deque[Row] = collections.deque()
    self._closing = self._abandoned = False
    self._failure: Exception | None = None
    # Slots that are free, the one that has been for longest first.
    self._free = list(range(self.config.num_slots))
    self._reading: collections.deque[Row] = collections.deque()
    self._open: list[Generation] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._finished: collections.Counter[str] = collections.Counter()
    self._thread = threading.Thread(target=self._run, name='jaxllm-engine', daemon=True)
    self._thread.start()

  def submit(self, jobs: Sequence[Job]) -> list[Ticket]:
    """Take jobs, all or none; they are served in the order in which they come.

    Returns:
      One ticket per job.

    Raises:
      ValueError: a job cannot be served: its prompt is empty or too long, an id is not in the
        vocabulary, or it asks for more than a row has room for.
      QueueFullError: too many requests wait.
      ClosedError: the engine was closed; or it failed (FailedError).
    """
    requests = [self._check(job) for job in jobs]
    tickets = [Ticket(job, self._notify) for job in jobs]
    self._enqueue([Generation(ticket, request, self._model.tokenizer)
                   for ticket, request in zip(tickets, requests, strict=True)])
    return tickets

  def embed(
    self, prompts: Sequence[Sequence[int]]
  ) -> 'concurrent.futures.Future[list[np.ndarray]]':
    """Average the final hidden states of each prompt; all of them wait as one request.

    Args:
      prompts: token ids, at least one prompt.

    Returns:
      A future of one (D,) float32 array per prompt. Cancelling it frees its slot.

    Raises:
      ValueError: as `submit`; or there is no prompt.
      QueueFullError: too many requests wait.
      ClosedError: as `submit`.
    """
    if not prompts:
      raise ValueError('prompts: none given; give at least one')
    jobs = [Job(tuple(prompt), SamplingConfig(max_new_tokens=1), 0) for prompt in prompts]
    future: concurrent.futures.Future[list[np.ndarray]] = concurrent.futures.Future()
    self._enqueue([Embedding(future, [self._check(job).prompt for job in jobs])])
    return future

  def statistics(self) -> Statistics:
    """Return a snapshot."""
    with self._changed:
      queued = sum(not row.is_cancelled for row in self._queue)
      rows = [*self._reading, *self._open]
    counts = {name: self._counts[name] for name in (
      'prompt_tokens', 'completion_tokens', 'prefix_hit_tokens', 'decode_steps')}
    return Statistics(
      num_slots=self.config.num_slots, busy_slots=len(rows), queued=queued,
      cached_tokens=sum(row.fed + row.new_tokens for row in rows),
      capacity_tokens=self.config.num_slots * self.context_length,
      compilations=self._batch.compilations, finished=dict(self._finished), **counts,
    )

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

  def _check(self, job: Job) -> Request:
    if not job.prompt:
      raise ValueError('prompt: no tokens; give at least one')
    if len(job.prompt) > self.context_length:
      raise ValueError(f'prompt: {len(job.prompt)} tokens, but a row holds {self.context_length}; '
                       'shorten it')
    if not 0 <= job.num_top <= programs.NUM_TOP:
      raise ValueError(f'num_top={job.num_top}: between 0 and {programs.NUM_TOP} are given')
    if '' in job.stop:
      raise ValueError("stop: '' would end the text before it begins; leave it out")
    stop_ids = tuple(dict.fromkeys((*self._model.tokenizer.eos_token_ids, *job.stop_ids)))
    request, = make_requests(self._model.config, [job.prompt], [job.sampling], stop_ids, [job.seed])
    programs.row_fields(request, self.context_length)
    return request

  def _enqueue(self, rows: Sequence[Row]) -> None:
    with self._changed:
      if self._failure is not None:
        raise FailedError('the engine failed; see its log') from self._failure
      if self._closing:
        raise ClosedError('the engine is closed')
      waiting = sum(not row.is_cancelled for row in self._queue)
      room = len(self._free) + self.config.max_queue - waiting
      if len(rows) > room:
        raise QueueFullError(f'{waiting} requests wait, and {len(rows)} more are too many '
                             f'(max_queue={self.config.max_queue}); try again later')
      self._queue.extend(rows)
      self._changed.notify_all()

  def _notify(self) -> None:
    with self._changed:
      self._changed.notify_all()

  # What follows runs in the thread.

  def _run(self) -> None:
    try:
      while self._wait():
        self._read()
        self._decode()
    except Exception as error:
      # Not the message, which may repeat a prompt.
      logging.error('the engine failed: %s\n%s', type(error).__name__,
                    ''.join(traceback.format_tb(error.__traceback__)))
      with self._changed:
        self._failure = error
    finally:
      self._end_all()

  def _wait(self) -> bool:
    """Wait for something to do and admit it; return whether the thread goes on."""
    with self._changed:
      self._sweep()
      while not (self._queue or self._reading or self._open or self._closing):
        self._changed.wait()
        self._sweep()
      while self._queue and self._free:
        row = self._queue.popleft()
        row.slot = prefixes.choose(
          row.request.prompt, self._batch.held, self._free, self._batch.chunk)
        self._free.remove(row.slot)
        self._reading.append(row)
      return not self._abandoned and bool(self._reading or self._open)

  def _sweep(self) -> None:
    """Let go of rows that were cancelled."""
    gone = [row for row in (*self._queue, *self._reading, *self._open) if row.is_cancelled]
    if gone:
      self._queue = collections.deque(row for row in self._queue if row not in gone)
    for row in gone:
      self._release(row, 'cancelled')
      row.fail(None)

  def _release(self, row: Row, reason: str) -> None:
    self._finished[reason] += 1
    with self._changed:
      if row in self._reading:
        self._reading.remove(row)
      if row in self._open:
        self._open.remove(row)
      if row.slot >= 0:
        self._free.append(row.slot)

  def _read(self) -> None:
    """Read prompts, the oldest first, for as many tokens as a turn has."""
    left = self._batch.chunk
    while self._reading:
      row = self._reading[0]
      if not row.started:
        row.started = True
        row.fed = self._batch.start(row.slot, row.request, row.reuse)
        self._counts['prefix_hit_tokens'] += row.fed
        self._counts['prompt_tokens'] += len(row.request.prompt)
      size = self._batch.size(len(row.request.prompt), row.fed)
      if size > left:
        return
      left -= size
      chunk = self._batch.feed(row.slot, row.request.prompt, row.fed)
      row.fed += chunk.count
      row.after_chunk(self._batch, chunk)
      if not row.started:
        # It has turned to its next prompt: those that wait come first.
        self._reading.rotate(-1)
      elif row.fed == len(row.request.prompt):
        self._after_reading(row, chunk)

  def _after_reading(self, row: Row, chunk: Chunk) -> None:
    if isinstance(row, Embedding):
      self._release(row, 'embedded')
      row.deliver()
    elif isinstance(row, Generation):
      self._batch.open(row.slot, chunk)
      with self._changed:
        self._reading.popleft()
        self._open.append(row)

  def _decode(self) -> None:
    """Draw one token for every open row."""
    masks = self._masks()
    rows = list(self._open)
    if not rows:
      return
    goes_on = any(row.fed + row.new_tokens < self._limit(row) - 1 for row in rows)
    wants_top = any(row.job.num_top for row in rows)
    drawn = self._batch.round([row.slot for row in rows], masks, wants_top, goes_on)
    self._counts['decode_steps'] += 1
    self._counts['completion_tokens'] += len(rows)
    for row in rows:
      slot, top = row.slot, []
      if drawn.top is not None:
        ids_BA, logprobs_BA = drawn.top
        top = first(ids_BA[slot], logprobs_BA[slot], row.job.num_top)
      try:
        piece = row.take(int(drawn.ids_B[slot]), float(drawn.logprobs_B[slot]), top,
                         bool(drawn.finished_B[slot]))
      except Exception as error:
        self._fail_one(row, error)
      else:
        self._give(row, piece)

  def _masks(self) -> dict[int, np.ndarray]:
    """Return what constrained rows allow; a row that allows nothing ends."""
    masks = {}
    for row in list(self._open):
      try:
        mask = row.mask()
      except Exception as error:
        self._fail_one(row, error)
        continue
      if mask is not None and not mask.any():
        self._give(row, row.stop())
      elif mask is not None:
        masks[row.slot] = mask
    return masks

  def _give(self, row: Generation, piece: TextPiece) -> None:
    # Whoever sees the last piece may count on a free slot.
    if piece.finish_reason is not None:
      self._release(row, piece.finish_reason)
    row.ticket.put(piece)

  def _limit(self, row: Row) -> int:
    asked = len(row.request.prompt) + row.request.sampling.max_new_tokens
    return min(asked, self.context_length + 1)

  def _fail_one(self, row: Row, error: Exception) -> None:
    """End one row whose constraint or text failed; only a `ConstraintError` is told as it is."""
    failure: Exception = error
    if not isinstance(error, ConstraintError):
      failure = RuntimeError(f'this request failed on the server: {type(error).__name__}')
      failure.__cause__ = error
    self._release(row, 'error')
    row.fail(failure)

  def _end_all(self) -> None:
    """Tell everyone who still waits that nothing more comes."""
    with self._changed:
      self._closing = True
      rows = [*self._queue, *self._reading, *self._open]
      self._queue.clear()
    for row in rows:
      error: Exception = ClosedError('the engine was closed before this request was finished')
      if self._failure is not None:
        error = FailedError('the engine failed; see its log')
        error.__cause__ = self._failure
      self._release(row, 'error')
      row.fail(error)
