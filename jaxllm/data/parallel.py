"""Work done ahead by threads, results in order."""

import collections
import concurrent.futures
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_In = TypeVar('_In')
_Out = TypeVar('_Out')


def map_ahead(
  function: Callable[[_In], _Out], items: Iterable[_In], num_threads: int | None = 2,
  ahead: int = 4, given_up: Callable[[], bool] = lambda: False,
) -> Iterator[_Out]:
  """Yield `function(item)` for each item in order, while threads work on the next ones.

  An error in a thread is raised where its result would have come. Whoever stops iterating early
  leaves nothing behind but the calls that have begun.

  Args:
    function: called from several threads at once.
    items: read from the calling thread, at most `ahead` items before they are needed.
    num_threads: threads, at least 1; None: a few more than there are cores.
    ahead: results that are begun or waiting at any time, at least 1.
    given_up: asked while a result is waited for; where it returns True, nothing more is yielded.
  """
  num_threads = num_threads or (os.cpu_count() or 1) + 4
  waiting: collections.deque[concurrent.futures.Future[_Out]] = collections.deque()
  todo: queue.SimpleQueue[Any] = queue.SimpleQueue()

  def work() -> None:
    while (task := todo.get()) is not None:
      future, item = task
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(function(item))
        except BaseException as error:  # For whoever asks for the result.
          future.set_exception(error)

  # Not those of an executor, which a program waits for at its end: one may hang.
  for number in range(num_threads):
    threading.Thread(target=work, name=f'map_ahead_{number}', daemon=True).start()
  remaining = iter(items)
  try:
    while True:
      for item in itertools.islice(remaining, ahead - len(waiting)):
        waiting.append(concurrent.futures.Future())
        todo.put((waiting[-1], item))
      if not waiting:
        return
      while not concurrent.futures.wait([waiting[0]], timeout=0.2).done:
        if given_up():
          return
      yield waiting.popleft().result()
  finally:
    for future in waiting:
      future.cancel()
    for _ in range(num_threads):
      todo.put(None)
