"""Differential privacy: a gradient is a noisy sum of clipped ones, and epsilon is accounted for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from jaxllm import sharding
from jaxllm.optim import privacy
from jaxllm.training import loop, metrics
from jaxllm.training import state as state_lib
from jaxllm.training import step as step_lib
from tests.training import tiny_run
from tests.training.test_step import make_batch

QUIET = privacy.PrivacyConfig(noise_multiplier=1e-6, clip_norm=0.5)


def gradients(tmp_path, batch, num_devices=1, **changes):
  experiment = tiny_run.experiment(tmp_path, **changes)
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:num_devices])
  state = state_lib.create_state(experiment, state_lib.make_optimizer(experiment), mesh)
  placed = sharding.put_batch(batch, sharding.batch_sharding(mesh, experiment.mesh))

  def run(state, batch):
    with sharding.active(sharding.Placement(mesh, experiment.mesh)):
      return step_lib.accumulate_gradients(experiment, state, batch, jax.random.key(1))

  return jax.device_get(jax.jit(run)(state, placed))


def test_each_row_counts_at_most_the_norm(tmp_path):
  batch = make_batch()
  batch['weights'][0] = 0  # A row without a target.
  expected = 0.0
  for i in range(8):
    grads, sums = gradients(tmp_path, {name: x[i : i + 1] for name, x in batch.items()})
    row = jax.tree.map(lambda x: x / max(sums['weight_sum'], 1), grads)  # noqa: B023
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(row)))
    assert norm == 0 if i == 0 else norm > QUIET.clip_norm
    scale = min(1, QUIET.clip_norm / norm) if norm else 0
    flat = np.concatenate([(scale * x).ravel() for x in jax.tree.leaves(row)])
    expected = expected + flat
  for changes in ({}, {'training__microbatches': 2}, {'mesh__data': 4, 'mesh__tensor': 2,
                                                      'num_devices': 8}):
    grads, sums = gradients(tmp_path, batch, privacy=QUIET, **changes)
    found = np.concatenate([x.ravel() for x in jax.tree.leaves(grads)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sums['weight_sum'] == batch['weights'].sum()


def test_a_row_that_is_not_finite_counts_as_nothing():
  def by_row(params, batch, key):
    return {'w': params['w'] * batch['x'][0]}, {'weight_sum': jnp.ones(())}

  clipped = privacy.clipped_sum(by_row, QUIET)
  grads, _ = clipped({'w': jnp.ones(3)}, {'x': jnp.array([0.1, jnp.nan, jnp.inf])},
                     jax.random.key(0))
  np.testing.assert_allclose(grads['w'], 0.1, rtol=1e-6)


def test_noise_has_its_size_and_changes():
  config = privacy.PrivacyConfig(noise_multiplier=3.0, clip_norm=0.5)
  zeros = {'a': jnp.zeros(20_000), 'b': jnp.zeros(20_000)}
  one, other = (privacy.add_noise(zeros, config, jax.random.key(i)) for i in range(2))
  for noise in (one['a'], one['b'], other['a']):
    assert abs(np.std(noise) / 1.5 - 1) < 0.03 and abs(np.mean(noise)) < 0.05
  assert abs(np.corrcoef(one['a'], one['b'])[0, 1]) < 0.03
  assert abs(np.corrcoef(one['a'], other['a'])[0, 1]) < 0.03


def test_skipping_spikes_would_leak(tmp_path):
  with pytest.raises(ValueError, match='training.spike.*with privacy set it to None'):
    tiny_run.experiment(tmp_path, privacy=QUIET, training__spike={'deviations': 6.0})


def gaussian_epsilon(sigma, delta):
  """Solve Balle and Wang, arXiv 1805.06530, theorem 8, for epsilon at sensitivity 1."""
  cdf = stats.norm.cdf
  return optimize.brentq(
    lambda e: cdf(0.5 / sigma - e * sigma) - np.exp(e) * cdf(-0.5 / sigma - e * sigma) - delta,
    0, 200)


@pytest.mark.parity
def test_epsilon_is_that_of_gaussians(tmp_path):
  config = privacy.PrivacyConfig(noise_multiplier=4.0, delta=1e-5)
  for steps, batch, records, twice in ((5, 10, 50, 0), (15, 10, 50, 0), (16, 10, 50, 0),
                                       (15, 10, 48, 2)):
    epochs = -(-steps * batch // records)
    sigma = 4.0 / np.sqrt(epochs - 2 * twice + 4 * twice)
    found = privacy.epsilon(config, steps, batch, records)
    assert found['epsilon'] == pytest.approx(gaussian_epsilon(sigma, 1e-5), rel=2e-3)
    assert 0 < found['epsilon_if_sampled'] < found['epsilon']
  assert privacy.epsilon(config, 0, 10, 50) == {'epsilon': 0.0, 'epsilon_if_sampled': 0.0}


@pytest.mark.parity
def test_a_run_tells_what_it_promises(tmp_path):
  config = tiny_run.experiment(
    tmp_path, privacy=privacy.PrivacyConfig(noise_multiplier=0.5), evaluation__prompts=(),
    checkpoint__every_steps=4)
  summary = loop.train(config, tmp_path / 'run', jax.devices()[:1])
  records = [record for record in metrics.read(tmp_path / 'run' / 'metrics.jsonl')
             if 'privacy/epsilon' in record]
  assert [record['step'] for record in records] == [4, 8]
  assert records[0]['privacy/epsilon_if_sampled'] < records[1]['privacy/epsilon_if_sampled']
  assert records[1]['privacy/epsilon'] == summary['privacy/epsilon']
