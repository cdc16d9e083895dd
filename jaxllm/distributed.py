"""Several processes as one run: connected, and of one mind.

- `connected`: connect the processes; where one of them fails or is lost, all end and say why.
- `agree`, `barrier`: compare what must be the same in all of them; wait for all of them.

Each process has a connection to process 0, on which it is told of errors by a thread, since its
main thread may wait for another process. The rest goes through the key-value store of JAX's
coordination service, which process 0 runs.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import logging
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed
from jax._src.clusters import ClusterEnv

from jaxllm import mistakes

SAVED_AND_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again.
POLL_SECONDS = 0.5
_WEEK = 7 * 24 * 3600 * 1000  # In milliseconds: a process may prepare records for long.
_GREETING = 'jaxllm '
# A host that is gone is noticed within half a minute.
_KEEPALIVE = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4}
STATE: Any = jax_distributed.global_state
_SERIAL = itertools.count()  # Of barriers: every process passes the same ones in the same order.
_HOSTS: list[str] = []  # Of all processes, where `connected` has connected them.


class ProcessError(RuntimeError):
  """A process of the run is missing; the message names it."""

  exit_code = 1


def prefix_of(name: str) -> str:
  """Return the prefix of what is written in one exchange, the same in all processes."""
  return f'jaxllm/{name}/{next(_SERIAL)}/'


def read(prefix: str) -> dict[int, str]:
  """Return what each process has written under a prefix."""
  found = STATE.client.key_value_dir_get(prefix)
  return {int(key.rpartition('/')[2]): value for key, value in found}


def write(prefix: str, value: str) -> None:
  """Write down a value of this process for `read`."""
  STATE.client.key_value_set(f'{prefix}{STATE.process_id}', value, allow_overwrite=True)


def _name(process: int) -> str:
  return f'process {process} ({_HOSTS[process] if _HOSTS else "unknown host"})'


@contextlib.contextmanager
def connected(
  wanted: bool, coordinator: str | None, num_processes: int | None, process_id: int | None,
  timeout_seconds: int,
) -> Iterator[None]:
  """Connect the processes of a run, and let an error in one of them end all of them.

  With several processes an exception inside is printed here and told to the others, and the process
  ends; SIGTERM ends all of them with SAVED_AND_STOPPED, except inside of `training.stopping`.

  Args:
    wanted: whether there are others at all; False does nothing.
    coordinator: HOST:PORT of process 0. Where it, `num_processes` and `process_id` are None, they
      come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or Kubernetes'
      JOB_COMPLETION_INDEX), else from SLURM, GKE or the Cloud TPU VM.
    num_processes: how many there are.
    process_id: which one this is.
    timeout_seconds: how long to wait for the others.

  Raises:
    ValueError: nothing says where the others are.
    ProcessError: some did not come; the message says which.
  """
  connections = _connect(
    coordinator, num_processes, process_id, timeout_seconds) if wanted else None
  if not connections:
    yield
    return
  if STATE.process_id:  # What process 0 says is said once.
    for logger in (logging.getLogger(), logging.getLogger('absl')):
      logger.setLevel(logging.ERROR)
  # Where process 0 is lost, a thread of JAX aborts this one: 6 seconds later, the signal's number,
  # so that `_watch` can name it before.
  libc = ctypes.CDLL(None)
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
  leaving = threading.Event()
  watch = threading.Thread(target=_watch, args=(connections, leaving), daemon=True)
  watch.start()
  try:
    with signals(_stop_now):
      yield
      barrier('the run is done')
  except BaseException as error:  # Including SystemExit: the others wait for this process.
    _leave(error, connections, leaving)
  leaving.set()
  watch.join()
  jax.distributed.shutdown()


def _stop_now(number: int, frame: Any) -> NoReturn:
  raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(SAVED_AND_STOPPED)


def _connect(
  address: str | None, number: int | None, me: int | None, timeout: int
) -> dict[int, socket.socket]:
  """Connect to the coordination service; return the connections of `_roll_call`."""
  devices = None
  if (address, number, me) == (None, None, None):
    numbers = [os.environ.get('JAX_NUM_PROCESSES', ''),
               os.environ.get('JAX_PROCESS_ID', os.environ.get('JOB_COMPLETION_INDEX', ''))]
    if all(text.isdecimal() for text in numbers):
      address, (number, me) = os.environ.get('JAX_COORDINATOR_ADDRESS'), map(int, numbers)
    else:
      address, number, me, devices = _detect(timeout)
  if address is None or number is None or me is None:
    raise ValueError(f'--coordinator={address} --num_processes={number} --process_id={me}: all '
                     'three are needed (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and '
                     'JAX_PROCESS_ID)')
  if not re.fullmatch(r'.+:\d+', address):
    raise ValueError(f'--coordinator={address}: HOST:PORT of process 0 is needed')
  if not 0 <= me < number:
    raise ValueError(f'--process_id={me} is not below --num_processes={number}')
  connections = _roll_call(address, number, me, timeout) if number > 1 else {}
  jax.distributed.initialize(address, number, me, devices, cluster_detection_method='deactivate',
                             heartbeat_timeout_seconds=60)
  return connections


def _detect(timeout: int) -> tuple[str | None, int | None, int | None, Any]:
  """Return what JAX finds out about a cluster: address of process 0, how many, which, devices."""
  try:
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
  except Exception as error:  # Those of requests, where metadata are asked for.
    raise ProcessError(f'--distributed: {mistakes.said(error)}') from error
  if None in found[:3]:
    raise ValueError(
      '--distributed: this is no Cloud TPU VM, no GKE pod and no SLURM step that srun has started; '
      'give --coordinator=HOST:PORT, --num_processes and --process_id, or leave it out where there '
      'is one process')
  return found


def _roll_call(coordinator: str, number: int, me: int, timeout: int) -> dict[int, socket.socket]:
  """Return once all processes are there; JAX aborts where one is not, and does not say which.

  The others call process 0 at the address where JAX's service will be, and it answers all at once:
  who is missing, and the names of the hosts. The connections are kept, because they end at once
  when a process does.
  """
  host, port = coordinator.rsplit(':', 1)
  deadline = time.monotonic() + timeout
  connections: dict[int, socket.socket] = {}
  answer = _gather(int(port), number, deadline, connections) if me == 0 else ''
  while not answer.startswith(_GREETING):
    if time.monotonic() > deadline:
      raise ProcessError(f'--distributed: process 0 at {coordinator} does not answer within '
                         f'{timeout} seconds (this is process {me} of {number}); look at its log, '
                         'and whether this host can reach it')
    time.sleep(0.1)
    with contextlib.suppress(OSError):
      connections[0] = socket.create_connection((host.strip('[]'), int(port)), timeout=5)
      connections[0].sendall(f'{_GREETING}{me} {number} {socket.gethostname()}\n'.encode())
      connections[0].settimeout(timeout + 5)  # It waits for others, who may have come later.
      answer = connections[0].makefile(errors='replace').readline()
  missing, _, hosts = answer.removeprefix(_GREETING).partition(';')
  if missing:
    raise ProcessError(f'--distributed: process {missing} of {number} did not come to process 0 on '
                       f'{hosts.split()[0]} within {timeout} seconds')
  _HOSTS[:] = hosts.split()
  for connection in connections.values():
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
      if hasattr(socket, option):  # Linux has them.
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
  return connections


def _gather(port: int, number: int, deadline: float, callers: dict[int, socket.socket]) -> str:
  """Wait for all processes, add their connections to `callers`, and answer them."""
  wide, hosts = socket.has_dualstack_ipv6(), {0: socket.gethostname()}
  with socket.create_server(
    ('', port), family=socket.AF_INET6 if wide else socket.AF_INET, dualstack_ipv6=wide,
    backlog=1024) as server:
    while len(hosts) < number and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      with contextlib.suppress(OSError):
        connection, _ = server.accept()
        connection.settimeout(2)
        said = connection.makefile(errors='replace').readline(300)
        if match := re.fullmatch(rf'{_GREETING}(\d+) {number} (\S+)\n', said):
          callers[int(match[1])], hosts[int(match[1])] = connection, match[2]
  missing = ', '.join(str(one) for one in range(number) if one not in hosts)
  answer = f'{_GREETING}{missing};{" ".join(hosts[one] for one in sorted(hosts))}\n'
  for connection in callers.values():
    with contextlib.suppress(OSError):
      connection.sendall(answer.encode())
  return answer


def _watch(connections: Mapping[int, socket.socket], leaving: threading.Event) -> None:
  """End this process when another one has failed, or has ended; a thread, until `leaving`."""
  selector = selectors.DefaultSelector()
  for process, connection in connections.items():
    selector.register(connection, selectors.EVENT_READ, process)
  while not leaving.is_set():
    for key, _ in selector.select(POLL_SECONDS):
      line = ''
      with contextlib.suppress(OSError):
        line = connections[key.data].makefile().readline()
      if leaving.is_set():
        return
      process, code, text = json.loads(line) if line.endswith('\n') else (
        key.data, 1, 'has ended without a word: killed, out of memory, or its host is gone')
      say(f'error: {_name(process)}: {text}')
      _end(connections if is_first() else {}, process, code, text)


def _leave(
  error: BaseException, connections: Mapping[int, socket.socket], leaving: threading.Event
) -> NoReturn:
  """Print an error, tell the others, and end this process."""
  if isinstance(error, jax.errors.JaxRuntimeError):
    # An exchange fails where a process has ended: `_watch` names that, and ends this one.
    time.sleep(3 * POLL_SECONDS)
  leaving.set()
  text, code = mistakes.sentence(error), getattr(error, 'exit_code', 2)
  if isinstance(error, SystemExit):
    text, code = 'stopped by SIGTERM; the same command goes on', SAVED_AND_STOPPED
  elif isinstance(error, KeyboardInterrupt):
    text, code = 'interrupted', 130
  elif text is None:
    text, code = f'{type(error).__name__}: {error}', 1
    traceback.print_exc()
  say(f'error: {text}')
  _end(connections, STATE.process_id, code, text)


def say(text: str) -> None:
  """Print a line on stderr."""
  with contextlib.suppress(OSError, ValueError):  # Where nobody hears it, the process ends too.
    print(text, file=sys.stderr, flush=True)


def _end(
  others: Mapping[int, socket.socket], process: int, code: int, text: str
) -> NoReturn:
  """Tell others, who tell no one unless they are process 0, why all end; then end at once."""
  for connection in others.values():
    with contextlib.suppress(OSError):
      connection.sendall((json.dumps([process, code, text]) + '\n').encode())
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  os._exit(code)


def is_first() -> bool:
  """Return whether this is the process that writes and prints."""
  return STATE.process_id == 0


def barrier(name: str) -> None:
  """Wait until all processes have come to this point, however long one of them works before it."""
  if STATE.num_processes > 1:
    STATE.client.wait_at_barrier(prefix_of(name), _WEEK)


def from_first(value: str) -> str:
  """Return the value of the first process, when it has one; those of others do not matter."""
  if STATE.num_processes == 1:
    return value
  key = prefix_of('first')
  if is_first():
    STATE.client.key_value_set(key, _GREETING + value)
  return STATE.client.blocking_key_value_get(key, _WEEK).removeprefix(_GREETING)


def from_all(value: str, combine: Callable[[list[str]], str]) -> str:
  """Return what `combine` makes, in the first process, of the values of all, in their order."""
  if STATE.num_processes == 1:
    return combine([value])
  prefix = prefix_of('all')
  STATE.client.key_value_set(f'{prefix}{STATE.process_id}', _GREETING + value)

  def get(name: Any) -> str:
    return STATE.client.blocking_key_value_get(f'{prefix}{name}', _WEEK).removeprefix(_GREETING)

  if is_first():
    values = [get(number) for number in range(STATE.num_processes)]
    STATE.client.key_value_set(f'{prefix}combined', _GREETING + combine(values))
  return get('combined')


def agree(facts: Mapping[str, Any]) -> None:
  """Compare facts of all processes; also a barrier.

  Args:
    facts: name -> value, in JSON.

  Raises:
    ValueError: they differ; the message names the facts, the values and the processes.
  """
  if STATE.num_processes == 1:
    return
  prefix = prefix_of('agree')
  text = json.dumps(facts, sort_keys=True, default=str)
  digest = hashlib.sha256(text.encode()).hexdigest()
  write(prefix, text)

  def compare(digests: list[str]) -> str:
    others = [one for one, theirs in enumerate(digests) if theirs != digest]
    if not others:
      return ''
    ours, theirs = json.loads(text), json.loads(
      STATE.client.blocking_key_value_get(f'{prefix}{others[0]}', _WEEK))
    rows = [
      f'{name} is {ours.get(name)!r} in {_name(0)} and {theirs.get(name)!r} in {_name(others[0])}'
      for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return (f'{", ".join(rows[:8])}{", ..." if rows[8:] else ""}; start all processes with the '
            f'same command, code, packages and data ({len(others)} differ from process 0)')

  verdict = from_all(digest, compare)
  barrier('all know')
  if verdict:
    raise ValueError(verdict)


@contextlib.contextmanager
def signals(handler: Callable[[int, Any], Any]) -> Iterator[None]:
  """Handle SIGTERM and SIGINT inside; outside of the main thread, which gets them, do nothing."""
  previous: dict[int, Any] = {}
  with contextlib.suppress(ValueError):
    previous = {one: signal.signal(one, handler) for one in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, before in previous.items():
      signal.signal(number, before)
