"""A mixture of experts in the place of the MLP: each token goes to the best of many small MLPs.

`route` chooses, in float32. Tokens are then sorted by expert, and each expert multiplies its own:
no token is dropped, and none changes another. With a capacity, in training, each expert takes so
many and no more. On a mesh every device sorts the tokens that it holds. Devices that split the
experts send each pair to the one that has its expert (`_mix_exchanged`), or gather the tokens of
each other and add up the results (`_mix`); with a capacity they exchange as many as there is room
for, all to all (`_mix_capacity`).

Axis letters beyond the usual: N tokens, K experts of a token, R = K * N pairs of these.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxllm import sharding
from jaxllm.models.config import DecoderConfig, ExpertsConfig
from jaxllm.models.linear import ExpertLinear, Linear, dequantize, expert_linear, is_quantized
from jaxllm.models.mlp import ACTIVATIONS, Mlp

AUX = 'aux'
"""Collection of what modules of a block `sow`: float32 scalars, each a mean over the tokens of the
batch. `Decoder.hidden` adds them over the layers by name; those named '..._loss' are part of every
objective."""
# Keeps the signal that moves the biases of experts out of the norm of the gradient.
_SIGNAL = 1e-6

Kernels = Mapping[str, Mapping[str, Any]]


class Moe(nn.Module):
  """Routed experts, and perhaps one for all tokens.

  Reports `router_balance_loss`, `router_z_loss`, `router_max_load` (of the fullest expert, 1 where
  loads are equal) and with a capacity `router_dropped` (share of a token's experts that had no room
  for it), each a mean over the layers.
  """

  config: DecoderConfig
  experts: ExpertsConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, is_real_BT: jax.Array | None, training: bool, report: bool
  ) -> jax.Array:
    """Return (B, T, D) in the dtype of `x_BTD`.

    Args:
      x_BTD: input.
      is_real_BT: False for padding, which goes to no routed expert; None: all are tokens.
      training: whether there is a capacity, if the config has one.
      report: whether to report the losses of the router.
    """
    config, experts = self.config, self.experts
    with jax.default_matmul_precision('highest'):
      logits_BTE = self._project('router', experts.num_experts, jnp.float32)(x_BTD)
    bias_E: Any = None
    if experts.scores == 'sigmoid':
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
      bias_E = self.param('balance_bias', zeros, (experts.num_experts,))
    scores_BTE, weights_BTK, ids_BTK = route(experts, logits_BTE, bias_E)
    if report:
      self._report(router_losses(experts, logits_BTE, scores_BTE, ids_BTK, is_real_BT, bias_E))
    if is_real_BT is not None:
      ids_BTK = jnp.where(is_real_BT[..., None], ids_BTK, experts.num_experts)
    factor = experts.capacity_factor if training else None
    mixed_BTD, dropped = _on_mesh(
      config, factor, Experts(config, experts, name='experts')(), x_BTD, ids_BTK, weights_BTK)
    if report and factor:
      self._report({'router_dropped': dropped})
    if experts.shared is None:
      return mixed_BTD
    shared_BTD = Mlp(config.replace(mlp_dim=experts.shared.mlp_dim), name='shared')(x_BTD)
    if experts.shared.gated:
      shared_BTD *= jax.nn.sigmoid(self._project('shared_gate', 1, config.dtype)(x_BTD))
    return mixed_BTD + shared_BTD

  def _project(self, name: str, outputs: int, dtype: Any) -> Linear:
    dim = self.config.embed_dim
    return Linear((dim,), (outputs,), ('embed', None), self.config.stddev(dim), False, dtype,
                  name=name)

  def _report(self, values: Mapping[str, jax.Array]) -> None:
    for name, value in values.items():
      self.sow(AUX, name, value / self.config.num_layers)


class Experts(nn.Module):
  """The kernels of all experts."""

  config: DecoderConfig
  experts: ExpertsConfig

  @nn.compact
  def __call__(self) -> Kernels:
    """Return 'up', 'down' and perhaps 'gate', each as `ExpertLinear` does."""
    config, number = self.config, self.experts.num_experts
    made = {}
    for name in ('gate', 'up') if config.gated else ('up',):
      made[name] = ExpertLinear(number, config.embed_dim, config.mlp_dim, ('embed', 'mlp'),
                                config.stddev(config.embed_dim), name=name)()
    made['down'] = ExpertLinear(number, config.mlp_dim, config.embed_dim, ('mlp', 'embed'),
                                config.stddev(config.mlp_dim, residual=True), name='down')()
    return made


def route(
  experts: ExpertsConfig, logits_BTE: jax.Array, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Choose the experts of each token.

  Args:
    logits_BTE: of the router, float32.
    bias_E: added to the scores for the choice, and for nothing else.

  Returns:
    The scores of all experts, the weights and the numbers of the chosen ones, best first.
  """
  squash = jax.nn.softmax if experts.scores == 'softmax' else jax.nn.sigmoid
  scores_BTE = squash(logits_BTE)
  ranked_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E[None, None]
  _, ids_BTK = jax.lax.top_k(jax.lax.stop_gradient(ranked_BTE), experts.top_k)
  weights_BTK = jnp.take_along_axis(scores_BTE, ids_BTK, axis=-1)
  if experts.normalized:
    weights_BTK /= weights_BTK.sum(axis=-1, keepdims=True) + 1e-20
  return scores_BTE, weights_BTK * experts.weight_scale, ids_BTK


