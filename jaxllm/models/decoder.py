"""One decoder-only transformer: embed -> blocks -> norm -> logits; cache in, cache out.

`Decoder` is the module, used purely: `Decoder(config).apply(variables, tokens_BT)`. `init`,
`abstract` and `unstack` make and reshape its variables. The parameters of all blocks are stored
stacked on axis 0 and run by a scan or unrolled; both call the same pure `Block` on one layer's
slice, and so agree exactly.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models import attention, positions
from jaxllm.models import cache as kv_cache
from jaxllm.models.attention import INTERMEDIATES, MASKED, Attention, View, softcap
from jaxllm.models.cache import KVCache, init_cache
from jaxllm.models.config import DecoderConfig, RematConfig
from jaxllm.models.linear import Embed, Linear, in_own_dtype, with_narrow_gradients
from jaxllm.models.mlp import Mlp
from jaxllm.models.moe import AUX, Moe
from jaxllm.models.norms import Norm
from jaxllm.sharding import Placement, active, constrain, platform

__all__ = [
  'Decoder', 'DecoderConfig', 'KVCache', 'abstract', 'init', 'init_cache', 'is_unstacked',
  'parameter_count', 'unstack',
]

REMAT_POLICIES: Mapping[str, RematConfig | Callable[..., Any]] = {
  'full': RematConfig(),
  'offload': RematConfig(offload=('block_input',)),
  'dots': jax.checkpoint_policies.dots_saveable,
  'dots_no_batch': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(attention.RESIDUAL_NAME),
  ),
}

Aux = dict[str, jax.Array]
# Collections that hold one tree per layer.
_LAYERED = ('params', 'lora')


class Block(nn.Module):
  """One layer: attention and MLP, each added to the residual stream."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, view: View, deterministic: bool, cache: KVCache | None = None,
    layer: int | jax.Array = 0, cache_positions_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Return (x_BTD, cache) after this layer; arguments as in `Attention`."""
    config = self.config
    added, cache = Attention(config, name='attention')(
      self._before('attention_norm', x_BTD), view, deterministic, cache, layer, cache_positions_BT)
    added = checkpoint_name(added, 'attention_out')
    added = self._after('attention_post_norm', added, deterministic)
    mixed = x_BTD + added
    mlp_input = x_BTD if config.residual == 'parallel' else mixed
    mlp_input = self._before('mlp_norm', mlp_input)
    if config.experts is None:
      added = Mlp(config, name='mlp')(mlp_input)
    else:
      is_real_BT = None if view.segment_ids_BT is None else view.segment_ids_BT > 0
      added = Moe(config, config.experts, name='mlp')(
        mlp_input, is_real_BT, training=not deterministic, report=cache is None)
    added = checkpoint_name(added, 'mlp_out')
    x_BTD = mixed + self._after('mlp_post_norm', added, deterministic)
    self.sow(INTERMEDIATES, 'residual', x_BTD)
    return constrain(x_BTD, 'batch', 'length', 'activation_embed'), cache

  def _before(self, name: str, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if self.config.norm_placement == 'post' else _norm(self.config, name)(x_BTD)

  def _after(self, name: str, x_BTD: jax.Array, deterministic: bool) -> jax.Array:
    if self.config.norm_placement != 'pre':
      x_BTD = _norm(self.config, name)(x_BTD)
    return nn.Dropout(self.config.dropout_rate)(x_BTD, deterministic)


class Decoder(nn.Module):
  """A decoder-only transformer.

  `variables` is {'params': ...} and optionally 'lora', plain nested dicts; the `layers` of each may
  be stacked (from `init`) or a dict of single layers (from `unstack`).

  Attributes:
    config: sizes and switches.
    placement: the devices that the variables are split over; None: one, or those of `active`.
  """

  config: DecoderConfig
  placement: Placement | None = None

  def setup(self):  # noqa: D102
    config = self.config
    stddev = config.initializer.stddev or 1.0
    self.embed = Embed(
      config.padded_vocab_size, config.embed_dim, ('vocab', 'embed'), stddev, config.dtype)
    if isinstance(config.positions, positions.LearnedPositions):
      self.positions = Embed(
        config.max_length, config.embed_dim, ('positions', 'embed'), stddev, config.dtype)
    self.dropout = nn.Dropout(config.dropout_rate)
    self.final_norm = _norm(config)
    if not config.tied_head:
      self.head = Linear(
        (config.embed_dim,), (config.padded_vocab_size,), ('embed', 'vocab'),
        config.stddev(config.embed_dim), 'head' in config.biases, config.dtype,
        jnp.float32)
    if self.is_initializing():
      self.param('layers', self._init_layers)

  def __call__(
    self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None, deterministic: bool = True,
  ) -> jax.Array:
    """Return logits_BTV (float32) of the next tokens; those of padded vocabulary entries are -1e30.

    Args:
      tokens_BT: int32 ids, each below `vocab_size` (the caller checks: JAX clamps silently).
      segment_ids_BT: int32, 0 = padding; tokens see only their own segment. None: one segment.
      positions_BT: int32, from 0 in each segment. None: derived from the segments.
      deterministic: whether dropout is off; if not, pass `rngs={'dropout': key}` to `apply`.
    """
    return self.logits(self.hidden(tokens_BT, segment_ids_BT, positions_BT, deterministic)[0])

  def hidden(
    self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None, deterministic: bool = True,
  ) -> tuple[jax.Array, Aux]:
    """Return (hidden_BTD, normalised; what the layers report); arguments as in `__call__`."""
    length = tokens_BT.shape[1]
    if positions_BT is None:
      positions_BT = _default_positions(self.config, length, segment_ids_BT)
    is_real_BT = True if segment_ids_BT is None else segment_ids_BT > 0
    mask = functools.partial(attention.sequence_mask, length, segment_ids_BT)
    length_B = jnp.max(positions_BT + 1, axis=1, where=is_real_BT, initial=1)
    with active(self.placement):
      views = self._views(
        (lambda window: None) if attention.is_fused(self.config) else mask,
        positions_BT, length_B, segment_ids_BT)
      x_BTD = self._embed(tokens_BT, positions_BT, deterministic)
      x_BTD, _, aux = self._run(x_BTD, views, deterministic)
      return self.final_norm(x_BTD), aux

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Return float32 logits (..., V) of hidden states (..., D); padded entries are -1e30."""
    config = self.config
    with active(self.placement):
      logits = self.embed.attend(hidden) if config.tied_head else self.head(hidden)
    logits = softcap(logits, config.logit_softcap)
    if config.padded_vocab_size == config.vocab_size:
      return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids < config.vocab_size, logits, MASKED)

  def extend(
    self, tokens_BT: jax.Array, cache: KVCache, counts_B: jax.Array
  ) -> tuple[jax.Array, KVCache]:
    """Append tokens to the rows of a cache: prefill, a chunk of it, or a step of decoding.

    Args:
      tokens_BT: int32; the first `counts_B[b]` of row b are real, the rest is ignored.
      cache: of B rows; row b continues at cache position `lengths_B[b]`.
      counts_B: int32 in [0, T]. Lengths + counts have to fit the cache; what does not is dropped.

    Returns:
      (hidden_BTD, of which only the real positions mean anything; the cache with new lengths).
    """
    offsets_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    positions_BT = cache.lengths_B[:, None] + offsets_1T
    cache_length = cache.keys[0].shape[-2]
    cache_positions_BT = jnp.where(offsets_1T < counts_B[:, None], positions_BT, cache_length)
    lengths_B = cache.lengths_B + counts_B
    segment_ids_BT = (offsets_1T < counts_B[:, None]).astype(jnp.int32)
    mask = functools.partial(attention.cache_mask, positions_BT, cache_length)
    filled = jnp.max(lengths_B, where=counts_B > 0, initial=1)
    with active(self.placement):
      views = self._views(mask, positions_BT, lengths_B, segment_ids_BT, filled)
      x_BTD = self._embed(tokens_BT, positions_BT, True)
      x_BTD, written, _ = self._run(x_BTD, views, True, cache, cache_positions_BT)
      assert written is not None
      cache = kv_cache.constrain(dataclasses.replace(written, lengths_B=lengths_B))
      return self.final_norm(x_BTD), cache

  def _embed(self, tokens_BT, positions_BT, deterministic: bool) -> jax.Array:
    config = self.config
    x_BTD = self.embed(tokens_BT)
    if config.embedding_scale is not None:
      x_BTD = x_BTD * jnp.asarray(config.embedding_scale, x_BTD.dtype)
    if isinstance(config.positions, positions.LearnedPositions):
      x_BTD = x_BTD + self.positions(positions_BT)
    x_BTD = self.dropout(x_BTD, deterministic)
    return constrain(x_BTD, 'batch', 'length', 'activation_embed')

  def _views(
    self, mask: Callable[[int | None], jax.Array | None], positions_BT: jax.Array,
    length_B: jax.Array, segment_ids_BT: jax.Array | None = None,
    cache_length: jax.Array | None = None,
  ) -> dict[str, View]:
    """Return what each kind of layer sees; `mask` makes the mask of a window."""
    config = self.config
    views: dict[str, View] = {}
    for kind in dict.fromkeys(config.layer_kinds):
      own = config.local_positions if kind == 'local' else None
      rotary, rotation = own or config.positions, None
      if isinstance(rotary, positions.RotaryPositions):
        cos, sin = positions.rotations(rotary, config.head_size, positions_BT, length_B)
        if kind == 'global_nope':
          cos, sin = jnp.ones_like(cos), jnp.zeros_like(sin)
        rotation = cos, sin
      window = config.window_of(kind)
      views[kind] = View(
        mask(window), rotation, segment_ids_BT, cache_length, config.windows.index(window))
    return views

  def _run(
    self, x_BTD: jax.Array, views: Mapping[str, View], deterministic: bool,
    cache: KVCache | None = None, cache_positions_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None, Aux]:
    """Run all layers, by a scan where everything is stacked, else one by one."""
    config = self.config
    layers: Any = {
      name: nn.meta.unbox(tree['layers'])
      for name, tree in self.variables.items() if name in _LAYERED and 'layers' in tree}
    drops = not deterministic and max(config.dropout_rate, config.attention_dropout_rate) > 0
    key = self.make_rng('dropout') if drops else None
    scanned = config.scan_layers and not any('0' in tree for tree in layers.values())
    scanned = scanned and (cache is None or not isinstance(cache.keys, tuple))
    on_tpu = scanned and platform() == 'tpu'
    collected = [AUX, *([INTERMEDIATES] if self.is_mutable_collection(INTERMEDIATES) else [])]

    def run_block(variables, x_BTD, view, cache, layer):
      if on_tpu:
        variables = in_own_dtype(*variables)
      x_BTD = checkpoint_name(x_BTD, 'block_input')
      rngs = None if key is None else {'dropout': jax.random.fold_in(key, layer)}
      (x_BTD, cache), sown = Block(config, parent=None).apply(
        variables, x_BTD, view, deterministic, cache, layer, cache_positions_BT, rngs=rngs,
        mutable=collected)
      return x_BTD, cache, _add_aux({}, sown.get(AUX, {})), sown.get(INTERMEDIATES, {})

    if config.remat != 'none':
      run_block = jax.checkpoint(
        run_block, policy=_remat_policy(config.remat), prevent_cse=not scanned)
    if scanned:
      scan: Callable[..., Any] = functools.partial(
        _scan, run_block, views=views, cache=cache, kinds=config.layer_kinds)
      if on_tpu and cache is None and 'lora' not in layers:
        scan = with_narrow_gradients(scan, config.dtype)
      elif on_tpu:
        layers = (layers,)
      x_BTD, cache, aux, seen_L = scan(layers, x_BTD)
    else:
      single = {name: _single_layers(tree, config.num_layers) for name, tree in layers.items()}
      aux, seen = {}, []
      for layer, kind in enumerate(config.layer_kinds):
        variables = {name: trees[layer] for name, trees in single.items()}
        x_BTD, cache, added, one = run_block(variables, x_BTD, views[kind], cache, layer)
        aux = _add_aux(aux, added)
        seen.append(one)
      seen_L = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    self.sow(INTERMEDIATES, 'layers', seen_L)
    return x_BTD, cache, aux

  def _init_layers(self, key: jax.Array) -> Any:
    """Return the parameters of all blocks, boxed with their axes, stacked on axis 0."""
    config = self.config
    x_BTD = jnp.zeros((1, 1, config.embed_dim), config.dtype)
    position_BT = jnp.zeros((1, 1), jnp.int32)
    mask = functools.partial(attention.sequence_mask, 1, None)
    view = self._views(mask, position_BT, jnp.ones(1, jnp.int32))[config.layer_kinds[0]]

    def init_block(layer: jax.Array) -> Any:
      block = Block(config, parent=None)
      return block.init(jax.random.fold_in(key, layer), x_BTD, view, True)['params']

    stacked = jax.vmap(init_block)(jnp.arange(config.num_layers))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})


