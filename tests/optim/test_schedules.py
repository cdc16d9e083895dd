"""Schedules against literal values: warmup, shape, end points."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.optim.optimizers import SCHEDULES, ScheduleConfig, make_schedule


def rates(num_steps, peak=1.0, counts=None, **config):
  schedule = make_schedule(ScheduleConfig(**config), peak, num_steps)
  return np.array([schedule(count) for count in (counts or range(num_steps + 1))])


def test_linear():
  np.testing.assert_allclose(
    rates(6, name='linear', warmup_steps=2, final_fraction=0.0),
    [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0], rtol=1e-6,
  )
  np.testing.assert_allclose(
    rates(6, name='linear', decay_steps=2, final_fraction=0.5), [1, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]
  )


def test_cosine_falls_to_its_final_fraction():
  values = rates(10, peak=2.0, name='cosine', warmup_steps=2, final_fraction=0.1)
  np.testing.assert_allclose(values[:3], [2 / 3, 4 / 3, 2], rtol=1e-6)
  for step in range(2, 11):
    expected = 2 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2)
    np.testing.assert_allclose(values[step], expected, rtol=1e-6)
  assert values[-1] == pytest.approx(0.2)


def test_wsd_warms_up_stays_and_decays():
  np.testing.assert_allclose(
    rates(10, name='wsd', warmup_steps=1, decay_steps=4, final_fraction=0.0),
    [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0], rtol=1e-6,
  )
  # By default a fifth of the run.
  np.testing.assert_allclose(
    rates(10, name='wsd', final_fraction=0.0), [1] * 9 + [0.5, 0], rtol=1e-6
  )


def test_constant():
  np.testing.assert_allclose(rates(4, peak=3.0, name='constant'), [3] * 5)


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('warmup_steps', [0, 1, 5])
def test_every_shape_peaks_after_warmup_never_is_zero_and_traces(name, warmup_steps):
  config = ScheduleConfig(name=name, warmup_steps=warmup_steps, final_fraction=0.0)
  schedule = make_schedule(config, 0.5, 20)
  counts = jnp.arange(20)
  values = np.array(jax.jit(jax.vmap(schedule))(counts))
  np.testing.assert_allclose(values, [schedule(count) for count in range(20)], rtol=1e-5)
  assert values.argmax() == warmup_steps and values[warmup_steps] == np.float32(0.5)
  assert (values > 0).all()
  assert (np.diff(values[: warmup_steps + 1]) > 0).all()
  assert (np.diff(values[warmup_steps:]) <= 0).all()


def test_phases_longer_than_the_run_are_refused():
  with pytest.raises(ValueError, match=r'schedule.warmup_steps=10: .* the 10 steps'):
    make_schedule(ScheduleConfig(warmup_steps=10), 1.0, 10)
  with pytest.raises(ValueError, match='schedule.decay_steps=9: at most the 8'):
    make_schedule(ScheduleConfig(name='wsd', warmup_steps=2, decay_steps=9), 1.0, 10)


def test_configs_name_what_is_wrong():
  with pytest.raises(ConfigError, match="name='cosin': one of constant, linear, cosine"):
    ScheduleConfig(name='cosin')
  with pytest.raises(ConfigError, match="decay_steps=5: a constant rate has no decay phase"):
    ScheduleConfig(name='constant', decay_steps=5)
