"""Laws of the train step: accumulating, sharding and skipping change only what they should."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxllm import sharding
from jaxllm.checkpoints import store as store_lib
from jaxllm.checkpoints.bundle import Bundle
from jaxllm.models import decoder
from jaxllm.training import state as state_lib
from jaxllm.training import step as step_lib
from tests.training import tiny_run as tiny

MESHES = {
  'data': {'data': 8},
  'fsdp': {'data': 1, 'fsdp': 8},
  'tensor': {'data': 4, 'tensor': 2},
  'mixed': {'data': 2, 'fsdp': 2, 'tensor': 2, 'slices': 2},
  'context': {'data': 2, 'context': 4},
}


def make_batch(rows=8, length=32, seed=0):
  generator = np.random.default_rng(seed)
  ids = generator.integers(0, 256, (rows, length + 1), dtype=np.int32)
  weights = (generator.random((rows, length)) < 0.7).astype(np.float32)
  return {
    'tokens': ids[:, :-1],
    'targets': ids[:, 1:],
    'weights': weights,
    'segment_ids': np.ones((rows, length), np.int32),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }


# A folder for all tests, so that equal runs share their compiled programs.
@pytest.fixture(scope='module')
def tmp_path(tmp_path_factory):
  return tmp_path_factory.mktemp('step')


PROGRAMS = {}


def begin(experiment, num_devices):
  """Return (the compiled step, the first state, and a function that places batches)."""
  key = experiment.to_json(), num_devices
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:num_devices])
  if key not in PROGRAMS:
    tx = state_lib.make_optimizer(experiment)
    state = state_lib.create_state(experiment, tx, mesh)
    PROGRAMS[key] = step_lib.make_train_step(experiment, tx, mesh), state
  train_step, state = PROGRAMS[key]
  # The step donates its state.
  state = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf).copy(), leaf.sharding), state)
  where = sharding.batch_sharding(mesh, experiment.mesh)
  return train_step, state, lambda batch: sharding.put_batch(batch, where)


def take_steps(experiment, num_devices, batches):
  train_step, state, put = begin(experiment, num_devices)
  history = []
  for batch in batches:
    state, metrics = train_step(state, put(batch))
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


@pytest.fixture(scope='module')
def one_device(tmp_path):
  return take_steps(tiny.experiment(tmp_path), 1, [make_batch(seed=seed) for seed in range(3)])


def assert_same_run(found, expected, tolerance):
  for got, want in zip(found[1], expected[1], strict=True):
    np.testing.assert_allclose(got['loss'], want['loss'], rtol=tolerance)
    np.testing.assert_allclose(got['grad_norm'], want['grad_norm'], rtol=10 * tolerance)
    assert got['tokens'] == want['tokens']
  # Adam's first updates have the size of the learning rate whatever the gradient's, so parameters
  # are compared on that scale.
  for got, want in zip(
    jax.tree.leaves(found[0].params), jax.tree.leaves(expected[0].params), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('name', MESHES)
def test_eight_devices_equal_one(tmp_path, one_device, name):
  changes = {'objective__chunk_size': 12} if name == 'context' else {}
  experiment = tiny.experiment(tmp_path, mesh=MESHES[name], **changes)
  found = take_steps(experiment, 8, [make_batch(seed=seed) for seed in range(3)])
  assert_same_run(found, one_device, 1e-5)


@pytest.mark.parametrize('name', ['data', 'mixed'])
def test_four_microbatches_equal_one_batch(tmp_path, name):
  changes = {'training__batch_size': 32, 'mesh': MESHES[name]}
  batches = [make_batch(32, seed=seed) for seed in range(2)]
  whole = take_steps(tiny.experiment(tmp_path, **changes), 8, batches)
  parts = tiny.experiment(tmp_path, training__microbatches=4, **changes)
  assert_same_run(take_steps(parts, 8, batches), whole, 1e-5)


def test_microbatches_are_weighted_by_their_tokens(tmp_path):
  batch = make_batch(8)
  batch['weights'][:] = 0
  batch['weights'][0] = 1  # All the tokens lie in one of four parts.
  whole = take_steps(tiny.experiment(tmp_path), 1, [batch])
  parts = take_steps(tiny.experiment(tmp_path, training__microbatches=4), 1, [batch])
  assert_same_run(parts, whole, 1e-5)


WEIGHT = {'square': 0.0}


class Reporting(decoder.Mlp):
  """An MLP that reports the mean of its output's square."""

  @nn.compact
  def __call__(self, x_BTD):
    added_BTD = super().__call__(x_BTD)
    self.sow('aux', 'square', jnp.square(added_BTD).mean())
    self.sow('aux', 'square_loss', WEIGHT['square'] * jnp.square(added_BTD).mean())
    return added_BTD


