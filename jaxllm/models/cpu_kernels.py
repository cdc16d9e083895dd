"""Matrix products that XLA's CPU backend is slow at: a single row, and weights stored smaller.

All accumulate in float32. Letters: I inputs, O outputs, R rows, P parts, J inputs of a part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Parts of a float32 product of one row, and of a product with an int8 table.
PARTS, TABLE_PARTS = 4, 16
# Products of one row with int8 numbers that are added up in registers.
TERMS, LANES = 16, 64


def matmul(x: jax.Array, kernel_IO: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Multiply `x` (..., I) with a kernel; a single float32 row in parts, which the cores share.

  One row takes as long as reading the kernel. XLA leaves that to one core, which does not use all
  of the machine's bandwidth: the parts take 0.7 to 0.9 of the time on two cores.
  """
  inputs = len(kernel_IO)
  if x.size != inputs or inputs % PARTS or jnp.dtype(dtype) != jnp.float32:
    return jnp.matmul(x.astype(dtype), kernel_IO.astype(dtype), preferred_element_type=jnp.float32)
  x_PI = x.astype(jnp.float32).reshape(PARTS, -1)
  kernel_PIO = kernel_IO.astype(jnp.float32).reshape(*x_PI.shape, -1)
  return jnp.einsum('PI,PIO->PO', x_PI, kernel_PIO).sum(axis=0).reshape(*x.shape[:-1], -1)


def matmul_stored(
  x_RI: jax.Array, stored: Any, read: Callable[[Any], jax.Array], dtype: DTypeLike
) -> jax.Array:
  """Multiply with the kernel (in..., out...) that `read` makes of stored arrays, part after part.

  XLA would first write out all kernels of a model as float32: memory that the small ones were to
  save, and the time to fault it in. A part is still in the cache when it is multiplied: for 8 to 64
  rows that takes 0.5 to 0.9 of the time of a float32 kernel.

  Args:
    x_RI: activations.
    stored: an int8 kernel, or arrays whose first axis is that of the inputs or of groups of them.
    read: makes a kernel of stretches of the arrays.
    dtype: dtype of the operands.
  """
  rows, inputs = x_RI.shape
  if rows == 1 and inputs % TERMS == 0 and isinstance(stored, jax.Array):
    return _row_by_int8(x_RI[0], stored.reshape(inputs, -1))
  lengths = [leaf.shape[0] for leaf in jax.tree.leaves(stored)]
  parts = next((n for n in (2, 3) if all(length % n == 0 for length in lengths)), 1)
  if parts == 1:
    return matmul(x_RI, read(stored).reshape(inputs, -1), dtype)

  @jax.checkpoint  # A gradient reads the parts again.
  def add(y_RO, part):
    x_RJ, stretch = part
    kernel_JO = read(stretch).reshape(inputs // parts, -1)
    return y_RO + jnp.matmul(x_RJ, kernel_JO, preferred_element_type=jnp.float32), None

  x_PRJ = x_RI.astype(dtype).reshape(rows, parts, -1).swapaxes(0, 1)
  split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), stored)
  outputs = jax.eval_shape(read, stored).size // inputs
  return jax.lax.scan(add, jnp.zeros((rows, outputs)), (x_PRJ, split))[0]


def matmul_table(x_RI: jax.Array, levels_OI: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Multiply with every row of an int8 table, without a float32 copy of it."""
  rows, inputs = x_RI.shape
  if rows == 1 and inputs % LANES == 0:
    x_CJ = x_RI.astype(jnp.float32).reshape(-1, LANES)
    levels_OCJ = levels_OI.reshape(-1, *x_CJ.shape)
    part_OJ = sum(x_CJ[None, c] * levels_OCJ[:, c].astype(jnp.float32) for c in range(len(x_CJ)))
    return jnp.ones((1, LANES)) @ jax.lax.optimization_barrier(part_OJ).T

  def multiply(part_CI):
    return jnp.matmul(x_RI.astype(dtype), part_CI.T.astype(dtype),
                      preferred_element_type=jnp.float32)

  parts = TABLE_PARTS if len(levels_OI) % TABLE_PARTS == 0 else 1
  y_PRC = jax.lax.map(jax.checkpoint(multiply), levels_OI.reshape(parts, -1, inputs))
  return y_PRC.swapaxes(0, 1).reshape(rows, -1)


def _row_by_int8(x_I: jax.Array, levels_IO: jax.Array) -> jax.Array:
  """Multiply one row with int8 numbers as they lie in memory.

  XLA would first write a float32 copy of the kernel, four times its size. A sum of `TERMS`
  element-wise products is one loop over the outputs, which it vectorises; the barrier keeps the
  remaining sum out of that loop. Twice as fast as a float32 product of one row.
  """
  x_GC = x_I.astype(jnp.float32).reshape(-1, TERMS)
  levels_GCO = levels_IO.reshape(*x_GC.shape, -1)
  part_GO = sum(x_GC[:, c, None] * levels_GCO[:, c].astype(jnp.float32) for c in range(TERMS))
  return jnp.ones((1, x_GC.shape[0])) @ jax.lax.optimization_barrier(part_GO)
