"""Texts to record files: tokenized in groups ahead, packed, counted, written in shards."""

import collections
import errno
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm import storage
from jaxllm.data import packing, parallel
from jaxllm.data.tokenizers import Tokenizer

_SHARD_TOKENS = 2**26
_GROUP_CHARACTERS = 2**20


def tokenize(
  texts: Iterable[tuple[str, str]], encode_batch: Callable[[Sequence[str]], list[list[int]]]
) -> Iterator[tuple[str, str, list[int]]]:
  """Yield (split, text, ids) for each (split, text).

  A group of texts is tokenized on all cores while the one before is being used.
  """
  def groups() -> Iterator[list[tuple[str, str]]]:
    group, size = [], 0
    for split, text in texts:
      group.append((split, text))
      size += len(text)
      if size >= _GROUP_CHARACTERS:
        yield group
        group, size = [], 0
    yield group

  def encode(group: list[tuple[str, str]]) -> list[tuple[str, str, list[int]]]:
    ids = encode_batch([text for _, text in group])
    return [(split, text, i) for (split, text), i in zip(group, ids, strict=True)]

  for group in parallel.map_ahead(encode, groups(), num_threads=1, ahead=2):
    yield from group


class _ShardWriter:
  """Writes records into `NAME-00000.array_record`, `-00001` and so on, a fixed number into each."""

  def __init__(self, directory: pathlib.Path, name: str, records_per_shard: int):
    self._directory, self._name, self._limit = directory, name, records_per_shard
    self._writer: Any = None
    self.counts: list[int] = []

  def write(self, record: bytes) -> None:
    from array_record.python import array_record_module
    if self._writer is None or self.counts[-1] == self._limit:
      self.close()
      path = self._directory / shard_name(self._name, len(self.counts))
      self._writer = self._io(array_record_module.ArrayRecordWriter, str(path), 'group_size:1')
      self.counts.append(0)
    self._io(self._writer.write, record)
    self.counts[-1] += 1

  def close(self) -> None:
    writer, self._writer = self._writer, None
    if writer is not None:
      self._io(writer.close)

  def _io(self, call: Callable[..., Any], *args: Any) -> Any:
    with storage.explained(self._directory):
      try:
        return call(*args)
      except RuntimeError as error:  # How the library reports every failure of the file system.
        code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
                     if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code)) from error


def shard_name(name: str, index: int) -> str:
  """Return the file name of a shard."""
  return f'{name}-{index:05d}.array_record'


class SplitWriter:
  """Packs and writes one split, and counts what goes into it.

  Args:
    directory: where the shards go.
    name: of the split.
    tokenizer: gives BOS, EOS and the bytes of tokens.
    data: packing, context length and whether documents have BOS and EOS.

  Raises:
    ValueError: the tokenizer has no BOS or EOS where it is wanted.
  """

  def __init__(self, directory: pathlib.Path, name: str, tokenizer: Tokenizer, data: Any):
    self._tokenizer, self._joined = tokenizer, data.packing == 'concat'
    self._prefix = _border(tokenizer.bos_id, 'bos') if data.add_bos else []
    self._suffix = _border(tokenizer.eos_id, 'eos') if data.add_eos else []
    dtype = packing.record_dtype(data.context_length, tokenizer.vocab_size)
    self._packer = packing.PACKERS[data.packing](dtype)
    self._shards = _ShardWriter(directory, name, max(1, _SHARD_TOKENS // data.context_length))
    self._counts = collections.Counter(
      dict.fromkeys(('documents', 'tokens', 'target_tokens', 'text_bytes', 'target_bytes'), 0))

  def add(self, text: str, encoded: list[int]) -> int:
    """Append a document and return how many tokens it has, borders included.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    ids = np.array([*self._prefix, *encoded, *self._suffix], np.int64)
    if not len(ids):
      return 0
    if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
      raise ValueError(f'the tokenizer gave ids {ids.min()} to {ids.max()}, outside its vocabulary '
                       f'of {self._tokenizer.vocab_size}')
    size = len(text.encode())
    predicted = size
    if not (self._joined and self._counts['documents']):  # Nothing predicts the first token.
      predicted -= len(self._tokenizer.id_bytes[ids[0]])
    self._counts.update(documents=1, tokens=len(ids), text_bytes=size, target_bytes=predicted)
    self._write(self._packer.add(ids))
    return len(ids)

  def finish(self) -> dict[str, Any]:
    """Write what is left and return the counts, as fields of `records.Split`."""
    self._write(self._packer.finish())
    self._shards.close()
    shards = tuple(self._shards.counts)
    return {**self._counts, 'records': sum(shards), 'shards': shards}

  def _write(self, records: Iterator[np.ndarray]) -> None:
    for record in records:
      self._counts.update(target_tokens=packing.count_targets(record))
      self._shards.write(record.tobytes())


def _border(token_id: int | None, name: str) -> list[int]:
  if token_id is None:
    raise ValueError(f'config.data.add_{name}=True, but the tokenizer has no {name.upper()}: set '
                     f"it to False, or (kind='json') name it in config.tokenizer.{name}_token")
  return [token_id]
