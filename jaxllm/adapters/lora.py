"""LoRA: low-rank matrices beside frozen kernels, in the collection that `models/linear.py` reads.

`init` makes the `lora` tree of a parameter tree, `abstract` its shapes and logical axes, `merge`
folds it into the parameters, `drop` is its dropout.
Training differentiates with respect to `variables['lora']` alone.

Axis letters: I inputs and O outputs of a kernel, all its axes folded.
"""

import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pydantic

from jaxllm.adapters.quantization import NUM_INPUTS
from jaxllm.config import Config
from jaxllm.models.linear import dequantize, is_quantized

Tree = dict[str, Any]


class LoraConfig(Config):
  """Which kernels are adapted, and how much.

  Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
  """

  rank: int = pydantic.Field(default=8, gt=0)
  """R, the rank of each update."""
  alpha: float = pydantic.Field(default=16.0, gt=0)
  """The update is multiplied by alpha / rank."""
  targets: tuple[str, ...] = ('layers/.*',)
  """Regular expressions, each for the whole path of a module, such as
  'layers/attention/(query|value)'; each must match one."""
  dropout_rate: float = pydantic.Field(default=0.0, ge=0, lt=1)
  """Share of the entries of `a` that a training step leaves out; see `drop`."""


def init(config: LoraConfig, params: Tree, key: jax.Array) -> Tree:
  """Return new adapters, under which a model computes what it did before.

  Args:
    config: rank, alpha and targets.
    params: nested dict of parameters, or of their shapes; layers stacked on axis 0.
    key: for `a`, which is normal with variance 1 / I; `b` is 0.

  Returns:
    The `lora` collection: `a` (L, I..., R), `b` (L, R, O...), `scale` (L,), float32, beside the
    path of each kernel, without L outside the layers. `scale` is a constant: it has no gradient.

  Raises:
    ValueError: a target matches no kernel.
  """
  lora: Tree = {}
  for path, kernel in _targets(config, params):
    a_shape, b_shape, lead = _shapes(path, kernel.shape, config.rank)
    # By path, so that another set of targets starts the rest alike.
    path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    inputs = math.prod(a_shape[len(lead) : -1])
    _insert(lora, path, {
      'a': jax.random.normal(path_key, a_shape) * inputs**-0.5,
      'b': jnp.zeros(b_shape),
      'scale': jnp.full(lead, config.alpha / config.rank, jnp.float32),
    })
  return lora


def abstract(config: LoraConfig, params: Tree, axes: Tree) -> tuple[Tree, Tree]:
  """Describe the adapters without allocating any.

  Args:
    config: rank, alpha and targets.
    params: shapes of the parameters, from `decoder.abstract`.
    axes: their logical axes, from the same.

  Returns:
    Trees of `init`'s form: ShapeDtypeStructs, and tuples of logical axis names.
  """
  shapes = jax.eval_shape(lambda key: init(config, params, key), jax.random.key(0))
  names: Tree = {}
  for path, kernel in _targets(config, params):
    kernel_axes = _at(axes, path)['kernel']
    stacked, num_inputs = layout(path, len(kernel.shape))
    lead, rest = kernel_axes[:stacked], kernel_axes[stacked:]
    _insert(names, path, {
      'a': (*lead, *rest[:num_inputs], 'rank'),
      'b': (*lead, 'rank', *rest[num_inputs:]),
      'scale': lead,
    })
  return shapes, names


def merge(params: Tree, lora: Tree) -> Tree:
  """Return parameters that compute alone what they do with the adapters.

  Args:
    params: kernels of any float dtype, which is kept; the product is taken in float32.
    lora: from `init`, trained.

  Raises:
    ValueError: an adapter has no kernel, or one of another shape.
  """
  check(lora, params)
  merged = jax.tree.map(lambda leaf: leaf, params)  # New dicts, the same arrays.
  for path, adapter in adapters(lora):
    module = _at(merged, path)
    kernel = module['kernel']
    if is_quantized(kernel):
      raise ValueError(f'{path}: the kernel is quantised; merge into the unquantised parameters')
    module['kernel'] = (kernel.astype(jnp.float32) + delta(path, adapter)).astype(kernel.dtype)
  return merged


def delta(path: str, adapter: Mapping[str, jax.Array]) -> jax.Array:
  """Return the update a @ b * scale of one kernel, in its shape, float32."""
  a, b, scale = (jnp.asarray(adapter[name], jnp.float32) for name in ('a', 'b', 'scale'))
  lead, rank = a.shape[: scale.ndim], a.shape[-1]
  product = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
  shape = a.shape[:-1] + b.shape[scale.ndim + 1 :]
  return (product * scale[..., None, None]).reshape(shape)


