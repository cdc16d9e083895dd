"""Where the tokens of records come from: a source, a document in it, a token of that.

Beside each shard lies a file of the pieces of its records, in the same format: an entry holds those
of `BLOCK` records, as columns of differences, which the format packs to about five bytes a piece.
"""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

PIECE = np.dtype([('record', '<u4'), ('start', '<u4'), ('source', '<u4'), ('document', '<u8'),
                  ('token', '<u8')])
"""Tokens of a record that follow each other in a document too: the record in its shard, where in it
they begin; the source, the document in it and its token that they begin with. All count from 0. A
piece ends where the next one begins, or the tokens of the record end."""
BLOCK = 256


def blocks(pieces: np.ndarray) -> Iterator[bytes]:
  """Yield the entries for pieces, which are in the order of their records."""
  last = int(pieces['record'][-1])
  edges = np.searchsorted(pieces['record'], np.arange(0, last + BLOCK + 1, BLOCK))
  for start, stop in zip(edges[:-1], edges[1:], strict=True):
    block = pieces[start:stop]
    yield b''.join(np.diff(block[name], prepend=block[name].dtype.type(0)).tobytes()
                   for name in PIECE.names or ())


class Lineage:
  """The pieces of the records of a split.

  Args:
    paths: the files of its shards.
    shards: records in each.
  """

  def __init__(self, paths: Sequence[pathlib.Path], shards: Sequence[int]):
    import grain

    self._files = [grain.sources.ArrayRecordDataSource(str(path)) for path in paths]
    self._ends = np.cumsum(shards)
    self._shards = shards

  def pieces(self, number: int) -> np.ndarray:
    """Return the pieces of a record, by its number in the split."""
    shard = int(np.searchsorted(self._ends, number, 'right'))
    record = number - (int(self._ends[shard]) - self._shards[shard])
    content = self._files[shard][record // BLOCK]
    found = np.zeros(len(content) // PIECE.itemsize, PIECE)
    for name in PIECE.names or ():
      size = found[name].nbytes
      found[name] = np.cumsum(np.frombuffer(content[:size], PIECE[name]), dtype=PIECE[name])
      content = content[size:]
    return found[found['record'] == record]
