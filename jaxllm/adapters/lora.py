"""LoRA: low-rank matrices beside frozen kernels, in the collection that `models/linear.py` reads.

`init` makes the `lora` tree of a parameter tree, `abstract` its shapes and logical axes, `merge`
folds it into the parameters, `drop` is its dropout.
Training differentiates with respect to `variables['lora']` alone.

Axis letters: I inputs and O outputs of a kernel, all its axes folded.
"""

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pydantic
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.config import Config
from jaxllm.models.linear import dequantize, is_quantized, num_inputs, num_stacked

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
  """Return new adapters, which do not change the model yet.

  Args:
    config: rank, alpha and targets.
    params: nested dict of parameters, or of their shapes; layers stacked on axis 0.
    key: for `a`, which is normal with variance 1 / I; `b` is 0.

  Returns:
    The `lora` collection: `a` (L, I..., R), `b` (L, R, O...), `scale` (L,), float32, beside the
    path of each kernel, without L outside the layers, with (L, E) of experts. `scale` is a
    constant: it has no gradient.

  Raises:
    ValueError: a target matches no kernel.
  """
  lora: Tree = {}
  for path, kernel in _targets(config, params):
    a_shape, b_shape, lead = shapes(path, kernel.shape, config.rank)
    # By path, so that another set of targets starts the rest alike.
    path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    inputs = math.prod(a_shape[len(lead) : -1])
    lora[path] = {
      'a': jax.random.normal(path_key, a_shape) * inputs**-0.5,
      'b': jnp.zeros(b_shape),
      'scale': jnp.full(lead, config.alpha / config.rank, jnp.float32),
    }
  return unflatten_dict(lora, sep='/')


def abstract(config: LoraConfig, params: Tree, axes: Tree) -> tuple[Tree, Tree]:
  """Return the adapters' shapes, and their logical axis names, as trees of `init`'s form.

  Args:
    config: rank, alpha and targets.
    params: shapes of the parameters, from `decoder.abstract`.
    axes: their logical axes, from the same.
  """
  kernel_axes = flatten_dict(axes, sep='/')
  names = {
    path: dict(zip(('a', 'b', 'scale'), shapes(path, kernel_axes[f'{path}/kernel'], 'rank'),
                   strict=True))
    for path, _ in _targets(config, params)}
  leaves = jax.eval_shape(lambda key: init(config, params, key), jax.random.key(0))
  return leaves, unflatten_dict(names, sep='/')


def merge(params: Tree, lora: Tree) -> Tree:
  """Return the parameters with the adapters folded into them.

  Args:
    params: kernels of any float dtype, which is kept; the product is taken in float32.
    lora: from `init`, trained.

  Raises:
    ValueError: an adapter has no kernel, or one of another shape.
  """
  check(lora, params)
  merged = flatten_dict(params, sep='/', is_leaf=lambda _, node: is_quantized(node))
  for path, adapter in adapters(lora):
    kernel = merged[f'{path}/kernel']
    if is_quantized(kernel):
      raise ValueError(f'{path}: the kernel is quantised; merge into the unquantised parameters')
    is_split = isinstance(kernel, jax.Array) and len(kernel.sharding.device_set) > 1
    # Of a kernel that is split the product must never be made whole on every device.
    add: Any = jax.jit(_add, out_shardings=kernel.sharding) if is_split else _add
    merged[f'{path}/kernel'] = add(kernel, adapter)
  return unflatten_dict(merged, sep='/')


def _add(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
  return (kernel.astype(jnp.float32) + delta(adapter)).astype(kernel.dtype)


def delta(adapter: Mapping[str, jax.Array]) -> jax.Array:
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
    dropped[path] = {**adapter, 'a': jnp.where(kept, a / (1 - rate), 0)}
  return unflatten_dict(dropped, sep='/')


def adapters(lora: Tree) -> Iterator[tuple[str, Tree]]:
  """Yield (path of the module, {'a', 'b', 'scale'})."""
  yield from flatten_dict(lora, sep='/', is_leaf=lambda _, node: 'a' in node).items()


def check(lora: Tree, params: Tree) -> None:
  """Raise a ValueError where an adapter does not fit its kernel."""
  kernels = dict(kernels_of(params))
  for path, adapter in adapters(lora):
    if path not in kernels:
      raise ValueError(f'adapter {path!r}: the model has no such kernel (it has '
                       f'{", ".join(kernels)})')
    kernel = kernels[path]
    expected = shapes(path, kernel.shape, adapter['a'].shape[-1])
    found = adapter['a'].shape, adapter['b'].shape, adapter['scale'].shape
    if found != expected:
      raise ValueError(f'adapter {path!r}: a, b and scale of shapes {found} do not fit the kernel '
                       f'of shape {kernel.shape}, which needs {expected}')


def _targets(config: LoraConfig, params: Tree) -> list[tuple[str, Any]]:
  """Return (path, kernel) of the adapted modules, in the order of the tree."""
  kernels = dict(kernels_of(params))
  chosen = {}
  for pattern in config.targets:
    matched = [path for path in kernels if re.fullmatch(pattern, path)]
    if not matched:
      raise ValueError(f'lora.targets: {pattern!r} matches no kernel (kernels: '
                       f'{", ".join(kernels)})')
    chosen.update(dict.fromkeys(matched))
  return [(path, kernel) for path, kernel in kernels.items() if path in chosen]


def kernels_of(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yield (path of the module, kernel); a quantised kernel by its shape as an array."""
  leaves = flatten_dict(params, sep='/', is_leaf=lambda _, node: is_quantized(node))
  for path, leaf in leaves.items():
    if path.endswith('/kernel'):
      yield path.removesuffix('/kernel'), (
        jax.eval_shape(lambda k: dequantize(k, jnp.float32), leaf) if is_quantized(leaf) else leaf)


def shapes(path: str, kernel: tuple[Any, ...], rank: Any) -> tuple[tuple[Any, ...], ...]:
  """Return the shapes, or axes, of a, b and scale; refuse no kernel (layers, inputs, outputs)."""
  stacked, inputs = num_stacked(path), num_inputs(path)
  if len(kernel) - stacked - inputs < 1:
    raise ValueError(f'{path}: a kernel of {len(kernel)} axes is not (layers, inputs, outputs)')
  lead, rest = kernel[:stacked], kernel[stacked:]
  return (*lead, *rest[:inputs], rank), (*lead, rank, *rest[inputs:]), lead
