"""Each optimizer equals its definition, decays what it should, and is blind to how layers lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.config import ConfigError
from jaxllm.models import decoder
from jaxllm.models.families import PRESETS
from jaxllm.optim import optimizers
from jaxllm.optim.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer

SHAPES = {
  'embed': {'embedding': (10, 6)},
  'final_norm': {'scale': (6,), 'bias': (6,)},
  'layers': {
    'attention': {
      'query': {'kernel': (3, 6, 2, 4), 'bias': (3, 2, 4)},
      'out': {'kernel': (3, 2, 4, 6)},
    },
    'attention_norm': {'scale': (3, 6)},
    'mlp': {'up': {'kernel': (3, 6, 12), 'bias': (3, 12)}, 'down': {'kernel': (3, 12, 6)}},
  },
  'head': {'kernel': (6, 10)},
}

SMALL = {'embed': {'embedding': (3, 2)}, 'layers': {'mlp': {'up': {'kernel': (2, 3, 2)}}}}


def random_tree(seed, shapes=SHAPES):
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  rng = np.random.default_rng(seed)
  return structure.unflatten([jnp.asarray(rng.normal(size=s), jnp.float32) for s in leaves])


def run(tx, params, num_steps=3):
  """Take steps along random gradients; return the params."""

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for seed in range(num_steps):
    params, state = step(params, state, random_tree(seed))
  return params


def first_updates(tx):
  """Return the jitted (params, grads) -> updates of the first step."""
  return jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])


def make(name, params, schedule=lambda count: 0.1 / (1 + count), **config):
  return make_optimizer(OptimizerConfig(name=name, **config), schedule, params)


def assert_trees_close(actual, expected, rtol=2e-5, atol=2e-6):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected
  )


def decayed(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )


def test_adamw_first_step_by_hand():
  params = {'kernel': jnp.array([2.0, -1.0]), 'bias': jnp.array([2.0])}
  grads = {'kernel': jnp.array([0.5, -4.0]), 'bias': jnp.array([-1e-8])}
  tx = make('adamw', params, schedule=lambda _: 0.1, weight_decay=0.01, clip_norm=None,
            decay_names=('kernel',))
  updates, _ = tx.update(grads, tx.init(params), params)
  # Bias correction makes the moments g and g * g: 0.1 * g / (|g| + 1e-8) + 0.1 * 0.01 * param.
  np.testing.assert_allclose(updates['kernel'], [-0.102, 0.101], rtol=1e-6)
  np.testing.assert_allclose(updates['bias'], [0.1 * 1e-8 / (1e-8 + 1e-8)], rtol=1e-5)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_reduces_a_quadratic(name):
  params, target = random_tree(0, SMALL), random_tree(1, SMALL)

  def loss(params):
    errors = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
    return sum(jax.tree.leaves(errors))

  config = OptimizerConfig(name=name, weight_decay=0.0, clip_norm=None)
  tx = make_optimizer(config, lambda _: 0.1, params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  trained, state = params, tx.init(params)
  for _ in range(60):
    trained, state = step(trained, state)
  assert loss(trained) < 0.4 * loss(params)


def by_hand(name, params, schedule):
  mask, clip = decayed(params), optax.clip_by_global_norm(0.7)
  if name == 'adamw':
    return optax.chain(clip, optax.adamw(schedule, 0.8, 0.9, 1e-6, weight_decay=0.3, mask=mask))
  if name == 'lion':
    return optax.chain(clip, optax.lion(schedule, 0.8, 0.9, weight_decay=0.3, mask=mask))
  return optax.chain(
    clip, optax.add_decayed_weights(0.3, mask), optax.sgd(schedule, momentum=0.0))


@pytest.mark.parametrize(
  'name, settings',
  [
    ('adamw', {'beta1': 0.8, 'beta2': 0.9, 'epsilon': 1e-6}),
    ('lion', {'beta1': 0.8, 'beta2': 0.9}),
    ('sgd', {'momentum': 0.0}),
  ],
)
def test_equals_optax_composed_by_hand(name, settings):
  params = random_tree(9)
  schedule = optax.linear_schedule(0.1, 0.01, 4)
  ours = make(name, params, schedule, weight_decay=0.3, clip_norm=0.7, **settings)
  assert_trees_close(run(ours, params), run(by_hand(name, params, schedule), params))


def test_sgd_momentum_equals_optax():
  params = random_tree(9)
  ours = make('sgd', params, lambda _: 0.1, momentum=0.7, weight_decay=0.0, clip_norm=None)
  assert_trees_close(run(ours, params), run(optax.sgd(0.1, momentum=0.7), params))


def layer(tree, index):
  """Return one layer's kernels as (in, out) matrices: query (D, N*H), out (N*H, D)."""
  tree = jax.tree.map(lambda x: x[index], tree)
  tree['attention']['query']['kernel'] = tree['attention']['query']['kernel'].reshape(6, 8)
  tree['attention']['out']['kernel'] = tree['attention']['out']['kernel'].reshape(8, 6)
  return tree


