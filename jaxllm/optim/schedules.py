"""Learning-rate schedules: linear warmup, then one of the shapes in `SCHEDULES`."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
import pydantic

from jaxllm.config import Config


class ScheduleConfig(Config):
  """How the learning rate moves over a run: a warmup to the peak, then a named shape."""

  name: str = 'cosine'
  """constant, linear, cosine, inverse_sqrt, or wsd (warmup, stable, decay)."""
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
      raise ValueError(f'name={self.name!r}: one of {", ".join(SCHEDULES)}')
    if self.decay_steps is not None and self.name in ('constant', 'inverse_sqrt'):
      raise ValueError(f'decay_steps={self.decay_steps}: {self.name!r} has no decay phase; set it '
                       'to None')
    return self


def make_schedule(config: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
  """Build the function from the count of finished updates to the learning rate.

  Every decay would reach its end at count `num_steps`, one past the last update, so that no update
  is made with a rate of 0.

  Args:
    config: the shape.
    peak: the highest learning rate.
    num_steps: updates of the whole run.

  Returns:
    A function of an int32 count, traced or not; the rate is a float32 scalar.

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


def _inverse_sqrt(config: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
  """Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 3, scaled to the peak."""
  first = config.warmup_steps + 1
  return lambda count: peak * jnp.maximum(jnp.sqrt(first / (first + count)), config.final_fraction)


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
  'inverse_sqrt': _inverse_sqrt,
  'wsd': _wsd,
}
"""name -> function of (config, peak, steps after the warmup), counting from the warmup's end."""
