"""The texts of a split as tokens, packed into records, written into shards.

- `tokenize` makes tokens of texts, `SplitPacker` records of tokens, `SplitWriter` shards.
- Lengths alone decide which tokens go where, so that a plan can be made without them.
"""

import base64
import collections
import errno
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxllm import storage
from jaxllm.data import lineage, parallel
from jaxllm.data.packing import PACKERS, Record, is_target, record_dtype
from jaxllm.data.tokenizers import Tokenizer

_SHARD_TOKENS = 2**26
_KINDS = ('rows', 'pieces')
GROUP_CHARACTERS = 2**20


class Text(NamedTuple):
  """A document, or a part of it, on its way into the records of a split.

  Attributes:
    split: 'train' or 'validation'.
    text: cleaned.
    source: which source it is of, from 0.
    document: which document of that, dropped ones counted, from 0.
  """

  split: str
  text: str
  source: int
  document: int


class Tokens(NamedTuple):
  """A `Text` as tokens.

  Attributes:
    ids: BOS and EOS included where they are wanted.
    text_bytes: size of the text.
    first_bytes: how many of them the first token stands for.
  """

  split: str
  ids: np.ndarray
  source: int
  document: int
  text_bytes: int
  first_bytes: int


def tokenize(
  texts: Iterable[Text], tokenizer: Tokenizer, data: Any,
  run: Callable[[Iterable[list[str]]], Iterable[list[bytes]]],
) -> Iterator[Tokens]:
  """Yield the tokens of each text, with BOS and EOS as `data` says; refuse unknown ids.

  `run` gives the ids of many groups of texts, as bytes of <u4.
  """
  groups: collections.deque[list[Text]] = collections.deque()

  def begun() -> Iterator[list[str]]:
    for group in parallel.grouped(texts, lambda text: len(text.text), GROUP_CHARACTERS):
      groups.append(group)
      yield [text.text for text in group]

  prefix, suffix = (np.array(some, np.int64) for some in borders(tokenizer, data))
  for several in run(begun()):
    for text, content in zip(groups.popleft(), several, strict=True):
      ids = np.concatenate([prefix, np.frombuffer(content, '<u4'), suffix])
      if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise ValueError(f'the tokenizer gave ids {ids.min()} to {ids.max()}, outside its '
                         f'vocabulary of {tokenizer.vocab_size}')
      first = len(tokenizer.id_bytes[ids[0]]) if len(ids) else 0
      yield Tokens(text.split, ids, text.source, text.document, len(text.text.encode()), first)


def write_shard(
  paths: tuple[pathlib.Path, pathlib.Path], rows: Iterable[bytes], pieces: np.ndarray
) -> None:
  """Write the records of a shard and their lineage into local files; an OSError says why not."""
  from array_record.python import array_record_module
  try:
    for path, entries in zip(paths, (rows, lineage.blocks(pieces)), strict=True):
      writer: Any = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for entry in entries:
        writer.write(entry)
      writer.close()
  except RuntimeError as error:  # How the library reports every failure of the file system.
    code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
                 if os.strerror(code) in str(error)), errno.EIO)
    raise OSError(code, os.strerror(code)) from error


def open_path(directory: pathlib.Path, name: str, index: int, kind: str) -> pathlib.Path:
  """Return the file of the plain bytes of a shard that is not full, one of `_KINDS`."""
  return directory / f'{name}-{index:05d}.{kind}'


def paths_of_shard(
  directory: pathlib.Path, name: str, index: int
) -> tuple[pathlib.Path, pathlib.Path]:
  """Return the files of a shard: its records, and their lineage."""
  path = directory / f'{name}-{index:05d}.array_record'
  return path, path.with_suffix('.lineage')