def init(config: DecoderConfig, key: jax.Array) -> dict[str, Any]:
  """Return fresh variables, {'params': ...}, float32 in plain nested dicts.

  Traceable: `jax.jit(partial(init, config), out_shardings=...)` makes them where they belong.
  """
  return nn.meta.unbox(_boxed_init(config, key))


def abstract(config: DecoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """Describe the variables without allocating any.

  Returns:
    (shapes, axes): trees of the form of `init`'s, with ShapeDtypeStruct leaves and with leaves that
    are tuples of logical axis names, one per dimension.
  """
  boxed = jax.eval_shape(functools.partial(_boxed_init, config), jax.random.key(0))
  axes = jax.tree.map(lambda box: box.names, boxed, is_leaf=nn.meta.is_axis_metadata)
  return nn.meta.unbox(boxed), axes


def unstack(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Return variables whose `layers` are dicts {'0': ..., '1': ...} of single layers.

  Decoding with unrolled layers then reads each weight where it lies, instead of slicing the stack
  in every step. Pair it with `init_cache(..., stacked=False)`.
  """
  result = dict(variables)
  for name in _LAYERED:
    layers = result.get(name, {}).get('layers')
    if layers is not None and '0' not in layers:
      trees = _single_layers(layers, len(jax.tree.leaves(layers)[0]))
      result[name] = {**result[name], 'layers': {str(i): tree for i, tree in enumerate(trees)}}
  return result


def is_unstacked(variables: Mapping[str, Any]) -> bool:
  """Return whether variables come from `unstack`."""
  return '0' in variables['params']['layers']


def parameter_count(config: DecoderConfig) -> int:
  """Return the number of parameters, without those of the vocabulary's padding."""
  return sum(jax.tree.leaves(parameter_counts(config)))


def parameter_counts(config: DecoderConfig) -> Any:
  """Return `parameter_count` of each leaf of the variables, a tree of `init`'s form."""
  return jax.tree.map(
    lambda leaf, names: math.prod(
      config.vocab_size if name == 'vocab' else size
      for size, name in zip(leaf.shape, names, strict=True)),
    *abstract(config),
  )


def _remat_policy(remat: str | RematConfig) -> Callable[..., Any]:
  policy = REMAT_POLICIES[remat] if isinstance(remat, str) else remat
  if not isinstance(policy, RematConfig):
    return policy
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=policy.save, names_which_can_be_offloaded=policy.offload,
    offload_src='device', offload_dst='pinned_host')


def _norm(config: DecoderConfig, name: str | None = None) -> Norm:
  return Norm(config.norm, (config.embed_dim,), ('embed',), config.dtype, name=name)


def _default_positions(
  config: DecoderConfig, length: int, segment_ids_BT: jax.Array | None
) -> jax.Array:
  if segment_ids_BT is not None:
    return positions.segment_positions(segment_ids_BT)
  if isinstance(config.positions, positions.LearnedPositions) and length > config.max_length:
    raise ValueError(
      f'{length} tokens, but max_length={config.max_length} positions are learned: shorten the '
      'input or raise max_length')
  return jnp.arange(length, dtype=jnp.int32)[None]


# Jitted, so that the forward pass which Linen traces to find the parameters is never run.
@functools.partial(jax.jit, static_argnums=0)
def _boxed_init(config: DecoderConfig, key: jax.Array) -> dict[str, Any]:
  return dict(Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32)))


