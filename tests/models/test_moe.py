"""Laws of a mixture of experts; `tiny.reference_logits` takes it as a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import sharding
from jaxllm.adapters import lora, quantization
from jaxllm.models import cpu_kernels, moe
from jaxllm.models.config import ExpertsConfig
from jaxllm.models.decoder import Decoder, abstract, init
from jaxllm.models.linear import grouped_dense

CONFIG = tiny.CONFIGS['mixtral'].replace(num_layers=2)
VARIABLES = tiny.variables_of(CONFIG)
TOKENS_BT = tiny.tokens_of(CONFIG, 8, 12)
SEGMENTS_BT = np.repeat(np.asarray([[1] * 5 + [2] * 5 + [0] * 2], np.int32), 8, axis=0)


def with_experts(**changes):
  return CONFIG.replace(experts=CONFIG.experts.replace(**changes))


@functools.partial(jax.jit, static_argnames=('config', 'training'))
def run(config, variables, tokens_BT, segments_BT=None, training=False):
  model = Decoder(config)
  hidden_BTD, aux = model.apply(
    variables, tokens_BT, segments_BT, deterministic=not training, method='hidden')
  return model.apply(variables, hidden_BTD, method='logits'), aux


def test_one_expert_is_the_dense_mlp():
  config = with_experts(num_experts=1, top_k=1)
  variables = tiny.variables_of(config)
  layers = variables['params']['layers']
  dense = {name: {'kernel': layer['kernel'][:, 0]}
           for name, layer in layers['mlp']['experts'].items()}
  dense = {'params': {**variables['params'], 'layers': {**layers, 'mlp': dense}}}
  np.testing.assert_allclose(
    run(config, variables, TOKENS_BT)[0],
    run(config.replace(experts=None), dense, TOKENS_BT)[0], atol=1e-5)


def test_permuting_the_experts_changes_nothing():
  order = np.asarray([2, 0, 3, 1])
  mlp = VARIABLES['params']['layers']['mlp']
  permuted = jax.tree.map(lambda leaf: leaf[:, order], mlp['experts'])
  router = {'kernel': mlp['router']['kernel'][..., order]}
  layers = {**VARIABLES['params']['layers'], 'mlp': {'experts': permuted, 'router': router}}
  got, want = (run(CONFIG, {'params': params}, TOKENS_BT, SEGMENTS_BT) for params in (
    {**VARIABLES['params'], 'layers': layers}, VARIABLES['params']))
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)
  for name in want[1]:
    np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-5)


def test_a_sequence_alone_is_the_sequence_in_a_batch():
  together, _ = run(CONFIG, VARIABLES, TOKENS_BT, SEGMENTS_BT)
  alone, _ = run(CONFIG, VARIABLES, TOKENS_BT[2:3, :5])
  np.testing.assert_allclose(together[2:3, :5], alone, atol=1e-5)


def test_enough_capacity_drops_nothing_and_too_little_does():
  want, without = run(CONFIG, VARIABLES, TOKENS_BT, SEGMENTS_BT, training=True)
  assert 'router_dropped' not in without
  real = SEGMENTS_BT > 0
  logits, aux = run(with_experts(capacity_factor=4.0), VARIABLES, TOKENS_BT, SEGMENTS_BT, True)
  np.testing.assert_allclose(logits[real], want[real], atol=1e-5)
  assert aux['router_dropped'] == 0
  scarce = with_experts(capacity_factor=0.5)
  logits, aux = run(scarce, VARIABLES, TOKENS_BT, SEGMENTS_BT, training=True)
  assert 0.39 < aux['router_dropped'] < 0.7
  assert np.abs(logits - want)[real].max() > 0.1
  logits, aux = run(scarce, VARIABLES, TOKENS_BT, SEGMENTS_BT)  # Only training has a capacity.
  np.testing.assert_array_equal(logits[real], want[real])


def test_a_full_expert_takes_first_choices_first_and_earlier_tokens_before_later_ones():
  config = tiny.BASE.replace(
    embed_dim=1, num_heads=1, head_dim=2, mlp_dim=1, gated=False, activation='relu',
    experts=ExpertsConfig(num_experts=2, top_k=2))
  kernels = {name: {'kernel': jnp.ones((2, 1, 1))} for name in ('up', 'down')}
  x_ND, ids_NK = jnp.ones((3, 1)), jnp.asarray([[0, 1], [0, 1], [1, 0]])
  weights_NK = jnp.asarray([[4.0, 1.0]] * 3)
  mixed_ND, dropped = moe._mix_capacity(config, 2 / 3, (), kernels, x_ND, ids_NK, weights_NK)
  # Expert 0 has room for the first choices of tokens 0 and 1; expert 1 for token 2, then token 0.
  np.testing.assert_allclose(mixed_ND[:, 0], [5, 4, 4])
  np.testing.assert_allclose(dropped, 2 / 6)


def test_the_balance_loss_is_least_at_uniform_loads():
  experts = ExpertsConfig(num_experts=4, top_k=2, balance_loss=0.5, z_loss=0.25)

  def losses(logits_TE, ids_TK, **kwargs):
    logits_BTE, ids_BTK = jnp.asarray([logits_TE]), jnp.asarray([ids_TK])
    return moe.router_losses(experts, logits_BTE, jax.nn.softmax(logits_BTE), ids_BTK, **kwargs)

  uniform = losses(np.zeros((2, 4), np.float32), [[0, 1], [2, 3]])
  np.testing.assert_allclose(uniform['router_balance_loss'], 0.5)
  np.testing.assert_allclose(uniform['router_z_loss'], 0.25 * np.log(4) ** 2, rtol=1e-6)
  assert uniform['router_max_load'] == 1
  # Scores of 5/12, 5/12, 1/12, 1/12, all tokens to the first two: 4 * 2 * (1/2 * 5/12) = 5/3.
  skewed = np.log(np.asarray([[5.0, 5, 1, 1]] * 2, np.float32))
  one_sided = losses(skewed, [[0, 1], [1, 0]])
  np.testing.assert_allclose(one_sided['router_balance_loss'], 0.5 * 5 / 3, rtol=1e-6)
  assert one_sided['router_max_load'] == 2
  # Padding counts nowhere.
  padded = losses(
    np.concatenate([np.zeros((2, 4), np.float32), skewed]), [[0, 1], [2, 3], [0, 1], [0, 1]],
    is_real_BT=jnp.asarray([[True, True, False, False]]))
  assert padded == uniform


def test_the_bias_chooses_but_does_not_weigh_and_its_gradient_is_the_load():
  experts = ExpertsConfig(num_experts=4, top_k=1, scores='sigmoid', normalized=False)
  logits_BTE = jnp.asarray([[[1.0, 0.0, -1.0, -2.0]] * 4])
  _, weights_BTK, ids_BTK = moe.route(experts, logits_BTE, jnp.asarray([0.0, 0, 0, 5]))
  np.testing.assert_array_equal(ids_BTK, 3)
  np.testing.assert_allclose(weights_BTK, jax.nn.sigmoid(-2.0), rtol=1e-6)

  def loss(bias_E):
    scores_BTE, _, ids_BTK = moe.route(experts, logits_BTE, bias_E)
    return moe.router_losses(experts, logits_BTE, scores_BTE, ids_BTK, bias_E=bias_E)[
      'router_balance_loss']

  np.testing.assert_array_equal(np.sign(jax.grad(loss)(jnp.zeros(4))), [1, -1, -1, -1])


@pytest.mark.parametrize('sizes', [(3, 0, 5, 1), (0, 0, 9, 0), (300, 2, 40, 91)])
def test_blocks_of_rows_multiply_as_a_ragged_product(sizes):
  numbers, rows = np.random.default_rng(0), sum(sizes)
  x_RI, kernel_EIO, dy_RO = (jnp.asarray(numbers.standard_normal(shape, np.float32))
                             for shape in ((rows + 2, 4), (4, 4, 6), (rows + 2, 6)))
  dy_RO = dy_RO.at[rows:].set(0)  # The results of rows behind the last group mean nothing.
  sizes_E = jnp.asarray(sizes, jnp.int32)

  def results(multiply):
    y_RO, vjp = jax.vjp(multiply, x_RI, kernel_EIO)
    dx_RI, dkernel_EIO = vjp(dy_RO)
    return y_RO[:rows], dx_RI[:rows], dkernel_EIO

  ours = results(lambda x, kernel: grouped_dense(x, kernel, sizes_E, 'float32'))
  theirs = results(lambda x, kernel: jax.lax.ragged_dot(x, kernel, sizes_E))
  assert cpu_kernels._blocks(rows, sizes_E)[0] in (1, 32)
  for got, want in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


OTHER_RULES = tuple((name, {'experts': ('fsdp',), 'embed': ()}.get(name, axes))
                    for name, axes in sharding.DEFAULT_RULES)


def exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name):
  """Do as `jax.lax.ragged_all_to_all`, which XLA has for TPUs, by gathering everything."""
  sent = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
  number = len(send_sizes) // len(sent[0])
  here, rows = jax.lax.axis_index(axis_name), jnp.arange(len(operand))
  received = []
  for source in range(len(sent[0])):
    for index in range(number):
      start, size, to = (part[source, here * number + index] for part in sent[1:])
      is_part = (rows >= start) & (rows < start + size)
      output = output.at[jnp.where(is_part, to + rows - start, len(output))].set(
        sent[0][source], mode='drop')
      received.append(size)
  # The real one reads nothing behind what it was told to receive.
  return jnp.where(jnp.all(jnp.stack(received) == recv_sizes), output, jnp.nan)


@pytest.mark.parametrize(('changes', 'sizes', 'found'), [
  ({}, {'fsdp': 2, 'tensor': 2, 'expert': 2}, 'all_gather'),
  ({'capacity_factor': 8.0}, {'fsdp': 2, 'tensor': 2, 'expert': 2}, 'all_to_all'),
  ({}, {'fsdp': 4, 'context': 2, 'rules': OTHER_RULES}, 'all_gather'),
  ({'num_experts': 8}, {'tensor': 2, 'expert': 4}, 'exchange'),
], ids=['dropless', 'capacity', 'rules', 'exchanged'])
def test_several_devices_compute_what_one_does(monkeypatch, changes, sizes, found):
  exchanged = []
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu' if found == 'exchange' else 'cpu')
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', lambda *args, **kwargs: (
    exchanged.append(args), exchange(*args, **kwargs))[1])
  mesh_config = sharding.MeshConfig(data=1, **sizes)
  config = with_experts(**changes)
  variables = tiny.variables_of(config)
  mesh = sharding.make_mesh(mesh_config)
  shapes, axes = abstract(config)

  def loss(variables, tokens_BT, segments_BT):
    hidden_BTD, aux = Decoder(config).apply(
      variables, tokens_BT, segments_BT, deterministic=False, method='hidden')
    return jnp.sum(jnp.sin(hidden_BTD) * (segments_BT > 0)[..., None]) + sum(aux.values())

  step = jax.value_and_grad(loss)
  want = jax.jit(step)(variables, TOKENS_BT, SEGMENTS_BT)
  batch = sharding.put_batch({'tokens': TOKENS_BT, 'segment_ids': SEGMENTS_BT},
                             sharding.batch_sharding(mesh, mesh_config))
  placed = jax.device_put(variables, sharding.shardings(axes, shapes, mesh, mesh_config))
  with sharding.active(sharding.Placement(mesh, mesh_config)):
    lowered = jax.jit(step).lower(placed, batch['tokens'], batch['segment_ids'])
  assert ('all_to_all' in lowered.as_text()) == (found == 'all_to_all')
  assert bool(exchanged) == (found == 'exchange')
  got = lowered.compile()(placed, batch['tokens'], batch['segment_ids'])
  # A gradient is a sum of numbers as large as the largest of its array, and is rounded like these.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
    a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max())), got, want)


def test_rows_that_the_mesh_does_not_divide_are_computed_by_all():
  placement = sharding.make_placement('fsdp=2,tensor=2,expert=2')
  got = jax.jit(Decoder(CONFIG, placement).apply)(VARIABLES, TOKENS_BT[:1])
  np.testing.assert_allclose(got, run(CONFIG, VARIABLES, TOKENS_BT[:1])[0], atol=1e-5)


@pytest.mark.parametrize(('changes', 'message'), [
  ({'experts': {'num_experts': 2, 'top_k': 3}},
   r'experts.top_k=3 is larger than experts.num_experts=2; lower the first or raise the second'),
  ({'experts': {'num_experts': 2, 'top_k': 1}, 'biases': ('mlp',)}, "leave 'mlp' out"),
])
def test_what_no_mixture_can_be_is_refused_with_one_sentence(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.BASE.replace(**changes)


def test_experts_that_do_not_divide_are_refused_with_one_sentence():
  mesh_config = sharding.MeshConfig(expert=8)
  shapes, axes = abstract(CONFIG)
  with pytest.raises(ValueError, match=r"axis 'experts' has size 4, .*'expert'.* \(8 devices\)"):
    sharding.shardings(axes, shapes, sharding.make_mesh(mesh_config), mesh_config)


def test_only_the_experts_of_a_token_count_as_operations():
  dense = CONFIG.replace(experts=None, mlp_dim=2 * CONFIG.mlp_dim)
  router = 2 * 2 * CONFIG.embed_dim * 4
  assert CONFIG.flops_per_token(16) == dense.flops_per_token(16) + router


def test_parameters_start_as_in_a_dense_model():
  config = CONFIG.replace(embed_dim=64, mlp_dim=64)
  experts = init(config, jax.random.key(0))['params']['layers']['mlp']['experts']
  for name, kernel in experts.items():
    residual = (2 * config.num_layers) ** 0.5 if name == 'down' else 1
    np.testing.assert_allclose(jnp.std(kernel['kernel'], axis=(2, 3)), 0.3 / residual, rtol=0.1)


def test_adapters_of_experts_merged_equal_adapters_beside_them():
  adapters = lora.init(lora.LoraConfig(rank=2), VARIABLES['params'], jax.random.key(0))
  up = adapters['layers']['mlp']['experts']['up']
  assert (up['a'].shape, up['b'].shape, up['scale'].shape) == (
    (2, 4, 16, 2), (2, 4, 2, 24), (2, 4))
  # Drawn by variance 1 / inputs, of which the experts are none.
  np.testing.assert_allclose(jnp.std(up['a']), 16**-0.5, rtol=0.15)
  adapters = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.random.normal(jax.random.key(len(str(path))), leaf.shape)
    if path[-1].key == 'b' else leaf, adapters)
  beside, _ = run(CONFIG, {**VARIABLES, 'lora': adapters}, TOKENS_BT)
  merged, _ = run(CONFIG, {'params': lora.merge(VARIABLES['params'], adapters)}, TOKENS_BT)
  assert np.abs(beside - run(CONFIG, VARIABLES, TOKENS_BT)[0]).max() > 0.1
  np.testing.assert_allclose(beside, merged, atol=5e-4)
  _, axes = lora.abstract(
    lora.LoraConfig(rank=2), *(each['params'] for each in abstract(CONFIG)))
  assert axes['layers']['mlp']['experts']['down'] == {
    'a': ('layers', 'experts', 'mlp', 'rank'), 'b': ('layers', 'experts', 'rank', 'embed'),
    'scale': ('layers', 'experts')}


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_experts_are_quantised_each_as_a_dense_kernel(kind):
  quantization_config = quantization.QuantizationConfig(kind=kind, group_size=8)
  small = quantization.quantize(VARIABLES, quantization_config)
  mlp, dense = small['params']['layers']['mlp'], VARIABLES['params']['layers']['mlp']
  for expert in range(4):
    kernel = dense['experts']['down']['kernel'][:, expert]
    alone = quantization.quantize(
      {'params': {'layers': {'mlp': {'down': {'kernel': kernel}}}}}, quantization_config)
    jax.tree.map(
      lambda got, want, expert=expert: np.testing.assert_array_equal(got[:, expert], want),
      mlp['experts']['down']['kernel'], alone['params']['layers']['mlp']['down']['kernel'])
  assert isinstance(mlp['router']['kernel'], jax.Array)
  rounded = quantization.dequantize_tree(small)
  want, _ = run(CONFIG, rounded, TOKENS_BT)
  for training_config in (CONFIG, with_experts(capacity_factor=4.0)):
    got, _ = run(training_config, small, TOKENS_BT, training=True)
    np.testing.assert_allclose(got, want, atol=1e-4)
  placement = sharding.make_placement('tensor=2,expert=2')
  got = jax.jit(Decoder(CONFIG, placement).apply)(small, TOKENS_BT)
  np.testing.assert_allclose(got, want, atol=1e-4)
