"""Several processes as one run: of one mind before the first step, told of a preemption.

- `agree`, `barrier`: compare what must be the same in all of them; wait for all of them.
- `preemption_notice`: Google's word that this machine is taken away becomes a SIGTERM.

They talk through the key-value store of JAX's coordination service, which process 0 runs.
"""

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from jax._src import distributed as jax_distributed

_NOTICE_SECONDS = 2
_WEEK = 7 * 24 * 3600 * 1000  # In milliseconds: a process may prepare records for long.
_GREETING, _HOST = 'jaxllm ', 'jaxllm/host/'
_STATE: Any = jax_distributed.global_state
_SERIAL = itertools.count()  # Of barriers: every process passes the same ones in the same order.


def _read(prefix: str) -> dict[int, str]:
  """Return what each process has written under a prefix."""
  found = _STATE.client.key_value_dir_get(prefix)
  return {int(key.rpartition('/')[2]): value for key, value in found}


def _write(prefix: str, value: str) -> None:
  _STATE.client.key_value_set(f'{prefix}{_STATE.process_id}', value, allow_overwrite=True)


def is_first() -> bool:
  """Return whether this is the process that writes and prints."""
  return _STATE.process_id == 0


def barrier(name: str) -> None:
  """Wait until all processes have come to this point, however long one of them works before it."""
  if _STATE.num_processes > 1:
    _STATE.client.wait_at_barrier(f'jaxllm/{next(_SERIAL)}/{name}', _WEEK)


def agree(facts: Mapping[str, Any]) -> None:
  """Compare facts of all processes; also a barrier.

  Args:
    facts: name -> value, in JSON.

  Raises:
    ValueError: they differ; the message names the facts, the values and the processes.
  """
  if _STATE.num_processes == 1:
    return
  prefix = f'jaxllm/agree/{next(_SERIAL)}/'
  text = json.dumps(facts, sort_keys=True, default=str)
  digest = hashlib.sha256(text.encode()).hexdigest()
  _write(f'{prefix}facts/', text)
  _write(f'{prefix}digest/', digest)
  _write(_HOST, socket.gethostname())
  barrier('facts are written')
  verdict = ''
  if is_first():
    others = [one for one, theirs in sorted(_read(f'{prefix}digest/').items()) if theirs != digest]
    if others:
      theirs = _STATE.client.blocking_key_value_get(f'{prefix}facts/{others[0]}', _WEEK)
      verdict = _differences(json.loads(text), json.loads(theirs), others)
    _STATE.client.key_value_set(f'{prefix}verdict', f'{_GREETING}{verdict}')
  verdict = _STATE.client.blocking_key_value_get(f'{prefix}verdict', _WEEK)
  barrier('all know')
  if verdict := verdict.removeprefix(_GREETING):
    raise ValueError(verdict)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], others: list[int]) -> str:
  hosts = _read(_HOST)
  here, there = (f'process {one} ({hosts.get(one, "unknown host")})' for one in (0, others[0]))
  names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
  rows = [f'{name} is {ours.get(name)!r} in {here} and {theirs.get(name)!r} in {there}'
          for name in names]
  return (f'{", ".join(rows[:8])}{", ..." if rows[8:] else ""}; start all processes with the same '
          f'command, code, packages and data ({len(others)} differ from process 0)')


@contextlib.contextmanager
def preemption_notice() -> Iterator[None]:
  """Ask Google's metadata server inside; where this machine is preempted, send itself a SIGTERM.

  Its address is GCE_METADATA_HOST, or what it always is on Google's machines; elsewhere nothing is
  asked.
  """
  product = pathlib.Path('/sys/class/dmi/id/product_name')
  google = product.exists() and product.read_text().startswith('Google')
  host = os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal' if google else '')
  closed = threading.Event()

  def poll() -> None:
    while not closed.wait(_NOTICE_SECONDS):
      with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(host, timeout=2)
        connection.request('GET', '/computeMetadata/v1/instance/preempted',
                           headers={'Metadata-Flavor': 'Google'})
        if connection.getresponse().read(16).strip() == b'TRUE':
          os.kill(os.getpid(), signal.SIGTERM)
          return

  if host:
    threading.Thread(target=poll, daemon=True).start()
  try:
    yield
  finally:
    closed.set()
