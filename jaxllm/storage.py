"""Paths anywhere, and files and directories that appear whole or not at all.

A path is local (or mounted), or `gs://BUCKET/...` or `s3://BUCKET/...`. Buckets cannot rename: each
file is one whole object there, and a directory counts once its last file, a marker, is written.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from jaxllm import mistakes

_PARTIAL = '.partial-'
# Scheme of a bucket -> (the package that reads it, the extra that installs that).
_BUCKETS = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}
CACHE = '~/.cache/jaxllm/buckets'
# What tells one content of a file elsewhere from another; a time does so for files of one name.
_CHECKSUMS = ('md5Hash', 'Content-MD5', 'ETag', 'blob_id', 'etag')
_TIMES = ('size', 'mtime', 'created', 'Last-Modified', 'last_modified', 'modify')
# Files by which a directory counts as complete.
MARKERS = ('commit_success.txt', 'config.json', 'adapter_config.json', 'manifest.json')


def path(location: str | os.PathLike[str], label: str = '') -> pathlib.Path:
  """Return a path, with the methods of pathlib wherever it leads.

  Raises:
    ValueError: another scheme than `gs` and `s3`, or no bucket; the message begins with `label`.
    ImportError: the package that reads such buckets is not installed.
  """
  text = os.fspath(location)
  if not re.match(r'[A-Za-z][\w+.-]*:(/|$)|(gs|s3):', text):
    return pathlib.Path(text).expanduser()
  scheme = text.partition(':')[0]
  if not re.match(r'(gs|s3)://[^/]', text):
    raise ValueError(f'{label}{text}: a path is local, gs://BUCKET/... or s3://BUCKET/...; write '
                     'it so, or mount what else there is')
  package, extra = _BUCKETS[scheme]
  if importlib.util.find_spec(package) is None:
    raise ImportError(f"{label}{text} needs the package {package}: pip install 'jaxllm[{extra}]'")
  import fsspec
  from etils import epath

  # Others write there too, so that listings may not be kept; and what fails is raised, not logged.
  fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False
  logging.getLogger(package).setLevel(logging.CRITICAL)
  return cast(pathlib.Path, epath.Path(text.rstrip('/')))


def is_remote(location: str | os.PathLike[str]) -> bool:
  """Return whether a path leads into a bucket."""
  return os.fspath(location).partition('://')[0] in _BUCKETS


class Remote(NamedTuple):
  """A file elsewhere: where in what was listed ('': it is that), location, size and version."""

  name: str
  location: str
  size: int | None
  version: str


def listed(location: str | os.PathLike[str], label: str = '') -> pathlib.Path | list[Remote]:
  """Return a path on this machine, or the files elsewhere that a location stands for.

  Those are a file, all below a directory, or what matches wildcards, wherever fsspec reads.

  Raises:
    OSError: the place cannot be read, or nothing is there.
    ImportError: the package that reads it is not installed.
  """
  text = os.fspath(location).rstrip('/')
  scheme, mark, _ = text.partition('://')
  if not mark:
    return path(location, label)
  import fsspec
  if scheme in _BUCKETS or scheme not in fsspec.available_protocols():
    path(location, label)  # It sets up the client of a bucket, and refuses all others.
  try:
    bucket, key = fsspec.core.url_to_fs(text)
  except ImportError as error:
    raise ImportError(f'{label}{text}: {error}') from None
  if scheme in ('file', 'local'):
    return pathlib.Path(key)
  root = _root(key)
  with explained(text):
    if root != key:
      found = bucket.glob(key, detail=True)
    else:
      found = {key: bucket.info(key)}
      found = found if found[key]['type'] == 'file' else bucket.find(key, detail=True)
    files = [Remote(name.removeprefix(root).lstrip('/'), bucket.unstrip_protocol(name),
                    info['size'], next((str(info[fact]) for fact in _CHECKSUMS if info.get(fact)),
                                       str([name, *map(info.get, _TIMES)])))
             for name, info in sorted(found.items()) if info['type'] == 'file']
    if not files:
      raise FileNotFoundError(key)
  return files


def _root(location: str) -> str:
  """Return a location up to its wildcards; in an URL of the web a question mark is none."""
  return re.split(r'/[^/]*[*[]' if location.startswith('http') else r'/[^/]*[*?[]', location)[0]


def local(location: str | os.PathLike[str], label: str = '') -> pathlib.Path:
  """Return a path on this machine: what `listed` finds elsewhere is copied to `CACHE`, once.

  Copies are made anew where the name, the size or the version of a file changes. The path of a
  pattern with wildcards is that of a directory with the files that match.
  """
  if isinstance(files := listed(location, label), pathlib.Path):
    return files
  import fsspec

  text = os.fspath(location).rstrip('/')
  cache = pathlib.Path(CACHE).expanduser()
  target = cache / digest([text, *files])[:16] / file_name(_root(text))
  if not target.exists():
    with explained(text), locked(cache), replaced(target.parent) as partial:
      for file in files:
        copy = partial / target.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        bucket, key = fsspec.core.url_to_fs(file.location)
        bucket.get_file(key, str(copy))
        if file.size not in (None, copy.stat().st_size):
          raise OSError(f'{file.location} changed while it was copied; try again')
  return target


def file_name(location: str) -> str:
  """Return the name of the file at a location, without the query of an URL."""
  return os.path.basename(location).partition('?')[0]


def upload(source: pathlib.Path, target: str | os.PathLike[str]) -> None:
  """Copy a local file or directory into a bucket, its markers last; an OSError says why not."""
  import fsspec

  goal = path(target)
  files = [source] if source.is_file() else [file for file in source.rglob('*') if file.is_file()]
  # The marker of a whole directory comes after those of its parts.
  files.sort(key=lambda file: (file.name in MARKERS, -len(file.parts), file))
  with explained(goal):
    bucket, key = fsspec.core.url_to_fs(os.fspath(goal))
    for file in files:
      bucket.put_file(str(file), os.path.join(key, file.relative_to(source)).removesuffix('/.'))


@contextlib.contextmanager
def buffered(
  directory: pathlib.Path, names: Sequence[str]
) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
  """Yield a local directory for files that grow, and a function that uploads what has grown.

  They are `directory` itself and a function that does nothing, unless it lies in a bucket. There
  the files `names` are copied first, and all is uploaded at the end.
  """
  if not is_remote(directory):
    yield directory, lambda: None
    return
  sizes: dict[pathlib.Path, int] = {}
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as folder:
    here = pathlib.Path(folder)
    for name in names:
      with explained(directory):
        if (directory / name).exists():
          (here / name).write_bytes((directory / name).read_bytes())

    def send() -> None:
      for file in (file for file in here.rglob('*') if file.is_file()):
        size = file.stat().st_size
        if sizes.get(file) != size:
          upload(file, directory / file.relative_to(here))
          sizes[file] = size

    try:
      yield here, send
    finally:
      send()


def remove(directory: str | os.PathLike[str]) -> None:
  """Remove a directory with all that is in it, if it is there."""
  from etils import epath

  with explained(path(directory)):
    epath.Path(directory).rmtree(missing_ok=True)


def move(source: Any, target: Any) -> None:
  """Give a directory another name; in a bucket its objects are copied, then removed."""
  with explained(path(target)):
    if is_remote(source):
      import fsspec

      bucket, key = fsspec.core.url_to_fs(os.fspath(source))
      bucket.mv(key, os.fspath(target).partition('://')[2], recursive=True)
    else:
      os.rename(source, target)


@contextlib.contextmanager
def replaced(target: str | os.PathLike[str], kept: bool = False) -> Iterator[pathlib.Path]:
  """Yield a free path for a file or directory that becomes `target` when the block is done.

  Where the block fails, nothing of it is left and `target` is as it was. A directory takes the
  place of nothing but an empty one. One that is `kept` holds what a block left that was
  interrupted or killed, outside of buckets.

  Raises:
    OSError: the disk is full or cannot be written.
  """
  if is_remote(target):
    with tempfile.TemporaryDirectory(prefix='jaxllm-') as folder:
      partial = pathlib.Path(folder) / 'whole'
      yield partial
      upload(partial, target)
    return
  target = pathlib.Path(target)
  partial = target.with_name(_PARTIAL + (target.name if kept else uuid.uuid4().hex[:8]))
  with explained(target.parent):
    target.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield partial
    with explained(target.parent):
      os.replace(partial, target)
  finally:
    if kept and isinstance(sys.exception(), KeyboardInterrupt | SystemExit | ChildProcessError):
      pass
    elif partial.is_dir():
      shutil.rmtree(partial, ignore_errors=True)
    else:
      partial.unlink(missing_ok=True)


def write_file(target: str | os.PathLike[str], content: bytes | str) -> None:
  """Write a file whole or not at all, text as UTF-8; an OSError says why it cannot be."""
  data = content.encode() if isinstance(content, str) else content
  with replaced(target) as partial, explained(partial.parent), partial.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def make_writable(directory: Any, label: str) -> None:
  """Create a directory where it is missing, and check that it can be written.

  In a bucket there are no directories to create, and a bucket is never created.

  Raises:
    ValueError: it cannot; the message begins with `label`.
  """
  probe = directory / f'.writable-{uuid.uuid4().hex[:8]}'
  try:
    if not is_remote(directory):
      directory.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except Exception as error:
    if not (isinstance(error, OSError) or is_remote(directory)):
      raise
    raise ValueError(f'{label}{directory}: cannot write there ({_reason(error)}); choose '
                     'another directory, or make this one writable') from error


@contextlib.contextmanager
def locked(directory: pathlib.Path, kept: str = '') -> Iterator[None]:
  """Hold a directory, created where needed, against other processes that write into it.

  What killed processes have left there is removed, but for that of the target `kept`.

  In a bucket nothing is held: there each writer's objects are whole, and the last one wins.

  Raises:
    OSError: the directory cannot be written.
  """
  if is_remote(directory):
    yield
    return
  with contextlib.ExitStack() as stack:
    with explained(directory):
      directory.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(open(directory / '.lock', 'w'))
      fcntl.flock(lock, fcntl.LOCK_EX)  # The system releases it however this process ends.
    for leftover in directory.glob(f'{_PARTIAL}*'):
      if leftover.name == _PARTIAL + kept:
        continue
      shutil.rmtree(leftover, ignore_errors=True)  # Files, as they are written at once, stay.
    yield


@contextlib.contextmanager
def explained(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Add the place and the fix to errors of writing, and of buckets."""
  try:
    yield
  except Exception as error:
    code = getattr(error, 'errno', None) or errno.EIO
    if '://' in os.fspath(directory) and code != errno.ENOSPC:
      what = 'the bucket' if is_remote(directory) else 'it'
      raise OSError(
        code, f'{what} cannot be used: {_reason(error)}; check that it is there, and what your '
        'credentials may do', str(directory)) from error
    if not isinstance(error, OSError):
      raise
    directory = pathlib.Path(directory)
    partial = [path for path in (directory, *directory.parents) if path.name.startswith(_PARTIAL)]
    place = partial[-1].parent if partial else directory
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise OSError(
      error.errno or errno.EIO, f'cannot write: {reason}; nothing half-written is left. Make room, '
      'or choose another directory', str(place)) from error