def drop(lora: Tree, rate: float, key: jax.Array) -> Tree:
  """Leave out entries of every `a` at random and scale up the rest.

  One draw serves a whole step. The paper drops entries of the input of `a`, anew for each token;
  this acts on the tree, needs nothing of the model, and costs nothing per token.

  Reference:
    Wan et al., "Regularization of Neural Networks using DropConnect", 2013.
  """
  if not rate:
    return lora
  dropped: Tree = {}
  for path, adapter in adapters(lora):
    a = adapter['a']
    path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    kept = jax.random.bernoulli(path_key, 1 - rate, a.shape)
    _insert(dropped, path, {**adapter, 'a': jnp.where(kept, a / (1 - rate), 0)})
  return dropped


def adapters(lora: Tree, path: str = '') -> Iterator[tuple[str, Tree]]:
  """Yield (path of the module, {'a', 'b', 'scale'})."""
  if 'a' in lora:
    yield path, lora
    return
  for name, child in lora.items():
    yield from adapters(child, f'{path}/{name}' if path else name)


def check(lora: Tree, params: Tree) -> None:
  """Raise a ValueError where an adapter does not fit its kernel."""
  kernels = dict(kernels_of(params))
  for path, adapter in adapters(lora):
    if path not in kernels:
      raise ValueError(f'adapter {path!r}: the model has no such kernel (it has '
                       f'{", ".join(kernels)})')
    kernel = kernels[path]
    expected = _shapes(path, kernel.shape, adapter['a'].shape[-1])
    found = adapter['a'].shape, adapter['b'].shape, adapter['scale'].shape
    if found != expected:
      raise ValueError(f'adapter {path!r}: a, b and scale of shapes {found} do not fit the kernel '
                       f'of shape {kernel.shape}, which needs {expected}')


def from_modules(modules: Mapping[str, Tree]) -> Tree:
  """Return the tree whose `adapters` are these.

  Raises:
    ValueError: a module has not exactly a, b and scale, or lies within another.
  """
  lora: Tree = {}
  for path, adapter in modules.items():
    inside = [other for other in modules if path.startswith(f'{other}/')]
    if set(adapter) != {'a', 'b', 'scale'} or inside:
      raise ValueError(f'adapter {path!r} has {sorted(adapter)}, not a, b and scale'
                       if not inside else f'adapter {path!r} lies within {inside[0]!r}')
    _insert(lora, path, adapter)
  return lora


def _targets(config: LoraConfig, params: Tree) -> list[tuple[str, Any]]:
  """Return (path, kernel) of what is adapted, in the order of the tree."""
  kernels = dict(kernels_of(params))
  chosen = {}
  for pattern in config.targets:
    matched = [path for path in kernels if re.fullmatch(pattern, path)]
    if not matched:
      raise ValueError(f'lora.targets: {pattern!r} matches no kernel (kernels: '
                       f'{", ".join(kernels)})')
    chosen.update(dict.fromkeys(matched))
  return [(path, kernel) for path, kernel in kernels.items() if path in chosen]


def kernels_of(params: Mapping[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  """Yield (path of the module, kernel); of a quantised one, what it would be as an array."""
  for name, child in params.items():
    if name == 'kernel':
      if is_quantized(child):
        child = jax.eval_shape(functools.partial(dequantize, dtype=jnp.float32), child)
      yield path, child
    elif isinstance(child, Mapping):
      yield from kernels_of(child, f'{path}/{name}' if path else name)


def layout(path: str, num_axes: int) -> tuple[int, int]:
  """Return how many leading axes of a kernel are those of layers, and how many then are inputs."""
  stacked = int(path.split('/')[0] == 'layers')
  num_inputs = NUM_INPUTS.get(path.rpartition('/')[2], 1)
  if num_axes - stacked - num_inputs < 1:
    raise ValueError(f'{path}: a kernel of {num_axes} axes is not (layers, inputs, outputs)')
  return stacked, num_inputs


def _shapes(
  path: str, kernel: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  """Return the shapes of a, b and scale."""
  stacked, num_inputs = layout(path, len(kernel))
  lead, rest = kernel[:stacked], kernel[stacked:]
  return (*lead, *rest[:num_inputs], rank), (*lead, rank, *rest[num_inputs:]), lead


def _at(tree: Tree, path: str) -> Tree:
  for name in path.split('/'):
    tree = tree[name]
  return tree


def _insert(tree: Tree, path: str, value: Any) -> None:
  *parents, last = path.split('/')
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = value
