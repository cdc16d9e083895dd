"""Laws of the decoder: causality, cache, packing, and independence of how it is run."""

import collections
import functools
import typing

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxllm.config import ConfigError
from jaxllm.models import attention, mlp
from jaxllm.models import decoder as decoder_lib
from jaxllm.models.attention import MASKED
from jaxllm.models.config import ExpertsConfig, RematConfig, RematName
from jaxllm.models.decoder import (
  REMAT_POLICIES,
  Decoder,
  abstract,
  init,
  init_cache,
  unstack,
)

LENGTH = 12


@functools.cache
def setting(name):
  """Return (config, variables, tokens (2, 12), hidden, logits) of a tiny decoder."""
  config = tiny.CONFIGS[name]
  variables, tokens_BT = tiny.variables_of(config), tiny.tokens_of(config, 2, LENGTH)
  model = Decoder(config)
  hidden_BTD, logits_BTV = jax.jit(
    lambda *args: (model.apply(*args, method='hidden')[0], model.apply(*args))
  )(variables, tokens_BT)
  return config, variables, tokens_BT, hidden_BTD, logits_BTV


@pytest.mark.parametrize('name', tiny.CONFIGS)
def test_logits_equal_an_independent_forward_pass(name):
  config, variables, tokens_BT, _, logits_BTV = setting(name)
  assert logits_BTV.shape == (2, LENGTH, 64) and logits_BTV.dtype == jnp.float32
  expected = tiny.reference_logits(config, variables, tokens_BT[1].tolist())
  np.testing.assert_allclose(logits_BTV[1, :, :50], expected, atol=1e-4)
  assert (logits_BTV[:, :, 50:] == MASKED).all()


@pytest.mark.parametrize('name', ['gpt2', 'mistral', 'gemma', 'olmo'])
def test_gradient_to_the_future_is_zero(name):
  config, variables, *_ = setting(name)
  tokens_BT = jnp.arange(LENGTH)[None]  # all different: row t of the table is token t's input

  def output_at(params, t):
    hidden_BTD, _ = Decoder(config).apply({'params': params}, tokens_BT, method='hidden')
    return jnp.square(hidden_BTD[0, t, :5]).sum()

  gradient = jax.jit(jax.grad(output_at))
  table_VD = gradient(variables['params'], 5)['embed']['embedding']
  assert (table_VD[6:] == 0).all()
  assert (table_VD[:6] != 0).any(axis=1).all()
  if config.layer_pattern == ('local',):  # three layers reach back 3 * (window - 1) tokens
    table_VD = gradient(variables['params'], 11)['embed']['embedding']
    assert (table_VD[:2] == 0).all() and (table_VD[2:12] != 0).any(axis=1).all()


@pytest.mark.parametrize(
  ('name', 'stacked'),
  [(name, True) for name in ('gpt2', 'mixtral', 'mistral', 'gemma', 'smollm3')]
  + [(name, False) for name in ('gpt2', 'gemma')],
)
def test_cached_decoding_equals_the_full_forward_pass(name, stacked):
  """Ragged rows, written by a padded prefill, a padded chunk, then single tokens."""
  config, variables, tokens_BT, full_BTD, _ = setting(name)
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
  np.testing.assert_allclose(got[:, :7], full_BTD[:, :7], atol=1e-5)


@pytest.mark.parametrize('name', ['gpt2', 'gemma', 'smollm3'])
def test_scanned_equals_unrolled_equals_unstacked(name):
  config, variables, tokens_BT, _, logits_BTV = setting(name)
  unrolled = Decoder(config.replace(scan_layers=False))
  for given in (variables, unstack(variables)):
    got = jax.jit(unrolled.apply)(given, tokens_BT)
    np.testing.assert_allclose(got, logits_BTV, atol=1e-5)


