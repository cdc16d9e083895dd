"""LoRA: nothing at first, the full matrix's gradient after, the same merged, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import sharding
from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters.lora import LoraConfig
from jaxllm.adapters.quantization import QuantizationConfig, dequantize_tree, quantize
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.sharding import MeshConfig

MODEL = DecoderConfig(
  vocab_size=30, vocab_multiple=8, embed_dim=8, num_layers=2, num_heads=4, num_kv_heads=2,
  mlp_dim=12, max_length=16,
)
ALL = LoraConfig(rank=3, alpha=6, targets=('layers/.*', 'head'))
start = jax.jit(lora_lib.init, static_argnums=0)
init = jax.jit(decoder.init, static_argnums=0)
apply = jax.jit(Decoder.apply, static_argnums=0)
TOKENS = jnp.asarray([[1, 2, 3, 4, 5]])


@functools.cache
def _params():
  return init(MODEL, jax.random.key(0))['params']


def _trained(config=ALL, seed=1):
  """Return adapters whose b is not 0."""
  adapters = start(config, _params(), jax.random.key(seed))
  keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.random.normal(next(keys), leaf.shape) if path[-1].key == 'b' else leaf,
    adapters)


def test_shapes_literally():
  adapters = start(LoraConfig(rank=3, alpha=6), _params(), jax.random.key(0))
  found = {path: (a['a'].shape, a['b'].shape, a['scale'].tolist())
           for path, a in lora_lib.adapters(adapters)}
  assert found == {
    'layers/attention/query': ((2, 8, 3), (2, 3, 4, 2), [2, 2]),
    'layers/attention/key': ((2, 8, 3), (2, 3, 2, 2), [2, 2]),
    'layers/attention/value': ((2, 8, 3), (2, 3, 2, 2), [2, 2]),
    'layers/attention/out': ((2, 4, 2, 3), (2, 3, 8), [2, 2]),
    'layers/mlp/gate': ((2, 8, 3), (2, 3, 12), [2, 2]),
    'layers/mlp/up': ((2, 8, 3), (2, 3, 12), [2, 2]),
    'layers/mlp/down': ((2, 12, 3), (2, 3, 8), [2, 2]),
  }


def test_untrained_adapters_change_nothing():
  params = _params()
  adapters = lora_lib.init(ALL, params, jax.random.key(1))
  base = apply(Decoder(MODEL), {'params': params}, TOKENS)
  np.testing.assert_array_equal(
    base, apply(Decoder(MODEL), {'params': params, 'lora': adapters}, TOKENS))


@pytest.mark.parametrize('scan', [True, False])
def test_merged_equals_unmerged(scan):
  config = MODEL.replace(scan_layers=scan)
  params, adapters = _params(), _trained()
  beside = apply(Decoder(config), {'params': params, 'lora': adapters}, TOKENS)
  merged = apply(Decoder(config), {'params': lora_lib.merge(params, adapters)}, TOKENS)
  np.testing.assert_allclose(beside, merged, rtol=1e-4, atol=1e-4)
  base = apply(Decoder(config), {'params': params}, TOKENS)
  assert np.abs(base - beside).max() > 1e-2


def test_unstacked_equals_stacked():
  variables = {'params': _params(), 'lora': _trained()}
  np.testing.assert_allclose(
    apply(Decoder(MODEL), variables, TOKENS),
    apply(Decoder(MODEL), decoder.unstack(variables), TOKENS), rtol=1e-5, atol=1e-5)


def _loss(variables):
  return jnp.sum(jnp.sin(Decoder(MODEL).apply(variables, TOKENS)[..., :30]))


def test_gradients_are_those_of_the_full_matrix():
  """With W = W0 + s a b: dL/da = s dL/dW b^T and dL/db = s a^T dL/dW."""
  params, adapters = _params(), _trained()
  full = jax.jit(jax.grad(_loss))({'params': lora_lib.merge(params, adapters)})['params']
  found = jax.jit(jax.grad(lambda a: _loss({'params': params, 'lora': a})))(adapters)
  for path, adapter in lora_lib.adapters(adapters):
    module, grads = full, found
    for name in path.split('/'):
      module, grads = module[name], grads[name]
    lead = adapter['scale'].shape
    a, b = (adapter[n].reshape(*lead, *s) for n, s in (('a', (-1, 3)), ('b', (3, -1))))
    kernel = module['kernel'].reshape(*lead, a.shape[-2], b.shape[-1])
    expected = {'a': 2 * kernel @ b.swapaxes(-1, -2), 'b': 2 * a.swapaxes(-1, -2) @ kernel}
    for name, value in expected.items():
      np.testing.assert_allclose(
        grads[name].reshape(value.shape), value, rtol=2e-3, atol=2e-3, err_msg=f'{path}/{name}')
    np.testing.assert_array_equal(grads['scale'], jnp.zeros(lead))


def test_training_moves_adapters_alone():
  params = _params()
  before = jax.tree.map(np.array, params)
  adapters = lora_lib.init(ALL, params, jax.random.key(1))
  tx = optax.adamw(1e-2, weight_decay=0.0)

  @jax.jit
  def step(adapters, opt_state):
    loss, grads = jax.value_and_grad(lambda a: _loss({'params': params, 'lora': a}))(adapters)
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return loss, optax.apply_updates(adapters, updates), opt_state

  first, moved, opt_state = step(adapters, tx.init(adapters))
  second, moved, _ = step(moved, opt_state)
  assert second < first
  jax.tree.map(np.testing.assert_array_equal, params, before)
  for (_, old), (_, new) in zip(lora_lib.adapters(adapters), lora_lib.adapters(moved), strict=True):
    np.testing.assert_array_equal(old['scale'], new['scale'])
    assert np.any(old['b'] != new['b'])


def test_dropout_keeps_the_mean_and_spares_the_rest():
  adapters = _trained(LoraConfig(rank=3, targets=('layers/mlp/up',)))
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.vmap(lambda key: lora_lib.drop(adapters, 0.3, key))(keys)['layers']['mlp']['up']
  up = adapters['layers']['mlp']['up']
  np.testing.assert_allclose(drawn['a'].mean(0), up['a'], atol=0.05)
  assert np.mean(drawn['a'] == 0) == pytest.approx(0.3, abs=0.01)
  np.testing.assert_array_equal(drawn['b'][7], up['b'])
  assert lora_lib.drop(adapters, 0.0, keys[0]) is adapters


def test_axes_follow_the_kernels():
  shapes, axes = decoder.abstract(MODEL)
  lora_shapes, lora_axes = lora_lib.abstract(ALL, shapes['params'], axes['params'])
  assert lora_axes['layers']['attention']['out'] == {
    'a': ('layers', 'heads', 'head_dim', 'rank'), 'b': ('layers', 'rank', 'embed'),
    'scale': ('layers',)}
  assert lora_axes['head'] == {'a': ('embed', 'rank'), 'b': ('rank', 'vocab'), 'scale': ()}
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(mesh_config)
  found = sharding.shardings(lora_axes, lora_shapes, mesh, mesh_config)
  spec = found['layers']['attention']['query']['b'].spec
  assert tuple(spec) == (None, None, 'tensor', None)
  like = jax.tree.map(lambda leaf: leaf.shape, lora_lib.init(ALL, _params(), jax.random.key(0)))
  assert jax.tree.map(lambda leaf: leaf.shape, lora_shapes) == like


def test_other_targets_start_the_same_adapters_alike():
  few = LoraConfig(rank=3, targets=('layers/attention/(query|value)',))
  some = lora_lib.init(few, _params(), jax.random.key(1))
  every = lora_lib.init(ALL, _params(), jax.random.key(1))
  assert [path for path, _ in lora_lib.adapters(some)] == [
    'layers/attention/query', 'layers/attention/value']
  np.testing.assert_array_equal(some['layers']['attention']['query']['a'],
                                every['layers']['attention']['query']['a'])


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_quantised_kernels_are_adapted_but_not_merged(kind):
  config = QuantizationConfig(kind=kind, group_size=4)
  quantised = jax.jit(quantize, static_argnums=1)({'params': _params()}, config)['params']
  adapters = _trained()
  started = jax.eval_shape(lambda tree: lora_lib.init(ALL, tree, jax.random.key(1)), quantised)
  assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, adapters)
  rounded = dequantize_tree(quantised)
  np.testing.assert_allclose(
    apply(Decoder(MODEL), {'params': quantised, 'lora': adapters}, TOKENS),
    apply(Decoder(MODEL), {'params': lora_lib.merge(rounded, adapters)}, TOKENS),
    rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='quantised'):
    lora_lib.merge(quantised, adapters)


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match="'layers/attn/.*' matches no kernel"):
    lora_lib.init(LoraConfig(targets=('head', 'layers/attn/.*')), _params(), jax.random.key(0))
  other = decoder.abstract(MODEL.replace(mlp_dim=16))[0]['params']
  with pytest.raises(ValueError, match=r"adapter 'layers/mlp/(gate|up|down)'.*do not fit"):
    lora_lib.merge(other, _trained())
  tied = decoder.abstract(MODEL.replace(tied_head=True))[0]['params']
  with pytest.raises(ValueError, match="adapter 'head': the model has no such kernel"):
    lora_lib.check(_trained(), tied)
