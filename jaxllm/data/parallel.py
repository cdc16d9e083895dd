"""Work done ahead by threads or by processes, results in order."""

import collections
import concurrent.futures
import contextlib
import importlib
import itertools
import marshal
import os
import queue
import signal
import subprocess
import sys
import threading
import time
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


@contextlib.contextmanager
def processes(
  make: Callable[[str], Callable[[Any], Any]], setting: str, count: int | None = None,
  here: Callable[[Any], Any] | None = None,
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
  """Give a function that yields `make(setting)(item)` for each item in order, by processes.

  They are started once the items have taken a second here, and ended with the context, even where
  this process is killed. They import the module of `make` and no more, never the caller's program.

  Args:
    make: a function of a module, so that it can be found by its name.
    setting: its argument.
    count: processes, started at once; None: as many as there are cores, 1: none but this one.
      Items and results are of the types that marshal knows.
    here: what this process calls; None: it makes a function of its own.
  """
  spent, most = [0.0], min(cores(), 32) if count is None else count
  function, idle = here or make(setting), queue.SimpleQueue[subprocess.Popen[bytes]]()
  started: list[subprocess.Popen[bytes]] = []

  def start() -> None:
    code = f'import sys; sys.path[:] = {sys.path!r}; import {__name__} as p; p.serve()'
    for _ in range(most - len(started)):
      # In a session of its own, so that Ctrl-C reaches this process alone.
      started.append(subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, start_new_session=True))
      _send(started[-1].stdin, marshal.dumps((make.__module__, make.__qualname__, setting)))
      idle.put(started[-1])

  def call(item: Any) -> Any:
    process = idle.get()
    try:
      _send(process.stdin, marshal.dumps(item))
      done, result = _receive(process.stdout)
    except ValueError:  # More than marshal takes.
      done = False
    except (EOFError, BrokenPipeError):
      code = process.wait()
      why = (f'was ended by {signal.Signals(-code).name}; the system does so where memory runs out'
             if code < 0 else f'ended with {code}')
      raise ChildProcessError(f'a process that works for this one {why}') from None
    finally:
      idle.put(process)
    return result if done else function(item)  # Fails here as it did there.

  def run(items: Iterable[Any]) -> Iterator[Any]:
    remaining = iter(items)
    for item in remaining:
      if most > 1 and (count or spent[0] > 1):
        start()
        yield from map_ahead(call, itertools.chain([item], remaining), most, 2 * most)
        return
      begin = time.perf_counter()
      result = function(item)
      spent[0] += time.perf_counter() - begin
      yield result

  try:
    yield run
  finally:
    for process in started:
      process.kill()
    for process in started:
      with contextlib.suppress(BrokenPipeError), process:
        pass


def serve() -> None:
  """Work for another process until it closes the standard input, and end at once then."""
  answers, todo = os.fdopen(os.dup(1), 'wb'), queue.SimpleQueue[Any]()
  os.dup2(2, 1)  # What a library prints is no answer.

  def read() -> None:
    with contextlib.suppress(EOFError):
      while True:
        todo.put(_receive(sys.stdin.buffer))
    os._exit(0)

  threading.Thread(target=read, daemon=True).start()
  module, name, setting = todo.get()
  function = getattr(importlib.import_module(module), name)(setting)
  while True:
    try:
      answer = marshal.dumps((True, function(todo.get())))
    except Exception:
      answer = marshal.dumps((False, None))
    with contextlib.suppress(BrokenPipeError):  # Nobody waits any more; `read` ends this process.
      _send(answers, answer)


def _send(file: Any, content: bytes) -> None:
  file.write(len(content).to_bytes(8) + content)
  file.flush()


def _receive(file: Any) -> Any:
  size = int.from_bytes(start) if len(start := file.read(8)) == 8 else -1
  if len(content := file.read(size) if size >= 0 else b'') != size:
    raise EOFError
  return marshal.loads(content)  # nosec B302: from a process of our own


def grouped(
  items: Iterable[_In], size: Callable[[_In], int], limit: int
) -> Iterator[list[_In]]:
  """Yield groups of items, each ended by the one with which their sizes reach a limit."""
  group, total = [], 0
  for item in items:
    group.append(item)
    if (total := total + size(item)) >= limit:
      yield group
      group, total = [], 0
  if group:
    yield group


def cores() -> int:
  """Return how many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
