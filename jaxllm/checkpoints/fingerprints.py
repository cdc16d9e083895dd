"""Fingerprints of arrays, the same on any mesh: what a checkpoint must give back, bit for bit.

They are three sums of the words of an array: plain, weighted by position, and mixed with it. Sums
of integers do not depend on their order: each device adds up its own part of an array, without any
exchange on devices, and the sums meet on the host. One changed word always changes the first and
the last; several leave all three alone once in 2**64 or more.
"""

import concurrent.futures
import functools
import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import distributed
from jaxllm.checkpoints import tree

# Odd factors and shifted differences can be undone, so that no two words mix to the same.
_SPREAD, _MIX = 0x9E3779B1, ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
_PIECE_WORDS = 1 << 16


def fingerprint(arrays: Any) -> str:
  """Return 16 hexadecimal digits that depend on every leaf's path, shape, dtype and bits."""
  leaves = dict(sorted(tree.flatten(arrays).items()))
  digest = hashlib.sha256()
  for (path, leaf), sums in zip(leaves.items(), combined(leaves, own_sums(leaves)), strict=True):
    digest.update(f'{path} {leaf.dtype} {leaf.shape} {sums[0]} {sums[1]}\n'.encode())
  return digest.hexdigest()[:16]


def fingerprints(leaves: Mapping[str, Any], sums: np.ndarray | None = None) -> dict[str, str]:
  """Return path -> shape, dtype and fingerprint of each leaf, 24 hexadecimal digits.

  Several processes call it together. `sums` are those of `own_sums`, where they are known.
  """
  sums = combined(leaves, own_sums(leaves) if sums is None else sums)
  return {path: f'{tree.describe(leaf)} {"".join(f"{one:08x}" for one in row)}'
          for (path, leaf), row in zip(leaves.items(), sums.tolist(), strict=True)}


def own_sums(leaves: Mapping[str, Any]) -> np.ndarray:
  """Return the three sums of the part of each leaf that this process has: uint32 [leaves, 3]."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    return np.array(list(threads.map(_own_sums, leaves.values())), np.uint32).reshape(-1, 3)


def combined(leaves: Mapping[str, Any], sums: np.ndarray) -> np.ndarray:
  """Add up what the processes return from `own_sums`, of leaves that lie in several of them."""
  shared = np.array([not getattr(leaf, 'is_fully_addressable', True) for leaf in leaves.values()],
                    bool)
  if shared.any():
    def add(texts: list[str]) -> str:
      parts = [np.frombuffer(bytes.fromhex(text), np.uint32) for text in texts]
      return np.sum(parts, axis=0, dtype=np.uint32).tobytes().hex()

    total = bytes.fromhex(distributed.from_all(sums[shared].tobytes().hex(), add))
    sums = sums.copy()
    sums[shared] = np.frombuffer(total, np.uint32).reshape(-1, 3)
  return sums


def _own_sums(leaf: Any) -> np.ndarray:
  leaf = jnp.asarray(leaf)
  shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
  if shards and shards[0].device.platform != 'cpu' and leaf.sharding.memory_kind == 'device':
    rows = {shard.device: shard.data for shard in device_sums(leaf).addressable_shards}
    found = jax.device_get([rows[shard.device] for shard in shards])
  else:  # NumPy compiles nothing, and waits for no computation of several devices.
    found = [_sums(np.asarray(shard.data, order='C'), shard.index, leaf.shape) for shard in shards]
  return np.array(found, np.uint32).reshape(-1, 3).sum(axis=0, dtype=np.uint32)


def _sums(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
  """Return the sums of a part of an array of a shape, piece by piece so that caches hold them."""
  split = max((axis for axis in range(part.ndim) if part.shape[axis] != shape[axis]), default=0)
  # Of each run of words that are neighbours in the whole array: where it begins there.
  begins = np.zeros(1, np.uint64)
  for axis in range(min(split + 1, part.ndim)):
    start, stride = index[axis].start or 0, math.prod(shape[axis + 1 :])
    count = part.shape[axis] if axis < split else 1
    begins = np.add.outer(begins, np.arange(start, start + count, dtype=np.uint64) * np.uint64(
      stride)).reshape(-1)
  rows = part.view(f'u{part.itemsize}').reshape(begins.size, -1)
  width = max(1, min(rows.shape[1], _PIECE_WORDS))
  height = max(1, _PIECE_WORDS // width)
  ramp, sums = np.arange(width, dtype=np.uint32), np.zeros(3, np.uint32)
  for top in range(0, rows.shape[0], height):
    for left in range(0, rows.shape[1], width):
      words = rows[top : top + height, left : left + width].astype(np.uint32, copy=False)
      first = (begins[top : top + height, None] + np.uint64(left)).astype(np.uint32)
      mixed = first + ramp[: words.shape[1]]  # The positions, at first.
      other = words * mixed
      weighted, plain = other.sum(dtype=np.uint32), words.sum(dtype=np.uint32)
      mixed *= np.uint32(_SPREAD)
      mixed += words
      for shift, factor in _MIX:
        mixed ^= np.right_shift(mixed, np.uint32(shift), out=other)
        if factor != 1:
          mixed *= np.uint32(factor)
      sums += np.array([plain, weighted, mixed.sum(dtype=np.uint32)])
  return np.array([[1, 0, 0], [1, 2, 0], [0, 0, 1]], np.uint32) @ sums  # By 2 * position + 1.


def device_sums(leaf: jax.Array) -> jax.Array:
  """Return the sums of what each device holds of an array: uint32 [devices, 3], where they lie."""
  sharding = leaf.sharding
  if not isinstance(sharding, NamedSharding):
    mesh = Mesh(np.array(sorted(leaf.devices(), key=lambda device: device.id)), 'all')
    sharding = NamedSharding(mesh, PartitionSpec())
  return _device_sums(leaf, sharding)


@functools.partial(jax.jit, static_argnums=1)
def _device_sums(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
  def sums(part: jax.Array) -> jax.Array:
    part = part.astype(jnp.uint8) if part.dtype == bool else part
    bits = jnp.dtype(f'uint{8 * part.dtype.itemsize}')
    words = jax.lax.bitcast_convert_type(part, bits).astype(jnp.uint32)
    position = jnp.zeros(part.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      names = sharding.spec[axis] if axis < len(sharding.spec) else None
      start = jax.lax.axis_index(names) * part.shape[axis] if names else 0
      index = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) + jnp.uint32(start)
      position = position * jnp.uint32(size % 2**32) + index
    mixed = words + position * jnp.uint32(_SPREAD)
    for shift, factor in _MIX:
      mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32)
                      for one in (words, words * (2 * position + 1), mixed)])[None]

  return jax.shard_map(
    sums, mesh=sharding.mesh, in_specs=sharding.spec,
    out_specs=PartitionSpec(sharding.mesh.axis_names), check_vma=False)(leaf)
