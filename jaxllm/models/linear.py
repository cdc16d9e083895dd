"""The one place where a weight meets an activation.

`Linear` and `Embed` hold every matrix of a decoder; whatever changes how weights are stored or
applied (compute dtype, LoRA, quantised kernels) is changed here and nowhere else.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pydantic
from jax.typing import DTypeLike

from jaxllm.config import Config
from jaxllm.sharding import constrain, num_parts, platform


class InitializerConfig(Config):
  """How weight matrices start: normal with mean 0; biases 0, norm scales 1."""

  stddev: float | None = pydantic.Field(default=0.02, gt=0)
  """Standard deviation of kernels and embeddings; None: 1 / sqrt(inputs) for each kernel and 1 for
  embeddings."""
  scale_residual: bool = True
  """Divide the deviation of kernels that write into the residual stream by sqrt(2 * num_layers), as
  GPT-2 does."""


# A quantised kernel: {'int8', 'scale'} or {'int4', 'scale'}, see `adapters.quantization`.
Quantized = Mapping[str, jax.Array]
# How many products of a row with int8 numbers are added up in registers on CPU.
TERMS, LANES = 16, 64
# Stretches of an int8 table that are multiplied one after the other on CPU.
ROW_PARTS = 16
# Parts of a product with a single row on CPU, which the cores share.
PARTS = 4


def is_quantized(kernel: Any) -> bool:
  """Return whether this is a quantised kernel and not an array."""
  return isinstance(kernel, Mapping) and ('int8' in kernel or 'int4' in kernel)


def dequantize(kernel: Quantized, dtype: Any) -> jax.Array:
  """Return the array that a quantised kernel stands for."""
  scale = kernel['scale']
  if 'int8' in kernel:
    return (kernel['int8'].astype(jnp.float32) * scale).astype(dtype)
  packed = kernel['int4']
  # The grouped axis: two inputs per byte, `scale.shape[axis]` groups.
  axis = next(i for i in range(packed.ndim) if packed.shape[i] != scale.shape[i])
  groups = scale.shape[axis]
  outer, inner = packed.shape[:axis], packed.shape[axis + 1 :]
  packed = packed.reshape(*outer, groups, -1, *inner)
  # Shifting back and forth extends the sign.
  halves = [jax.lax.shift_right_arithmetic(jax.lax.shift_left(packed, jnp.int8(4)), jnp.int8(4)),
            jax.lax.shift_right_arithmetic(packed, jnp.int8(4))]
  levels = jnp.concatenate(halves, axis=axis + 1).astype(jnp.float32)
  return (levels * jnp.expand_dims(scale, axis + 1)).reshape(*outer, -1, *inner).astype(dtype)


def dense(
  x: jax.Array, kernel: jax.Array | Quantized, num_in: int, dtype: DTypeLike,
  result_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
  """Contract the trailing `num_in` axes of `x` with the leading ones of `kernel`.

  All other axes are folded into one on either side, which leaves a plain matrix product: faster
  than a contraction over several axes on CPU, and equal elsewhere. Only a length that is split over
  devices stays an axis of its own: folded, it would be gathered first.

  Args:
    x: activations (..., in...).
    kernel: weights (in..., out...), or a quantised kernel.
    num_in: how many axes are contracted.
    dtype: dtype of the operands; products are accumulated in float32.
    result_dtype: what the caller makes of the result. Partial sums of several devices are added up
      in it. CPUs return float32 all the same, which is twice as fast for bfloat16 operands.

  Returns:
    (..., out...) in float32 or `result_dtype`.
  """
  if isinstance(kernel, Mapping):
    return _dense_quantized(x, kernel, num_in, dtype)
  lead, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
  inputs = math.prod(kernel.shape[:num_in])
  single = math.prod(lead) == 1 and inputs % PARTS == 0
  if single and platform() == 'cpu' and jnp.dtype(dtype) == jnp.float32:
    return _one_row(x.reshape(-1), kernel.reshape(inputs, -1)).reshape(*lead, *out)
  rows = lead if num_parts('length') > 1 else (-1,)
  y = jnp.matmul(
    x.reshape(*rows, inputs).astype(dtype),
    kernel.reshape(inputs, -1).astype(dtype),
    preferred_element_type=jnp.float32 if platform() == 'cpu' else result_dtype,
  )
  return y.reshape(*lead, *out)


def _matmul(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
  return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def _one_row(x_I: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  """Multiply a single row in parts: XLA's CPU backend would leave the whole to one core.

  Reading the kernel once is all the time that it takes, and one core does not use all of the
  machine's bandwidth: the parts take 0.7 to 0.9 of the time on two cores.
  """
  x_PI = x_I.astype(jnp.float32).reshape(PARTS, -1)
  kernel_PIO = kernel_IO.astype(jnp.float32).reshape(*x_PI.shape, -1)
  return jnp.einsum('PI,PIO->PO', x_PI, kernel_PIO).sum(axis=0)


def _dense_quantized(
  x: jax.Array, kernel: Quantized, num_in: int, dtype: DTypeLike
) -> jax.Array:
  # A kernel that is reshaped before it is tied, and after that again, would be copied.
  scale = kernel['scale']
  if 'int4' in kernel:
    x, packed = _together(x, kernel['int4'])
    return _in_parts(x, {'int4': packed, 'scale': scale}, num_in,
                     lambda part: dequantize(part, dtype), dtype)
  x, levels = _together(x, kernel['int8'])
  lead, out = x.shape[: x.ndim - num_in], levels.shape[num_in:]
  inputs = math.prod(levels.shape[:num_in])
  if math.prod(lead) == 1 and inputs % TERMS == 0 and platform() == 'cpu':
    y = _one_row_of_levels(x.reshape(-1), levels.reshape(inputs, -1)).reshape(*lead, *out)
  else:
    y = _in_parts(x, levels, num_in, lambda part: part.astype(dtype), dtype)
  return y * scale.reshape(*[1] * len(lead), *out)


def _together(x: jax.Array, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Tie a kernel to an activation: else a decoding loop keeps a float32 copy of it, made before."""
  return jax.lax.optimization_barrier((x, stored))