def _single_layers(layers: Mapping[str, Any], num_layers: int) -> list[Any]:
  """Return the tree of each layer, of stacked or unstacked layers."""
  if '0' in layers:
    return [layers[str(i)] for i in range(num_layers)]
  # Split, not sliced: the gradient is then one concatenation instead of a sum of padded arrays.
  parts = jax.tree.map(
    lambda leaf: [jnp.squeeze(one, 0) for one in jax.lax.split(leaf, [1] * num_layers)], layers)
  inner = jax.tree.structure([0] * num_layers)
  return jax.tree.transpose(jax.tree.structure(layers), inner, parts)


def _add_aux(totals: Aux, sown: Mapping[str, Any]) -> Aux:
  """Add the leaves of what modules have sown to the totals of their names."""
  totals = dict(totals)
  for path, value in jax.tree_util.tree_leaves_with_path(sown):
    name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
    totals[name] = totals.get(name, 0.0) + jnp.asarray(value, jnp.float32)
  return totals


def _scan(run_block, layers, x_BTD, views, cache, kinds):
  """Scan `run_block` over the layers; where kinds differ, each layer picks its view by number."""
  names = list(views)
  stacked_views = jax.tree.map(lambda *leaves: jnp.stack(leaves), *views.values())

  def body(carry, layer_inputs):
    variables, layer, kind = layer_inputs
    view = views[names[0]]
    if len(names) > 1:
      view = jax.tree.map(lambda leaf: leaf[kind], stacked_views)
    x_BTD, cache, *reported = run_block(variables, carry[0], view, carry[1], layer)
    return (x_BTD, cache), reported

  layer_L = jnp.arange(len(kinds), dtype=jnp.int32)
  kind_L = jnp.asarray([names.index(kind) for kind in kinds], jnp.int32)
  (x_BTD, cache), (aux, seen_L) = jax.lax.scan(body, (x_BTD, cache), (layers, layer_L, kind_L))
  return x_BTD, cache, {name: value_L.sum() for name, value_L in aux.items()}, seen_L