def test_muon_equals_muon_of_each_matrix_and_adamw_of_the_rest():
  params, grads = random_tree(3), random_tree(4)
  tx = make('muon', params, lambda _: 0.1, weight_decay=0.0, clip_norm=None)
  updates = first_updates(tx)(params, grads)

  adam = optax.adam(0.1, 0.9, 0.95)
  muon = optax.contrib.muon(0.1, adam_b2=0.95, nesterov=True, consistent_rms=0.2)
  muon_updates = first_updates(muon)
  for name in ('embed', 'final_norm', 'head'):
    expected, _ = adam.update(grads[name], adam.init(params[name]))
    assert_trees_close(updates[name], expected)
  for index in range(3):
    mine, theirs = layer(updates['layers'], index), layer(params['layers'], index)
    expected = muon_updates(theirs, layer(grads['layers'], index))
    for path in (('attention', 'query'), ('attention', 'out'), ('mlp', 'up'), ('mlp', 'down')):
      got, want = mine[path[0]][path[1]]['kernel'], expected[path[0]][path[1]]['kernel']
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    vectors = {'norm': mine['attention_norm'], 'bias': mine['mlp']['up']['bias']}
    slices = layer(grads['layers'], index)
    slices = {'norm': slices['attention_norm'], 'bias': slices['mlp']['up']['bias']}
    assert_trees_close(vectors, adam.update(slices, adam.init(slices))[0])


