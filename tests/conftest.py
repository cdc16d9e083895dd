"""Eight CPU devices, strict rank promotion, and compilation that saves time rather than cycles."""

import gc
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile a lot and run little: without optimization they are four times as fast.
os.environ['XLA_FLAGS'] = ' '.join([
  os.environ.get('XLA_FLAGS', ''),
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
])

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

MAPS = pathlib.Path('/proc/self/maps')


@pytest.fixture(autouse=True, scope='module')
def forget_compiled_programs():
  """Programs map memory, and past Linux's 65,530 maps of a process the compiler crashes."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b'\n') > 20_000:
    jax.clear_caches()
    gc.collect()
