"""Normalisation of activations, always computed in float32."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import pydantic
from jax.typing import DTypeLike

from jaxllm.config import Config


class NormConfig(Config):
  """Which normalisation stands everywhere in a decoder."""

  kind: Literal['layernorm', 'rmsnorm'] = 'rmsnorm'
  """'layernorm' subtracts the mean, divides by the deviation; 'rmsnorm' by the root mean square."""
  epsilon: float = pydantic.Field(default=1e-5, gt=0)
  """Added to the variance (or mean square) before the root."""
  bias: bool = False
  """Whether a learned bias is added; layernorm only."""
  scale_plus_one: bool = False
  """Multiply by 1 + scale with scale initialised to 0, as Gemma does."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'NormConfig':
    if self.bias and self.kind != 'layernorm':
      raise ValueError(f"bias=True: {self.kind} has no bias; set bias=False or kind='layernorm'")
    return self


class Norm(nn.Module):
  """Normalise over the trailing axes of these sizes (`shape`) and logical names, scale and shift.

  Reference:
    Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450; Zhang, Sennrich, "Root Mean Square
    Layer Normalization", arXiv 1910.07467.
  """

  config: NormConfig
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return `x` (..., *shape) normalised, in `dtype`."""
    config = self.config
    last = tuple(range(-len(self.shape), 0))
    y = x.astype(jnp.float32)
    if config.kind == 'layernorm':
      y = y - y.mean(last, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(last, keepdims=True) + config.epsilon)
    initial = nn.initializers.zeros if config.scale_plus_one else nn.initializers.ones
    scale = self._param('scale', initial, x.ndim)
    y = y * (1 + scale if config.scale_plus_one else scale)
    if config.bias:
      y = y + self._param('bias', nn.initializers.zeros, x.ndim)
    return y.astype(self.dtype)

  def _param(self, name: str, initial: nn.initializers.Initializer, rank: int) -> jax.Array:
    """Return a float32 parameter of `shape`, with leading axes of 1 up to `rank`."""
    value: Any = self.param(name, nn.with_logical_partitioning(initial, self.axes), self.shape)
    return jax.lax.expand_dims(value.astype(jnp.float32), range(rank - len(self.shape)))
