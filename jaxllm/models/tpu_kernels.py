"""Attention on TPUs by kernels of JAX: splash for whole sequences, paged for decode steps.

Each device attends to its own rows and heads. Where the sequence is split, each gathers all keys
and values and attends with two pieces of queries, one from each end: causal attention is then
equally much work for all of them.

Reference: Dao, "FlashAttention-2", arXiv 2307.08691; Dubey et al., "The Llama 3 Herd of Models",
arXiv 2407.21783, section 3.3.2 (both ideas of the split).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import paged_attention as paged
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxllm import sharding
from jaxllm.models.attention import RESIDUAL_NAME
from jaxllm.models.cache import KVCache
from jaxllm.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class _Mask(splash.Mask):
  """Which keys are visible; queries stand in the order of pieces that devices hold.

  The kernel asks for each block of the mask; JAX's masks compare T x T numbers for that, which
  takes minutes at 100,000 tokens.
  """

  length: int
  window: int | None
  parts: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.length, self.length

  @functools.cached_property
  def q_sequence(self) -> np.ndarray:
    last = 2 * self.parts - 1
    order = [sorted((part, last - part), key=lambda piece: piece % 2) for part in range(self.parts)]
    return np.arange(self.length, dtype=np.int32).reshape(last + 1, -1)[np.ravel(order)].ravel()

  def mask_function(self, queries: Any, keys: Any) -> Any:
    visible = queries >= keys
    return visible if self.window is None else visible & (queries - self.window < keys)

  def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
    queries, keys = self.q_sequence[index[0]], np.arange(index[1].start, index[1].stop)
    corners = self.mask_function(queries[[0, -1, 0, -1]], keys[[0, 0, -1, -1]])
    nearest, farthest = queries[0] - keys[-1], queries[-1] - keys[0]
    if corners.all() or farthest < 0 or (self.window is not None and nearest >= self.window):
      return corners[:1, None]
    return self.mask_function(queries[:, None], keys[None])


def splash_attention(
  query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array,
  segment_ids_BT: jax.Array | None, config: DecoderConfig, window: int | None,
) -> jax.Array:
  """Attend causally within segments; a length is padded to whole blocks.

  Arguments as in `attend`, and:

  Args:
    segment_ids_BT: int32, or None: one segment.
    config: scale and cap of the logits, and block sizes.
    window: tokens that a query sees, itself included; None: all before it.
  """
  length, parts = query_BTNH.shape[1], sharding.num_parts('length')
  blocks, padded = _block_sizes(config, length, 2 * parts if parts > 1 else 1)
  if padded > length:
    # Behind every real token, so that no real query sees it.
    query_BTNH, key_BTKH, value_BTKH, segment_ids_BT = jax.tree.map(
      lambda x: jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2)),
      (query_BTNH, key_BTKH, value_BTKH, segment_ids_BT))
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([_Mask(padded, window, parts)]), block_sizes=blocks,
    head_shards=1, q_seq_shards=parts, attn_logits_soft_cap=config.attention_softcap,
    residual_checkpoint_name=RESIDUAL_NAME, interpret=sharding.platform() != 'tpu')
  mask_axes = jax.tree.map(
    lambda x: (None, 'length', None) if x.ndim == 3 else ('length',), kernel)
  queries, keys = ('batch', 'length', 'heads', None), ('batch', None, 'kv_heads', None)
  attend = sharding.map_shards(
    functools.partial(_attend, parts=parts, names=sharding.mesh_axes('length')),
    (mask_axes, queries, keys, keys, ('batch', 'length'), ('batch', None)), queries)
  scaled = (query_BTNH * config.query_scale).astype(query_BTNH.dtype)
  out_BTNH = attend(kernel, scaled, key_BTKH, value_BTKH, segment_ids_BT, segment_ids_BT)
  return out_BTNH[:, :length]


def _attend(kernel, query_BTNH, key_BSKH, value_BSKH, query_ids_BT, key_ids_BS, *, parts, names):
  def attend_row(query_TNH, key_SKH, value_SKH, query_ids_T, key_ids_S):
    segments = None if key_ids_S is None else splash.SegmentIds(query_ids_T, key_ids_S)
    heads_first = (x.swapaxes(0, 1) for x in (query_TNH, key_SKH, value_SKH))
    return kernel(*heads_first, segments).swapaxes(0, 1)

  def exchange(x, back=False):
    if x is None or parts == 1:
      return x
    pieces = []
    for number, piece in enumerate(jnp.split(x, 2, axis=1)):
      pairs = [(part, min(at, 2 * parts - 1 - at))
               for part, at in enumerate(range(number, 2 * parts, 2))]
      pairs = [(to, part) for part, to in pairs] if back else pairs
      pieces.append(jax.lax.ppermute(piece, names, pairs))
    return jnp.concatenate(pieces, axis=1)

  mixed_BTNH = jax.vmap(attend_row)(
    exchange(query_BTNH), key_BSKH, value_BSKH, exchange(query_ids_BT), key_ids_BS)
  return exchange(mixed_BTNH, back=True)


def _block_sizes(config: DecoderConfig, length: int, pieces: int) -> tuple[splash.BlockSizes, int]:
  """Return the kernel's block sizes, and the padded length."""
  if sizes := config.splash_blocks:
    query, key, compute = sizes.query, sizes.key, sizes.key_compute or sizes.key
    length += -length % math.lcm(query * pieces, key)
  else:
    length += -length % (128 * pieces)
    query = key = compute = next(n for n in (512, 256, 128) if length % (n * pieces) == 0)
  return splash.BlockSizes(
    block_q=query, block_kv=key, block_kv_compute=compute, block_q_dkv=query, block_kv_dkv=key,
    block_kv_dkv_compute=compute, block_q_dq=query, block_kv_dq=key), length


