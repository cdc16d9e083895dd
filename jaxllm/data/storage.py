"""Directories that appear whole or not at all, and files that are written once.

- `locked` lets one process at a time write a directory; `staged` gives it a place to write to.
- `ShardWriter` writes ArrayRecord files; `write_file` writes a small file atomically.
- `digest` is the SHA-256 of a file, remembered by size and modification time.
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
from collections.abc import Iterator
from typing import Any

_STAGING = '.preparing-'


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
  """Hold the directory, creating it where needed, against other processes that write it.

  Raises:
    OSError: the directory cannot be written.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / '.lock', 'w')
  except OSError as error:
    raise _explained(error, directory) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # Released by the system however this process ends.
    for leftover in directory.glob(f'{_STAGING}*'):
      shutil.rmtree(leftover, ignore_errors=True)
    yield


@contextlib.contextmanager
def staged(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Give an empty directory that becomes `target` on success and vanishes on failure.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  staging = pathlib.Path(tempfile.mkdtemp(prefix=_STAGING, dir=target.parent))
  try:
    yield staging
    if target.exists():
      shutil.rmtree(target)
    os.chmod(staging, 0o755)
    os.replace(staging, target)
  except OSError as error:
    raise _explained(error, target.parent) from error
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def write_file(path: pathlib.Path, content: bytes) -> None:
  """Write a file whole or not at all."""
  handle, partial = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(partial, 0o644)
    os.replace(partial, path)
  except OSError as error:
    pathlib.Path(partial).unlink(missing_ok=True)
    raise _explained(error, path.parent) from error


def _explained(error: OSError, directory: pathlib.Path) -> OSError:
  reason = {errno.ENOSPC: 'the disk is full', errno.EFBIG: 'a file is too large'}.get(
    error.errno or 0, error.strerror or str(error))
  return OSError(error.errno or errno.EIO,
                 f'cannot write prepared data: {reason}; free space or choose another directory',
                 str(directory))


class ShardWriter:
  """Write records into `{name}-00000.array_record`, `-00001`, ..., a fixed number to each."""

  def __init__(self, directory: pathlib.Path, name: str, records_per_shard: int):
    self._directory, self._name, self._limit = directory, name, records_per_shard
    self._writer: Any = None
    self.counts: list[int] = []

  def write(self, record: bytes) -> None:
    """Append one record."""
    from array_record.python import array_record_module
    if self._writer is None or self.counts[-1] == self._limit:
      self.close()
      path = self._directory / shard_name(self._name, len(self.counts))
      self._writer = _io(array_record_module.ArrayRecordWriter, str(path), 'group_size:1')
      self.counts.append(0)
    _io(self._writer.write, record)
    self.counts[-1] += 1

  def close(self) -> None:
    """Finish the open shard."""
    writer, self._writer = self._writer, None
    if writer is not None:
      _io(writer.close)


def shard_name(name: str, index: int) -> str:
  """Return the file name of a shard."""
  return f'{name}-{index:05d}.array_record'


def _io(call: Any, *args: Any) -> Any:
  try:
    return call(*args)
  except RuntimeError as error:  # What the C++ side raises for every failure of the file system.
    code = errno.ENOSPC if 'No space left' in str(error) else errno.EIO
    raise OSError(code, os.strerror(code) if code == errno.ENOSPC else str(error)) from error


def digest(path: pathlib.Path, known: dict[str, Any]) -> str:
  """Return the SHA-256 of a file.

  Args:
    path: the file.
    known: path -> [size, mtime_ns, digest], read and updated: a file with the same size and
      modification time is not read again.
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
