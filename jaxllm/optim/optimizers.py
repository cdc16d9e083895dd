"""Optimizers and learning-rate schedules by name, each composed from optax.

An optimizer clips, finds a direction, decays weights, scales by the learning rate; a schedule is a
linear warmup, then one of the shapes in `SCHEDULES`.

`weight_decay` means the same for all of them: each update subtracts learning rate * weight_decay
* parameter from the parameters whose leaf is named in `decay_names`, wherever layers are stacked.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pydantic

from jaxllm import mistakes
from jaxllm.config import Config


class OptimizerConfig(Config):
  """Which optimizer, and its settings.

  A setting of None takes the named optimizer's own default; one that it does not read is refused.
  """

  name: str = 'adamw'
  """adamw, lion, muon or sgd."""
  learning_rate: float = pydantic.Field(1e-3, gt=0)
  """Peak learning rate; the schedule scales it."""
  weight_decay: float = pydantic.Field(0.1, ge=0)
  """Decay per unit of learning rate, on the parameters of decay_names."""
  decay_names: tuple[str, ...] = ('kernel', 'embedding')
  """Last path component of the parameters that decay; each name must match one."""
  clip_norm: float | None = pydantic.Field(1.0, gt=0)
  """Gradients with a larger global norm are scaled down to it; None: never."""
  beta1: float | None = pydantic.Field(None, ge=0, lt=1)
  """Decay of the first moment (adamw, muon's AdamW part: 0.9; lion: 0.9, the update's mixture)."""
  beta2: float | None = pydantic.Field(None, ge=0, lt=1)
  """Decay of the second moment (adamw, muon: 0.95); lion's momentum (0.99)."""
  epsilon: float | None = pydantic.Field(None, gt=0)
  """Added to the denominator (adamw, muon: 1e-8)."""
  momentum: float | None = pydantic.Field(None, ge=0, lt=1)
  """Decay of the momentum (sgd: 0.9; muon: 0.95)."""
  momentum_dtype: Literal['float32', 'bfloat16'] | None = None
  """Storage of the first moment (adamw, lion, muon, sgd); None: that of the parameters."""
  second_moment_dtype: Literal['float32', 'bfloat16'] | None = None
  """Storage of the second moment (adamw, muon's AdamW part); None: that of the parameters."""
  memory: Literal['device', 'host'] = 'device'
  """Where moments lie between updates; on 'host' TPUs and GPUs hold less, and wait for copies."""
  balance_rate: float = pydantic.Field(1e-3, ge=0)
  """How far a step moves the biases that balance experts with sigmoid scores."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'OptimizerConfig':
    if self.name not in OPTIMIZERS:
      raise ValueError(f'name={self.name!r}: one of {", ".join(OPTIMIZERS)}'
                       f'{mistakes.hint(self.name, OPTIMIZERS)}')
    read = _settings_of(self.name)
    for field in _SETTINGS:
      if getattr(self, field) is not None and field not in read:
        raise ValueError(f'{field}={getattr(self, field)!r}: {self.name!r} does not read it (it '
                         f'reads {", ".join(read) or "none of these"}); set it to None')
    if self.second_moment_dtype == 'bfloat16' and (self.beta2 or 0) > _MAX_BETA2:
      raise ValueError(f"beta2={self.beta2} with second_moment_dtype='bfloat16': its 8 bits round "
                       f'such a slow decay away; take at most {_MAX_BETA2}, or float32')
    return self


class ScheduleConfig(Config):
  """How the learning rate moves over a run: a warmup to the peak, then a named shape."""

  name: str = 'cosine'
  """constant, linear, cosine, or wsd (warmup, stable, decay)."""
  warmup_steps: int = pydantic.Field(0, ge=0)
  """Steps of linear warmup; the first update already uses peak / (warmup_steps + 1), not 0."""
  decay_steps: int | None = pydantic.Field(None, gt=0)
  """Steps that the decay takes. linear and cosine start it after the warmup, by default over all
  that is left of the run; wsd ends it with the run, by default over the last fifth."""
  final_fraction: float = pydantic.Field(0.1, ge=0, le=1)
  """The rate never falls below this fraction of the peak (constant never falls)."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'ScheduleConfig':
    if self.name not in SCHEDULES:
      raise ValueError(f'name={self.name!r}: one of {", ".join(SCHEDULES)}'
                       f'{mistakes.hint(self.name, SCHEDULES)}')
    if self.decay_steps is not None and self.name == 'constant':
      raise ValueError(f'decay_steps={self.decay_steps}: a constant rate has no decay phase; '
                       'set it to None')
    return self


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule, params: Any
) -> optax.GradientTransformation:
  """Compose the optimizer, an optax transform whose update needs the params.

  Args:
    config: name and settings.
    schedule: count of finished updates -> learning rate, from `make_schedule`.
    params: nested dict of arrays or ShapeDtypeStructs; only paths and ranks are read.

  Raises:
    ValueError: a name of `decay_names` matches no parameter.
  """
  settings = {name: getattr(config, name) for name in _settings_of(config.name)}
  settings = {name: value for name, value in settings.items() if value is not None}
  decay = optax.add_decayed_weights(
    config.weight_decay, decay_mask(config.decay_names, params)
  ) if config.weight_decay else optax.identity()
  task = _Task(params, schedule, decay)
  optimizer = OPTIMIZERS[config.name](task, **settings)
  if config.clip_norm is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  labels = jax.tree_util.tree_map_with_path(
    lambda path, _: 'balance' if _keys(path)[-1] == 'balance_bias' else 'other', params)
  if 'balance' not in jax.tree.leaves(labels):
    return optimizer
  # Their gradients are loads, of which the signs alone count: Wang et al., arXiv 2408.15664.
  balance = optax.chain(optax.scale_by_sign(), optax.scale(-config.balance_rate))
  return optax.partition({'balance': balance, 'other': optimizer}, labels)


