"""A decoder over 2 x 2 x 2 devices computes what one device does, with its parameters split."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from jaxllm import sharding
from jaxllm.models.decoder import Decoder, abstract, init, init_cache

CONFIG = tiny.CONFIGS['gemma'].replace(
  num_kv_heads=2, num_layers=2, layer_pattern=('local', 'global'), tied_head=False
)
MESH_CONFIG = sharding.MeshConfig(data=2, fsdp=2, tensor=2)


def splits(mesh_config):
  mesh = sharding.make_mesh(mesh_config)
  shapes, axes = abstract(CONFIG)
  return mesh, sharding.shardings(axes, shapes, mesh, mesh_config)


@pytest.mark.parametrize('axis', ['fsdp', 'context'])
def test_forward_equals_one_device(axis):
  """To 1e-5: sums over devices are taken in another order."""
  mesh_config = sharding.MeshConfig(data=2, tensor=2, **{axis: 2})
  mesh, param_shardings = splits(mesh_config)
  variables, tokens_BT = tiny.variables_of(CONFIG), tiny.tokens_of(CONFIG, 8, 12)
  segments_BT = np.repeat(np.asarray([[1] * 5 + [2] * 7], np.int32), 8, axis=0)
  expected = jax.jit(Decoder(CONFIG).apply)(variables, tokens_BT, segments_BT)
  batch = sharding.put_batch(
    {'tokens': tokens_BT, 'segment_ids': segments_BT}, sharding.batch_sharding(mesh, mesh_config)
  )
  with sharding.active(sharding.Placement(mesh, mesh_config)):
    got = jax.jit(Decoder(CONFIG).apply)(
      jax.device_put(variables, param_shardings), batch['tokens'], batch['segment_ids']
    )
  assert len(got.sharding.device_set) == 8
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_split_context_exchanges_keys_and_values_alone():
  mesh_config = sharding.MeshConfig(data=2, context=4)
  mesh = sharding.make_mesh(mesh_config)
  config = tiny.BASE.replace(num_kv_heads=2)
  tokens = jax.ShapeDtypeStruct(
    (4, 64), jnp.int32, sharding=sharding.batch_sharding(mesh, mesh_config)
  )
  hidden = functools.partial(Decoder(config).apply, method='hidden')
  with sharding.active(sharding.Placement(mesh, mesh_config)):
    text = jax.jit(hidden).lower(abstract(config)[0], tokens).compile().as_text()
  gathered = re.findall(r'= (\S+)\{\S+ all-gather\(', text)
  assert gathered == ['f32[2,2,64,4]'] * 2  # (B, K, S, H) of the rows of one device


def test_parameters_are_born_split_as_named():
  mesh, param_shardings = splits(MESH_CONFIG)
  make = jax.jit(functools.partial(init, CONFIG), out_shardings=param_shardings)
  params = make(jax.random.key(0, impl='rbg'))['params']
  layers = params['layers']
  for leaf, spec in [
    (params['embed']['embedding'], ('tensor', 'fsdp')),
    (params['head']['kernel'], ('fsdp', 'tensor')),
    (layers['attention']['query']['kernel'], (None, 'fsdp', 'tensor', None)),
    (layers['attention']['key']['kernel'], (None, 'fsdp', 'tensor', None)),
    (layers['attention']['out']['kernel'], (None, 'tensor', None, 'fsdp')),
    (layers['mlp']['gate']['kernel'], (None, 'fsdp', 'tensor')),
    (layers['mlp']['down']['kernel'], (None, 'tensor', 'fsdp')),
    (layers['mlp_norm']['scale'], (None, 'fsdp')),
  ]:
    assert leaf.sharding.spec == PartitionSpec(*spec)
    parts = 2 ** sum(axis is not None for axis in spec)
    assert leaf.addressable_shards[0].data.size * parts == leaf.size


def test_decoding_on_a_mesh_equals_one_device():
  mesh, param_shardings = splits(MESH_CONFIG)
  variables, tokens_BT = tiny.variables_of(CONFIG), tiny.tokens_of(CONFIG, 4, 5)
  counts_B = jnp.asarray([5, 3, 4, 1])
  extend = functools.partial(Decoder(CONFIG).apply, method='extend')
  expected, _ = jax.jit(extend)(variables, tokens_BT, init_cache(CONFIG, 4, 8), counts_B)
  with sharding.active(sharding.Placement(mesh, MESH_CONFIG)):
    got, cache = jax.jit(extend)(
      jax.device_put(variables, param_shardings), tokens_BT, init_cache(CONFIG, 4, 8), counts_B
    )
  assert cache.lengths_B.tolist() == [5, 3, 4, 1]
  for row, count in enumerate([5, 3, 4, 1]):
    np.testing.assert_allclose(got[row, :count], expected[row, :count], atol=1e-5)
