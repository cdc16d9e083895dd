"""Eight CPU devices, strict rank promotion, and compilation that saves time rather than cycles."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile a lot and run little: without optimization they are four times as fast.
os.environ['XLA_FLAGS'] = ' '.join([
  os.environ.get('XLA_FLAGS', ''),
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
])

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