def test_what_layers_report_is_part_of_the_loss_and_averaged_like_it(tmp_path, monkeypatch):
  monkeypatch.setattr(decoder, 'Mlp', Reporting)
  experiment = tiny.experiment(tmp_path)
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  state = state_lib.create_state(experiment, state_lib.make_optimizer(experiment), mesh)
  batch, key = make_batch(8), jax.random.key(0)

  def sums(batch, weight, microbatches=1):
    monkeypatch.setitem(WEIGHT, 'square', weight)
    config = tiny.experiment(tmp_path, training__microbatches=microbatches)
    return jax.jit(lambda *args: step_lib.accumulate_gradients(config, *args))(state, batch, key)

  parts = [sums({name: x[i::4] for name, x in batch.items()}, 1e6) for i in range(4)]
  expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  found = sums(batch, 1e6, microbatches=4)
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
  total = found[1]
  added = total['loss_sum'] - total['cross_entropy_sum']
  assert added > 0
  np.testing.assert_allclose(added, 1e6 * total['square_sum'], rtol=1e-2)
  without = sums(batch, 0.0, microbatches=4)
  assert without[1]['loss_sum'] == without[1]['cross_entropy_sum']
  assert optax.global_norm(jax.tree.map(jnp.subtract, found[0], without[0])) > 1e-3


def test_updating_in_place_changes_no_bit(tmp_path, monkeypatch):
  experiment = tiny.experiment(tmp_path, training__ema_decay=0.5)
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  tx = state_lib.make_optimizer(experiment)
  state = state_lib.create_state(experiment, tx, mesh)
  batch = sharding.put_batch(make_batch(), sharding.batch_sharding(mesh, experiment.mesh))
  found = {}
  for platform in ('cpu', 'tpu'):
    monkeypatch.setattr(sharding, 'platform', lambda platform=platform: platform)
    one = jax.tree.map(jnp.copy, state)
    lowered = step_lib.make_train_step(experiment, tx, mesh).lower(one, batch)
    assert ('optimization_barrier' in lowered.as_text()) == (platform == 'tpu')
    train_step = lowered.compile()
    for factor in (1.0, np.nan, 1.0):
      one, _ = train_step(one, {**batch, 'weights': batch['weights'] * factor})
    found[platform] = one
  assert found['tpu'].step == 3 and found['tpu'].skipped == 1
  jax.tree.map(np.testing.assert_array_equal, found['tpu'], found['cpu'])


SMALL_STATE = {
  'training__param_dtype': 'bfloat16', 'optimizer__momentum_dtype': 'bfloat16',
  'optimizer__second_moment_dtype': 'bfloat16', 'optimizer__memory': 'host'}


def test_a_state_in_bfloat16_on_the_host_trains_nearly_the_same_on_any_mesh(tmp_path, one_device):
  batches = [make_batch(seed=seed) for seed in range(3)]
  found = [
    take_steps(tiny.experiment(tmp_path, mesh=mesh, **SMALL_STATE), num_devices, batches)
    for num_devices, mesh in ((1, {}), (8, MESHES['mixed']))]
  for state, history in found:
    for got, want in zip(history, one_device[1], strict=True):
      np.testing.assert_allclose(got['loss'], want['loss'], rtol=2e-3)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {'bfloat16'}
    assert {(str(leaf.dtype), leaf.sharding.memory_kind)
            for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {
              ('bfloat16', 'pinned_host')}
  # Nearly all round alike: that a sum is another in its last bits seldom decides.
  one, many = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(
    jax.device_get(state.params))]) for state, _ in found)
  assert (one == many).mean() > 0.97


def test_a_small_state_goes_on_bit_for_bit_and_moves_between_memories(tmp_path):
  experiment = tiny.experiment(tmp_path, mesh={}, **SMALL_STATE)
  train_step, state, put = begin(experiment, 1)
  state, _ = train_step(state, put(make_batch()))
  store = store_lib.open_store(tmp_path / 'small', store_lib.CheckpointConfig(asynchronous=False))
  store_lib.save(store, 1, state, Bundle('{}', {}, {}))
  found = {}
  for memory in ('device', 'host'):
    other = experiment.replace(optimizer=experiment.optimizer.replace(memory=memory))
    found[memory] = store_lib.restore(store, state_lib.abstract_state(
      other, state_lib.make_optimizer(other), sharding.make_mesh(other.mesh, jax.devices()[:1])))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found[memory].opt_state)
            if leaf.ndim} == {{'host': 'pinned_host', 'device': 'device'}[memory]}
  store_lib.close(store)
  jax.tree.map(assert_same_bits, found['device'], state)
  again, one = train_step(found['host'], put(make_batch(seed=1)))
  expected, two = train_step(state, put(make_batch(seed=1)))
  jax.tree.map(assert_same_bits, (again, one), (expected, two))


def assert_same_bits(got, want):
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(*(np.asarray(leaf, np.float64) for leaf in (got, want)))


def test_without_a_memory_of_the_host_the_choice_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'memories', lambda mesh: ['device'])
  experiment = tiny.experiment(tmp_path, mesh={}, optimizer__memory='host')
  with pytest.raises(ValueError, match="optimizer.memory='host': .*take 'device'"):
    state_lib.abstract_state(
      experiment, state_lib.make_optimizer(experiment), sharding.make_mesh(experiment.mesh))