def _reason(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return 'there is no such bucket or object'
  return mistakes.said(getattr(error, 'strerror', None) or error)


def file_digest(path: pathlib.Path, known: dict[str, Any]) -> str:
  """Return the SHA-256 of a file.

  `known`, path -> [size, mtime_ns, digest], is read and updated: a file whose size and modification
  time have not changed is not read again.
  """
  stat = path.stat()
  key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
  match known.get(key):
    case [*before, str(found)] if before == stamp:
      return found
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  known[key] = [*stamp, found]
  return found


def digest(value: Any) -> str:
  """Return the SHA-256 of a JSON-able value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(target: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
  """Write an indented JSON object with its digest, whole or not at all."""
  fields = json.loads(json.dumps(fields))
  content = {**fields, 'sha256': digest(fields)}
  write_file(target, json.dumps(content, indent=2, ensure_ascii=False) + '\n')


def unsealed(content: bytes | str) -> dict[str, Any]:
  """Return a JSON object, without its digest if it has one; a ValueError says what is wrong."""
  try:
    fields = json.loads(content)
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  if not isinstance(fields, dict):
    raise ValueError('it holds no JSON object')
  if isinstance(fields.get('sha256'), str) and fields.pop('sha256') != digest(fields):
    raise ValueError('its checksum is another')
  return fields


def read_json(path: pathlib.Path, needed: bool = False) -> dict[str, Any]:
  """Read a JSON object; {} where the file is absent, or damaged unless it is `needed`."""
  try:
    return unsealed(path.read_bytes())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    if needed:
      raise ValueError(f'{path} is damaged ({error}); put a copy of it back') from error
    return {}