def _in_parts(
  x: jax.Array, stored: Any, num_in: int, read: Callable[[Any], jax.Array], dtype: DTypeLike
) -> jax.Array:
  """Do as `dense` with a kernel that is stored smaller, part after part on CPU.

  Its backend would first write out all kernels of a model as float32: memory that the small ones
  were to save, and the time to fault it in. A part is still in the cache when it is multiplied: for
  8 to 64 rows that takes 0.5 to 0.9 of the time of a float32 kernel.

  Args:
    x: activations (..., in...).
    stored: arrays whose first axis is that of the inputs, or of groups of them.
    num_in: how many axes are contracted.
    read: makes a kernel (in..., out...) of stretches of the arrays.
    dtype: of the operands.
  """
  lengths = [leaf.shape[0] for leaf in jax.tree.leaves(stored)]
  parts = next((n for n in (2, 3) if all(length % n == 0 for length in lengths)), 1)
  if platform() != 'cpu' or parts == 1:
    return dense(x, read(stored), num_in, dtype)
  kernel = jax.eval_shape(read, stored)
  lead, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
  rows = math.prod(lead)
  x_PRJ = x.astype(dtype).reshape(rows, parts, -1).swapaxes(0, 1)
  split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), stored)

  # A gradient reads the parts again.
  @jax.checkpoint
  def add(y_RO, part):
    x_RJ, stretch = part
    return y_RO + _matmul(x_RJ, read(stretch).reshape(x_RJ.shape[1], -1), dtype), None

  y_RO, _ = jax.lax.scan(add, jnp.zeros((rows, math.prod(out))), (x_PRJ, split))
  return y_RO.reshape(*lead, *out)


def _one_row_of_levels(x_I: jax.Array, levels_IO: jax.Array) -> jax.Array:
  """Multiply one row with int8 numbers as they lie in memory.

  XLA's CPU backend would first write a float32 copy of the kernel, four times its size. A sum of
  `TERMS` element-wise products is one loop over the outputs, which it vectorises; the barrier keeps
  the remaining sum out of that loop. Twice as fast as a float32 product of one row.
  """
  x_GC = x_I.astype(jnp.float32).reshape(-1, TERMS)
  levels_GCO = levels_IO.reshape(*x_GC.shape, -1)
  part_GO = sum(x_GC[:, c, None] * levels_GCO[:, c].astype(jnp.float32) for c in range(TERMS))
  return jnp.ones((1, x_GC.shape[0])) @ jax.lax.optimization_barrier(part_GO)


def _one_row_of_levels_transposed(x_I: jax.Array, levels_OI: jax.Array) -> jax.Array:
  """Do the same for a kernel whose outputs come first."""
  x_CJ = x_I.astype(jnp.float32).reshape(-1, LANES)
  levels_OCJ = levels_OI.reshape(-1, *x_CJ.shape)
  part_OJ = sum(x_CJ[None, c] * levels_OCJ[:, c].astype(jnp.float32) for c in range(len(x_CJ)))
  return jnp.ones((1, LANES)) @ jax.lax.optimization_barrier(part_OJ).T