def test_chunked_loss_and_ema_train_the_same(tmp_path, one_device):
  changes = {'objective__chunk_size': 5, 'training__ema_decay': 0.5}
  found = take_steps(
    tiny.experiment(tmp_path, **changes), 1, [make_batch(seed=seed) for seed in range(3)]
  )
  assert_same_run(found, one_device, 1e-5)
  difference = optax.global_norm(jax.tree.map(jnp.subtract, found[0].ema, found[0].params))
  assert 0 < difference < 0.1


def test_the_average_follows_its_formula(tmp_path):
  experiment = tiny.experiment(
    tmp_path, objective__chunk_size=5, training__ema_decay=0.5)  # As above.
  train_step, before, put = begin(experiment, 1)
  old = jax.tree.map(np.array, before.params)
  after, _ = train_step(before, put(make_batch()))
  expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, old, after.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema, expected)


def test_state_and_batch_have_the_named_shardings(tmp_path):
  experiment = tiny.experiment(tmp_path, mesh=MESHES['mixed'])
  state, _ = take_steps(experiment, 8, [make_batch()])
  query = ('layers', 'attention', 'query', 'kernel')
  expected = {
    query: PartitionSpec(None, 'fsdp', 'tensor', None),
    ('layers', 'mlp', 'down', 'kernel'): PartitionSpec(None, 'tensor', 'fsdp'),
    ('embed', 'embedding'): PartitionSpec('tensor', 'fsdp'),
    ('final_norm', 'scale'): PartitionSpec('fsdp'),
  }
  adam = next(
    part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, 'mu'))
    if hasattr(part, 'mu')
  )
  for tree in (state.params, adam.mu, adam.nu):
    for path, spec in expected.items():
      leaf = tree
      for key in path:
        leaf = leaf[key]
      assert leaf.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(leaf.sharding.mesh, spec), leaf.ndim
      ), (path, leaf.sharding.spec)
  kernel = state.params['layers']['attention']['query']['kernel']
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  mesh = sharding.make_mesh(experiment.mesh)
  placed = sharding.put_batch(make_batch(), sharding.batch_sharding(mesh, experiment.mesh))
  assert placed['tokens'].addressable_shards[0].data.shape == (2, 32)


@pytest.mark.parametrize('name', ['lion', 'muon', 'sgd'])
def test_every_optimizer_state_takes_its_parameters_shardings(tmp_path, name):
  experiment = tiny.experiment(tmp_path, optimizer__name=name, mesh=MESHES['mixed'])
  mesh = sharding.make_mesh(experiment.mesh)
  state = state_lib.abstract_state(experiment, state_lib.make_optimizer(experiment), mesh)
  split = {
    leaf.shape for leaf in jax.tree.leaves(state.opt_state)
    if any(entry is not None for entry in leaf.sharding.spec)
  }
  large = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 64}
  assert large <= split


def test_a_step_that_is_not_finite_changes_only_counters(tmp_path):
  train_step, state, put = begin(tiny.experiment(tmp_path), 1)
  before = jax.tree.map(np.array, state)
  bad = make_batch()
  bad['weights'][0, 0] = np.nan
  after, metrics = train_step(state, put(bad))
  assert metrics['applied'] == 0 and metrics['skipped_in_a_row'] == 1
  assert after.step == 1 and after.skipped == 1
  for got, want in zip(
    jax.tree.leaves((after.params, after.opt_state, after.loss_mean)),
    jax.tree.leaves((before.params, before.opt_state, before.loss_mean)), strict=True,
  ):
    np.testing.assert_array_equal(got, want)
  again, metrics = train_step(after, put(make_batch()))
  assert metrics['applied'] == 1 and metrics['skipped_in_a_row'] == 0 and again.skipped == 1


def test_an_update_that_ruins_the_parameters_is_not_applied(tmp_path):
  """The gradient is finite, and so is each new parameter; their norm is not."""
  experiment = tiny.experiment(tmp_path, optimizer__learning_rate=1e28, schedule__warmup_steps=0)
  train_step, state, put = begin(experiment, 1)
  before = jax.tree.map(np.array, state.params)
  after, metrics = train_step(state, put(make_batch()))
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  assert metrics['applied'] == 0 and metrics['skipped_in_a_row'] == 1
  jax.tree.map(np.testing.assert_array_equal, after.params, before)


def test_a_spike_is_skipped_once_the_statistics_are_warm(tmp_path):
  experiment = tiny.experiment(
    tmp_path, training__spike={'deviations': 6.0, 'window_steps': 5}
  )
  train_step, state, put = begin(experiment, 1)
  batch = make_batch()
  batch['targets'] = batch['tokens']
  spike = make_batch(seed=1)
  spike['targets'] = (spike['tokens'] + 1) % 256
  state, metrics = train_step(state, put(spike))
  assert metrics['applied'] == 1  # Too early to judge.
  for _ in range(40):
    state, metrics = train_step(state, put(batch))
    assert metrics['applied'] == 1
  state, metrics = train_step(state, put(spike))
  assert metrics['applied'] == 0 and np.isfinite(metrics['loss'])


def test_the_donated_step_compiles_once(tmp_path, one_device):
  train_step, _, _ = begin(tiny.experiment(tmp_path), 1)
  assert train_step._cache_size() == 1