def test_dropout_depends_on_the_key_alone():
  config, variables, tokens_BT, _, logits_BTV = setting('gpt2')
  config = config.replace(dropout_rate=0.2, attention_dropout_rate=0.2)

  def run(seed, apply, variables=variables):
    return apply(variables, tokens_BT, rngs={'dropout': jax.random.key(seed, impl='rbg')})

  scanned, unrolled = (
    jax.jit(functools.partial(Decoder(config.replace(scan_layers=s)).apply, deterministic=False))
    for s in (True, False)
  )
  np.testing.assert_array_equal(run(1, scanned), run(1, scanned))
  np.testing.assert_allclose(run(1, scanned), run(1, unrolled), atol=1e-5)
  np.testing.assert_allclose(run(1, scanned), run(1, unrolled, unstack(variables)), atol=1e-5)
  assert jnp.abs(run(1, scanned) - run(2, scanned)).max() > 0.1
  off = jax.jit(Decoder(config).apply)(variables, tokens_BT)
  np.testing.assert_allclose(off, logits_BTV, atol=1e-5)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_every_layer_drops_something_else(scan_layers):
  """Each of two layers adds 0 or 2; were their masks the same, their sum would never be 2."""
  config = tiny.BASE.replace(
    num_layers=2, positions=None, biases=('mlp',), dropout_rate=0.5, scan_layers=scan_layers
  )
  variables = jax.tree.map(jnp.zeros_like, tiny.variables_of(config))
  variables['params']['layers']['mlp']['down']['bias'] = jnp.ones((2, 16))
  variables['params']['final_norm']['scale'] = jnp.ones(16)
  hidden = functools.partial(Decoder(config).apply, deterministic=False, method='hidden')
  rngs = {'dropout': jax.random.key(0, impl='rbg')}
  hidden_BTD, _ = jax.jit(hidden)(variables, jnp.zeros((1, 20), jnp.int32), rngs=rngs)
  assert max(len(np.unique(hidden_D)) for hidden_D in hidden_BTD[0]) == 3


@pytest.mark.parametrize('name', ['gpt2', 'gemma', 'mistral'])
def test_packed_equals_unpacked(name):
  config, variables, tokens_BT, _, logits_BTV = setting(name)
  short, long = tokens_BT[0, :5], tokens_BT[1]
  packed = np.concatenate([short, long, np.zeros(3, np.int32)])[None]
  segments = jnp.asarray([[1] * 5 + [2] * LENGTH + [0] * 3])
  positions = jnp.asarray([[*range(5), *range(LENGTH), *range(3)]])
  apply = jax.jit(Decoder(config).apply)
  got = apply(variables, packed, segments, positions)
  np.testing.assert_allclose(got[0, :5], logits_BTV[0, :5], atol=1e-5)
  np.testing.assert_allclose(got[0, 5 : 5 + LENGTH], logits_BTV[1], atol=1e-5)
  np.testing.assert_array_equal(got, apply(variables, packed, segments))


