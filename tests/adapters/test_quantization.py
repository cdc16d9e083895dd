"""Quantised weights: bounded errors, exact sizes, the same product by every path, int8 caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.adapters import quantization
from jaxllm.adapters.quantization import QuantizationConfig
from jaxllm.generation import decode
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.models import cpu_kernels, decoder, linear
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig

BASE = DecoderConfig(
  vocab_size=61, vocab_multiple=16, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
  mlp_dim=64, max_length=32, initializer=InitializerConfig(stddev=None),
)
TOKENS = np.random.default_rng(0).integers(0, 61, size=(2, 20)).astype(np.int32)
KINDS = [QuantizationConfig(), QuantizationConfig(kind='int4', group_size=16)]
APPLY = jax.jit(lambda model, variables: model.apply(variables, TOKENS), static_argnums=0)
HIDDEN = jax.jit(
  lambda model, variables, tokens: model.apply(variables, tokens, method='hidden')[0],
  static_argnums=0)
init = functools.cache(lambda config: jax.jit(decoder.init, static_argnums=0)(
  config, jax.random.key(0)))
quantize = jax.jit(quantization.quantize, static_argnums=1)
dequantize_tree = jax.jit(quantization.dequantize_tree)


def make(tied=False, unstacked=False):
  config = BASE.replace(tied_head=tied)
  variables = init(config)
  return Decoder(config), decoder.unstack(variables) if unstacked else variables


@pytest.mark.parametrize(('config', 'tied'), [*((config, False) for config in KINDS),
                                               (KINDS[0], True)])
def test_the_model_runs_as_with_the_rounded_weights(config, tied):
  model, variables = make(tied)
  small = quantize(variables, config)
  rounded = dequantize_tree(small)
  assert jax.tree.structure(rounded) == jax.tree.structure(variables)
  want = APPLY(model, rounded)
  for stacked_or_not in (small, decoder.unstack(small)):
    np.testing.assert_allclose(APPLY(model, stacked_or_not)[..., :61], want[..., :61], atol=1e-4)
  # Quantisation and unstacking commute.
  jax.tree.map(np.testing.assert_array_equal, quantize(decoder.unstack(variables), config),
               decoder.unstack(small))


@pytest.mark.parametrize('config, levels', [(KINDS[0], 127), (KINDS[1], 7)])
def test_errors_are_half_a_level(config, levels):
  _, variables = make()
  rounded = dequantize_tree(quantize(variables, config))
  for name in ('query', 'out'):
    old, new = (tree['params']['layers']['attention'][name]['kernel']
                for tree in (variables, rounded))
    error = np.abs(old - new)
    assert 0 < error.max() <= 0.5 * np.abs(old).max() / levels * 1.001
  kernel = np.full((2, 32, 64), 3.0, np.float32)
  kernel[1] = 0
  tree = {'params': {'layers': {'mlp': {'up': {'kernel': jnp.asarray(kernel)}}}}}
  exact = dequantize_tree(quantize(tree, config))['params']['layers']['mlp']['up']['kernel']
  np.testing.assert_allclose(exact, kernel, rtol=1e-6)


def stored_bytes(variables):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def test_sizes():
  _, variables = make()
  kernels = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(variables)
                if path[-1].key in ('kernel', 'embedding'))
  int8, int4 = (quantize(variables, config) for config in KINDS)
  rest = stored_bytes(variables) - 4 * kernels
  scales = sum(leaf.nbytes for path, leaf in jax.tree.leaves_with_path(int8)
               if path[-1].key == 'scale' and leaf.dtype == jnp.float32) - rest
  assert stored_bytes(int8) == kernels + scales + rest
  assert stored_bytes(int4) < 0.9 * stored_bytes(int8)


def test_products_without_a_copy_are_the_same():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(64,)), jnp.float32)
  levels = jnp.asarray(rng.integers(-127, 128, size=(64, 40)), jnp.int8)
  want = np.asarray(x)[None] @ np.asarray(levels, np.float32)
  stored = jax.jit(lambda x, levels: cpu_kernels.matmul_stored(
    x, levels, lambda part: part.astype('float32'), 'float32'))
  table = jax.jit(lambda x, levels: cpu_kernels.matmul_table(x, levels, 'float32'))
  for found in (stored(x[None], levels), table(x[None], levels.T)):
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('tied', [False, True])
def test_generation_from_int8(tied):
  model, variables = make(tied, unstacked=True)
  small = quantize(variables, QuantizationConfig())
  greedy = SamplingConfig(temperature=0.0, max_new_tokens=8)
  got = decode.generate(model, small, [[1, 2, 3], [4]], greedy)
  want = decode.generate(model, dequantize_tree(small), [[1, 2, 3], [4]], greedy)
  assert [result.tokens for result in got] == [result.tokens for result in want]


@pytest.mark.parametrize('unstacked', [True, False])
def test_int8_caches(unstacked):
  model, variables = make(unstacked=unstacked)
  cache = decoder.init_cache(BASE, 2, 24, jnp.int8, stacked=not unstacked)
  extend = jax.jit(lambda *args: model.apply(*args, method='extend'))
  hidden, cache = extend(variables, TOKENS[:, :16], cache, jnp.array([16, 16]))
  more, cache = extend(variables, TOKENS[:, 16:17], cache, jnp.array([1, 1]))
  want = HIDDEN(model, variables, TOKENS[:, :17])
  np.testing.assert_allclose(hidden, want[:, :16], atol=0.1)
  np.testing.assert_allclose(more[:, 0], want[:, 16], atol=0.1)
  assert jax.tree.leaves(cache.keys)[0].dtype == jnp.int8
  greedy = SamplingConfig(temperature=0.0, max_new_tokens=5)
  pieces = decode.stream(model, variables, [[1, 2, 3]], greedy, cache_dtype=jnp.int8)
  assert sum(len(piece.tokens) for piece in pieces) == 5


@pytest.mark.parametrize('config', KINDS, ids=lambda config: config.kind)
def test_gradients_pass_through_to_what_is_not_quantised(config):
  model, variables = make()
  small = quantize(variables, config)
  rounded = dequantize_tree(small)

  def loss(scale, tree):
    params = {**tree['params'], 'final_norm': {'scale': scale}}
    return model.apply({'params': params}, TOKENS)[..., :61].var()

  scale, grad = variables['params']['final_norm']['scale'], jax.jit(jax.grad(loss))
  got, want = grad(scale, small), grad(scale, rounded)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
  embed = jax.grad(lambda x: linear.dense(x, small['params']['head']['kernel'], 1,
                                          jnp.float32).sum())(jnp.ones((2, 32)))
  kernel = dequantize_tree(small)['params']['head']['kernel']
  np.testing.assert_allclose(embed[0], kernel.sum(axis=1), rtol=1e-4, atol=1e-4)
