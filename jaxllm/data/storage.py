"""Directories that appear whole or not at all, and files that are written once.

- `locked` lets one process at a time write into a directory, `staged` gives it a folder to fill.
- `ShardWriter` writes ArrayRecord files; `write_file` writes a small file atomically.
- `file_digest` remembers the SHA-256 of files; `read_json` reads what may be absent or damaged.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

_STAGING = '.preparing-'


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
  """Hold a directory, created where needed, against other processes that write into it.

  Raises:
    OSError: the directory cannot be written.
  """
  with contextlib.ExitStack() as stack:
    with _explained(directory):
      directory.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(open(directory / '.lock', 'w'))
      fcntl.flock(lock, fcntl.LOCK_EX)  # The system releases it however this process ends.
    for leftover in directory.glob(f'{_STAGING}*'):
      shutil.rmtree(leftover, ignore_errors=True)
    yield


@contextlib.contextmanager
def staged(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Give an empty folder that becomes `target` on success and vanishes on failure.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  with _explained(target.parent):
    staging = pathlib.Path(tempfile.mkdtemp(prefix=_STAGING, dir=target.parent))
  try:
    yield staging
    with _explained(target.parent):
      staging.chmod(0o755)
      if target.exists():
        shutil.rmtree(target)
      os.replace(staging, target)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def write_file(path: pathlib.Path, content: bytes) -> None:
  """Write a file whole or not at all.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  with _explained(path.parent):
    handle, partial = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
      with os.fdopen(handle, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.chmod(partial, 0o644)
      os.replace(partial, path)
    except BaseException:
      pathlib.Path(partial).unlink(missing_ok=True)
      raise


class ShardWriter:
  """Writes records into `NAME-00000.array_record`, `-00001` and so on, a fixed number into each."""

  def __init__(self, directory: pathlib.Path, name: str, records_per_shard: int):
    self._directory, self._name, self._limit = directory, name, records_per_shard
    self._writer: Any = None
    self.counts: list[int] = []

  def write(self, record: bytes) -> None:
    """Append one record.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    from array_record.python import array_record_module
    if self._writer is None or self.counts[-1] == self._limit:
      self.close()
      path = self._directory / shard_name(self._name, len(self.counts))
      self._writer = self._io(array_record_module.ArrayRecordWriter, str(path), 'group_size:1')
      self.counts.append(0)
    self._io(self._writer.write, record)
    self.counts[-1] += 1

  def close(self) -> None:
    """Finish the open shard."""
    writer, self._writer = self._writer, None
    if writer is not None:
      self._io(writer.close)

  def _io(self, call: Callable[..., Any], *args: Any) -> Any:
    with _explained(self._directory):
      try:
        return call(*args)
      except RuntimeError as error:  # How the library reports every failure of the file system.
        code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
                     if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code)) from error


def shard_name(name: str, index: int) -> str:
  """Return the file name of a shard."""
  return f'{name}-{index:05d}.array_record'


@contextlib.contextmanager
def _explained(directory: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    staging = [path for path in (directory, *directory.parents) if path.name.startswith(_STAGING)]
    place = staging[-1].parent if staging else directory
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise OSError(
      error.errno or errno.EIO,
      f'cannot write prepared data: {reason}; nothing half-written is left. Make room, or prepare '
      'into another directory', str(place)) from error


def file_digest(path: pathlib.Path, known: dict[str, Any]) -> str:
  """Return the SHA-256 of a file.

  Args:
    path: the file.
    known: path -> [size, mtime_ns, digest], read and updated: a file whose size and modification
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
