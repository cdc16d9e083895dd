"""A cache is read block by block: equal to the whole, and blind to how far other rows reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import attention, decoder
from jaxllm.models.decoder import Decoder, DecoderConfig, init_cache
from jaxllm.models.linear import InitializerConfig

GLOBAL = DecoderConfig(
  vocab_size=61, vocab_multiple=16, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2,
  mlp_dim=48, max_length=46, initializer=InitializerConfig(stddev=None),
)
LOCAL = GLOBAL.replace(layer_pattern=('local', 'global'), window=5, attention_softcap=20.0)


def extend(config, tokens_BT, counts_B, steps, dtype=None, stacked=False):
  """Return the hidden states of a prefill and of single steps."""
  variables = decoder.init(config, jax.random.key(1))
  variables = variables if stacked else decoder.unstack(variables)
  cache = init_cache(config, len(tokens_BT), 46, dtype, stacked)
  apply = jax.jit(lambda cache, tokens_BT, counts_B: Decoder(config).apply(
    variables, tokens_BT, cache, counts_B, method='extend'))
  first_BTD, cache = apply(cache, tokens_BT, counts_B)
  later = []
  for step in range(steps):
    hidden_B1D, cache = apply(cache, tokens_BT[:, step : step + 1], jnp.minimum(counts_B, 1))
    later.append(hidden_B1D[:, 0])
  return [np.where((jnp.arange(first_BTD.shape[1])[None] < counts_B[:, None])[..., None],
                   first_BTD, 0), *later]


@pytest.mark.parametrize('config', [GLOBAL, LOCAL], ids=['global', 'local'])
@pytest.mark.parametrize('dtype, stacked', [(None, False), (None, True), (jnp.int8, False)])
def test_blocks_are_the_whole(config, dtype, stacked, monkeypatch):
  tokens_BT = jax.random.randint(jax.random.key(0), (3, 36), 0, 61)
  counts_B = jnp.array([36, 1, 20])
  monkeypatch.setattr(attention, 'BLOCK', 8)
  blocks = extend(config, tokens_BT, counts_B, 4, dtype, stacked)
  monkeypatch.setattr(attention, 'BLOCK', 46)
  for got, want in zip(blocks, extend(config, tokens_BT, counts_B, 4, dtype, stacked), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('config', [GLOBAL, LOCAL], ids=['global', 'local'])
def test_a_row_does_not_see_how_many_blocks_are_read(config, monkeypatch):
  monkeypatch.setattr(attention, 'BLOCK', 8)
  tokens_BT = jax.random.randint(jax.random.key(0), (2, 36), 0, 61)
  short, long = (extend(config, tokens_BT, jnp.array([5, other]), 4) for other in (2, 36))
  for one, other in zip(short, long, strict=True):
    np.testing.assert_array_equal(one[0], other[0])
