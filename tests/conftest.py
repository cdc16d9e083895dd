"""Eight CPU devices, strict rank promotion, and compilation that saves time rather than cycles."""

import gc
import hashlib
import os
import pathlib

from jaxlib.version import __version_info__ as jaxlib_version

os.environ['JAX_PLATFORMS'] = 'cpu'
# Programs of several devices that come from a cache can deadlock on CPU.
os.environ['JAX_COMPILATION_CACHE_DIR'] = ''
# Tests compile a lot and run little: without optimization they are four times as fast, and without
# the fusion emitters XLA compiles in less than half the time. Later versions have no such flag, and
# XLA ends a process that gives it one it does not know.
os.environ['XLA_FLAGS'] = ' '.join([
  os.environ.get('XLA_FLAGS', ''),
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_cpu_parallel_codegen_split_count=1',
  '--xla_cpu_use_fusion_emitters=false' if jaxlib_version < (0, 12) else '',
])

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tracing makes many objects and little garbage, and JAX makes each collection dearer.
gc.set_threshold(50_000, 20, 20)

MAPS = pathlib.Path('/proc/self/maps')
PROGRAMS = {}
compile_program = compiler.backend_compile_and_load


def compile_once(backend, module, devices, options, host_callbacks):
  """Compile like JAX, but equal programs of a process once: many tests train the same tiny run."""
  text = module.operation.get_asm(enable_debug_info=False)
  if host_callbacks or 'callback' in text:
    return compile_program(backend, module, devices, options, host_callbacks)
  key = hashlib.sha256(text.encode()).digest(), str(devices), options.SerializeAsString()
  if key not in PROGRAMS:
    PROGRAMS[key] = compile_program(backend, module, devices, options, host_callbacks)
  return PROGRAMS[key]


compiler.backend_compile_and_load = compile_once


@pytest.fixture(autouse=True, scope='module')
def forget_compiled_programs():
  """Programs map memory, and past Linux's 65,530 maps of a process the compiler crashes."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b'\n') > 20_000:
    PROGRAMS.clear()
    jax.clear_caches()
    gc.collect()