def decay_mask(names: tuple[str, ...], params: Any) -> Any:
  """Return a tree of bools: True where the last path component is one of `names`.

  By name and not by rank, because stacking the layers gives a norm's scale two dimensions.

  Raises:
    ValueError: a name matches no parameter.
  """
  mask = jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[-1] in names, params)
  present = {_keys(path)[-1] for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  for name in names:
    if name not in present:
      raise ValueError(f'optimizer.decay_names: {name!r} matches no parameter (names: '
                       f'{", ".join(sorted(present))})')
  return mask


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
  """Round float32 to one of the two nearest bfloat16 numbers, in proportion to how near each is.

  The bits depend on the key and the place in the whole array, however it is split.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


class _Task(NamedTuple):
  params: Any
  schedule: optax.Schedule
  decay: optax.GradientTransformation


def _descend(task: _Task, direction: optax.GradientTransformation) -> optax.GradientTransformation:
  return optax.chain(direction, task.decay, optax.scale_by_learning_rate(task.schedule))


def _adam(
  beta1: float, beta2: float, epsilon: float, momentum_dtype: str | None,
  second_moment_dtype: str | None,
) -> optax.GradientTransformation:
  """Return Adam's direction; optax would keep the second moment as the parameters are."""
  adam = optax.scale_by_adam(beta1, beta2, epsilon, mu_dtype=momentum_dtype)

  def init(params: Any) -> Any:
    state: Any = adam.init(params)
    return state._replace(nu=optax.tree.cast(state.nu, second_moment_dtype))

  def update(grads: Any, state: Any, params: Any = None) -> Any:
    exact = state._replace(nu=optax.tree.cast_like(state.nu, grads))
    updates, new = adam.update(grads, exact, params)
    return updates, new._replace(nu=optax.tree.cast_like(new.nu, state.nu))  # type: ignore

  return optax.GradientTransformation(init, update)


def _adamw(
  task: _Task, *, beta1: float = 0.9, beta2: float = 0.95, epsilon: float = 1e-8,
  momentum_dtype: str | None = None, second_moment_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101."""
  return _descend(task, _adam(beta1, beta2, epsilon, momentum_dtype, second_moment_dtype))


def _lion(
  task: _Task, *, beta1: float = 0.9, beta2: float = 0.99, momentum_dtype: str | None = None
) -> optax.GradientTransformation:
  """Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675."""
  return _descend(task, optax.scale_by_lion(beta1, beta2, mu_dtype=momentum_dtype))


def _muon(
  task: _Task, *, momentum: float = 0.95, beta1: float = 0.9, beta2: float = 0.95,
  epsilon: float = 1e-8, momentum_dtype: str | None = None, second_moment_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Muon for the kernels inside layers, AdamW for embeddings, norms, biases and the head.

  Updates are scaled to AdamW's usual root mean square, so both share one learning rate: Liu et
  al., Muon is Scalable for LLM Training, arXiv 2502.16982, equation 4.
  """
  def by_axes(choose: Callable[[Any], Any]) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: choose(_matrix_axes(path, leaf)), task.params)

  labels = by_axes(lambda axes: 'muon' if axes else 'adamw')
  masked = by_axes(lambda axes: axes or optax.MaskedNode())

  def scale(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    sides = (math.prod(update.shape[a] for a in side) for side in axes)
    return 0.2 * math.sqrt(max(sides)) * update

  orthogonal = optax.chain(
    optax.contrib.scale_by_muon(
      beta=momentum, mu_dtype=momentum_dtype, weight_dimension_numbers=lambda _: masked),
    optax.stateless(lambda updates, _: jax.tree.map(scale, updates, masked)),
  )
  adam = _adam(beta1, beta2, epsilon, momentum_dtype, second_moment_dtype)
  return _descend(task, optax.partition({'muon': orthogonal, 'adamw': adam}, labels))


def _sgd(
  task: _Task, *, momentum: float = 0.9, momentum_dtype: str | None = None
) -> optax.GradientTransformation:
  return _descend(task, optax.trace(momentum, accumulator_dtype=momentum_dtype))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'adamw': _adamw, 'lion': _lion, 'muon': _muon, 'sgd': _sgd}
"""name -> function of (task, **settings); its keyword arguments are the fields that it reads."""

_SETTINGS = ('beta1', 'beta2', 'epsilon', 'momentum', 'momentum_dtype', 'second_moment_dtype')
# bfloat16 numbers lie up to 1 / 128 apart: what changes by less than half of that is rounded back.
_MAX_BETA2 = 0.99


def _settings_of(name: str) -> list[str]:
  return [field for field in inspect.signature(OPTIMIZERS[name]).parameters if field != 'task']


def _keys(path: tuple[Any, ...]) -> list[str]:
  return [str(getattr(entry, 'key', entry)) for entry in path]


def _matrix_axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
  """Return the axes of a stacked kernel (L, inputs..., outputs...) that are its matrix's rows and
  columns, of experts (L, E, inputs, outputs); None for other parameters.
  """
  keys = _keys(path)
  if keys[-1] != 'kernel' or 'layers' not in keys:
    return None
  axes = tuple(range(1 + ('experts' in keys[:-2]), leaf.ndim))
  owner = keys[-2]
  if len(axes) > 2 and owner not in ('query', 'key', 'value', 'out'):
    raise ValueError(f'{"/".join(keys)}: shape {leaf.shape} is not (layers, in, out), and no rule '
                     f'says which axes of {owner!r} are inputs')
  num_inputs = len(axes) - 1 if owner == 'out' else 1
  return optax.contrib.MuonDimensionNumbers(axes[:num_inputs], axes[num_inputs:])


def make_schedule(config: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
  """Return the function from the count of finished updates to the learning rate, float32.

  Every decay would reach its end at count `num_steps`, one past the last update, so that no update
  is made with a rate of 0.

  Args:
    peak: the highest learning rate.
    num_steps: updates of the whole run.

  Raises:
    ValueError: the phases are longer than the run.
  """
  after = num_steps - config.warmup_steps
  if after <= 0:
    raise ValueError(f'schedule.warmup_steps={config.warmup_steps}: must be smaller than the '
                     f'{num_steps} steps of the run')
  if config.name == 'wsd' and (config.decay_steps or 0) > after:
    raise ValueError(f'schedule.decay_steps={config.decay_steps}: at most the {after} of '
                     f'{num_steps} steps that follow the warmup of {config.warmup_steps}')
  shape = SCHEDULES[config.name](config, peak, after)
  if not config.warmup_steps:
    return shape
  first = peak / (config.warmup_steps + 1)
  warmup = optax.linear_schedule(first, peak, config.warmup_steps)
  return optax.join_schedules([warmup, shape], [config.warmup_steps])


def _wsd(config: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
  """Hu et al., arXiv 2404.06395, section 4; the fifth: Hägele et al., arXiv 2405.18392."""
  decay = config.decay_steps or max(1, min(num_steps, (num_steps + config.warmup_steps) // 5))
  return optax.linear_schedule(peak, peak * config.final_fraction, decay, num_steps - decay)


SCHEDULES: dict[str, Callable[[ScheduleConfig, float, int], optax.Schedule]] = {
  'constant': lambda config, peak, num_steps: optax.constant_schedule(peak),
  'linear': lambda config, peak, num_steps: optax.linear_schedule(
    peak, peak * config.final_fraction, config.decay_steps or num_steps),
  'cosine': lambda config, peak, num_steps: optax.cosine_decay_schedule(
    peak, config.decay_steps or num_steps, config.final_fraction),
  'wsd': _wsd,
}
"""name -> function of (config, peak, steps after the warmup), counting from the warmup's end."""