def test_padding_gives_no_nan_forward_or_backward():
  config, variables, tokens_BT, *_ = setting('gemma')
  segments_BT = jnp.zeros_like(tokens_BT).at[0, :3].set(1)  # row 1 is padding altogether

  def total(variables):
    return Decoder(config).apply(variables, tokens_BT, segments_BT)[..., :50].sum()

  value, gradient = jax.jit(jax.value_and_grad(total))(variables)
  assert jnp.isfinite(value)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_remat_changes_nothing(monkeypatch):
  config = tiny.BASE.replace(
    num_layers=2, positions=None, activation='relu', gated=False, attention_dropout_rate=0.1
  )
  variables, tokens_BT = tiny.variables_of(config), tiny.tokens_of(config, 2, LENGTH)

  def loss_and_gradient(remat, scan_layers):
    model = Decoder(config.replace(remat=remat, scan_layers=scan_layers))

    def loss(variables):
      rngs = {'dropout': jax.random.key(3, impl='rbg')}
      hidden, _ = model.apply(
        variables, tokens_BT, deterministic=False, rngs=rngs, method='hidden')
      return jnp.square(hidden - 1).mean()

    return jax.jit(jax.value_and_grad(loss))(variables)

  expected = loss_and_gradient('none', True)
  named = RematConfig(save=('query_key_value', 'attention_out'), offload=('block_input', 'mlp_up'))
  cases = [(remat, True, 'cpu') for remat in (*REMAT_POLICIES, named)]
  # On TPUs a layer's parameters are kept from being cast before the scan.
  cases += [('none', False, 'cpu'), ('full', False, 'cpu'), ('full', True, 'tpu')]
  for remat, scan_layers, platform in cases:
    monkeypatch.setattr(decoder_lib, 'platform', lambda platform=platform: platform)
    leaves = map(jax.tree.leaves, (loss_and_gradient(remat, scan_layers), expected))
    for got, want in zip(*leaves, strict=True):
      np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_on_tpus_gradients_are_held_in_the_dtype_that_they_are_made_in(monkeypatch):
  dense = tiny.BASE.replace(num_layers=2, dtype='bfloat16', remat='full')
  sparse = dense.replace(experts=ExpertsConfig(num_experts=4, top_k=2))

  def loss(config, variables):
    hidden_BTD, _ = Decoder(config).apply(
      variables, tiny.tokens_of(config, 2, LENGTH), method='hidden')
    return jnp.square(hidden_BTD.astype(jnp.float32) - 1).mean()

  def stacks(config, *names):
    """Return the dtypes of the stacks like a kernel that loops of the gradient return."""
    def walk(jaxpr):
      for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'scan':
          yield from (str(var.aval.dtype) for var in eqn.outvars if var.aval.shape == kernel.shape)
        for inner in jax.tree.leaves([*eqn.params.values()], is_leaf=lambda x: hasattr(x, 'eqns')):
          if hasattr(inner, 'eqns'):
            yield from walk(inner)

    variables = tiny.variables_of(config)
    kernel = functools.reduce(dict.get, names, variables['params']['layers'])['kernel']
    return {*walk(jax.make_jaxpr(functools.partial(jax.grad(loss, 1), config))(variables).jaxpr)}

  monkeypatch.setattr(decoder_lib, 'platform', lambda: 'tpu')
  assert stacks(sparse, 'attention', 'query') == {'bfloat16'}
  assert stacks(sparse, 'mlp', 'router') == {'float32'}
  variables = tiny.variables_of(dense)
  narrow = jax.jit(functools.partial(jax.grad(loss, 1), dense))(variables)
  monkeypatch.setattr(
    decoder_lib, 'with_narrow_gradients',
    lambda scan, dtype: lambda layers, x_BTD: scan((layers,), x_BTD))
  assert stacks(dense, 'attention', 'query') == {'float32'}
  wide = jax.jit(functools.partial(jax.grad(loss, 1), dense))(variables)
  jax.tree.map(np.testing.assert_array_equal, narrow, wide)
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype('float32')}


def residuals(config):
  """Return the shapes of what the backward pass of a tiny decoder keeps, with how many of each."""
  variables, tokens_BT = tiny.variables_of(config), tiny.tokens_of(config, 2, LENGTH)

  def loss(variables):
    hidden_BTD, _ = Decoder(config).apply(variables, tokens_BT, method='hidden')
    return jnp.square(hidden_BTD - 1).mean()

  kept = jax.eval_shape(lambda variables: jax.vjp(loss, variables)[1], variables)
  return collections.Counter(leaf.shape for leaf in jax.tree.leaves(kept))


# Layers, rows and tokens in front.
KEPT = {
  'block_input': {}, 'query_key_value': {(4, 4): 1, (2, 4): 2}, 'attention': {(4, 4): 1},
  'attention_out': {(16,): 1}, 'mlp_up': {(24,): 2}, 'mlp_out': {(16,): 1},
}


@pytest.mark.parametrize('kind', ['save', 'offload'])
def test_remat_by_name_keeps_what_it_names(kind):
  config = tiny.BASE.replace(num_layers=2, num_kv_heads=2, norm_placement='sandwich')
  least = residuals(config.replace(remat='full'))
  assert [*KEPT] == [*typing.get_args(RematName)]
  for name, shapes in KEPT.items():
    found = residuals(config.replace(remat=RematConfig(**{kind: (name,)})))
    assert found - least == {(2, 2, LENGTH, *shape): count for shape, count in shapes.items()}
    assert not least - found


def test_remat_by_name_reaches_experts():
  config = tiny.BASE.replace(num_layers=2, experts=ExpertsConfig(num_experts=4, top_k=2))
  least, found = (
    residuals(config.replace(remat=remat)) for remat in ('full', RematConfig(save=('mlp_up',))))
  assert found - least == {(2, 2 * 2 * LENGTH, 24): 2}  # Each token stands there twice.


