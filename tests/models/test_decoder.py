"""Laws of the decoder: causality, cache, packing, and independence of how it is run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.models.attention import MASKED
from jaxllm.models.decoder import Decoder, abstract, init, init_cache, unstack

LENGTH = 12
EVERY_CONFIG = pytest.mark.parametrize('name', tiny.CONFIGS)


@functools.cache
def setting(name):
  """Return (config, variables, tokens (2, 12), logits) of a tiny decoder."""
  config = tiny.CONFIGS[name]
  variables, tokens_BT = tiny.variables_of(config), tiny.tokens_of(config, 2, LENGTH)
  return config, variables, tokens_BT, jax.jit(Decoder(config).apply)(variables, tokens_BT)


@EVERY_CONFIG
def test_logits_equal_an_independent_forward_pass(name):
  config, variables, tokens_BT, logits_BTV = setting(name)
  assert logits_BTV.shape == (2, LENGTH, 64) and logits_BTV.dtype == jnp.float32
  expected = tiny.reference_logits(config, variables, tokens_BT[1].tolist())
  np.testing.assert_allclose(logits_BTV[1, :, :50], expected, atol=1e-4)
  assert (logits_BTV[:, :, 50:] == MASKED).all()


@EVERY_CONFIG
def test_gradient_to_the_future_is_zero(name):
  config, variables, _, _ = setting(name)
  tokens_BT = jnp.arange(LENGTH)[None]  # all different: row t of the table is token t's input

  def output_at(params, t):
    hidden_BTD = Decoder(config).apply({'params': params}, tokens_BT, method='hidden')
    return jnp.square(hidden_BTD[0, t, :5]).sum()

  gradient = jax.jit(jax.grad(output_at))
  table_VD = gradient(variables['params'], 5)['embed']['embedding']
  assert (table_VD[6:] == 0).all()
  assert (table_VD[:6] != 0).any(axis=1).all()
  if config.layer_pattern == ('local',):  # three layers reach back 3 * (window - 1) tokens
    table_VD = gradient(variables['params'], 11)['embed']['embedding']
    assert (table_VD[:2] == 0).all() and (table_VD[2:12] != 0).any(axis=1).all()


@EVERY_CONFIG
@pytest.mark.parametrize('stacked', [True, False])
def test_cached_decoding_equals_the_full_forward_pass(name, stacked):
  """Ragged rows, written by a padded prefill, a padded chunk, then single tokens."""
  config, variables, tokens_BT, logits_BTV = setting(name)
  variables = variables if stacked else unstack(variables)
  extend = jax.jit(functools.partial(Decoder(config).apply, method='extend'))
  cache = init_cache(config, 2, LENGTH, stacked=stacked)
  got = np.zeros((2, LENGTH, config.embed_dim), np.float32)
  for width, counts in [(4, (4, 2)), (4, (1, 3)), (1, (1, 1)), (1, (0, 1)), (1, (1, 0))]:
    starts = np.asarray(cache.lengths_B)
    chunk = np.full((2, width), 49, np.int32)  # garbage beyond the counts
    for row, count in enumerate(counts):
      chunk[row, :count] = tokens_BT[row, starts[row] : starts[row] + count]
    hidden_BTD, cache = extend(variables, chunk, cache, jnp.asarray(counts))
    for row, count in enumerate(counts):
      got[row, starts[row] : starts[row] + count] = hidden_BTD[row, :count]
  assert cache.lengths_B.tolist() == [7, 7]
  got_BTV = Decoder(config).apply(variables, got[:, :7], method='logits')
  np.testing.assert_allclose(got_BTV, logits_BTV[:, :7], atol=2e-5)


@EVERY_CONFIG
def test_scanned_equals_unrolled_equals_unstacked(name):
  config, variables, tokens_BT, logits_BTV = setting(name)
  unrolled = Decoder(config.replace(scan_layers=False))
  for given in (variables, unstack(variables)):
    got = jax.jit(unrolled.apply)(given, tokens_BT)
    np.testing.assert_allclose(got, logits_BTV, atol=1e-5)


def test_dropout_depends_on_the_key_alone():
  config = tiny.CONFIGS['gpt2'].replace(dropout_rate=0.2, attention_dropout_rate=0.2)
  variables, tokens_BT = tiny.variables_of(config), tiny.tokens_of(config, 2, LENGTH)

  def run(key, scan_layers=True, variables=variables):
    model = Decoder(config.replace(scan_layers=scan_layers))
    apply = functools.partial(model.apply, deterministic=False)
    return jax.jit(apply)(variables, tokens_BT, rngs={'dropout': jax.random.key(key)})

  np.testing.assert_array_equal(run(1), run(1))
  np.testing.assert_allclose(run(1), run(1, scan_layers=False), atol=1e-5)
  np.testing.assert_allclose(run(1), run(1, False, unstack(variables)), atol=1e-5)
  assert jnp.abs(run(1) - run(2)).max() > 0.1
  off = Decoder(config).apply(variables, tokens_BT)
  np.testing.assert_allclose(off, setting('gpt2')[3], atol=1e-5)


@pytest.mark.parametrize('name', ['gpt2', 'gemma', 'mistral'])
def test_packed_equals_unpacked(name):
  config, variables, tokens_BT, logits_BTV = setting(name)
  short, long = tokens_BT[0, :5], tokens_BT[1]
  packed = jnp.concatenate([short, long, jnp.zeros(3, jnp.int32)])[None]
  segments = jnp.asarray([[1] * 5 + [2] * LENGTH + [0] * 3])
  positions = jnp.asarray([[*range(5), *range(LENGTH), *range(3)]])
  apply = jax.jit(Decoder(config).apply)
  got = apply(variables, packed, segments, positions)
  np.testing.assert_allclose(got[0, :5], logits_BTV[0, :5], atol=1e-5)
  np.testing.assert_allclose(got[0, 5 : 5 + LENGTH], logits_BTV[1], atol=1e-5)
  np.testing.assert_array_equal(got, apply(variables, packed, segments))


def test_padding_gives_no_nan_forward_or_backward():
  config, variables, tokens_BT, _ = setting('gemma')
  segments_BT = jnp.zeros_like(tokens_BT).at[0, :3].set(1)  # row 1 is padding altogether

  def total(variables):
    return Decoder(config).apply(variables, tokens_BT, segments_BT)[..., :50].sum()

  value, gradient = jax.jit(jax.value_and_grad(total))(variables)
  assert jnp.isfinite(value)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('scan_layers', [True, False])
def test_remat_changes_nothing(scan_layers):
  config = tiny.CONFIGS['llama'].replace(scan_layers=scan_layers, dropout_rate=0.1)
  _, variables, tokens_BT, _ = setting('llama')

  def loss_and_gradient(remat):
    def loss(variables):
      rngs = {'dropout': jax.random.key(3)}
      model = Decoder(config.replace(remat=remat))
      logits = model.apply(variables, tokens_BT, deterministic=False, rngs=rngs)
      return jnp.square(logits[..., :50]).mean()
    return jax.jit(jax.value_and_grad(loss))(variables)

  expected = loss_and_gradient('none')
  for remat in ('full', 'dots', 'dots_no_batch'):
    for got, want in zip(*map(jax.tree.leaves, (loss_and_gradient(remat), expected)), strict=True):
      np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_bfloat16_activations_stay_close_and_logits_are_float32():
  config, variables, tokens_BT, logits_BTV = setting('llama')
  low = Decoder(config.replace(dtype='bfloat16'))
  assert low.apply(variables, tokens_BT, method='hidden').dtype == jnp.bfloat16
  got = low.apply(variables, tokens_BT)
  assert got.dtype == jnp.float32
  error = jnp.abs(got - logits_BTV)[..., :50].mean() / jnp.abs(logits_BTV[..., :50]).mean()
  assert 1e-4 < error < 0.05


def test_padded_vocabulary_never_wins_and_has_no_gradient():
  config, variables, tokens_BT, _ = setting('llama')

  def loss(variables):
    log_probs = jax.nn.log_softmax(Decoder(config).apply(variables, tokens_BT))
    return -jnp.take_along_axis(log_probs, tokens_BT[..., None], -1).mean()

  gradient = jax.grad(loss)(variables)['params']['head']['kernel']
  assert (gradient[:, 50:] == 0).all() and (gradient[:, :50] != 0).any()


def test_lora_adds_its_product_and_the_zero_one_nothing():
  config, variables, tokens_BT, logits_BTV = setting('llama')
  key = jax.random.key(5)
  a = jax.random.normal(key, (3, 16, 2))
  b = jax.random.normal(key, (3, 2, 4, 4))
  scale = jnp.full((3,), 0.5)

  def adapted(b):
    lora = {'layers': {'attention': {'query': {'a': a, 'b': b, 'scale': scale}}}}
    return {**variables, 'lora': lora}

  apply = jax.jit(Decoder(config).apply)
  np.testing.assert_array_equal(apply(adapted(0 * b), tokens_BT), logits_BTV)
  merged = jax.tree.map(lambda leaf: leaf, variables)
  query = merged['params']['layers']['attention']['query']
  query['kernel'] = query['kernel'] + 0.5 * jnp.einsum('LDR,LRNH->LDNH', a, b)
  got = apply(adapted(b), tokens_BT)
  assert jnp.abs(got - logits_BTV)[..., :50].max() > 0.1
  np.testing.assert_allclose(got, apply(merged, tokens_BT), atol=1e-4)
  unstacked = Decoder(config).apply(unstack(adapted(b)), tokens_BT)
  np.testing.assert_allclose(unstacked, got, atol=1e-5)


def test_writes_past_the_end_of_the_cache_are_dropped():
  config, variables, tokens_BT, logits_BTV = setting('llama')
  extend = functools.partial(Decoder(config).apply, variables, method='extend')
  _, cache = extend(tokens_BT[:, :6], init_cache(config, 2, 6), jnp.asarray([6, 6]))
  _, after = extend(tokens_BT[:, :4], cache, jnp.asarray([4, 0]))
  np.testing.assert_array_equal(after.keys, cache.keys)


def test_initial_deviations_follow_gpt2():
  config = tiny.BASE.replace(embed_dim=128, mlp_dim=512, num_layers=8)
  config = config.replace(initializer=config.initializer.replace(stddev=0.02))
  params = init(config, jax.random.key(0))['params']
  np.testing.assert_allclose(params['embed']['embedding'].std(), 0.02, rtol=0.05)
  layers = params['layers']
  np.testing.assert_allclose(layers['mlp']['up']['kernel'].std((1, 2)), 0.02, rtol=0.05)
  np.testing.assert_allclose(layers['mlp']['down']['kernel'].std((1, 2)), 0.005, rtol=0.05)
  np.testing.assert_allclose(layers['attention']['out']['kernel'].std(), 0.005, rtol=0.05)
  first, second = layers['mlp']['up']['kernel'][:2]
  assert (first != second).all()


def test_nnx_wraps_the_decoder():
  import flax
  from flax import nnx

  config, variables, tokens_BT, logits_BTV = setting('llama')
  before = flax.config.flax_always_shard_variable
  flax.config.update('flax_always_shard_variable', False)
  try:
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(Decoder(config), nnx.Rngs(0)), tokens_BT)
    graph, state = nnx.split(model, nnx.Param, ...)[0], nnx.state(model, nnx.Param)
    del graph
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert model(tokens_BT).shape == logits_BTV.shape
  finally:
    flax.config.update('flax_always_shard_variable', before)
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract(config)[0]['params'])
