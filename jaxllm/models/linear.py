"""The one place where a weight meets an activation.

`Linear` and `Embed` hold every matrix of a decoder; whatever changes how weights are stored or
applied (compute dtype, LoRA, quantised kernels) is changed here and nowhere else.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.sharding import constrain


class InitializerConfig(Config):
  """How weight matrices start: normal with mean 0; biases 0, norm scales 1."""

  stddev: float | None = pydantic.Field(0.02, gt=0)
  """Standard deviation of kernels and embeddings; None: 1 / sqrt(inputs) for each kernel and 1 for
  embeddings."""
  scale_residual: bool = True
  """Divide the deviation of kernels that write into the residual stream by sqrt(2 * num_layers), as
  GPT-2 does."""


def dense(x: jax.Array, kernel: jax.Array, num_in: int, dtype: jnp.dtype) -> jax.Array:
  """Contract the trailing `num_in` axes of `x` with the leading ones of `kernel`.

  All other axes are folded into one on either side, which leaves a plain matrix product: faster
  than a contraction over several axes on CPU, and equal elsewhere.

  Args:
    x: activations (..., in...).
    kernel: weights (in..., out...).
    num_in: how many axes are contracted.
    dtype: dtype of the operands; products are accumulated in float32.

  Returns:
    (..., out...) float32.
  """
  lead, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
  inputs = math.prod(kernel.shape[:num_in])
  y = jnp.matmul(
    x.reshape(-1, inputs).astype(dtype),
    kernel.reshape(inputs, -1).astype(dtype),
    preferred_element_type=jnp.float32,
  )
  return y.reshape(*lead, *out)


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
  dtype: jnp.dtype
  result_dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return (..., out...) of `x` (..., in...)."""
    initial = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
    kernel = self.param('kernel', initial, self.inputs + self.outputs)
    y = dense(x, kernel, len(self.inputs), self.dtype)
    if self.has_variable('lora', 'a'):
      y = y + self._low_rank(x)
    if self.use_bias:
      names = self.axes[len(self.inputs):]
      initial = nn.with_logical_partitioning(nn.initializers.zeros, names)
      bias = self.param('bias', initial, self.outputs)
      y = y + jax.lax.expand_dims(bias.astype(y.dtype), range(y.ndim - bias.ndim))
    return y.astype(self.result_dtype or self.dtype)

  def _low_rank(self, x: jax.Array) -> jax.Array:
    a, b = self.get_variable('lora', 'a'), self.get_variable('lora', 'b')
    scale = jax.lax.stop_gradient(self.get_variable('lora', 'scale', 1.0))
    return dense(dense(x, a, len(self.inputs), self.dtype), b, 1, self.dtype) * scale


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
  dtype: jnp.dtype

  def setup(self):  # noqa: D102
    initial = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
    self.embedding = self.param('embedding', initial, (self.num_rows, self.embed_dim))

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Return the rows (B, T, D) of `ids_BT`, which must be below `num_rows`; B may be 1.

    On a mesh, devices that split the table look up their own columns of all their rows. Left to
    itself the compiler may gather the whole table, and add up gradients of the size of it.
    """
    rows = 'lookup_batch' if ids_BT.shape[0] > 1 else None
    x_BTD = self.embedding[constrain(ids_BT, rows, 'length')].astype(self.dtype)
    return constrain(x_BTD, rows, 'length', self.axes[1])

  def attend(self, x: jax.Array) -> jax.Array:
    """Return the product (..., num_rows) of `x` (..., D) with every row, in float32."""
    return dense(x, self.embedding.T, 1, self.dtype)
