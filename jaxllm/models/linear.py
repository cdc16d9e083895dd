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
from jaxllm.models import cpu_kernels
from jaxllm.sharding import constrain, num_parts, platform


class InitializerConfig(Config):
  """How weight matrices start: normal with mean 0; biases 0, norm scales 1."""

  stddev: float | None = pydantic.Field(default=0.02, gt=0)
  """Standard deviation of kernels and embeddings; None: 1 / sqrt(inputs) of kernels, else 1."""
  scale_residual: bool = True
  """Divide the deviation of kernels that write into the residual stream by sqrt(2 * num_layers), as
  GPT-2 does."""


# A quantised kernel: {'int8', 'scale'} or {'int4', 'scale'}, see `adapters.quantization`.
Quantized = Mapping[str, jax.Array]


def num_inputs(path: str) -> int:
  """Return how many leading axes are contracted of a kernel, by its path or its module's."""
  return 2 if path.removesuffix('/kernel').rpartition('/')[2] == 'out' else 1


def num_stacked(path: str) -> int:
  """Return how many leading axes of a kernel count matrices, by its path: layers and experts."""
  parts = path.split('/')
  return int(parts[0] == 'layers' and not parts[1].isdecimal()) + int('experts' in parts)


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
  outer, inner = packed.shape[:axis], packed.shape[axis + 1 :]
  packed = packed.reshape(*outer, scale.shape[axis], -1, *inner)
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

  All other axes are folded into one, which is faster on CPU and equal elsewhere. Only a length that
  is split over devices stays an axis of its own: folded, it would be gathered first.

  Args:
    x: activations (..., in...).
    kernel: weights (in..., out...), or a quantised kernel.
    num_in: how many axes are contracted.
    dtype: dtype of the operands; products are accumulated in float32.
    result_dtype: dtype in which partial sums of several devices are added up. CPUs return float32
      all the same, which is twice as fast for bfloat16 operands.

  Returns:
    (..., out...) in float32 or `result_dtype`.
  """
  if isinstance(kernel, Mapping):
    return _dense_quantized(x, kernel, num_in, dtype)
  lead, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
  kernel_IO = kernel.reshape(math.prod(kernel.shape[:num_in]), -1)
  rows = lead if num_parts('length') > 1 else (-1,)
  x = x.reshape(*rows, len(kernel_IO))
  if platform() == 'cpu':
    y = cpu_kernels.matmul(x, kernel_IO, dtype)
  else:
    y = jnp.matmul(x.astype(dtype), kernel_IO.astype(dtype), preferred_element_type=result_dtype)
  return y.reshape(*lead, *out)


def _dense_quantized(x: jax.Array, kernel: Quantized, num_in: int, dtype: DTypeLike) -> jax.Array:
  name, lead = 'int4' if 'int4' in kernel else 'int8', x.shape[: x.ndim - num_in]
  x, levels = _tie(x, kernel[name])
  stored: Any = {name: levels, 'scale': kernel['scale']} if name == 'int4' else levels

  def read(part: Any) -> jax.Array:
    return dequantize(part, dtype) if name == 'int4' else part.astype(dtype)

  if platform() == 'cpu':
    y = cpu_kernels.matmul_stored(x.reshape(math.prod(lead), -1), stored, read, dtype)
    y = y.reshape(*lead, *jax.eval_shape(read, stored).shape[num_in:])
  else:
    y = dense(x, read(stored), num_in, dtype)
  if name == 'int8':
    y *= kernel['scale'].reshape(*[1] * len(lead), *y.shape[len(lead):])
  return y


def _tie(x: jax.Array, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Tie a kernel to an activation: else a decode loop keeps a float32 copy of it, made before.

  Reshape the kernel only after this barrier: XLA copies one that is reshaped on both sides of it.
  """
  return jax.lax.optimization_barrier((x, stored))


def grouped_dense(
  x_RI: jax.Array, kernel: jax.Array | Quantized, sizes_E: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
  """Multiply consecutive groups of rows, each by its own kernel (I, O).

  Args:
    x_RI: activations, sorted by group.
    kernel: (E, I, O), or a quantised kernel.
    sizes_E: rows of each group; None: all have the same. What lies behind the last means nothing.
    dtype: dtype of the operands, and of the result but on CPUs.
  """
  def read(part: Any) -> jax.Array:
    return dequantize(part, dtype) if is_quantized(part) else part

  if sizes_E is None:
    kernel_EIO = read(kernel).astype(dtype)
    x_ECI = x_RI.astype(dtype).reshape(len(kernel_EIO), -1, x_RI.shape[1])
    y_ECO = jnp.einsum('ECI,EIO->ECO', x_ECI, kernel_EIO, preferred_element_type=jnp.float32)
    return y_ECO.reshape(len(x_RI), -1)
  if platform() == 'cpu':
    return cpu_kernels.grouped_matmul(x_RI, kernel, sizes_E, read, dtype)
  return jax.lax.ragged_dot(
    x_RI.astype(dtype), read(kernel).astype(dtype), sizes_E, preferred_element_type=dtype)


@jax.custom_vjp
def in_own_dtype(layer: Any, gradient: Any = None) -> Any:
  """Return the variables of one layer of a stack, as they are.

  The TPU compiler carries a precision backwards: it would cast the whole stack to the compute dtype
  before a scan, and keep that copy beside the parameters. It does not look through bits.

  Args:
    gradient: what the gradient goes to instead, in its dtypes; its values are not read.
  """
  bits = jax.tree.map(
    lambda leaf: jax.lax.bitcast_convert_type(leaf, jnp.int32) if leaf.dtype == jnp.float32
    else leaf, layer)
  return jax.tree.map(
    lambda bits, leaf: jax.lax.bitcast_convert_type(bits, leaf.dtype),
    jax.lax.optimization_barrier(bits), layer)


def _cast_gradient(like: Any, grads: Any) -> tuple[Any, Any]:
  if like is None:
    return grads, None
  return None, jax.tree.map(lambda grad, one: grad.astype(one.dtype), grads, like)


in_own_dtype.defvjp(
  lambda layer, gradient=None: (
    in_own_dtype(layer), jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), gradient)),
  _cast_gradient)


