"""Products of every shape against NumPy's."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.adapters.quantization import QuantizationConfig, quantize
from jaxllm.models.cpu_kernels import PARTS
from jaxllm.models.linear import dense, dequantize


@pytest.mark.parametrize('lead', [(), (1,), (1, 1), (2, 1), (1, 3), (8,)])
@pytest.mark.parametrize('inputs', [(64,), (4, 16), (2 * PARTS + 1,)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', [None, 'int8', 'int4'])
def test_dense_is_the_contraction(lead, inputs, dtype, kind):
  rng = np.random.default_rng(len(lead) + inputs[0])
  x = jnp.asarray(rng.normal(size=(*lead, *inputs)), dtype)
  kernel = full = jnp.asarray(rng.normal(size=(*inputs, 3, 5)), jnp.float32)
  if kind is not None:
    name = 'query' if len(inputs) == 1 else 'out'
    tree = {'params': {name: {'kernel': kernel}}}
    kernel = quantize(tree, QuantizationConfig(kind=kind, group_size=16))['params'][name]['kernel']
    full = dequantize(kernel, jnp.float32)
  got = dense(x, kernel, len(inputs), dtype)
  want = np.tensordot(np.asarray(x, np.float64), np.asarray(full, np.float64), len(inputs))
  assert got.shape == (*lead, 3, 5) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-5 if dtype == 'float32' else 0.1)
