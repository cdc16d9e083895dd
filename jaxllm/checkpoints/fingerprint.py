"""A short proof of what arrays hold, the same on every mesh."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.checkpoints import tree


def of(arrays: Any) -> str:
  """Return 16 hexadecimal digits that depend on every leaf's path, shape, dtype and bits.

  Computed where the arrays lie. Each leaf gives two sums of its bits, one of them weighted by
  position; integers add up to the same in any order, so that shardings do not matter.

  Args:
    arrays: pytree of arrays.
  """
  digest = hashlib.sha256()
  for path, leaf in sorted(tree.flatten(arrays).items()):
    sums = jax.device_get(_sums(leaf))
    digest.update(f'{path} {leaf.dtype} {leaf.shape} {sums[0]} {sums[1]}\n'.encode())
  return digest.hexdigest()[:16]


@jax.jit
def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
  bits = jnp.dtype(f'uint{8 * leaf.dtype.itemsize}')
  words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
  # Odd weights: a change of one word always changes the sum.
  position = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    position = position * jnp.uint32(size % 2**32) + index
  return jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)