def test_a_remat_name_that_is_unknown_comes_with_those_that_are_known():
  for change in ({'save': ('mlp',)}, {'save': ('mlp_up',), 'offload': ('mlp_up',)}):
    with pytest.raises(ConfigError, match='block_input.*mlp_out|both name .mlp_up') as error:
      tiny.BASE.replace(remat=change)
    assert len(str(error.value).splitlines()) == 1


def test_bfloat16_activations_stay_close_and_logits_are_float32():
  config, variables, tokens_BT, full_BTD, _ = setting('llama')
  low = Decoder(config.replace(dtype='bfloat16'))
  got, _ = jax.jit(functools.partial(low.apply, method='hidden'))(variables, tokens_BT)
  assert got.dtype == jnp.bfloat16
  error = jnp.abs(got - full_BTD).mean() / jnp.abs(full_BTD).mean()
  assert 1e-4 < error < 0.05
  logits = jax.eval_shape(low.apply, variables, tokens_BT)
  assert logits.dtype == jnp.float32


def test_padded_vocabulary_never_wins_and_has_no_gradient():
  config, variables, _, hidden_BTD, _ = setting('llama')

  def loss(kernel):
    params = variables['params'] | {'head': {'kernel': kernel}}
    logits = Decoder(config).apply({'params': params}, hidden_BTD[0, 0], method='logits')
    assert logits.shape == (64,)
    return -jax.nn.log_softmax(logits)[7]

  kernel = 100 * variables['params']['head']['kernel']
  gradient = jax.jit(jax.grad(loss))(kernel)
  assert (gradient[:, 50:] == 0).all() and (gradient[:, :50] != 0).any()


def test_lora_adds_its_product_and_the_zero_one_nothing():
  config, variables, tokens_BT, _, logits_BTV = setting('llama')
  numbers = np.random.default_rng(5)
  a, b = numbers.standard_normal((3, 16, 2)), numbers.standard_normal((3, 2, 4, 4))
  scale = jnp.full((3,), 0.5)

  def adapted(b):
    lora = {'layers': {'attention': {'query': {'a': a, 'b': b, 'scale': scale}}}}
    return {**variables, 'lora': lora}

  apply = jax.jit(Decoder(config).apply)
  np.testing.assert_array_equal(apply(adapted(0 * b), tokens_BT), logits_BTV)
  merged = jax.tree.map(lambda leaf: leaf, variables)
  query = merged['params']['layers']['attention']['query']
  query['kernel'] = query['kernel'] + 0.5 * np.einsum('LDR,LRNH->LDNH', a, b)
  got = apply(adapted(b), tokens_BT)
  assert jnp.abs(got - logits_BTV)[..., :50].max() > 0.1
  np.testing.assert_allclose(got, apply(merged, tokens_BT), atol=1e-4)
  np.testing.assert_allclose(apply(unstack(adapted(b)), tokens_BT), got, atol=1e-5)


@pytest.mark.parametrize('stacked', [True, False])
def test_writes_past_the_end_of_the_cache_are_dropped(stacked):
  config, variables, tokens_BT, *_ = setting('llama')
  extend = jax.jit(functools.partial(Decoder(config).apply, method='extend'))
  cache = init_cache(config, 2, 6, stacked=stacked)
  _, cache = extend(variables, tokens_BT[:, :4], cache, jnp.asarray([4, 4]))
  _, after = extend(variables, tokens_BT[:, 4:8], cache, jnp.asarray([4, 0]))
  before_LBKSH, after_LBKSH = np.stack(cache.keys), np.stack(after.keys)
  np.testing.assert_array_equal(after_LBKSH[..., :4, :], before_LBKSH[..., :4, :])
  assert (after_LBKSH[:, 0, :, 4:] != 0).all() and (after_LBKSH[:, 1, :, 4:] == 0).all()


