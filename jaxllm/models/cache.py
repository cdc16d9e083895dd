"""Keys and values of tokens already seen: an explicit argument and result of `Decoder.extend`."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxllm import sharding
from jaxllm.models.config import DecoderConfig
from jaxllm.sharding import Placement

_AXES = ('layers', 'batch', 'kv_heads', None, None)


@flax.struct.dataclass
class KVCache:
  """Keys and values of every layer, S positions per row.

  Attributes:
    keys: (L, B, K, S, H), or one (B, K, S, H) per layer.
    values: as `keys`.
    lengths_B: int32, how many positions of each row are filled, from 0 on.
    key_scales: float32, like `keys` with H = 1, where these are int8; else None.
    value_scales: as `key_scales`.
  """

  keys: jax.Array | tuple[jax.Array, ...]
  values: jax.Array | tuple[jax.Array, ...]
  lengths_B: jax.Array  # noqa: N815
  key_scales: jax.Array | tuple[jax.Array, ...] | None = None
  value_scales: jax.Array | tuple[jax.Array, ...] | None = None


def init_cache(
  config: DecoderConfig, batch_size: int, length: int, dtype: jnp.dtype | None = None,
  stacked: bool = True, placement: Placement | None = None,
) -> KVCache:
  """Return an empty cache.

  Args:
    batch_size: B.
    length: S, the longest prompt and continuation together.
    dtype: dtype of keys and values; the config's by default. int8: each is quantised on its own.
    stacked: one array for all layers (for scanned layers), or one per layer, which is updated in
      place by unrolled layers (fast decoding on CPU; see `unstack`).
    placement: the devices of the model; None: the default one.
  """
  shape = (batch_size, config.kv_heads, length, config.head_size)
  dtype = jnp.dtype(dtype or config.dtype)

  def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    where = placement and placement.sharding(shape, *_AXES[-len(shape) :])
    return jnp.zeros(shape, dtype, device=where)

  def make(shape: tuple[int, ...], dtype: Any) -> jax.Array | tuple[jax.Array, ...]:
    if stacked:
      return zeros((config.num_layers, *shape), dtype)
    return tuple(zeros(shape, dtype) for _ in range(config.num_layers))

  empty = functools.partial(make, shape, dtype)
  lengths_B = jnp.zeros(
    batch_size, jnp.int32, device=placement and placement.sharding((batch_size,), None))
  if dtype != jnp.int8:
    return KVCache(empty(), empty(), lengths_B)
  scales = functools.partial(make, (*shape[:-1], 1), jnp.float32)
  return KVCache(empty(), empty(), lengths_B, scales(), scales())


def constrain(cache: KVCache) -> KVCache:
  """Pin the sharding of a cache to that of `init_cache`."""
  return jax.tree.map(
    lambda leaf: sharding.constrain(leaf, *_AXES[-leaf.ndim :] if leaf.ndim > 1 else [None]), cache)


def write(
  cache: KVCache, layer: int | jax.Array, positions_BT: jax.Array, key_BKTH: jax.Array,
  value_BKTH: jax.Array,
) -> KVCache:
  """Put new keys and values of one layer into their positions; one past the end is dropped."""
  if positions_BT.size == 1:
    # XLA turns a scatter of a single row into an update that copies the cache; with a second row,
    # which is dropped, it happens in place.
    positions_BT = jnp.pad(positions_BT, ((0, 0), (0, 1)), constant_values=cache.keys[0].shape[-2])
    one_more = (0, 0), (0, 0), (0, 1), (0, 0)
    key_BKTH, value_BKTH = jnp.pad(key_BKTH, one_more), jnp.pad(value_BKTH, one_more)
  row_B1 = jnp.arange(positions_BT.shape[0], dtype=jnp.int32)[:, None]

  def put(old: jax.Array | tuple[jax.Array, ...], new_BKTH: jax.Array):
    new_BTKH = new_BKTH.swapaxes(1, 2).astype(old[0].dtype)
    if isinstance(old, tuple):
      changed = old[layer].at[row_B1, :, positions_BT].set(new_BTKH, mode='drop')
      return (*old[:layer], changed, *old[layer + 1 :])
    return old.at[layer, row_B1, :, positions_BT].set(new_BTKH, mode='drop')

  new = {'keys': key_BKTH, 'values': value_BKTH}
  if cache.key_scales is not None:
    (new['keys'], new['key_scales']), (new['values'], new['value_scales']) = map(
      _to_int8, (key_BKTH, value_BKTH))
  return dataclasses.replace(
    cache, **{name: put(getattr(cache, name), leaf) for name, leaf in new.items()})


def read(
  cache: KVCache, layer: int | jax.Array, start: int | jax.Array = 0, count: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Return one layer's keys and values, (B, K, S, H) each; those of some positions where given."""

  def cut(leaves: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    leaf = leaves[layer]
    return leaf if count is None else jax.lax.dynamic_slice_in_dim(leaf, start, count, 2)

  keys, values = cut(cache.keys), cut(cache.values)
  if cache.key_scales is None or cache.value_scales is None:
    return keys, values
  return keys * cut(cache.key_scales), values * cut(cache.value_scales)


def _to_int8(new_BKTH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return whole numbers up to 127 and the scale of each key or value."""
  new_BKTH = new_BKTH.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(new_BKTH).max(axis=-1, keepdims=True) / 127, 1e-30)
  return jnp.round(new_BKTH / scale), scale
