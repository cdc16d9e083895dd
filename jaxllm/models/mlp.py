"""The feed-forward half of a block."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models.config import DecoderConfig
from jaxllm.models.linear import Linear
from jaxllm.sharding import constrain

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}


class Mlp(nn.Module):
  """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)).

  Reference:
    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Return (B, T, D) in the dtype of `x_BTD`."""
    config = self.config
    activation = ACTIVATIONS[config.activation]
    up_BTF = checkpoint_name(self._widen('up')(x_BTD), 'mlp_up')
    hidden_BTF = (
      activation(checkpoint_name(self._widen('gate')(x_BTD), 'mlp_up')) * up_BTF if config.gated
      else activation(up_BTF))
    hidden_BTF = constrain(hidden_BTF, 'batch', 'length', 'mlp')
    stddev = config.stddev(config.mlp_dim, residual=True)
    return Linear((config.mlp_dim,), (config.embed_dim,), ('mlp', 'embed'), stddev,
                  'mlp' in config.biases, config.dtype, name='down')(hidden_BTF)

  def _widen(self, name: str) -> Linear:
    config = self.config
    return Linear((config.embed_dim,), (config.mlp_dim,), ('embed', 'mlp'),
                  config.stddev(config.embed_dim), 'mlp' in config.biases, config.dtype, name=name)
