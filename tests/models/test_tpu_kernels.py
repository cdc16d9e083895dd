"""The kernels of TPUs, interpreted here, compute what plain attention does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas import tpu as pltpu

from jaxllm import sharding
from jaxllm.models import tpu_kernels
from jaxllm.models.decoder import Decoder, init_cache

BASE = tiny.BASE.replace(num_layers=1, num_kv_heads=2, max_length=140)
CONFIGS = {
  'softcap': BASE.replace(attention='splash', attention_softcap=2.0, splash_blocks={
    'query': 128, 'key': 256, 'key_compute': 128}),
  'kinds': BASE.replace(
    num_layers=3, layer_pattern=('local', 'global', 'global_nope'), window=5, scan_layers=False),
  'mesh': BASE.replace(num_layers=2, layer_pattern=('local', 'global'), window=100),
}
# Neither a multiple of the kernel's block; two documents and padding in each row, cut elsewhere.
LENGTH = 140
SEGMENTS = np.stack([
  np.repeat(np.asarray([1, 2, 0], np.int32), [cut, 130 - cut, 10]) for cut in (70, 129, 3, 128)
])


def loss_and_gradient(config, variables):
  tokens_BT = tiny.tokens_of(config, 4, LENGTH)

  def loss_fn(variables):
    logits_BTV = Decoder(config).apply(variables, tokens_BT, SEGMENTS)
    return jnp.sum(jax.nn.log_softmax(logits_BTV)[..., 3] * (SEGMENTS > 0)) / tokens_BT.size

  return jax.jit(jax.value_and_grad(loss_fn))(variables)


@pytest.mark.parametrize('name, mesh', [
  ('softcap', None), ('kinds', None), ('mesh', {'fsdp': 2, 'tensor': 2, 'context': 2}),
])
def test_kernel_equals_plain_attention(name, mesh):
  """To 1e-5: the kernel adds up the softmax block by block."""
  config = CONFIGS[name]
  variables = tiny.variables_of(config)
  expected = loss_and_gradient(config.replace(attention='xla', splash_blocks=None), variables)
  fused = config.replace(attention='splash', remat='dots_no_batch')
  if mesh:
    with sharding.active(sharding.make_placement(mesh)):
      got = loss_and_gradient(fused, variables)
  else:
    got = loss_and_gradient(fused, variables)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, expected)


@pytest.mark.parametrize('window', [None, 100])
@pytest.mark.parametrize('parts', [1, 3])
def test_blocks_of_the_mask_are_those_of_the_whole_mask(window, parts):
  mask = tpu_kernels._Mask(768, window, parts)
  position = mask.q_sequence
  distance = position[:, None] - np.arange(768)
  whole = (distance >= 0) & (distance < (window or 768))
  for row in range(0, 768, 128):
    for column in range(0, 768, 64):
      index = slice(row, row + 128), slice(column, column + 64)
      np.testing.assert_array_equal(np.broadcast_to(mask[index], (128, 64)), whole[index])
  assert len(set(position.reshape(parts, -1).sum(axis=1))) == 1  # No device has more to do.


@pytest.mark.parametrize('changes, said', [
  ({'attention_dropout_rate': 0.1}, 'splash.*attention_dropout_rate'),
  ({'splash_blocks': {'query': 100}}, 'splash_blocks.query=100: a multiple of 128'),
  ({'splash_blocks': {'key': 256, 'key_compute': 384}}, 'key_compute=384 does not divide'),
  ({'splash_blocks': {}, 'attention': 'xla'}, "splash_blocks is set, but attention='xla'"),
  ({'attention': 'cudnn', 'dtype': 'bfloat16', 'layer_pattern': ('local', 'global'), 'window': 4},
   'one mask for all layers'),
  ({'decode_attention': 'paged'}, "decode_attention='paged' with window=None and head_dim=4"),
])
def test_what_the_kernel_cannot_do_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    BASE.replace(**{'attention': 'splash', 'num_layers': 2, **changes})


@pytest.mark.parametrize('stacked, mesh', [(True, None), (False, {'data': 2, 'tensor': 2})])
def test_a_decode_step_by_pages_equals_plain_attention(monkeypatch, stacked, mesh):
  """To 1e-5. Rows are filled unequally; one is full, and one has no token of this step."""
  config = tiny.BASE.replace(
    num_layers=2, num_kv_heads=2, head_dim=128, attention_softcap=2.0, max_length=256)
  variables, tokens_BT = tiny.variables_of(config), tiny.tokens_of(config, 4, 1)
  numbers = np.random.default_rng(0)
  cache = jax.tree.map(
    lambda leaf: jnp.asarray(numbers.standard_normal(leaf.shape), leaf.dtype),
    init_cache(config, 4, 256, jnp.bfloat16, stacked))
  cache = dataclasses.replace(cache, lengths_B=jnp.asarray([3, 130, 255, 256], jnp.int32))
  counts_B = jnp.asarray([1, 1, 1, 0], jnp.int32)

  def step(config):
    extend = jax.jit(functools.partial(Decoder(config).apply, method='extend'))
    with sharding.active(sharding.make_placement(mesh)):
      return extend(variables, tokens_BT, cache, counts_B)[0]

  expected = step(config)
  with pltpu.force_tpu_interpret_mode():
    monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
    got = step(config.replace(decode_attention='paged'))
  np.testing.assert_allclose(got[:3], expected[:3], atol=1e-5)
  assert np.isfinite(got).all()
