"""Meshes and rules: shapes that fit, errors that say what to change, batches placed by name."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm import sharding
from jaxllm.sharding import MeshConfig


def test_one_axis_takes_the_devices_that_are_left():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2, 'context': 1, 'expert': 1}
  assert sharding.make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize('fields, message', [
  ({'data': 3}, 'multiple of 3 devices but there are 8'),
  ({'fsdp': 3}, 'multiple of 3 devices but there are 8'),
  ({'data': 4}, 'multiple of 4'),
  ({'fsdp': 4, 'slices': 4}, 'slices=4 does not divide data=2'),
])
def test_sizes_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(MeshConfig(**fields))


def test_data_alone_runs_between_slices():
  """A TPU says its slice; elsewhere a slice is a part of the devices in their order."""
  mesh_config = MeshConfig(data=4, fsdp=2, slices=2)
  mesh = sharding.make_mesh(mesh_config)
  numbers = np.vectorize(lambda device: device.id)(mesh.devices).reshape(2, 2, 2)
  np.testing.assert_array_equal(np.sort(numbers.reshape(2, 4)), np.arange(8).reshape(2, 4))

  def chips(*slices):
    return [types.SimpleNamespace(platform='tpu', device_kind='TPU', slice_index=index, id=number,
                                  process_index=index) for number, index in enumerate(slices)]

  found = sharding.slice_devices(mesh_config, chips(1, 0, 1, 0, 0, 1, 1, 0))
  assert [[one.id for one in part] for part in found] == [[1, 3, 4, 7], [0, 2, 5, 6]]
  for devices in (chips(*[0] * 8), [types.SimpleNamespace(platform='tpu')] * 8):
    with pytest.raises(ValueError, match=r'slices=2, but .* slice_index .* are of 1; set it'):
      sharding.slice_devices(mesh_config, devices)


@pytest.mark.parametrize('fields, message', [
  ({'data': 0}, 'data=0'),
  ({'data': -1, 'fsdp': -1}, 'at most one'),
  ({'data': 3, 'slices': 2}, 'slices=2 with data=3: .* divides data'),
  ({'rules': (('embed', ('gpu',)),)}, "rules.0.1.0='gpu': one of data, fsdp"),
  ({'rules': (('embed', ()), ('embed', ()))}, 'more than once'),
])
def test_bad_mesh_configs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    MeshConfig(**fields)


def test_names_become_mesh_axes():
  rules = MeshConfig().rules
  spec = sharding.partition_spec(('layers', 'embed', 'heads', 'head_dim'), rules)
  assert spec == PartitionSpec(None, 'fsdp', 'tensor', None)
  assert sharding.partition_spec(('batch', None), rules) == PartitionSpec(
    ('data', 'fsdp', 'expert'), None
  )
  with pytest.raises(ValueError, match="no rule for the logical axis 'colour'"):
    sharding.partition_spec(('colour',), rules)
  with pytest.raises(ValueError, match='maps two axes'):
    sharding.partition_spec(('heads', 'mlp'), rules)


def test_an_axis_that_does_not_divide_is_named():
  mesh_config = MeshConfig(tensor=4)
  mesh = sharding.make_mesh(mesh_config)
  axes = {'head': {'kernel': ('embed', 'vocab')}}
  shapes = {'head': {'kernel': jax.ShapeDtypeStruct((8, 50257), jnp.float32)}}
  with pytest.raises(ValueError, match=r"head/kernel: axis 'vocab' has size 50257.*4 devices"):
    sharding.shardings(axes, shapes, mesh, mesh_config)


def test_batches_are_split_by_rows_and_constraints_hold_under_jit():
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(mesh_config)
  rows = np.arange(32, dtype=np.int32).reshape(8, 4)
  placed = sharding.put_batch({'tokens': rows}, sharding.batch_sharding(mesh, mesh_config))
  assert placed['tokens'].addressable_shards[0].data.shape == (2, 4)
  np.testing.assert_array_equal(placed['tokens'], rows)

  def double(x):
    with sharding.active(sharding.Placement(mesh, mesh_config)):
      return sharding.constrain(x * 2, None, 'mlp')

  assert jax.jit(double)(rows).sharding.spec == PartitionSpec(None, 'tensor')
  assert sharding.constrain(rows, 'batch', 'mlp') is rows