@pytest.mark.parametrize('rows', [1, 2])
def test_unstacked_decoding_updates_the_cache_in_place(rows):
  """A decode loop needs less scratch memory than one layer's keys: no copy of the cache."""
  config = tiny.BASE.replace(num_layers=2, positions=None, activation='relu', gated=False)
  model, variables = Decoder(config), unstack(tiny.variables_of(config))
  cache = init_cache(config, rows, 4096, stacked=False)

  @functools.partial(jax.jit, donate_argnums=1)
  def decode(variables, cache, tokens_B1):
    def body(carry):
      tokens_B1, cache = carry
      ones_B = jnp.ones(rows, jnp.int32)
      hidden_BTD, cache = model.apply(variables, tokens_B1, cache, ones_B, method='extend')
      logits_BTV = model.apply(variables, hidden_BTD, method='logits')
      return logits_BTV.argmax(-1).astype(jnp.int32), cache
    return jax.lax.while_loop(lambda carry: carry[1].lengths_B[0] < 9, body, (tokens_B1, cache))

  compiled = decode.lower(variables, cache, jnp.zeros((rows, 1), jnp.int32)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < cache.keys[0].nbytes


@pytest.mark.parametrize('window', [None, 3])
@pytest.mark.parametrize('packed', [True, False])
def test_cudnn_is_asked_for_the_same_attention(monkeypatch, packed, window):
  """The arguments given to the kernel, carried out by XLA."""
  numbers = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(numbers.standard_normal((2, 7, heads, 8)), jnp.float32) for heads in (4, 2, 2)
  )
  segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]]) if packed else None
  mask = attention.sequence_mask(7, segments, window)
  expected = attention.attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, 0.3)
  product = jax.nn.dot_product_attention

  def plain(*args, implementation, **kwargs):
    assert implementation == 'cudnn'
    return product(*args, **kwargs, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', plain)
  config = tiny.BASE.replace(attention_scale=0.3)
  got = attention.cudnn_attention(query, key, value, segments, config, window)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_sequence_beyond_the_learned_positions_is_refused():
  config = tiny.CONFIGS['gpt2']
  with pytest.raises(ValueError, match='33 tokens.*max_length=32'):
    jax.eval_shape(Decoder(config).apply, abstract(config)[0], jnp.zeros((1, 33), jnp.int32))


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
  config = tiny.BASE.replace(num_layers=1, positions=None)
  tokens_BT = tiny.tokens_of(config, 2, LENGTH)
  before = flax.config.flax_always_shard_variable
  flax.config.update('flax_always_shard_variable', False)
  try:
    @nnx.jit
    def make():
      rngs = nnx.Rngs(jax.random.key(0, impl='rbg'))
      return nnx.bridge.ToNNX(Decoder(config), rngs).lazy_init(tokens_BT)

    model = make()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    got = nnx.jit(lambda model: model(tokens_BT))(model)
  finally:
    flax.config.update('flax_always_shard_variable', before)
  assert jax.tree.structure(params) == jax.tree.structure(abstract(config)[0]['params'])
  want = jax.jit(Decoder(config).apply)({'params': params}, tokens_BT)
  np.testing.assert_array_equal(got, want)


class Reporting(mlp.Mlp):
  """An MLP that reports the mean of its input's square."""

  @nn.compact
  def __call__(self, x_BTD):
    self.sow('aux', 'square', jnp.square(x_BTD.astype(jnp.float32)).mean())
    return super().__call__(x_BTD)


def test_what_layers_report_is_added_and_costs_nothing_where_there_is_none(monkeypatch):
  config, variables, tokens_BT, *_ = setting('gpt2')
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.full_like(leaf, path[-1].key == 'scale')
    if path[-2].key == 'mlp_norm' else leaf, variables)

  def run(**changes):
    model = Decoder(config.replace(**changes))
    return jax.jit(lambda v: model.apply(v, tokens_BT, method='hidden'))(variables)

  plain, aux = run()
  assert aux == {}
  monkeypatch.setattr(decoder_lib, 'Mlp', Reporting)
  cases = [run(**changes) for changes in (
    {}, {'scan_layers': not config.scan_layers}, {'remat': 'full'})]
  for hidden_BTD, aux in cases:
    np.testing.assert_allclose(hidden_BTD, plain, atol=1e-5)
    assert aux['square'].dtype == jnp.float32
    np.testing.assert_allclose(aux['square'], config.num_layers, rtol=1e-2)  # Of what is normal.