class Linear(nn.Module):
  """Affine map between groups of axes: (..., in...) -> (..., out...).

  Given a `lora` collection with this module's path, its low-rank product is added:
  `x a b * scale`, with a (in..., R), b (R, out...) and a constant scalar `scale` (1 if absent).

  Attributes:
    inputs: sizes of the contracted axes.
    outputs: sizes of the new axes.
    axes: logical names of `inputs` then `outputs`.
    stddev: standard deviation of the initial kernel.
    use_bias: whether a bias (out...) is added.
    dtype: dtype of the operands.
    result_dtype: dtype of the result; None: `dtype`.

  Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str, ...]
  stddev: float
  use_bias: bool
  dtype: DTypeLike
  result_dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return (..., out...) of `x` (..., in...)."""
    initial = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
    kernel: Any = self.get_variable('params', 'kernel')
    if not is_quantized(kernel):
      kernel = self.param('kernel', initial, self.inputs + self.outputs)
    result_dtype = self.result_dtype or self.dtype
    y = dense(x, kernel, len(self.inputs), self.dtype, result_dtype)
    if self.has_variable('lora', 'a'):
      y = y + self._low_rank(x)
    if self.use_bias:
      names = self.axes[len(self.inputs):]
      initial = nn.with_logical_partitioning(nn.initializers.zeros, names)
      bias: Any = self.param('bias', initial, self.outputs)
      y = y + jax.lax.expand_dims(bias.astype(y.dtype), range(y.ndim - bias.ndim))
    return y.astype(result_dtype)

  def _low_rank(self, x: jax.Array) -> jax.Array:
    a: Any = self.get_variable('lora', 'a')
    b: Any = self.get_variable('lora', 'b')
    scale = jax.lax.stop_gradient(self.get_variable('lora', 'scale', 1.0))
    return dense(dense(x, a, len(self.inputs), self.dtype) * scale, b, 1, self.dtype)


class Embed(nn.Module):
  """A table with one row of D numbers per id.

  Attributes:
    num_rows: size of the table.
    embed_dim: D.
    axes: logical names of the two axes.
    stddev: standard deviation of the initial table.
    dtype: dtype of operands and results.
  """

  num_rows: int
  embed_dim: int
  axes: tuple[str, str]
  stddev: float
  dtype: DTypeLike

  def setup(self):  # noqa: D102
    initial = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
    self.embedding = self.get_variable('params', 'embedding')
    if not is_quantized(self.embedding):
      self.embedding = self.param('embedding', initial, (self.num_rows, self.embed_dim))

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Return the rows (B, T, D) of `ids_BT`, which must be below `num_rows`; B may be 1.

    On a mesh, devices that split the table look up their own columns of all their rows. Left to
    itself the compiler may gather the whole table, and add up gradients of the size of it.
    """
    rows = 'lookup_batch' if ids_BT.shape[0] > 1 else None
    ids_BT = constrain(ids_BT, rows, 'length')
    if is_quantized(self.embedding):
      found = {name: table[ids_BT] for name, table in self.embedding.items()}
      x_BTD = dequantize(found, self.dtype)
    else:
      x_BTD = self.embedding[ids_BT].astype(self.dtype)
    return constrain(x_BTD, rows, 'length', self.axes[1])

  def attend(self, x: jax.Array) -> jax.Array:
    """Return the product (..., num_rows) of `x` (..., D) with every row, in float32."""
    if not is_quantized(self.embedding):
      return _matmul(x, self.embedding.T, self.dtype)
    levels_VD, scale_V1 = self.embedding['int8'], self.embedding['scale']
    x_RD, levels_VD = _together(x.reshape(-1, self.embed_dim), levels_VD)
    if len(x_RD) == 1 and self.embed_dim % LANES == 0 and platform() == 'cpu':
      y_RV = _one_row_of_levels_transposed(x_RD[0], levels_VD)
    elif platform() == 'cpu' and self.num_rows % ROW_PARTS == 0:
      levels_PCD = levels_VD.reshape(ROW_PARTS, -1, self.embed_dim)
      y_PRC = jax.lax.map(
        jax.checkpoint(lambda part_CD: _matmul(x_RD, part_CD.T, self.dtype)), levels_PCD)
      y_RV = y_PRC.swapaxes(0, 1).reshape(len(x_RD), -1)
    else:
      y_RV = _matmul(x_RD, levels_VD.T, self.dtype)
    return (y_RV * scale_V1.T).reshape(*x.shape[:-1], -1)
