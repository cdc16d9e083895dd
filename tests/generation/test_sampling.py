"""Logit rules against NumPy: which tokens survive, exactly, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.generation import sampling
from jaxllm.generation.sampling import RULES, SamplingConfig

LOGITS = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 3
HISTORY = sampling.History(
  jnp.zeros((6, 8), jnp.int32), jnp.ones(6, jnp.int32), jnp.ones(6, jnp.int32),
  jnp.full(6, 8, jnp.int32), jnp.full((6, 1), -1, jnp.int32),
)


SAMPLE, APPLY_RULES = jax.jit(sampling.sample), jax.jit(sampling.apply_rules)


def probabilities(logits):
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
  return weights / weights.sum(axis=-1, keepdims=True)


def ruled(logits, configs):
  values = {name: jnp.asarray(value) for name, value in sampling.row_values(configs).items()}
  return np.asarray(APPLY_RULES(jnp.asarray(logits), values, HISTORY))


def reference(logits, config):
  """Filter one row the slow way: sort, then cut."""
  logits = logits.astype(np.float64) / (config.temperature or 1.0)
  keep = np.ones(len(logits), bool)
  order = np.argsort(-logits)
  if config.top_k:
    keep[order[config.top_k :]] = False
  p = probabilities(np.where(keep, logits, -np.inf))
  if config.top_p < 1:
    before = np.cumsum(p[order]) - p[order]
    keep[order[before >= config.top_p]] = False
    p = probabilities(np.where(keep, logits, -np.inf))
  if config.min_p:
    keep &= p >= config.min_p * p.max()
  return probabilities(np.where(keep, logits, -np.inf))


CONFIGS = [
  SamplingConfig(),
  SamplingConfig(temperature=0.6),
  SamplingConfig(top_k=5),
  SamplingConfig(top_p=0.8),
  SamplingConfig(min_p=0.1),
  SamplingConfig(temperature=1.7, top_k=12, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: repr(c)[15:])
def test_rules_keep_exactly_the_same_tokens(config):
  got = ruled(LOGITS, [config] * 6)
  want = np.stack([reference(row, config) for row in LOGITS])
  np.testing.assert_array_equal(np.isfinite(got), want > 0)
  np.testing.assert_allclose(probabilities(got), want, atol=1e-6)


def test_each_row_has_its_own_rules():
  got = ruled(LOGITS, CONFIGS)
  for row, config in enumerate(CONFIGS):
    np.testing.assert_array_equal(got[row], ruled(LOGITS, [config] * 6)[row])
  np.testing.assert_array_equal(got[0], LOGITS[0])


@pytest.mark.parametrize('top_k', [1, 2, 39, 40, 41, 10_000])
def test_top_k_counts(top_k):
  kept = np.isfinite(ruled(LOGITS, [SamplingConfig(top_k=top_k)] * 6)).sum(axis=1)
  assert (kept == min(top_k, 40)).all()


def test_ties_and_odd_values():
  logits = np.array([[2, 1, 1, 1, -np.inf, -1e30], [0, -0.5, 3e38, -3e38, 1e-40, 1]], np.float32)
  history = jax.tree.map(lambda a: a[:2], HISTORY)
  values = {'top_k': jnp.asarray([2, 2], jnp.int32)}
  got = np.asarray(APPLY_RULES(jnp.asarray(logits), values, history))
  assert np.isfinite(got).tolist() == [
    [True, True, True, True, False, False], [False, False, True, False, False, True]
  ]
  cold = np.asarray(RULES['temperature'].apply(jnp.asarray(logits), jnp.full(2, 1e-38), history))
  assert not np.isnan(cold).any() and cold.argmax(axis=1).tolist() == [0, 2]


def test_the_most_probable_token_always_survives():
  tight = SamplingConfig(top_p=1e-9, min_p=1.0, temperature=1e-6)
  got = ruled(LOGITS, [tight] * 6)
  assert (np.isfinite(got).sum(axis=1) >= 1).all()
  assert (got.argmax(axis=1) == LOGITS.argmax(axis=1)).all()


@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: repr(c)[15:])
def test_draws_have_the_right_frequencies(config):
  draws = 20_000
  logits = jnp.asarray(np.tile(LOGITS[:1], (draws, 1)))
  values = {k: jnp.asarray(v) for k, v in sampling.row_values([config] * draws).items()}
  history = jax.tree.map(lambda a: jnp.repeat(a[:1], draws, axis=0), HISTORY)
  keys = sampling.row_keys(jnp.full(draws, 7, jnp.uint32), jnp.arange(draws))
  ids = np.asarray(SAMPLE(keys, logits, values, history))
  want = reference(LOGITS[0], config)
  counts = np.bincount(ids, minlength=40)
  assert (counts[want == 0] == 0).all()
  # Chi-square over the tokens that are expected at least five times, beyond five deviations.
  often = want * draws >= 5
  expected = want[often] * draws
  chi_square = ((counts[often] - expected) ** 2 / expected).sum()
  freedom = max(often.sum() - 1, 1)
  assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_zero_temperature_is_greedy_in_its_row_only():
  configs = [SamplingConfig(temperature=0.0 if row % 2 else 1.5) for row in range(6)]
  values = {k: jnp.asarray(v) for k, v in sampling.row_values(configs).items()}
  drawn = np.stack([
    np.asarray(SAMPLE(
      sampling.row_keys(jnp.arange(6, dtype=jnp.uint32), jnp.full(6, index)),
      jnp.asarray(LOGITS), values, HISTORY,
    ))
    for index in range(20)
  ])
  assert (drawn[:, 1::2] == LOGITS.argmax(axis=1)[1::2]).all()
  assert all(len(set(drawn[:, row])) > 1 for row in (0, 2, 4))


@pytest.mark.parametrize('field, value', [
  ('temperature', -0.1), ('top_p', 0.0), ('top_p', 1.1), ('top_k', -1), ('min_p', 2.0),
  ('max_new_tokens', 0), ('seed', -1), ('temperature', float('nan')),
])
def test_bad_values_are_named(field, value):
  with pytest.raises(ConfigError, match=field):
    SamplingConfig(**{field: value})


def test_the_old_name_of_a_field_is_read():
  config = SamplingConfig.from_json('{"no_repeat_ngram": 3}')
  assert config == SamplingConfig(no_repeat_ngram_size=3)
  with pytest.raises(ValueError, match='no_repeat_ngram_size'):
    SamplingConfig(no_repeat_ngram=-1)
