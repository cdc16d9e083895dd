"""The fused attention of TPUs, interpreted here, computes what plain attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import sharding
from jaxllm.models.decoder import Decoder

BASE = tiny.BASE.replace(num_layers=1, num_kv_heads=2, max_length=140)
CONFIGS = {
  'softcap': BASE.replace(attention_softcap=2.0),
  'window': BASE.replace(layer_pattern=('local',), window=5),
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


@pytest.mark.parametrize('name', ['softcap', 'window', 'mesh'])
def test_kernel_equals_plain_attention(name):
  """To 1e-5: the kernel adds up the softmax block by block."""
  config = CONFIGS.get(name, BASE)
  variables = tiny.variables_of(config)
  expected = loss_and_gradient(config, variables)
  fused = config.replace(attention='splash', remat='dots_no_batch')
  if name == 'mesh':
    mesh_config = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
    with sharding.active(sharding.Placement(sharding.make_mesh(mesh_config), mesh_config)):
      got = loss_and_gradient(fused, variables)
  else:
    got = loss_and_gradient(fused, variables)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, expected)


def test_what_the_kernel_cannot_do_is_refused():
  mixed = {'layer_pattern': ('local', 'global'), 'window': 4}
  for changes in ({'attention_dropout_rate': 0.1}, mixed):
    with pytest.raises(ValueError, match='splash.*' + next(iter(changes))):
      BASE.replace(attention='splash', num_layers=2, **changes)
