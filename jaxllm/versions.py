"""Versions of jax and of what must fit it: those that were tested, and a sentence about others."""

import importlib.metadata

# Beginning of jax's version -> versions of libtpu that compile for it, the best one first.
LIBTPU = {
  '0.10.2': ('0.0.42',),
  '0.11.0': ('0.0.44',),
  '0.11.1': ('0.0.46',),
  '0.11.2': ('0.0.48',),
  '0.12.0': ('0.0.52', '0.0.50'),
}
# The first jax that needs a newer flax, and that flax.
NEW_JAX, NEW_FLAX = '0.11.1', '0.12.9'


def mismatch(accelerators: bool = True) -> str | None:
  """Return the sentence about installed packages that do not fit this jax; None: all do.

  Args:
    accelerators: whether libtpu and the plugins for CUDA count.
  """
  jax, jaxlib, flax = (installed(name) for name in ('jax', 'jaxlib', 'flax'))
  if _numbers(jax) >= _numbers(NEW_JAX) and '' < flax and _numbers(flax) < _numbers(NEW_FLAX):
    return (f'flax {flax} cannot be used with jax {jax}: pip install --upgrade '
            f"'flax>={NEW_FLAX}'")
  if not accelerators:
    return None
  for cuda in ('cuda12', 'cuda13'):
    plugin = installed(f'jax-{cuda}-plugin')
    if plugin and plugin != jaxlib:
      return (f'jax-{cuda}-plugin {plugin} does not fit jaxlib {jaxlib}: pip install '
              f"'jax[{cuda}]=={jax}'")
  libtpu = installed('libtpu')
  fitting = next((known for start, known in LIBTPU.items() if jax.startswith(start)), ())
  if libtpu and fitting and not libtpu.startswith(fitting):
    return (f'libtpu {libtpu} does not fit jax {jax}, which needs '
            f"{' or '.join(f'{known}.*' for known in fitting)}: pip install "
            f"'libtpu=={fitting[0]}.*'")
  return None


def installed(name: str) -> str:
  """Return the version of a package; '': it is not installed."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ''


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split('.') if part.isdecimal())
