"""Work done ahead by threads, results in order."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_In = TypeVar('_In')
_Out = TypeVar('_Out')


def map_ahead(
  function: Callable[[_In], _Out], items: Iterable[_In], num_threads: int | None = 2, ahead: int = 4
) -> Iterator[_Out]:
  """Yield `function(item)` for each item in order, while threads work on the next ones.

  An error in a thread is raised where its result would have come. Whoever stops iterating early
  leaves nothing behind but the calls that have begun.

  Args:
    function: called from several threads at once.
    items: read from the calling thread, at most `ahead` items before they are needed.
    num_threads: threads, at least 1; None: a few more than there are cores.
    ahead: results that are begun or waiting at any time, at least 1.
  """
  pool = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix='map_ahead')
  waiting: collections.deque[concurrent.futures.Future[_Out]] = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) >= ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
