"""Self-attention: projections, rotation, masks, and the product of queries, keys and values.

`View` is what a layer of one kind sees of a call: computed once, shared by all layers of the kind.
Whole sequences may go to a fused kernel, whose memory grows with the length, not its square:
cuDNN's on NVIDIA GPUs, or on TPUs those of `tpu_kernels`.

Axis letters beyond the usual: R = T * G, the queries of all heads that share a key head.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm import sharding
from jaxllm.models import cache as kv_cache
from jaxllm.models.config import DecoderConfig
from jaxllm.models.linear import Linear
from jaxllm.models.norms import Norm
from jaxllm.models.positions import rotate

# Finite, so that a row without any visible key gives no NaN, forward or backward.
MASKED = -1e30
# Positions of a cache that are read at a time.
BLOCK = 128
# Under this name a remat policy may keep what the heads return instead of running them again.
RESIDUAL_NAME = 'attention'
# Linen's collection of what layers computed on the way; filled where `apply` is asked for it.
INTERMEDIATES = 'intermediates'


@flax.struct.dataclass
class View:
  """What queries of one layer kind see, and how they are rotated.

  Attributes:
    mask_BTS: True where the key is visible; B may be 1. None: left to a fused kernel.
    rotation: (cos_BTP, sin_BTP), or None where nothing is rotated; B may be 1.
    segment_ids_BT: int32, 0 = padding, or None: one segment; for experts, and instead of a mask.
    cache_length: int32 scalar, the filled positions of the longest row; nothing beyond is read.
    window: the place of what a fused kernel sees among `config.windows`.
  """

  mask_BTS: jax.Array | None  # noqa: N815
  rotation: tuple[jax.Array, jax.Array] | None
  segment_ids_BT: jax.Array | None = None  # noqa: N815
  cache_length: jax.Array | None = None
  window: int | jax.Array = 0


def sequence_mask(
  length: int, segment_ids_BT: jax.Array | None, window: int | None
) -> jax.Array:
  """Return which keys each query of a whole sequence sees, (B or 1, T, T).

  Those are itself and what stands before it in its own segment, at most `window` tokens; padding
  (segment 0) sees padding, so that no row is empty.
  """
  index_T = jnp.arange(length, dtype=jnp.int32)
  mask_BTS = cache_mask(index_T[None], length, window)
  if segment_ids_BT is not None:
    mask_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  return mask_BTS


def cache_mask(query_BT: jax.Array, cache_length: int, window: int | None) -> jax.Array:
  """Return which of S cache positions the queries at `query_BT` see, (B, T, S)."""
  position_11S = jnp.arange(cache_length, dtype=jnp.int32)[None, None, :]
  distance_BTS = query_BT[:, :, None] - position_11S
  mask_BTS = distance_BTS >= 0
  return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """Squash `x` into (-cap, cap); None: return it as is."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
  query_BTNH: jax.Array, key_BKSH: jax.Array, value_BKSH: jax.Array, mask_BTS: jax.Array,
  scale: float, cap: float | None = None,
  dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
  """Average the values of visible keys, weighted by the softmax of their logits.

  The query heads of a group are folded into the rows of one matrix product with the key head that
  they share, so that keys and values are never repeated. Masking adds to the logits and the softmax
  is divided out of the small result: both are faster than the usual order.

  Args:
    key_BKSH: keys; each head serves the N / K consecutive query heads of its group.
    mask_BTS: True where the key is visible; B may be 1.
    scale: factor of the logits.
    cap: logits x become cap * tanh(x / cap); None: off.
    dropout: applied to the weights.

  Returns:
    (B, T, N, H) in the dtype of the queries; H is that of the values.
  """
  query_BKTGH = _grouped(query_BTNH, key_BKSH.shape[1], scale)
  _, total_BKTG1, mixed_BKTGH = _weigh(query_BKTGH, key_BKSH, value_BKSH, mask_BTS, cap, dropout)
  return _ungrouped(mixed_BKTGH / total_BKTG1, query_BTNH)