class SplitPacker:
  """Packs the documents of a split into records, and counts what goes into them.

  Which tokens go where depends on lengths alone: other tokens of the same lengths give records with
  the same pieces, which `fill` can then make those of the documents.

  Args:
    data: packing, context length and the sources, of which none shares a record if they are mixed.
    vocab_size: ids are below it.
    state: what to go on from, of `state`.

  Attributes:
    shard_records: how many records a shard holds, but for the last one.
  """

  def __init__(self, data: Any, vocab_size: int, state: Mapping[str, Any] = MappingProxyType({})):
    dtype = record_dtype(data.context_length, vocab_size)
    self.shard_records = max(1, _SHARD_TOKENS // data.context_length)
    self._policy, self._mixed, self._source = data.packing, data.mixed, state.get('source')
    self._make_packer = functools.partial(PACKERS[data.packing], dtype)
    self._packer = self._make_packer([
      Record(dtype, row=np.frombuffer(base64.b64decode(row), dtype)[0].copy(), pieces=pieces)
      for row, pieces in state.get('open', ())])
    sources = len((*data.sources, *data.own_validation))
    self._records, self._tokens = ([*state.get(name, [0] * sources)]
                                   for name in ('source_records', 'source_tokens'))
    self._counts = collections.Counter(state.get('counts') or dict.fromkeys(
      ('documents', 'tokens', 'target_tokens', 'text_bytes', 'target_bytes', 'dropped_tokens'), 0))

  def add(self, tokens: Tokens) -> Iterator[Record]:
    """Append a document; yield the records that became full."""
    size = len(tokens.ids)
    if not size:
      return
    if self._mixed and self._source not in (None, tokens.source):
      yield from self.finish()
    self._source = tokens.source
    # Nothing predicts the first token.
    first = not (self._policy == 'concat' and self._packer.open[0].segment)
    self._counts.update(documents=1, tokens=size, text_bytes=tokens.text_bytes,
                        target_bytes=tokens.text_bytes - first * tokens.first_bytes)
    self._tokens[tokens.source] += size
    if size == 1 and self._policy == 'one_document':
      self._counts['dropped_tokens'] += 1
      return
    yield from self._counted(self._packer.add(tokens.ids, tokens.source, tokens.document))

  def finish(self) -> Iterator[Record]:
    """Yield the records that are left, but for a token alone, and begin anew."""
    yield from self._counted(self._packer.finish())
    self._counts['dropped_tokens'] += sum(
      int((record.row['segment_ids'] > 0).sum()) for record in self._packer.open)
    self._packer = self._make_packer([])

  def _counted(self, records: Iterable[Record]) -> Iterator[Record]:
    for record in records:
      self._counts['target_tokens'] += int(is_target(record.row['segment_ids']).sum())
      self._records[record.pieces[0][1]] += 1
      yield record

  def counts(self) -> dict[str, Any]:
    """Return the counts of all documents and records so far, as fields of `records.Split`."""
    return {**self._counts, 'source_tokens': tuple(self._tokens),
            'source_records': tuple(self._records) if self._mixed else ()}

  def state(self) -> dict[str, Any]:
    """Return what another packer can go on from, JSON-able."""
    return {'counts': self._counts, 'source': self._source, 'source_records': self._records,
            'source_tokens': self._tokens, 'open': [
              (base64.b64encode(record.row.tobytes()).decode(), record.pieces)
              for record in self._packer.open]}


class SplitWriter:
  """Packs one split and writes it into `NAME-00000.array_record`, `-00001` and so on.

  Until its shard is full, a record lies in a file of plain bytes, its pieces in another: these can
  be cut to a known size, so that a killed process goes on from `state`.

  Args:
    directory: where the shards go.
    name: of the split.
    data: as of `SplitPacker`, and
    vocab_size: too.
    state: what to go on from, of `state`.
  """

  def __init__(
    self, directory: pathlib.Path, name: str, data: Any, vocab_size: int,
    state: Mapping[str, Any] = MappingProxyType({}),
  ):
    self._directory, self._name = directory, name
    self._packer = SplitPacker(data, vocab_size, state)
    self._shards: list[int] = [*state.get('shards', [0])]
    self._files = [self._io(self._open, kind, size) for kind, size in state.get(
      'bytes', dict.fromkeys(_KINDS, 0)).items()]

  def add(self, tokens: Tokens) -> None:
    """Append a document."""
    self._write(self._packer.add(tokens))

  def state(self) -> dict[str, Any]:
    """Return what another writer can go on from, JSON-able, once it is all on the disk."""
    for file in self._files:
      self._io(file.flush)
      self._io(os.fsync, file.fileno())
    sizes = (file.tell() for file in self._files)
    return {'shards': self._shards, 'bytes': dict(zip(_KINDS, sizes, strict=True)),
            **self._packer.state()}

  def saved(self, last: int | None = -1) -> None:
    """Remove what nothing goes on from any more, now that the last state is kept."""
    for shard in range(len(self._shards))[:last]:
      for kind in _KINDS:
        open_path(self._directory, self._name, shard, kind).unlink(missing_ok=True)

  def finish(self) -> dict[str, Any]:
    """Write what is left and return the counts, as fields of `records.Split`."""
    self._write(self._packer.finish())
    if self._shards[-1]:
      self._io(self._end_shard)
    self.saved(None)
    shards = tuple(filter(None, self._shards))
    files = [paths_of_shard(self._directory, self._name, i) for i in range(len(shards))]
    sha256, lineage_sha256 = (
      tuple(storage.file_digest(paths[kind], {}) for paths in files) for kind in (0, 1))
    return {**self._packer.counts(), 'records': sum(shards), 'shards': shards, 'sha256': sha256,
            'lineage_sha256': lineage_sha256}

  def _write(self, records: Iterator[Record]) -> None:
    for record in records:
      if self._shards[-1] == self._packer.shard_records:
        self._io(self._end_shard)
        self._shards.append(0)
        self._files = [self._io(self._open, kind, 0) for kind in _KINDS]
      pieces = np.array([(self._shards[-1], *piece) for piece in record.pieces], lineage.PIECE)
      for file, content in zip(self._files, (record.row, pieces), strict=True):
        self._io(file.write, content.tobytes())
      self._shards[-1] += 1

  def _open(self, kind: str, size: int) -> Any:
    path = open_path(self._directory, self._name, len(self._shards) - 1, kind)
    file = path.open('r+b' if size else 'w+b')
    file.truncate(size)
    file.seek(size)
    return file

  def _end_shard(self) -> None:
    rows, pieces = self._files
    pieces.flush()
    size = rows.tell() // self._shards[-1]
    rows.seek(0)
    write_shard(paths_of_shard(self._directory, self._name, len(self._shards) - 1),
                iter(lambda: rows.read(size), b''), np.memmap(pieces, lineage.PIECE, 'r'))
    rows.close()
    pieces.close()

  def _io(self, call: Callable[..., Any], *args: Any) -> Any:
    with storage.explained(self._directory):
      return call(*args)


def borders(tokenizer: Tokenizer, data: Any) -> tuple[list[int], list[int]]:
  """Return the ids before and after each document; refuse a tokenizer that lacks those wanted."""
  return (_border(tokenizer.bos_id, 'bos') if data.add_bos else [],
          _border(tokenizer.eos_id, 'eos') if data.add_eos else [])


def _border(token_id: int | None, name: str) -> list[int]:
  if token_id is None:
    raise ValueError(f'config.data.add_{name}=True, but the tokenizer has no {name.upper()}: set '
                     f"it to False, or (kind='json') name it in config.tokenizer.{name}_token")
  return [token_id]
