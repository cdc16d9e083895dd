"""Weight-only quantisation, tree to tree: int8 per output channel, int4 per group of inputs.

A quantised kernel is a dict in the place of the array: {'int8', 'scale'} or {'int4', 'scale'}.
`models.linear` reads both. Norms, biases, position tables and routers stay as they are, embeddings
are quantised per row where the config says so. Letters: I inputs, O outputs, G groups.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.config import Config
from jaxllm.models.linear import dequantize, is_quantized, num_inputs, num_stacked

LEVELS = {'int8': 127, 'int4': 7}


class QuantizationConfig(Config):
  """How weights are stored."""

  kind: Literal['int8', 'int4'] = 'int8'
  """int8: one scale per output channel; int4: one per output channel and group of inputs."""
  group_size: int = pydantic.Field(default=32, ge=4, multiple_of=2)
  """Inputs that share a scale in int4; int8 where it does not divide a kernel's last input axis."""
  embeddings: bool = True
  """Whether embedding tables (and with them a tied head) become int8, one scale per row."""


def quantize(variables: Mapping[str, Any], config: QuantizationConfig) -> dict[str, Any]:
  """Return the variables of a model with a quantised dict in place of every kernel.

  Args:
    variables: of a decoder, layers stacked or not; other collections ('lora') stay as they are.
  """
  leaves = flatten_dict(variables['params'])
  return {**variables, 'params': unflatten_dict(
    {path: _quantize(path, leaf, config) for path, leaf in leaves.items()})}


def dequantize_tree(variables: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
  """Return variables with arrays again, rounded as quantisation left them."""
  return jax.tree.map(
    lambda leaf: dequantize(leaf, dtype) if is_quantized(leaf) else leaf, dict(variables),
    is_leaf=is_quantized)


def _quantize(path: tuple[str, ...], leaf: Any, config: QuantizationConfig) -> Any:
  if path == ('embed', 'embedding') and config.embeddings:
    # One scale per row: the table is (outputs, inputs) where it is the head.
    return _per_channel(leaf, lead=1, inputs=1)
  if path[-1] != 'kernel' or path[-2] in ('router', 'shared_gate'):
    return leaf
  stacked, inputs = num_stacked('/'.join(path)), num_inputs(path[-2])
  last = stacked + inputs - 1
  if config.kind == 'int4' and leaf.shape[last] % config.group_size == 0:
    return _grouped(leaf, last, config.group_size)
  return _per_channel(leaf, stacked, inputs)


def _per_channel(kernel: jax.Array, lead: int, inputs: int) -> dict[str, jax.Array]:
  axes = tuple(range(lead, lead + inputs))
  scale = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True).astype(jnp.float32) / LEVELS['int8']
  scale = jnp.where(scale > 0, scale, 1.0)
  return {'int8': jnp.round(kernel / scale).astype(jnp.int8), 'scale': scale}


def _grouped(kernel: jax.Array, axis: int, group_size: int) -> dict[str, jax.Array]:
  """Pack two inputs per byte: the first half of a group in the low bits, the rest in the high."""
  outer, inner = kernel.shape[:axis], kernel.shape[axis + 1 :]
  grouped = kernel.reshape(*outer, -1, group_size, *inner)
  scale = jnp.max(jnp.abs(grouped), axis=axis + 1).astype(jnp.float32) / LEVELS['int4']
  scale = jnp.where(scale > 0, scale, 1.0)
  levels = jnp.round(grouped / jnp.expand_dims(scale, axis + 1)).astype(jnp.int8)
  low, high = jnp.split(levels, 2, axis=axis + 1)
  packed = (low & jnp.int8(15)) | jax.lax.shift_left(high, jnp.int8(4))
  return {'int4': packed.reshape(*outer, -1, *inner), 'scale': scale}