def attend_cache(
  query_BTNH: jax.Array, cache: kv_cache.KVCache, layer: int | jax.Array, view: View, scale: float,
  cap: float | None = None,
) -> jax.Array:
  """Do as `attend` with one layer of a cache, block by block, as far as any row is filled.

  How many blocks are read never changes a row: what lies beyond its own tokens adds exactly 0.

  Reference:
    Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867, algorithm 3.
  """
  assert view.mask_BTS is not None and view.cache_length is not None
  mask_BTS, cache_length = view.mask_BTS, view.mask_BTS.shape[2]
  # A GPU would wait for the host before every block.
  if cache_length <= BLOCK or sharding.platform() == 'gpu':
    return attend(query_BTNH, *kv_cache.read(cache, layer), mask_BTS, scale, cap)
  query_BKTGH = _grouped(query_BTNH, cache.keys[0].shape[-3], scale)

  def add(carry):
    block, top_BKTG1, total_BKTG1, mixed_BKTGH = carry
    # The last block overlaps the one before it where the length is no multiple.
    start = jnp.minimum(block * BLOCK, cache_length - BLOCK)
    is_new_S = start + jnp.arange(BLOCK) >= block * BLOCK
    seen_BTS = jax.lax.dynamic_slice_in_dim(mask_BTS, start, BLOCK, 2) & is_new_S[None, None]
    new_BKTG1, more_BKTG1, added_BKTGH = _weigh(
      query_BKTGH, *kv_cache.read(cache, layer, start, BLOCK), seen_BTS, cap, least_BKTG1=top_BKTG1)
    keep_BKTG1 = jnp.exp(top_BKTG1 - new_BKTG1)
    return (block + 1, new_BKTG1, total_BKTG1 * keep_BKTG1 + more_BKTG1,
            mixed_BKTGH * keep_BKTG1 + added_BKTGH)

  zeros_BKTG1 = jnp.zeros((*query_BKTGH.shape[:-1], 1), jnp.float32)
  start = (jnp.int32(0), zeros_BKTG1 + 2 * MASKED, zeros_BKTG1,
           jnp.zeros(query_BKTGH.shape, jnp.float32))
  _, _, total_BKTG1, mixed_BKTGH = jax.lax.while_loop(
    lambda carry: carry[0] * BLOCK < view.cache_length, add, start)
  return _ungrouped(mixed_BKTGH / total_BKTG1, query_BTNH)


def _grouped(query_BTNH: jax.Array, num_kv_heads: int, scale: float) -> jax.Array:
  batch, length, _, dim = query_BTNH.shape
  scaled_BTNH = (query_BTNH * scale).astype(query_BTNH.dtype)
  return scaled_BTNH.reshape(batch, length, num_kv_heads, -1, dim).swapaxes(1, 2)


def _ungrouped(mixed_BKTGH: jax.Array, query_BTNH: jax.Array) -> jax.Array:
  mixed_BTKGH = mixed_BKTGH.astype(query_BTNH.dtype).swapaxes(1, 2)
  return mixed_BTKGH.reshape(*query_BTNH.shape[:-1], mixed_BKTGH.shape[-1])


