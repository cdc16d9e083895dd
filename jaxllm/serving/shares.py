"""Fair shares: what a server has of everything is divided among its clients.

A client is named by its API key; '' stands for everyone where nobody needs to be told apart.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jaxllm.serving.access import busy

T = TypeVar('T')


def fits(amount: int, free: int, held: int, client: str) -> bool:
  """Return whether a client that holds some may have more of what is free.

  A client alone gets three quarters of everything; so there is always room for another one.
  """
  return amount <= free and (not client or held + amount <= max(3 * (free - amount), 1))


class Budget:
  """So many of something; `name` is what a client is told who asks for too many."""

  def __init__(self, total: int, name: str):
    self._total, self._name = total, name
    self._held: collections.Counter[str] = collections.Counter()

  @property
  def used(self) -> int:
    """How many are taken."""
    return self._held.total()

  @contextlib.contextmanager
  def taking(self, client: str) -> Iterator[Callable[[int], None]]:
    """Yield what takes some for a client, or raises an ApiError; all are given back at the end."""
    taken = 0

    def take(amount: int) -> None:
      nonlocal taken
      if not fits(amount, self._total - self.used, self._held[client], client):
        raise busy(f'{self._name}; come back later')
      taken += amount
      self._held[client] += amount

    try:
      yield take
    finally:
      self._held[client] -= taken
      if not self._held[client]:
        del self._held[client]


class Workers:
  """Threads; next is the client who uses the fewest, and of its jobs the smallest.

  No client has all of them, so that another one need not wait for the end of a job.
  """

  def __init__(self, num_threads: int, name: str):
    self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, name)
    self._free = num_threads
    self._held: collections.Counter[str] = collections.Counter()
    # (client, size, turn to begin).
    self._waiting: list[tuple[str, int, asyncio.Future[None]]] = []

  async def run(self, client: str, size: int, work: Callable[..., T], *args: Any) -> T:
    """Return what work makes of its arguments; `size` orders the jobs that wait."""
    turn = asyncio.get_running_loop().create_future()
    job = asyncio.ensure_future(self._run(client, turn, work, *args))
    # An error of which nobody hears is none to be logged, prompt and all.
    job.add_done_callback(lambda job: job.cancelled() or job.exception())
    self._waiting.append((client, size, turn))
    self._start()
    try:
      # The thread is busy also where nobody waits for the result any more.
      return await asyncio.shield(job)
    finally:
      turn.cancel()

  async def _run(self, client: str, turn: 'asyncio.Future[None]', work: Callable[..., T],
                 *args: Any) -> T:
    await turn
    try:
      return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
    finally:
      self._free += 1
      self._held[client] -= 1
      self._start()

  def _start(self) -> None:
    """Let jobs begin while threads are free."""
    def may_begin(job: tuple[str, int, Any]) -> bool:
      return fits(1, self._free, self._held[job[0]], job[0])

    while ready := [*filter(may_begin, self._waiting)]:
      job = min(ready, key=lambda job: (self._held[job[0]], job[1]))
      self._waiting.remove(job)
      if not job[2].done():
        self._free -= 1
        self._held[job[0]] += 1
        job[2].set_result(None)

  def close(self) -> None:
    """Let the threads go."""
    self._pool.shutdown(wait=False, cancel_futures=True)
