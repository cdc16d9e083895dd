"""What a compiled program says that its devices exchange, read from the text of XLA."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm.training import cost

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
          'collective-permute')


def sent(text: str, mesh: Any) -> list[dict[str, Any]]:
  """Return what a program's text says that a step exchanges; the bytes are those a device sends.

  The pieces of an operation that is fused with arithmetic share a channel, and count once; those of
  a `shard_map`, which all have one channel, are told apart by their source. Rings send about the
  size of its larger side, all-reduce twice that, and once between two slices; fused, it is a
  reduce-scatter. A ragged exchange counts the room for what it receives, which is more.
  """
  bodies: dict[str, list[str]] = {}
  name = ''
  for line in text.split('\n'):
    if line.endswith('{') and (head := re.match(r'(ENTRY )?%?([\w.-]+)', line)):
      name = 'ENTRY' if head[1] else head[2]
      bodies[name] = []
    elif name:
      bodies[name].append(line)

  totals: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
  seen: set[Any] = set()

  def add(kind: str, axes: tuple[str, ...], times: int, size: float) -> None:
    count, before = totals.get((kind, axes), (0, 0.0))
    totals[kind, axes] = count + times, before + size * times

  def visit(name: str, times: int) -> None:
    for line in bodies[name]:
      if loop := re.search(r' while\(.*condition=%([\w.-]+), body=%([\w.-]+)', line):
        bounds = re.findall(r' [su]32\[\]\S* constant\((\d+)\)', '\n'.join(bodies[loop[1]]))
        visit(loop[2], times * max(map(int, bounds), default=1))
      elif found := re.search(rf'= (.*?) ({"|".join(_KINDS)})(-start)?\(', line):
        channel = re.search(r'channel_id=\d+', line)
        origin = re.search(r'metadata=\{.*?shard_map.*?\}', line)
        piece = channel and (channel[0], origin and (found[2], origin[0]))
        if piece and piece in seen:
          continue
        seen.add(piece)
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else found[2]
        # An asynchronous operation returns operand and result, other tuples are several results.
        size = (max if found[3] else sum)(_sizes(found[1])) * (2 if kind == 'all-reduce' else 1)
        add(kind, _axes(line, mesh), times, size)
      elif far := re.search(r' = (.*?) send\(.*_xla_megascale_transfer_type="(\w+)"', line):
        add(far[2].lower().replace('_', '-'), (cost.SLICES,), times, _sizes(far[1])[0])
      else:
        for callee in re.findall(r'(?:calls|to_apply)=%([\w.-]+)', line):
          visit(callee, times)

  visit('ENTRY', 1)
  return [{'kind': kind, 'axes': ' '.join(axes), 'per_step': count, 'bytes': size}
          for (kind, axes), (count, size) in sorted(totals.items(), key=lambda one: -one[1][1])]


def _sizes(types: str) -> list[int]:
  """Return the bytes of arrays, as XLA writes their types."""
  return [
    int((re.search(r'\d+', dtype) or ['8'])[0]) // 8 * math.prod(
      map(int, filter(None, dims.split(','))))
    for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', types)]


def _axes(line: str, mesh: Any) -> tuple[str, ...]:
  """Return the mesh axes along which the devices of a group, or of a pair, differ."""
  varying: set[int] = set()
  for group in _groups(line, mesh.size):
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)))
  return tuple(mesh.axis_names[axis] for axis in sorted(varying))


def _groups(line: str, size: int) -> Iterator[np.ndarray]:
  """Yield the places of devices that exchange something, as XLA writes them."""
  if made := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    shape, dims, order = ([int(one) for one in (part or '').split(',') if one]
                          for part in made.groups())
    places = np.arange(math.prod(dims)).reshape(dims)
    yield from (places.transpose(order) if order else places).reshape(shape)
  elif split := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', line):
    sizes = {axis: int(count) for axis, count in re.findall(r"'(\w+)'=(\d+)", split[1])}
    last = re.findall(r"'(\w+)'", split[2])
    moved = np.argsort([last.index(axis) + 1 if axis in last else 0 for axis in sizes], stable=True)
    places = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    yield from places.transpose(moved).reshape(-1, math.prod(sizes[axis] for axis in last))
  elif named := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', line):
    for group in re.findall(r'\{([\d,]+)\}', named[1]):
      yield np.array([int(one) for one in group.split(',')])
  else:
    yield np.arange(size)
