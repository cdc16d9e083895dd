"""Matrix products that XLA's CPU backend is slow at: one row, weights stored smaller, experts.

All accumulate in float32. Letters: I inputs, O outputs, R rows, P parts of J inputs, U in a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Parts of a float32 product of one row, and of a product with an int8 table.
PARTS, TABLE_PARTS = 4, 16
# Most rows of a block in a product with the kernels of experts.
MAX_BLOCK = 128
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
  x_RI: jax.Array, kernels: Any, sizes_E: jax.Array, read: Callable[[Any], jax.Array],
  dtype: DTypeLike,
) -> jax.Array:
  """Multiply consecutive groups of rows, each by its own kernel, as `jax.lax.ragged_dot`.

  For that XLA multiplies all rows by every kernel. Here a block of rows is multiplied by the one
  kernel of its group: with 64 experts in an eightieth of the time.

  Args:
    x_RI: rows, sorted by group. The result of those behind the last group means nothing.
    kernels: an array (E, I, O), or arrays with E in front; only the former has a gradient.
    sizes_E: rows of each group.
    read: makes the kernel (I, O) of one group.
    dtype: dtype of the operands.
  """
  return _by_blocks(x_RI, kernels, sizes_E, read, dtype, 0)


def _by_blocks(x_RI, kernels, sizes_E, read, dtype, contracted: int) -> jax.Array:
  rows, (block, expert_P, start_P, _, count) = len(x_RI), _blocks(len(x_RI), sizes_E)
  x_RI = jnp.pad(x_RI.astype(dtype), ((0, block), (0, 0)))

  def kernel(expert: Any) -> jax.Array:
    return read(jax.tree.map(lambda leaf: leaf[expert], kernels)).astype(dtype)

  def multiply(part, y_RO):
    x_UI = jax.lax.dynamic_slice_in_dim(x_RI, start_P[part], block)
    y_UO = jax.lax.dot_general(x_UI, kernel(expert_P[part]), (((1,), (contracted,)), ((), ())),
                               preferred_element_type=jnp.float32)
    # Rows of the next group are overwritten by its own block.
    return jax.lax.dynamic_update_slice_in_dim(y_RO, y_UO, start_P[part], 0)

  outputs = jax.eval_shape(kernel, 0).shape[1 - contracted]
  return jax.lax.fori_loop(0, count, multiply, jnp.zeros((rows + block, outputs)))[:rows]


def _blocks(rows: int, sizes_E: jax.Array) -> tuple[int, jax.Array, jax.Array, jax.Array, Any]:
  """Return the rows of a block; group, first row and rows left of each block; their number."""
  groups = len(sizes_E)
  # A power of two, a quarter to a half of the mean size of a group.
  block = max(1, min(MAX_BLOCK, 2 ** (rows // groups).bit_length() // 4))
  ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // block)
  index_P = jnp.arange(rows // block + groups)
  last_E = jnp.cumsum(blocks_E)
  expert_P = jnp.minimum(jnp.searchsorted(last_E, index_P, side='right'), groups - 1)
  start_P = (ends_E - sizes_E)[expert_P] + (index_P - (last_E - blocks_E)[expert_P]) * block
  return block, expert_P, start_P, ends_E[expert_P] - start_P, last_E[-1]


def _grouped_forward(x_RI, kernels, sizes_E, read, dtype):
  return _by_blocks(x_RI, kernels, sizes_E, read, dtype, 0), (x_RI, kernels, sizes_E)


def _grouped_backward(read, dtype, saved, dy_RO):
  x_RI, kernels, sizes_E = saved
  dx_RI = _by_blocks(dy_RO, kernels, sizes_E, read, dtype, 1).astype(x_RI.dtype)
  if not isinstance(kernels, jax.Array):
    return dx_RI, None, None
  block, expert_P, start_P, left_P, count = _blocks(len(x_RI), sizes_E)
  x_RI, dy_RO = (jnp.pad(rows.astype(dtype), ((0, block), (0, 0))) for rows in (x_RI, dy_RO))

  def add(part, total_EIO):
    x_UI, dy_UO = (jax.lax.dynamic_slice_in_dim(rows, start_P[part], block)
                   for rows in (x_RI, dy_RO))
    x_UI = jnp.where(jnp.arange(block)[:, None] < left_P[part], x_UI, 0)
    added_IO = jnp.matmul(x_UI.T, dy_UO, preferred_element_type=jnp.float32)
    return total_EIO.at[expert_P[part]].add(added_IO)

  total_EIO = jax.lax.fori_loop(0, count, add, jnp.zeros(kernels.shape))
  return dx_RI, total_EIO.astype(kernels.dtype), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)
