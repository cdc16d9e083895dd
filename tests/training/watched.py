"""Watches that no parameter which a rule splits is ever whole on one device."""

import contextlib
import functools

import jax
import pytest

from jaxllm import loading, sharding
from jaxllm.checkpoints import reading
from jaxllm.models import decoder
from jaxllm.training import scoring, state

# What makes arrays, and what uses those of a model.
WATCHED = ((jax, 'device_put'), (jax, 'make_array_from_callback'), (reading, '_read'),
           (loading, 'load'), (loading, 'generate'), (loading, 'check_model'),
           (state, 'create_state'), (state, 'freeze'), (scoring, 'take'))


@contextlib.contextmanager
def whole_parameters(config, mesh_config, devices=None):
  """Give a list of (call, shape) of split parameters that lay whole on a device; it stays empty."""
  shapes, axes = decoder.abstract(config)
  mesh = sharding.make_mesh(mesh_config, devices)
  split = set()
  for leaf, where in zip(
    jax.tree.leaves(shapes),
    jax.tree.leaves(sharding.shardings(axes, shapes, mesh, mesh_config)), strict=True,
  ):
    if where.shard_shape(leaf.shape) != leaf.shape:
      split |= {leaf.shape}
  before = jax.live_arrays()  # Held, so that no other array gets one of these ids.
  known, found = set(map(id, before)), []

  def look(call):
    for array in jax.live_arrays():
      if id(array) in known or array.shape not in split:
        continue
      if any(shard.data.shape == array.shape for shard in array.addressable_shards):
        found.append((call, array.shape))

  def watched(call, name):
    @functools.wraps(call)
    def wrapper(*args, **kwargs):
      result = call(*args, **kwargs)
      look(name)
      return result
    return wrapper

  with pytest.MonkeyPatch.context() as patch:
    for module, name in WATCHED:
      patch.setattr(module, name, watched(getattr(module, name), name))
    yield found
