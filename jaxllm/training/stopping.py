"""A signal or a notice of preemption to one process stops all of them after the same step."""

import contextlib
import http.client
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm import distributed

NOTICE_SECONDS = 2


class Stopper:
  """Tells the steps of a loop when to stop: all processes after the same one.

  The main thread says in `due` which step it goes on with. Once any process is asked to stop, the
  thread of each one writes down the step that its main thread has gone on with, and all stop after
  the last of these. No main thread has to come to a certain point for that, so that none waits for
  one that waits for it on a device.
  """

  def __init__(self, step: int, last: int) -> None:
    """Begin with `step` steps taken; `last` is where the loop ends by itself."""
    self.asked, self._closed, self._agreed = (threading.Event() for _ in range(3))
    self._lock, self._proposed = threading.Lock(), False
    self._last = self._stop_step = last
    self._going_on_with = min(step + 1, last)
    self._several = distributed.STATE.num_processes > 1
    self._prefix = distributed.prefix_of('stop')
    targets = [self._poll_peers] * self._several + [self._poll_notice] * bool(metadata_host())
    self._error: Exception | None = None
    self._threads = [threading.Thread(target=self._guarded, args=(target,), daemon=True)
                     for target in targets]
    for thread in self._threads:
      thread.start()

  def due(self, step: int) -> bool:
    """Return whether to stop after `step` steps, which have been taken; to be called once each.

    An error of a thread is raised here: without it, a request would go unheard.
    """
    with self._lock:
      if self._several and not self._proposed:
        self._going_on_with = min(step + 1, self._last)
        return False
    if self._several:
      self._agreed.wait()
    if self._error is not None:
      raise self._error
    return step >= self._stop_step if self._several else self.asked.is_set()

  def is_asked_alone(self) -> bool:
    """Return whether to stop where nobody else has to take the step that is waited for."""
    return self.asked.is_set() and not self._several

  def close(self) -> None:
    """End the threads; the others no longer wait for this process."""
    self._closed.set()
    for thread in self._threads:
      thread.join()

  def _guarded(self, target: Callable[[], None]) -> None:
    try:
      target()
    except Exception as error:
      self._error, self._proposed = error, True
      self._agreed.set()

  def _poll_peers(self) -> None:
    while not self._closed.is_set() and not distributed.read(f'{self._prefix}asked/'):
      if self.asked.wait(distributed.POLL_SECONDS):
        distributed.write(f'{self._prefix}asked/', '')
    with self._lock:
      self._proposed = True
      distributed.write(f'{self._prefix}step/', str(self._going_on_with))
    while not self._closed.wait(distributed.POLL_SECONDS / 10):
      steps = distributed.read(f'{self._prefix}step/')
      if len(steps) == distributed.STATE.num_processes:
        self._stop_step = max(map(int, steps.values()))
        self._agreed.set()
        return

  def _poll_notice(self) -> None:
    while not self._closed.wait(NOTICE_SECONDS):
      with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(metadata_host(), timeout=2)
        connection.request('GET', '/computeMetadata/v1/instance/preempted',
                           headers={'Metadata-Flavor': 'Google'})
        if connection.getresponse().read(16).strip() == b'TRUE':
          self.asked.set()
          distributed.say('This machine is being preempted: saving, then stopping.')
          return


def metadata_host() -> str:
  """Return the host of Google's metadata server; '' where this is not Google's machine."""
  product = pathlib.Path('/sys/class/dmi/id/product_name')
  google = product.exists() and product.read_text().startswith('Google')
  return os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal' if google else '')


@contextlib.contextmanager
def stop_requests(step: int, last: int) -> Iterator[Stopper]:
  """Turn SIGTERM, the first SIGINT and a notice of preemption into a request to stop.

  A second SIGINT interrupts at once. Arguments as of `Stopper`.
  """
  stopper = Stopper(step, last)

  def request(number: int, frame: Any) -> None:
    if stopper.asked.is_set() and number == signal.SIGINT:
      raise KeyboardInterrupt
    stopper.asked.set()
    distributed.say(f'{signal.Signals(number).name}: saving, then stopping.')

  with distributed.signals(request), contextlib.closing(stopper):
    yield stopper
