"""Pytrees as named leaves: the stored form of a state, its comparison with another, its proof.

A state is stored as nested dicts of arrays, whatever containers it is made of, so that a leaf is
found by its path ('params/layers/mlp/up/kernel', 'opt_state/0/mu/...') and by nothing else.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

MAX_LINES = 30


def path_of(keys: Any) -> str:
  """Return a key path of JAX as text: 'params/layers/mlp/up/kernel'."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
  """Return path -> leaf in the order of `jax.tree.leaves`; refuse two of the same path."""
  pairs = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  leaves = dict(pairs)
  if len(leaves) != len(pairs):
    raise ValueError('two leaves of the state have the same path; rename one of them')
  return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Return nested dicts, one level for each part of a path."""
  return traverse_util.unflatten_dict(dict(leaves), sep='/')


def differences(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
  """Describe every leaf whose presence, shape or dtype differs; an empty list: all agree.

  Args:
    expected: path -> anything with shape and dtype.
    stored: the same, of the checkpoint.
  """
  lines = []
  for path, leaf in expected.items():
    if path not in stored:
      lines.append(f'{path}: not in the checkpoint, expected {describe(leaf)}')
    elif describe(leaf) != describe(stored[path]):
      lines.append(f'{path}: {describe(stored[path])} in the checkpoint, expected '
                   f'{describe(leaf)}')
  lines += [f'{path}: {describe(leaf)} in the checkpoint, not expected'
            for path, leaf in stored.items() if path not in expected]
  return lines


def listing(lines: list[str]) -> str:
  """Join lines for an error message, cut where it would scroll away."""
  more = len(lines) - MAX_LINES
  shown = [f'  {line}' for line in lines[:MAX_LINES]]
  return '\n'.join(shown + ([f'  ... and {more} more'] if more > 0 else []))


def describe(leaf: Any) -> str:
  """Return the dtype and shape of a leaf, such as 'float32[2, 3]'."""
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def fingerprint(arrays: Any) -> str:
  """Return 16 hexadecimal digits that depend on every leaf's path, shape, dtype and bits."""
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten(arrays).items()):
    sums = _sums_of(leaf)
    digest.update(f'{path} {leaf.dtype} {leaf.shape} {sums[0]} {sums[1]}\n'.encode())
  return digest.hexdigest()[:16]


def fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
  """Return path -> shape, dtype and fingerprint of each leaf, 24 hexadecimal digits.

  Computed where the arrays lie, from three sums of their words: plain, weighted by position, and
  mixed with it. Integers add up to the same in any order, so that meshes do not matter. One changed
  word always changes the first and the last; several leave all three alone once in 2**64 or more.
  """
  sums = {path: _sums_of(leaf) for path, leaf in leaves.items()}
  return {path: f'{describe(leaf)} {"".join(f"{int(one):08x}" for one in sums[path])}'
          for path, leaf in leaves.items()}


def _sums_of(leaf: Any) -> Any:
  """Return `_sums` of a leaf; on CPUs by NumPy, ten times as fast there, piece by piece."""
  leaf = jnp.asarray(leaf)
  device = next(iter(leaf.sharding.device_set))
  if device.platform != 'cpu' or not leaf.is_fully_addressable:
    return jax.device_get(_sums(leaf))
  array = np.ascontiguousarray(np.asarray(leaf))
  words = array.view(f'u{array.itemsize}').reshape(-1)
  sums, size = np.zeros(3, np.uint32), 1 << 16
  for begin in range(0, words.size, size):
    piece = words[begin : begin + size].astype(np.uint32)
    position = np.arange(begin, begin + piece.size).astype(np.uint32)
    mixed = piece + position * np.uint32(_SPREAD)
    for shift, factor in _MIX:
      mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    sums += np.array([one.sum(dtype=np.uint32)
                      for one in (piece, piece * (2 * position + 1), mixed)])
  return sums


# Odd factors and shifted differences can be undone, so that no two words mix to the same.
_SPREAD, _MIX = 0x9E3779B1, ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))


@jax.jit
def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
  bits = jnp.dtype(f'uint{8 * leaf.dtype.itemsize}')
  words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
  position = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    position = position * jnp.uint32(size % 2**32) + index
  mixed = words + position * jnp.uint32(_SPREAD)
  for shift, factor in _MIX:
    mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
  return (jnp.sum(words, dtype=jnp.uint32),
          jnp.sum(words * (2 * position + 1), dtype=jnp.uint32),
          jnp.sum(mixed, dtype=jnp.uint32))