def router_losses(
  experts: ExpertsConfig, logits_BTE: jax.Array, scores_BTE: jax.Array, ids_BTK: jax.Array,
  is_real_BT: jax.Array | None = None, bias_E: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Return the losses of one layer's router, times their factors, and the largest load.

  Padding counts nowhere. The gradient of the biases is the load of each expert less the mean.

  Args:
    experts: the factors.
    logits_BTE: of the router.
    scores_BTE: from `route`.
    ids_BTK: from `route`.
    is_real_BT: False for padding.
    bias_E: the biases, if there are any.
  """
  number, top_k = experts.num_experts, experts.top_k
  real_BT = jnp.ones(ids_BTK.shape[:2]) if is_real_BT is None else is_real_BT.astype(jnp.float32)
  count = jnp.maximum(real_BT.sum(), 1)
  chosen_BTE = jax.nn.one_hot(ids_BTK, number).sum(axis=2)
  share_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)
  load_E, share_E = (jnp.einsum('BTE,BT->E', x_BTE, real_BT) / count
                     for x_BTE in (chosen_BTE / top_k, share_BTE))
  balance = experts.balance_loss * number * jnp.sum(load_E * share_E)
  if bias_E is not None:
    moved_E = bias_E - jax.lax.stop_gradient(bias_E)  # 0, with a gradient of 1.
    balance += _SIGNAL * jnp.sum(moved_E * (load_E - 1 / number))
  z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
  return {
    'router_balance_loss': balance,
    'router_z_loss': experts.z_loss * jnp.sum(z_BT * real_BT) / count,
    'router_max_load': number * load_E.max(),
  }


def _on_mesh(
  config: DecoderConfig, factor: float | None, kernels: Kernels, x_BTD: jax.Array,
  ids_BTK: jax.Array, weights_BTK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return (the weighted sum of each token's experts, the share dropped by a capacity `factor`)."""
  placement = sharding.split_placement()
  if placement is None:
    return _mix(config, factor, _Split(), kernels, x_BTD, ids_BTK, weights_BTK)
  kernels = {
    name: {**stored, 'kernel': dequantize(stored['kernel'], config.dtype)
           if is_quantized(stored['kernel']) else stored['kernel'].astype(config.dtype)}
    for name, stored in kernels.items()}

  def spec(array: jax.Array, *axes: str | None) -> PartitionSpec:
    return placement.sharding(array.shape, *axes).spec

  specs = {name: {leaf: spec(array, *_leaf_axes(name)[leaf]) for leaf, array in stored.items()}
           for name, stored in kernels.items()}
  tokens = spec(x_BTD, 'batch', 'length', None)
  split = _Split(
    tokens=_mesh_axes(tokens), experts=_mesh_axes(specs['up']['kernel'][:1]),
    mlp=_mesh_axes(specs['up']['kernel'][2:]))
  mix = functools.partial(_mix, config, factor, split)
  return jax.shard_map(
    mix, mesh=placement.mesh, in_specs=(specs, tokens, tokens, tokens),
    out_specs=(tokens, PartitionSpec()), check_vma=False)(kernels, x_BTD, ids_BTK, weights_BTK)


class _Split(NamedTuple):
  """The mesh axes that tokens, experts and their hidden axis are split over."""

  tokens: tuple[str, ...] = ()
  experts: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ()


def _mesh_axes(spec: Iterable[Any]) -> tuple[str, ...]:
  return tuple(axis for entry in spec
               for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def _leaf_axes(name: str) -> dict[str, tuple[str | None, ...]]:
  """Return the axes of what `ExpertLinear` returns that stay split; `embed` is gathered."""
  inputs, outputs = ('mlp', None) if name == 'down' else (None, 'mlp')
  return {'kernel': ('experts', inputs, outputs), 'a': ('experts', inputs, None),
          'b': ('experts', None, outputs), 'scale': ('experts',)}


def _mix(
  config: DecoderConfig, factor: float | None, split: _Split, kernels: Kernels, x_BTD: jax.Array,
  ids_BTK: jax.Array, weights_BTK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Do as `_on_mesh` with what one device holds of everything."""
  assert config.experts is not None
  x_ND, ids_NK, weights_NK = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, ids_BTK, weights_BTK))
  number, inner = len(jax.tree.leaves(kernels)[0]), {*split.experts, *split.mlp}
  if factor is not None:
    mixed_ND, dropped = _mix_capacity(
      config, factor, split.experts, kernels, x_ND, ids_NK, weights_NK)
    mixed_ND = jax.lax.psum(mixed_ND, split.mlp)
    return mixed_ND.reshape(x_BTD.shape), jax.lax.pmean(dropped, split.tokens)
  # Devices with other tokens but a part of the same experts.
  shared = tuple(axis for axis in split.tokens if axis in inner)
  is_less = ids_NK.shape[1] * number < config.experts.num_experts
  if is_less and shared == split.experts and sharding.platform() == 'tpu':  # CPUs cannot.
    mixed_ND = _mix_exchanged(config, shared, kernels, x_ND, ids_NK, weights_NK)
    return jax.lax.psum(mixed_ND, split.mlp).reshape(x_BTD.shape), jnp.zeros(())
  x_ND, ids_NK, weights_NK = (
    jax.lax.all_gather(x, shared, tiled=True) if shared else x for x in (x_ND, ids_NK, weights_NK))
  first = jax.lax.axis_index(split.experts) * number if split.experts else 0
  order_R, place_R, sizes_E = _sort(ids_NK - first, number)
  # A token's experts are all different: there are no more rows than these.
  order_R = order_R[:len(x_ND) * min(ids_NK.shape[1], number)]
  is_here_R1 = (jnp.arange(len(order_R)) < sizes_E.sum())[:, None]
  rows_RD = _take(x_ND, order_R % len(x_ND), place_R)
  mixed_RD = _apply(config, kernels, jnp.where(is_here_R1, rows_RD, 0), sizes_E)
  mixed_RD = jnp.where(is_here_R1, mixed_RD, 0)
  mixed_ND = _combine(_take(mixed_RD, place_R, order_R), weights_NK)
  mixed_ND = jax.lax.psum(mixed_ND, tuple(axis for axis in sorted(inner) if axis not in shared))
  if shared:
    mixed_ND = jax.lax.psum_scatter(mixed_ND, shared, tiled=True)
  return mixed_ND.reshape(x_BTD.shape), jnp.zeros(())


def _mix_exchanged(
  config: DecoderConfig, axes: tuple[str, ...], kernels: Kernels, x_ND: jax.Array,
  ids_NK: jax.Array, weights_NK: jax.Array,
) -> jax.Array:
  """Send each pair to the device of its expert and the result back, S devices at once."""
  assert config.experts is not None
  order_R, place_R, sizes_E = _sort(ids_NK, config.experts.num_experts)
  sizes_SE = jax.lax.all_gather(sizes_E, axes)
  parts, here = len(sizes_SE), jax.lax.axis_index(axes)
  number = len(sizes_E) // parts

  def own(x_SE: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_SE, here * number, number, axis=1)

  # Where the pairs of each expert start: with those who send them, and with the one that has it,
  # which holds them by expert and then by sender.
  sent_SE = jnp.cumsum(sizes_SE, axis=1) - sizes_SE
  by_device = sizes_SE.T.reshape(parts, -1)
  held_SE = (jnp.cumsum(by_device, axis=1) - by_device).reshape(-1, parts).T
  received = own(sizes_SE).reshape(-1)

  room = parts * len(x_ND) * min(ids_NK.shape[1], number)
  rows_RD = jax.lax.ragged_all_to_all(
    _take(x_ND, order_R % len(x_ND), place_R), jnp.zeros((room, x_ND.shape[1]), x_ND.dtype),
    sent_SE[here], sizes_E, held_SE[here], received, axis_name=axes)
  mixed_RD = _apply(config, kernels, rows_RD, own(sizes_SE).sum(axis=0))
  mixed_RD = jax.lax.ragged_all_to_all(
    mixed_RD, jnp.zeros((len(order_R), x_ND.shape[1]), mixed_RD.dtype),
    own(held_SE).reshape(-1), received, own(sent_SE).reshape(-1), sizes_E, axis_name=axes)
  return _combine(_take(mixed_RD, place_R, order_R), weights_NK)


def _mix_capacity(
  config: DecoderConfig, factor: float, expert_axes: tuple[str, ...], kernels: Kernels,
  x_ND: jax.Array, ids_NK: jax.Array, weights_NK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Fill C places of each expert, first choices first, and exchange them with other devices."""
  assert config.experts is not None
  (tokens, top_k), number = ids_NK.shape, config.experts.num_experts
  capacity = min(tokens, math.ceil(factor * tokens * top_k / number))
  order_R, _, sizes_E = _sort(ids_NK, number)
  start_E = jnp.cumsum(sizes_E) - sizes_E
  place_1C = jnp.arange(capacity)[None]
  rows_EC = order_R[jnp.minimum(start_E[:, None] + place_1C, len(order_R) - 1)]
  # Behind the pairs where a place is not filled, and behind the places where a pair has none.
  row_P = jnp.where(place_1C < sizes_E[:, None], rows_EC, len(order_R)).reshape(-1)
  place_R = jnp.full(len(order_R), len(row_P)).at[row_P].set(jnp.arange(len(row_P)), mode='drop')
  buffer_PD = _take(x_ND, jnp.where(row_P < len(order_R), row_P % tokens, tokens), place_R)
  buffer_ECD = buffer_PD.reshape(number, capacity, -1)
  if expert_axes:
    buffer_ECD = jax.lax.all_to_all(buffer_ECD, expert_axes, 0, 1, tiled=True)
  mixed_ECD = _apply(config, kernels, buffer_ECD.reshape(-1, x_ND.shape[1]), None)
  mixed_ECD = mixed_ECD.reshape(buffer_ECD.shape)
  if expert_axes:
    mixed_ECD = jax.lax.all_to_all(mixed_ECD, expert_axes, 1, 0, tiled=True)
  mixed_RD = _take(mixed_ECD.reshape(-1, x_ND.shape[1]), place_R, row_P)
  kept = jnp.minimum(sizes_E, capacity).sum() / jnp.maximum(sizes_E.sum(), 1)
  return _combine(mixed_RD, weights_NK), 1 - kept


def _sort(ids_NK: jax.Array, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the pairs k * N + n by expert, others last; the place of each; sizes of experts."""
  expert_R = ids_NK.T.reshape(-1)
  expert_R = jnp.where((expert_R >= 0) & (expert_R < number), expert_R, number)
  sizes_E = (expert_R[:, None] == jnp.arange(number)[None]).sum(axis=0, dtype=jnp.int32)
  order_R = jnp.argsort(expert_R)
  return order_R, jnp.argsort(order_R), sizes_E


@jax.custom_vjp
def _take(x_ND: jax.Array, index_R: jax.Array, back: jax.Array) -> jax.Array:
  """Return rows of `x_ND`, 0 for an index beyond them.

  `back` says where the rows went: K times N numbers, beyond R for nowhere. So the gradient is
  gathered too; left to itself XLA would scatter it, row by row.
  """
  return x_ND.at[index_R].get(mode='fill', fill_value=0)


_take.defvjp(
  lambda x_ND, index_R, back: (_take(x_ND, index_R, back), (len(x_ND), back)),
  lambda saved, dy_RD: (
    _take(dy_RD, saved[1], saved[1]).reshape(-1, saved[0], dy_RD.shape[1]).sum(axis=0), None, None))


def _apply(
  config: DecoderConfig, kernels: Kernels, x_RD: jax.Array, sizes_E: jax.Array | None
) -> jax.Array:
  """Apply the MLP of each expert to its rows; `sizes_E` as in `grouped_dense`."""
  def multiply(name: str, x: jax.Array) -> jax.Array:
    y = expert_linear(kernels[name], x, sizes_E, config.dtype)
    return y if name == 'down' else checkpoint_name(y, 'mlp_up')

  hidden_RF = ACTIVATIONS[config.activation](multiply('gate' if config.gated else 'up', x_RD))
  return multiply('down', hidden_RF * multiply('up', x_RD) if config.gated else hidden_RF)


def _combine(mixed_RD: jax.Array, weights_NK: jax.Array) -> jax.Array:
  """Add up what the experts of each token made of it, by their weights."""
  mixed_KND = mixed_RD.reshape(*weights_NK.T.shape, -1)
  mixed_ND = jnp.einsum('KND,NK->ND', mixed_KND.astype(jnp.float32), weights_NK)
  return mixed_ND.astype(mixed_RD.dtype)
