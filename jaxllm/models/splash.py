"""Fused attention on TPU: JAX's splash kernel, whose memory grows with the length, not its square.

Elsewhere the same kernel is interpreted, which is slow and serves tests.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm import sharding

# The kernel works on blocks of keys and queries; a length is padded to a multiple of the smallest.
BLOCK_SIZES = (512, 256, 128)
# Under this name a remat policy may keep the kernel's result instead of running it again.
RESIDUAL_NAME = 'splash'


def splash_attention(
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  segment_ids_BT: jax.Array | None,
  scale: float,
  window: int | None,
  softcap: float | None,
) -> jax.Array:
  """Attend causally within segments, each device to its own rows and heads.

  Args:
    query_BTNH: queries.
    key_BTKH: keys; each head serves N / K query heads.
    value_BTKH: values.
    segment_ids_BT: int32, or None: one segment.
    scale: factor of the logits.
    window: tokens that a query sees, itself included; None: all before it.
    softcap: logits x become cap * tanh(x / cap); None: off.

  Reference:
    Dao, "FlashAttention-2", arXiv 2307.08691; `jax.experimental.pallas.ops.tpu.splash_attention`.
  """
  length = query_BTNH.shape[1]
  padding = -length % BLOCK_SIZES[-1]
  if padding:
    # Behind every real token, so that no real query sees it.
    query_BTNH, key_BTKH, value_BTKH = (
      jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query_BTNH, key_BTKH, value_BTKH)
    )
    if segment_ids_BT is not None:
      segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))
  attend: Callable[..., jax.Array] = functools.partial(
    _attend, window=window, softcap=softcap, interpret=sharding.platform() != 'tpu'
  )
  queries, keys = ('batch', None, 'heads', None), ('batch', None, 'kv_heads', None)
  attend = sharding.map_shards(attend, (queries, keys, keys, ('batch', None)), queries)
  scaled = (query_BTNH * scale).astype(query_BTNH.dtype)
  return attend(scaled, key_BTKH, value_BTKH, segment_ids_BT)[:, :length]


def _attend(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT, *, window, softcap, interpret):
  # Here, because the import takes longer than that of all models.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  _, length, heads, _ = query_BTNH.shape
  block = next(size for size in BLOCK_SIZES if length % size == 0)
  shape = length, length
  mask = (
    splash.CausalMask(shape) if window is None
    else splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  )
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
    residual_checkpoint_name=RESIDUAL_NAME, interpret=interpret,
  )

  def attend_row(query_TNH, key_TKH, value_TKH, segment_ids_T):
    segments = None if segment_ids_T is None else splash.SegmentIds(segment_ids_T, segment_ids_T)
    heads_first = (x.swapaxes(0, 1) for x in (query_TNH, key_TKH, value_TKH))
    return kernel(*heads_first, segments).swapaxes(0, 1)

  return jax.vmap(attend_row)(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT)
