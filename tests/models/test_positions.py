"""Rotary positions and their scalings against plain formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.positions import (
  LinearScaling,
  Llama3Scaling,
  LongRopeScaling,
  RotaryPositions,
  YarnScaling,
  rotate,
  rotations,
  segment_positions,
)

HEAD_DIM = 8


def angles(scaling, length=1, head_dim=HEAD_DIM, base=10_000.0, fraction=1.0):
  """Return the angle of every pair at position 1 in a row of `length`, and the magnitude."""
  config = RotaryPositions(base=base, fraction=fraction, scaling=scaling)
  cos_BTP, sin_BTP = rotations(config, head_dim, jnp.asarray([[1]]), jnp.asarray([length]))
  cos_P, sin_P = np.asarray(cos_BTP[0, 0]), np.asarray(sin_BTP[0, 0])
  return np.arctan2(sin_P, cos_P), np.hypot(cos_P, sin_P)


def test_base_and_fraction():
  np.testing.assert_allclose(angles(None)[0], [1, 0.1, 0.01, 0.001], rtol=1e-5)
  np.testing.assert_allclose(angles(None, base=16.0)[0], [1, 0.5, 0.25, 0.125], rtol=1e-5)
  np.testing.assert_allclose(angles(None, fraction=0.5)[0], [1, 0.01], rtol=1e-5)


def test_linear_scaling_divides_every_angle():
  got, magnitude = angles(LinearScaling(factor=4))
  np.testing.assert_allclose(got, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-5)
  np.testing.assert_allclose(magnitude, 1, rtol=1e-6)


def test_llama3_scaling_keeps_high_and_divides_low_frequencies():
  scaling = Llama3Scaling(factor=8, original_length=1024)
  expected = []
  for i in range(16):
    frequency = 10_000 ** (-i / 16)
    wavelength = 2 * math.pi / frequency
    if wavelength > 1024 / 1:
      frequency /= 8
    elif wavelength >= 1024 / 4:
      smooth = (1024 / wavelength - 1) / (4 - 1)
      frequency = (1 - smooth) * frequency / 8 + smooth * frequency
    expected.append(frequency)
  np.testing.assert_allclose(angles(scaling, head_dim=32)[0], expected, rtol=1e-5)
  assert expected[0] == 1 and expected[-1] < 10_000 ** (-15 / 16) / 7


@pytest.mark.parametrize('whole_pairs', [True, False])
def test_yarn_scaling_ramps_between_fast_and_slow_pairs(whole_pairs):
  scaling = YarnScaling(factor=4, original_length=64, fast_turns=8, whole_pairs=whole_pairs)
  low, high = (
    32 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(10_000)) for turns in (8, 1)
  )
  if whole_pairs:
    low, high = math.floor(low), math.ceil(high)
  expected = []
  for i in range(16):
    ramp = min(max((i - low) / (high - low), 0), 1)
    expected.append(10_000 ** (-i / 16) * (ramp / 4 + 1 - ramp))
  got, magnitude = angles(scaling, head_dim=32)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  np.testing.assert_allclose(magnitude, 0.1 * math.log(4) + 1, rtol=1e-5)
  assert angles(scaling.replace(attention_factor=1.0))[1] == pytest.approx(1)


def test_longrope_chooses_divisors_by_the_row():
  scaling = LongRopeScaling(
    short_factors=(1, 1, 2, 4), long_factors=(1, 2, 10, 100), original_length=10,
    attention_factor=1.25,
  )
  short, magnitude = angles(scaling, length=10)
  np.testing.assert_allclose(short, [1, 0.1, 0.005, 0.00025], rtol=1e-5)
  np.testing.assert_allclose(magnitude, 1.25, rtol=1e-6)
  np.testing.assert_allclose(angles(scaling, length=11)[0], [1, 0.05, 0.001, 0.00001], rtol=1e-5)


@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_attention_depends_on_distance_alone(fraction):
  numbers = np.random.default_rng(0)
  query, key = (jnp.asarray(numbers.standard_normal((1, 6, 2, HEAD_DIM))) for _ in range(2))
  config = RotaryPositions(fraction=fraction)

  def logits(shift):
    table = rotations(config, HEAD_DIM, jnp.arange(6)[None] + shift, jnp.asarray([6]))
    return jnp.einsum('BTNH,BSNH->BNTS', rotate(query, *table), rotate(key, *table))

  np.testing.assert_allclose(logits(100), logits(0), atol=1e-4)
  assert jnp.abs(logits(0) - jnp.einsum('BTNH,BSNH->BNTS', query, key)).max() > 0.1
  rotated = rotate(query, *rotations(config, HEAD_DIM, jnp.asarray([[5] * 6]), jnp.asarray([6])))
  kept = int(HEAD_DIM * fraction)
  np.testing.assert_array_equal(rotated[..., kept:], query[..., kept:])


def test_positions_restart_in_each_segment():
  segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 4]])
  assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]
