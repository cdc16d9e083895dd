"""The files of all sources: counted, hashed, and none of them read twice."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxllm import storage
from jaxllm.config import Config
from jaxllm.data import documents
from jaxllm.data.documents import SourceConfig


class SourceCounts(Config):
  """What one source gave."""

  location: str
  """The source's location."""
  files: int
  """Files it read."""
  file_bytes: int
  """Their size."""
  sha256: str
  """SHA-256 over the names and contents of these files."""
  documents: int
  """Documents it held."""
  dropped: int
  """Documents that cleaning dropped, or that were empty."""


def survey(
  train: Sequence[SourceConfig], validation: Sequence[SourceConfig], hashes: dict[str, Any]
) -> list[SourceCounts]:
  """Count and hash the files of every source; `hashes` are those of `storage.file_digest`.

  Raises:
    ValueError: there are no files, or texts of `validation` are trained on.
  """
  sources = []
  read: dict[Any, list[_Read]] = {}
  for number, source in enumerate([*train, *validation]):
    digest, size, found = hashlib.sha256(), 0, documents.find(source)
    for name, path in found.files:
      content = storage.file_digest(path, hashes)
      _check_overlap(read, content, _Read(path, source, number < len(train), found.shared))
      digest.update(f'{name}\0{content}\0'.encode())
      size += path.stat().st_size
    sources.append(SourceCounts(location=source.location, files=len(found.files), file_bytes=size,
                                sha256=digest.hexdigest(), documents=0, dropped=0))
  return sources


class _Read(NamedTuple):
  """A file, the source that reads it, whether for training, and whether maybe only a part."""

  path: pathlib.Path
  source: SourceConfig
  train: bool
  shared: bool


def _check_overlap(read: dict[Any, list[_Read]], content: str, new: _Read) -> None:
  """Refuse a file that is read before, and for validation a copy of what is trained on.

  `read` maps a path or (SHA-256 `content`, train) to who reads it, and grows by `new`.
  """
  path = new.path.resolve()
  for old in [*read.get(path, ()), *read.get((content, not new.train), ())]:
    starts, stops = zip(old.source.slice, new.source.slice, strict=True)
    common = max(starts) < min(stops) and old.source.text_field == new.source.text_field
    if new.shared:
      common = common and old.source.location == new.source.location
    if common and path.stat().st_size:
      fields = ['config.data.' + ('sources' if who.train else 'validation') for who in (old, new)]
      verb = 'is' if old.path.resolve() == path else 'has the content of'
      other = '' if old.path == new.path else f' {verb} {str(new.path)!r}'
      raise ValueError(
        f'{fields[0]} ({old.source.location!r}) and {fields[1]} ({new.source.location!r}) read the '
        f'same texts: {str(old.path)!r}{other}; name them once, or give slices that do not overlap')
  read.setdefault(path, []).append(new)
  copies = read.setdefault((content, new.train), [])
  if not copies or copies[-1].source != new.source:
    copies.append(new)