def with_narrow_gradients(scan: Callable[..., Any], dtype: str) -> Callable[..., Any]:
  """Return `scan` of (layers, x_BTD), with gradients of kernels that are held as they are made.

  They are made in the compute dtype, but those of float32 parameters would be float32 in the stack.
  """
  run = jax.custom_vjp(lambda layers, x_BTD: scan((layers,), x_BTD))

  def forward(layers: Any, x_BTD: jax.Array) -> tuple[Any, Any]:
    gradients = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.zeros(leaf.shape, dtype if _is_narrow(path) else leaf.dtype), layers)
    outputs, backward = jax.vjp(
      lambda gradients, x_BTD: scan((layers, gradients), x_BTD), gradients, x_BTD)
    return outputs, (backward, jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), layers))

  def backward(residuals: Any, cotangents: Any) -> tuple[Any, jax.Array]:
    gradients, x_BTD = residuals[0](cotangents)
    return jax.tree.map(lambda one, like: one.astype(like.dtype), gradients, residuals[1]), x_BTD

  run.defvjp(forward, backward)
  return run


def _is_narrow(path: Any) -> bool:
  """Return whether a kernel is cast to the compute dtype before it is used; a router's is not."""
  return path[-1].key == 'kernel' and path[-2].key != 'router'


class Linear(nn.Module):
  """Affine map between groups of axes: (..., in...) -> (..., out...).

  Adds the low-rank product `x a b * scale` of a `lora` collection with this module's path, with a
  (in..., R), b (R, out...) and a constant scalar `scale` (1 if absent).

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
  axes: tuple[str | None, ...]
  stddev: float
  use_bias: bool
  dtype: DTypeLike
  result_dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return (..., out...) of `x` (..., in...)."""
    kernel = _stored(self, 'kernel', self.inputs + self.outputs)
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


class ExpertLinear(nn.Module):
  """The matrices (E, inputs, outputs) of all experts, to be multiplied where their rows are.

  Its adapters have E in front too: a (E, inputs, R), b (E, R, outputs), scale (E). Attributes as in
  `Linear`, without the axis `experts`.
  """

  num_experts: int
  inputs: int
  outputs: int
  axes: tuple[str, str]
  stddev: float

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    """Return {'kernel'} and perhaps {'a', 'b', 'scale'}."""
    shape = self.num_experts, self.inputs, self.outputs
    names = ('experts', *self.axes)
    stored = {'kernel': _stored(self, 'kernel', shape, names)}
    if self.has_variable('lora', 'a'):
      stored |= {name: self.get_variable('lora', name) for name in ('a', 'b', 'scale')}
    return stored


def expert_linear(
  stored: Mapping[str, Any], x_RI: jax.Array, sizes_E: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
  """Apply what `ExpertLinear` returns to rows that are sorted by expert; see `grouped_dense`."""
  y_RO = grouped_dense(x_RI, stored['kernel'], sizes_E, dtype)
  if 'a' in stored:
    scale_E11 = jax.lax.stop_gradient(stored['scale'])[:, None, None]
    low_RR = grouped_dense(x_RI, stored['a'] * scale_E11, sizes_E, dtype)
    y_RO = y_RO + grouped_dense(low_RR, stored['b'], sizes_E, dtype)
  return y_RO.astype(dtype)


class Embed(nn.Module):
  """A table with one row of D numbers per id; attributes as in `Linear`."""

  num_rows: int
  embed_dim: int
  axes: tuple[str, str]
  stddev: float
  dtype: DTypeLike

  def setup(self):  # noqa: D102
    self.embedding = _stored(self, 'embedding', (self.num_rows, self.embed_dim))

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
    x_RD, levels_VD = _tie(x.reshape(-1, self.embed_dim), self.embedding['int8'])
    if platform() == 'cpu':
      y_RV = cpu_kernels.matmul_table(x_RD, levels_VD, self.dtype)
    else:
      y_RV = _matmul(x_RD, levels_VD.T, self.dtype)
    return (y_RV * self.embedding['scale'].T).reshape(*x.shape[:-1], -1)


def _stored(module: Any, name: str, shape: tuple[int, ...], axes: Any = None) -> Any:
  """Return a matrix of a module, or what is quantised in its place."""
  stored = module.get_variable('params', name)
  if is_quantized(stored):
    return stored
  initial = nn.initializers.normal(module.stddev)
  return module.param(name, nn.with_logical_partitioning(initial, axes or module.axes), shape)


def _matmul(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
  return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
