"""Estimates count what a device holds, computes and sends."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm import config as config_lib
from jaxllm import sharding
from jaxllm.models.config import ExpertsConfig
from jaxllm.sharding import MeshConfig
from jaxllm.training import cost, op_costs, state
from jaxllm.training import step as step_lib
from tests.training import tiny_run

SQUARE = jnp.zeros((64, 64), jnp.float32)
SIZE = SQUARE.nbytes


def traced(function, *arguments):
  return op_costs.trace_cost(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_elementwise_results_are_fused_and_products_stored():
  assert traced(lambda x: jnp.sum(jnp.exp(x) * 2 + 1), SQUARE).peak == 4
  found = traced(lambda x: jnp.sum(x @ x @ x), SQUARE)
  assert found.peak == 2 * SIZE  # The first product, while the second is computed.
  assert found.flops == 2 * 2 * 64**3


def test_loops_compute_each_turn_and_hold_one():
  def scanned(x):
    return jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=5)[0]

  found = traced(scanned, SQUARE)
  assert found.flops == 5 * 2 * 64**3
  assert SIZE <= found.peak <= 3 * SIZE


def test_what_the_backward_pass_needs_is_saved_unless_recomputed():
  def loss(f, x):
    with jax.named_scope('loss'):
      for _ in range(8):
        x = f(x)
      return jnp.sum(x)

  def layer(x):
    return jnp.tanh(jnp.tanh(x @ SQUARE) @ SQUARE)

  plain = traced(jax.grad(lambda x: loss(layer, x)), SQUARE)
  saving = traced(jax.grad(lambda x: loss(jax.checkpoint(layer), x)), SQUARE)
  assert saving.saved < 0.7 * plain.saved
  assert saving.flops > plain.flops


def test_a_wider_cast_and_zeros_are_never_whole():
  stacks = jnp.zeros((8, 64, 64), jnp.bfloat16)

  def widened(x):
    return jax.lax.scan(lambda _, part: (None, part @ part), None, x)[1].astype(jnp.float32)

  def added(x):
    return jax.lax.scan(lambda _, two: (None, two[0] @ two[1]), None, (x, jnp.zeros_like(x)))[1]

  for function in (widened, added):
    found = op_costs.trace_cost(jax.make_jaxpr(function)(stacks).jaxpr,
                            lambda shape: 1 / 8 if len(shape) == 3 else 1.0)
    assert found.peak <= stacks.nbytes / 2, function


def test_state_is_counted_as_it_is_held(tmp_path):
  config = MeshConfig(data=2, fsdp=2, tensor=2)
  experiment = tiny_run.experiment(tmp_path, mesh=config)
  mesh = sharding.make_mesh(config)
  made = state.create_state(experiment, state.make_optimizer(experiment), mesh)

  def held(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)) / cost.GIB

  gib = cost.estimate(experiment, mesh, cost.local_chip(mesh))['gib']
  assert gib['parameters'] == held(made.params) == gib['gradients']
  assert gib['optimizer'] == held(made.opt_state)
  assert gib['total'] < gib['memory']


def test_the_parts_of_a_sequence_compute_all_of_it(tmp_path):
  config = MeshConfig(data=2, context=4)
  experiment = tiny_run.experiment(tmp_path, mesh=config)
  made = cost.estimate(experiment, mesh := sharding.make_mesh(config), cost.local_chip(mesh))
  assert made['executed'] * 8 >= 0.999 * made['flops']


def test_the_estimate_is_near_the_compiled_step(tmp_path):
  experiment = tiny_run.experiment(tmp_path, **{
    'model.embed_dim': 64, 'model.mlp_dim': 256, 'model.max_length': 256,
    'data.context_length': 256, 'model.num_layers': 4})
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  tx = state.make_optimizer(experiment)
  memory = step_lib.make_train_step(experiment, tx, mesh).lower(
    state.abstract_state(experiment, tx, mesh), step_lib.abstract_batch(experiment, mesh)
  ).compile().memory_analysis()
  gib = cost.estimate(experiment, mesh, cost.local_chip(mesh))['gib']
  found = gib['gradients'] + gib['saved activations'] + gib['temporaries']
  assert found * cost.GIB == pytest.approx(memory.temp_size_in_bytes, rel=0.35)


def test_time_is_that_of_the_bound_and_unknown_without_figures(tmp_path):
  config = MeshConfig(data=2, fsdp=4)
  experiment = tiny_run.experiment(tmp_path, mesh=config, model__dtype='bfloat16')
  mesh = sharding.abstract_mesh(config, 8)
  plan = cost.estimate(experiment, mesh, cost.CHIPS['v5e'])
  seconds, ceiling = plan['seconds'], plan['ceiling']
  assert ceiling['seconds'] == max(seconds.values()) == seconds[ceiling['bound']]
  assert ceiling['chip_hours'] == pytest.approx(ceiling['seconds'] * 8 * 8 / 3600)
  assert {(one['kind'], one['axes']) for one in plan['exchanged']} == {
    ('all-gather', 'fsdp'), ('reduce-scatter', 'fsdp'), ('all-reduce', 'data')}
  two = experiment.replace(mesh=config.replace(slices=2))
  far, = (one for one in cost.estimate(two, mesh, cost.CHIPS['v5e'])['exchanged']
          if one['axes'] == cost.SLICES)
  # Between two slices of one device along data each, what is added up crosses once.
  assert 2 * far['bytes'] == sum(
    one['bytes'] for one in plan['exchanged'] if one['axes'] == 'data')
  toaster = cost.estimate(experiment, mesh, cost.Chip('a toaster', 1e-4))
  assert toaster['ceiling'] is None and 'no peak of a toaster' in cost.page(toaster)
  assert 'config.objective.chunk_size=512 leaves little' in toaster['problems'][0]


@pytest.mark.parametrize('experts, kinds, copies', [
  (dict(top_k=4), {'all-gather', 'reduce-scatter'}, 4),
  (dict(top_k=2), {'all-to-all'}, 2 * 2 * 3 / 4),
  (dict(top_k=4, capacity_factor=1.25), {'all-to-all'}, 2 * 4 * 1.25 * 3 / 4)])
def test_tokens_go_to_their_experts_and_back(tmp_path, experts, kinds, copies):
  mesh = MeshConfig(data=2, expert=4)
  experiment = tiny_run.experiment(
    tmp_path, mesh=mesh, model__experts=ExpertsConfig(num_experts=8, **experts))
  sent = cost.exchange(experiment, sharding.abstract_mesh(mesh, 8))
  found = {one['kind']: one['bytes'] for one in sent if one['axes'] == 'expert'}
  assert set(found) == kinds  # Their kernels stay where they are.
  assert set(found.values()) == {copies * 2 * 2 * 32 * 16 * 4}  # Passes, layers, tokens, width.


def test_inputs_of_blocks_on_the_host_take_no_memory_of_the_device(tmp_path):
  experiment = tiny_run.experiment(tmp_path, model__num_layers=8, model__scan_layers=True)
  mesh = sharding.abstract_mesh(MeshConfig(), 1)

  def saved(remat):
    run = config_lib.override(experiment, {'model.remat': remat})
    return cost.estimate(run, mesh, cost.CHIPS['v5e'])['gib']['saved activations']

  assert saved('offload') < saved('full') < saved('none')