def paged_attention(
  query_B1NH: jax.Array, cache: KVCache, layer: int | jax.Array, lengths_B: jax.Array,
  config: DecoderConfig,
) -> jax.Array:
  """Attend with one query of each row to the first `lengths_B` positions of a layer of the cache.

  The kernel reads each row as far as it is filled. The cache stays where it is: a row and key head
  are a sequence of pages to it, which lie one after another.
  """
  keys, values, first = cache.keys, cache.values, layer
  if isinstance(keys, tuple):
    keys, values, first = keys[layer], values[layer], 0
  heads = 'batch', 'kv_heads', None, None
  attend = sharding.map_shards(
    functools.partial(_attend_pages, cap=config.attention_softcap),
    ((None, *heads)[-keys.ndim:], (None, *heads)[-keys.ndim:], heads, ('batch',), ()), heads)
  batch, _, num_heads, dim = query_B1NH.shape
  scaled = (query_B1NH * config.query_scale).astype(query_B1NH.dtype)
  grouped_BKGH = scaled.reshape(batch, config.kv_heads, -1, dim)
  mixed_BKGH = attend(keys, values, grouped_BKGH, lengths_B, jnp.asarray(first, jnp.int32))
  return mixed_BKGH.reshape(batch, 1, num_heads, dim)


def _attend_pages(keys, values, query_BKGH, lengths_B, layer, *, cap):
  *_, batch, heads, length, dim = keys.shape
  page = math.gcd(length, 512)
  per_row, rows = length // page, batch * heads
  pages = layer * rows * per_row + jnp.arange(rows * per_row, dtype=jnp.int32)
  mixed = paged.paged_attention(
    query_BKGH.reshape(rows, -1, dim), keys.reshape(1, -1, page, dim),
    values.reshape(1, -1, page, dim), jnp.repeat(lengths_B, heads), pages.reshape(rows, -1),
    pages_per_compute_block=1, attn_logits_soft_cap=cap)
  return mixed.reshape(query_BKGH.shape).astype(query_BKGH.dtype)
