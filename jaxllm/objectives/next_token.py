"""Next-token cross-entropy, plain or in chunks that never hold the logits of the whole batch.

Below it stand the parts that other losses share: types, the hidden states that a loss reads, the
model's aux losses, sums over parts of a batch.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import pydantic

from jaxllm import sharding
from jaxllm.config import Config
from jaxllm.models.log_probs import target_parts

if TYPE_CHECKING:
  from jaxllm.models.decoder import Decoder

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]

class NextToken(Config):
  """Next-token cross-entropy, of answers alone where there is a task."""

  kind: Literal['next_token'] = 'next_token'
  label_smoothing: float = pydantic.Field(0.0, ge=0, lt=1)
  """Share of the target probability that is spread evenly over the whole vocabulary."""
  z_loss: float = pydantic.Field(0.0, ge=0)
  """Factor of the squared log-partition, which keeps logits from drifting (1e-4 is usual)."""
  chunk_size: int | None = pydantic.Field(None, gt=0)
  """Positions of each sequence whose logits exist at once; None: all of them, which is faster and
  needs batch * length * vocabulary * 4 bytes."""


def next_token_loss(
  config: NextToken, model: 'Decoder', variables: Any, batch: Batch,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Sums]:
  """Sum the weighted loss of a batch; divide by the count only after all sums are added.

  Args:
    model: gives `hidden` and `logits`, and `config.vocab_size`.
    batch: tokens_BT, targets_BT, weights_BT, segment_ids_BT, positions_BT, and perhaps is_text_BT,
      0 where a target stands for no text.
    dropout_key: None turns dropout off.

  Returns:
    The float32 sums of weighted loss and of weights, and a dict of weighted sums that are part of
    neither: `cross_entropy_sum` in nats without smoothing and z-loss, and `correct_sum`, the tokens
    to which no other was preferred; with a z-loss `z_loss_sum`, and with `is_text` `text_sum`, the
    cross-entropy of text. Where all weights are 0, all are 0.
  """
  hidden_BTD, aux = hidden_states(model, variables, batch, dropout_key)

  def sums(hidden_BTD: jax.Array, *of_targets: jax.Array) -> Sums:
    logits_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
    return token_sums(config, logits_BTV, *of_targets, vocab_size=model.config.vocab_size)

  of_targets = [batch[name] for name in ('targets', 'weights', 'is_text') if name in batch]
  if config.chunk_size is None:
    totals = sums(hidden_BTD, *of_targets)
  else:
    chunks = [_split(x_BT, config.chunk_size) for x_BT in (hidden_BTD, *of_targets)]
    totals = scan_sum(jax.checkpoint(sums), *chunks)
  return with_aux(totals.pop('loss_sum'), totals.pop('weight_sum'), totals, aux)


def token_sums(
  config: NextToken, logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
  is_text_BT: jax.Array | None = None, *, vocab_size: int,
) -> Sums:
  """Return the sums of `next_token_loss` for logits that are already there.

  Args:
    logits_BTV: float32; entries from `vocab_size` on are padding, and no part of smoothing.
    targets_BT: int32; may hold anything where the weight is 0.
    weights_BT: float32.
    is_text_BT: where it is 0, a target is no part of `text_sum`.
    vocab_size: real entries of the vocabulary.

  Reference:
    z-loss: Chowdhery et al., PaLM, arXiv 2204.02311, section 5. Label smoothing: Szegedy et al.,
    arXiv 1512.00567, section 7.
  """
  target_BT, log_partition_BT, largest_BT = target_parts(logits_BTV, targets_BT)
  cross_entropy_BT = log_partition_BT - target_BT
  loss_BT, extra = cross_entropy_BT, {}
  if config.z_loss:
    extra['z_loss_sum'] = config.z_loss * jnp.square(log_partition_BT)
    loss_BT = loss_BT + extra['z_loss_sum']
  if config.label_smoothing:
    index_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)
    mean_BT = jnp.sum(jnp.where(index_BTV < vocab_size, logits_BTV, 0), axis=-1) / vocab_size
    loss_BT += config.label_smoothing * (target_BT - mean_BT)

  def weighted(x_BT: jax.Array) -> jax.Array:
    # A target that cannot be (a padding id) has infinite loss, and 0 * inf is NaN.
    return jnp.sum(weights_BT * jnp.where(weights_BT == 0, 0, x_BT))

  if is_text_BT is not None:
    extra['text_sum'] = jnp.where(is_text_BT, cross_entropy_BT, 0)
  return {
    'loss_sum': weighted(loss_BT),
    'weight_sum': jnp.sum(weights_BT),
    'cross_entropy_sum': weighted(cross_entropy_BT),
    'correct_sum': weighted(target_BT >= largest_BT),
    **{name: weighted(x_BT) for name, x_BT in extra.items()},
  }


def _split(x_BT: jax.Array, chunk_size: int) -> jax.Array:
  """Cut the length axis into chunks, each with positions of all devices that split that axis."""
  batch, length, *rest = x_BT.shape
  parts = sharding.num_parts('length')
  x_BPT = x_BT.reshape(batch, parts, length // parts, *rest)
  size = min(-(-chunk_size // parts), length // parts)
  padding = [(0, 0)] * x_BPT.ndim
  padding[2] = (0, -x_BPT.shape[2] % size)  # Zeros: also the weights.
  chunks = jnp.pad(x_BPT, padding).reshape(batch, parts, -1, size, *rest)
  return jnp.moveaxis(chunks, 2, 0).reshape(-1, batch, parts * size, *rest)


def hidden_states(
  model: 'Decoder', variables: Any, batch: Batch, dropout_key: jax.Array | None
) -> tuple[jax.Array, Sums]:
  """Return (hidden_BTD, aux) of a batch; without a key there is no dropout."""
  return model.apply(  # type: ignore[return-value]
    variables, batch['tokens'], batch['segment_ids'], batch.get('positions'),
    deterministic=dropout_key is None,
    rngs=None if dropout_key is None else {'dropout': dropout_key}, method='hidden',
  )


def with_aux(
  loss_sum: jax.Array, weight_sum: jax.Array, sums: Sums, aux: Sums
) -> tuple[jax.Array, jax.Array, Sums]:
  """Return (loss_sum, weight_sum, sums) with the model's aux scalars, the '..._loss' in the loss.

  Each is a mean over a batch and counts as often as the batch has weight, so that it is averaged as
  the loss is over microbatches and devices.
  """
  added = sum(value for name, value in aux.items() if name.endswith('_loss'))
  return loss_sum + weight_sum * added, weight_sum, {
    'cross_entropy_sum': loss_sum, **sums,
    **{f'{name}_sum': value * weight_sum for name, value in aux.items()}}


def scan_sum(f: Callable[..., Any], *parts: Any) -> Any:
  """Add up the trees `f` of each part, one after another; parts are stacked on axis 0."""
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(f, *first))

  def add(carry: Any, part: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, f(*part)), None

  return jax.lax.scan(add, zeros, parts)[0]


def average(total: jax.Array, count: jax.Array) -> jax.Array:
  """Divide a sum by its count; 0 where nothing was counted."""
  return total / jnp.where(count == 0, 1, count)