def _weigh(
  query_BKTGH, key_BKSH, value_BKSH, mask_BTS, cap, dropout=lambda weights: weights,
  least_BKTG1=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the largest logit, at least `least_BKTG1`, and the sums of weights and of values."""
  dtype = query_BKTGH.dtype
  *lead, dim = query_BKTGH.shape
  query_BKRH = query_BKTGH.reshape(*lead[:2], -1, dim)
  logits_BKRS = jnp.einsum(
    'BKRH,BKSH->BKRS', query_BKRH, key_BKSH.astype(dtype), preferred_element_type=jnp.float32)
  logits_BKTGS = softcap(logits_BKRS, cap).reshape(*lead, -1)
  logits_BKTGS += jnp.where(mask_BTS, 0, MASKED)[:, None, :, None]
  top_BKTG1 = jax.lax.stop_gradient(logits_BKTGS.max(axis=-1, keepdims=True))
  if least_BKTG1 is not None:
    top_BKTG1 = jnp.maximum(least_BKTG1, top_BKTG1)
  weights_BKTGS = jnp.exp(logits_BKTGS - top_BKTG1)
  mixed_BKRH = jnp.einsum(
    'BKRS,BKSH->BKRH', dropout(weights_BKTGS).astype(dtype).reshape(logits_BKRS.shape),
    value_BKSH.astype(dtype), preferred_element_type=jnp.float32)
  total_BKTG1 = weights_BKTGS.sum(axis=-1, keepdims=True)
  return top_BKTG1, total_BKTG1, mixed_BKRH.reshape(*lead, -1)


def cudnn_attention(
  query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array,
  segment_ids_BT: jax.Array | None, config: DecoderConfig, window: int | None,
) -> jax.Array:
  """Attend by cuDNN's fused kernel; arguments as in `tpu_kernels.splash_attention`."""
  mask_B1TS = None
  if segment_ids_BT is not None:
    mask_B1TS = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
  return jax.nn.dot_product_attention(
    query_BTNH, key_BTKH, value_BTKH, mask=mask_B1TS, scale=config.query_scale, is_causal=True,
    local_window_size=None if window is None else (window - 1, 0), implementation='cudnn')


def fused_attention(
  query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, view: View,
  config: DecoderConfig,
) -> jax.Array:
  """Attend by the config's kernel; where windows differ between layers, the view says which."""
  kernel: Callable[..., jax.Array] = cudnn_attention
  if config.attention == 'splash':
    # Here, because the import takes longer than that of all models.
    from jaxllm.models import tpu_kernels

    kernel = tpu_kernels.splash_attention
  return jax.lax.switch(
    view.window, [functools.partial(kernel, config=config, window=one) for one in config.windows],
    query_BTNH, key_BTKH, value_BTKH, view.segment_ids_BT)


def is_fused(config: DecoderConfig) -> bool:
  """Return whether whole sequences go to a kernel that makes its own mask, on this platform."""
  return config.attention == 'splash' or (
    config.attention == 'cudnn' and sharding.platform() == 'gpu')


def decodes_paged(config: DecoderConfig, cache: kv_cache.KVCache, length: int) -> bool:
  """Return whether a step of `length` tokens goes to the paged kernel, on this platform."""
  return (
    config.decode_attention == 'paged' and sharding.platform() == 'tpu' and length == 1
    and cache.keys[0].dtype == jnp.bfloat16 and cache.keys[0].shape[-2] % 128 == 0)


class Attention(nn.Module):
  """Grouped-query self-attention.

  Reference:
    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; Ainslie et al., "GQA", arXiv
    2305.13245.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, view: View, deterministic: bool, cache: kv_cache.KVCache | None = None,
    layer: int | jax.Array = 0, cache_positions_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.KVCache | None]:
    """Return (output_BTD, the cache with the new keys and values).

    Args:
      x_BTD: input, in the config's dtype.
      view: mask and rotation.
      deterministic: whether dropout is off.
      cache: where earlier keys and values lie, or None: the sequence attends to itself.
      layer: this layer's place in the cache.
      cache_positions_BT: where the new ones go in the cache.
    """
    config = self.config
    query = self._project('query', config.num_heads, 'heads')(x_BTD)
    key = self._project('key', config.kv_heads, 'kv_heads')(x_BTD)
    value = self._project('value', config.kv_heads, 'kv_heads')(x_BTD)
    if config.query_key_norm is not None:
      query = self._norm('query_norm', config.num_heads, 'heads')(query)
      key = self._norm('key_norm', config.kv_heads, 'kv_heads')(key)
    if view.rotation is not None:
      query, key = rotate(query, *view.rotation), rotate(key, *view.rotation)
    query = sharding.constrain(query, 'batch', 'length', 'heads', 'head_dim')
    query, key, value = (checkpoint_name(x, 'query_key_value') for x in (query, key, value))
    scale, cap = config.query_scale, config.attention_softcap
    heads_first = key.swapaxes(1, 2), value.swapaxes(1, 2)
    if view.mask_BTS is None:
      mixed_BTNH = fused_attention(query, key, value, view, config)
    elif cache is not None and cache_positions_BT is not None:
      cache = kv_cache.write(cache, layer, cache_positions_BT, *heads_first)
      if decodes_paged(config, cache, query.shape[1]):
        from jaxllm.models import tpu_kernels

        lengths_B = view.mask_BTS.sum(axis=(1, 2), dtype=jnp.int32)
        mixed_BTNH = tpu_kernels.paged_attention(query, cache, layer, lengths_B, config)
      else:
        mixed_BTNH = attend_cache(query, cache, layer, view, scale, cap)
    else:
      dropout = nn.Dropout(config.attention_dropout_rate, deterministic=deterministic)
      mixed_BTNH = attend(query, *heads_first, view.mask_BTS, scale, cap, dropout)
      if self.is_mutable_collection(INTERMEDIATES):
        # The weights are the average of values that tell positions apart.
        batch, length, heads, _ = key.shape
        eye_BKSS = jnp.broadcast_to(jnp.eye(length), (batch, heads, length, length))
        self.sow(INTERMEDIATES, 'weights',
                 attend(query, heads_first[0], eye_BKSS, view.mask_BTS, scale, cap))
    if config.attention != 'splash':  # It names its own, with what its gradient needs besides.
      mixed_BTNH = checkpoint_name(mixed_BTNH, RESIDUAL_NAME)
    out = Linear(
      (config.num_heads, config.head_size), (config.embed_dim,), ('heads', 'head_dim', 'embed'),
      config.stddev(config.num_heads * config.head_size, residual=True),
      'attention_out' in config.biases, config.dtype, name='out')
    return out(mixed_BTNH), cache

  def _project(self, name: str, heads: int, axis: str) -> Linear:
    config = self.config
    return Linear(
      (config.embed_dim,), (heads, config.head_size), ('embed', axis, 'head_dim'),
      config.stddev(config.embed_dim), 'qkv' in config.biases, config.dtype, name=name)

  def _norm(self, name: str, heads: int, axis: str) -> Norm:
    config = self.config
    first = 1 if config.query_key_norm == 'head' else 0
    shape, axes = (heads, config.head_size)[first:], (axis, 'head_dim')[first:]
    return Norm(config.norm, shape, axes, config.dtype, name=name)
