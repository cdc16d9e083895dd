"""Files and directories that appear whole or not at all: the only place that renames."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

_PARTIAL = '.partial-'


@contextlib.contextmanager
def replaced(target: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yield a free path for a file or directory that becomes `target` when the block is done.

  Where the block fails, nothing of it is left and `target` is as it was. A directory takes the
  place of nothing but an empty one.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  target = pathlib.Path(target)
  partial = target.with_name(_PARTIAL + uuid.uuid4().hex[:8])
  with explained(target.parent):
    target.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield partial
    with explained(target.parent):
      os.replace(partial, target)
  finally:
    if partial.is_dir():
      shutil.rmtree(partial, ignore_errors=True)
    else:
      partial.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
  """Write a file whole or not at all, text as UTF-8.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  data = content.encode() if isinstance(content, str) else content
  with replaced(path) as partial, explained(partial.parent), partial.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def make_writable(directory: Any, label: str) -> None:
  """Create a directory where it is missing, and check that it can be written.

  Raises:
    ValueError: it cannot; the message begins with `label`.
  """
  probe = directory / f'.writable-{uuid.uuid4().hex[:8]}'
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise ValueError(f'{label}{directory}: cannot write there ({error.strerror or error}); choose '
                     'another directory, or make this one writable') from error


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
  """Hold a directory, created where needed, against other processes that write into it.

  Raises:
    OSError: the directory cannot be written.
  """
  with contextlib.ExitStack() as stack:
    with explained(directory):
      directory.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(open(directory / '.lock', 'w'))
      fcntl.flock(lock, fcntl.LOCK_EX)  # The system releases it however this process ends.
    for leftover in directory.glob(f'{_PARTIAL}*'):
      shutil.rmtree(leftover, ignore_errors=True)  # Files, as they are written at once, stay.
    yield


@contextlib.contextmanager
def explained(directory: pathlib.Path) -> Iterator[None]:
  """Add the place and the fix to errors of writing."""
  try:
    yield
  except OSError as error:
    partial = [path for path in (directory, *directory.parents) if path.name.startswith(_PARTIAL)]
    place = partial[-1].parent if partial else directory
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise OSError(
      error.errno or errno.EIO, f'cannot write: {reason}; nothing half-written is left. Make room, '
      'or choose another directory', str(place)) from error


def file_digest(path: pathlib.Path, known: dict[str, Any]) -> str:
  """Return the SHA-256 of a file.

  `known`, path -> [size, mtime_ns, digest], is read and updated: a file whose size and modification
  time have not changed is not read again.
  """
  stat = path.stat()
  key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
  if known.get(key, [])[:2] != stamp:
    with path.open('rb') as file:
      known[key] = [*stamp, hashlib.file_digest(file, 'sha256').hexdigest()]
  return known[key][2]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Read a JSON object; {} where the file is absent or damaged."""
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