def test_muon_updates_are_nearly_orthogonal_at_the_scale_of_adamw():
  params = random_tree(3)
  tx = make('muon', params, lambda _: 1.0, weight_decay=0.0, clip_norm=None)
  updates = first_updates(tx)(params, random_tree(4))
  for index in range(3):
    matrix = layer(updates['layers'], index)['mlp']['up']['kernel']
    values = np.linalg.svd(matrix / (0.2 * np.sqrt(12)), compute_uv=False)
    assert (values > 0.5).all() and (values < 1.3).all()


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_decay_reaches_exactly_kernels_and_embeddings(name):
  params = random_tree(5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  tx = make(name, params, lambda _: 0.1, weight_decay=0.5, clip_norm=None)
  updates = first_updates(tx)(params, zeros)
  for (path, update), param in zip(
    jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
  ):
    if path[-1].key in ('kernel', 'embedding'):
      # The first schedule-free step moves all the way to z.
      np.testing.assert_allclose(update, -0.1 * 0.5 * param, rtol=1e-4, atol=1e-6)
    else:
      np.testing.assert_allclose(update, 0, atol=1e-6)


def test_every_decay_name_matches_a_parameter_of_real_models():
  for name in ('gpt2_124m', 'llama3_8b'):
    preset = PRESETS[name]
    shapes, _ = decoder.abstract(preset.replace(num_layers=1))
    mask = optimizers.decay_mask(OptimizerConfig().decay_names, shapes['params'])
    flat = {
      '/'.join(key.key for key in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert flat['embed/embedding'] and flat['layers/mlp/down/kernel']
    assert not any(leaf for path, leaf in flat.items() if path.endswith(('scale', 'bias')))


def test_a_decay_name_that_matches_nothing_is_refused():
  with pytest.raises(ValueError, match=r"decay_names: 'kernels' matches no parameter .*kernel"):
    make('adamw', SHAPES_AS_STRUCTS, decay_names=('kernels',))


SHAPES_AS_STRUCTS = jax.tree.map(
  lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES,
  is_leaf=lambda x: isinstance(x, tuple),
)


def test_muon_refuses_to_guess_the_axes_of_an_unknown_kernel():
  params = {'layers': {'heads': {'kernel': jax.ShapeDtypeStruct((2, 8, 4, 4), jnp.float32)}}}
  with pytest.raises(ValueError, match="layers/heads/kernel: .* no rule says .* 'heads'"):
    make('muon', params, weight_decay=0.0)


def test_muon_makes_the_update_of_each_expert_orthogonal_as_of_a_dense_kernel():
  shape = 2, 3, 8, 4
  grad = jax.random.normal(jax.random.key(0), shape)

  def update(path, grad):
    keys = path.split('/')
    tree = {'layers': {keys[0]: {keys[1]: {'kernel': grad}} if len(keys) > 1 else {'kernel': grad}}}
    tx = make('muon', tree, lambda _: 1.0, weight_decay=0.0, clip_norm=None)
    return jax.tree.leaves(tx.update(tree, tx.init(tree), tree)[0])[0]

  experts = update('experts/up', grad)
  assert experts.shape == shape
  for expert in range(3):
    np.testing.assert_allclose(experts[:, expert], update('up', grad[:, expert]), atol=1e-5)
  gram = jnp.einsum('LEIO,LEIP->LEOP', experts, experts)
  values = jnp.linalg.eigvalsh(gram) / (0.2**2 * 8)  # Squares of the singular values.
  assert 0.4 < values.min() and values.max() < 1.6


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_biases_of_experts_move_by_the_sign_of_their_load_alone(name):
  params = {'layers': {'up': {'kernel': jnp.ones((2, 4, 4))}, 'balance_bias': jnp.zeros((2, 3))}}
  grads = {'layers': {'up': {'kernel': jnp.full((2, 4, 4), 0.5)},
                      'balance_bias': jnp.asarray([[1e-7, -3e-8, 0], [0, 2e-9, -1e-7]])}}
  tx = make(name, params, decay_names=('kernel',), balance_rate=0.01)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(
    updates['layers']['balance_bias'], [[-0.01, 0.01, 0], [0, -0.01, 0.01]])
  plain = {'layers': {'up': params['layers']['up']}}
  tx = make(name, plain, decay_names=('kernel',))
  want, _ = tx.update({'layers': {'up': grads['layers']['up']}}, tx.init(plain), plain)
  np.testing.assert_array_equal(
    updates['layers']['up']['kernel'], want['layers']['up']['kernel'])


def test_clipping_is_by_the_global_norm():
  params = {'kernel': jnp.zeros(1), 'bias': jnp.zeros(1)}
  tx = make('sgd', params, lambda _: 1.0, momentum=0.0, weight_decay=0.0)
  for grads, expected in [((3.0, 4.0), (-0.6, -0.8)), ((0.3, 0.4), (-0.3, -0.4))]:
    grads = {'kernel': jnp.array([grads[0]]), 'bias': jnp.array([grads[1]])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose([updates['kernel'][0], updates['bias'][0]], expected, rtol=1e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_is_abstract_and_moments_have_their_parameters_shapes(name):
  tx = make(name, SHAPES_AS_STRUCTS)
  state = jax.eval_shape(tx.init, SHAPES_AS_STRUCTS)
  assert jax.tree.map(jnp.shape, tx.init(random_tree(0))) == jax.tree.map(jnp.shape, state)
  shapes = {
    tuple(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(SHAPES_AS_STRUCTS)
  }
  moments = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    owners = [tuple(path[i:]) for i in range(len(path)) if tuple(path[i:]) in shapes]
    assert leaf.shape == (shapes[owners[0]] if owners else leaf.shape)
    assert owners or leaf.size <= 3
    moments += bool(owners)
  copies = {'adamw': 2, 'lion': 1, 'sgd': 1}
  assert moments == (copies.get(name, 0) * len(shapes) or 4 + 2 * (len(shapes) - 4))


def test_momentum_dtype():
  tx = make('adamw', SHAPES_AS_STRUCTS, momentum_dtype='bfloat16')
  state = jax.eval_shape(tx.init, SHAPES_AS_STRUCTS)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
  assert dtypes == {jnp.dtype('bfloat16'), jnp.dtype('float32')}


@pytest.mark.parametrize('name, wanted', [
  ('adamw', {'mu': 'bfloat16', 'nu': 'bfloat16'}), ('muon', {'mu': 'float32', 'nu': 'bfloat16'})])
def test_moments_are_stored_as_chosen_and_lead_the_same_way(name, wanted):
  params = random_tree(2, SMALL)
  dtypes = {{'mu': 'momentum_dtype', 'nu': 'second_moment_dtype'}[key]: dtype
            for key, dtype in wanted.items()}
  tx = make(name, params, lambda _: 1e-2, **dtypes)
  found = {str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tx.init(params))
           if '.nu' in jax.tree_util.keystr(path)}
  assert found == {wanted['nu']}
  low, full = run_along(tx, params), run_along(make(name, params, lambda _: 1e-2), params)
  # Numbers of 8 bits, 20 times.
  jax.tree.map(lambda a, b, start: np.testing.assert_allclose(
    a - start, b - start, atol=0.02 * jnp.abs(b - start).max()), low, full, params)


def run_along(tx, params):
  """Take 20 steps along gradients that shrink to nothing; return the params."""
  grads = random_tree(5, SMALL)

  def step(carry, scale):
    params, state = carry
    updates, state = tx.update(jax.tree.map(lambda g: g * scale, grads), state, params)
    return (optax.apply_updates(params, updates), state), None

  scales = jnp.linspace(1.0, 0.0, 20)
  return jax.jit(lambda carry: jax.lax.scan(step, carry, scales)[0])((params, tx.init(params)))[0]


def test_a_second_moment_in_bfloat16_forgets_at_the_slowest_decay():
  params = {'kernel': jnp.ones(2)}
  tx = optimizers._adam(0.9, optimizers._MAX_BETA2, 1e-8, None, 'bfloat16')
  state = tx.init(params)
  state = state._replace(nu={'kernel': jnp.asarray([1.0, 1.9], jnp.bfloat16)})
  state = jax.lax.fori_loop(
    0, 300, lambda _, state: tx.update({'kernel': jnp.zeros(2)}, state, params)[1], state)
  np.testing.assert_allclose(
    state.nu['kernel'].astype(jnp.float32) / jnp.array([1.0, 1.9]), 0.99 ** 300, rtol=0.3)


def test_stochastic_rounding_takes_a_neighbour_and_is_right_in_the_mean():
  x = jnp.concatenate([random_tree(6, {'x': (29,)})['x'], jnp.array([0.0, 1.5, -2.0 ** -130])])
  rounded = jax.jit(jax.vmap(optimizers.stochastic_round, (None, 0)))(
    x, jax.random.split(jax.random.key(0), 4000))
  assert rounded.dtype == jnp.bfloat16
  found = np.asarray(rounded, np.float64)
  bits = np.asarray(x).view(np.uint32) & 0xFFFF0000
  below, above = (b.view(np.float32).astype(np.float64) for b in (bits, bits + 0x10000))
  assert ((found == below) | (found == above)).all()
  assert (found[:, np.asarray(x) == below] == below[np.asarray(x) == below]).all()
  share = (np.asarray(x, np.float64) - below) / (above - below)
  deviations = np.sqrt(share * (1 - share) / len(found))
  assert (abs((found == above).mean(axis=0) - share) <= 4.5 * deviations).all()
  extremes = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
  np.testing.assert_array_equal(
    optimizers.stochastic_round(extremes, jax.random.key(1)).astype(jnp.float32), extremes)


def test_stochastic_rounding_does_not_depend_on_the_mesh():
  x, key = random_tree(7, {'x': (16, 24)})['x'], jax.random.key(3)
  whole = jax.jit(optimizers.stochastic_round)(x, key)
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('a', 'b'))
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('a', 'b'))
  split = jax.jit(optimizers.stochastic_round, out_shardings=where)(jax.device_put(x, where), key)
  np.testing.assert_array_equal(*(np.asarray(leaf, np.float32) for leaf in (whole, split)))


def test_configs_name_what_is_wrong():
  with pytest.raises(ConfigError, match="beta2=0.999 with second_moment_dtype='bfloat16'.*0.99,"):
    OptimizerConfig(beta2=0.999, second_moment_dtype='bfloat16')
  with pytest.raises(ConfigError, match="name='adam': one of adamw, lion"):
    OptimizerConfig(name='adam')
  with pytest.raises(ConfigError, match="beta2=0.9: 'sgd' does not read it .*momentum"):
    OptimizerConfig(name='sgd', beta2=0.9)
  with pytest.raises(ConfigError, match='learning_rate'):
    OptimizerConfig(learning_rate=0)
