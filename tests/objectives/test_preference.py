"""Preference losses: literal values of the papers' formulas, and laws on a tiny model."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from jaxllm.data import packing
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives import preference
from jaxllm.objectives.preference import Dpo, Ipo, Orpo, Pair, SimPo, sequence_log_probs
from jaxllm.tasks.encoding import Tokens

init = jax.jit(decoder.init, static_argnums=0)
log_probs_of = jax.jit(sequence_log_probs, static_argnums=0)
loss_of = jax.jit(preference.preference_loss, static_argnums=(0, 1))
MODEL = DecoderConfig(
  vocab_size=30, vocab_multiple=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=12,
  max_length=16, scan_layers=False,
)


def _pair(*values):
  return Pair(*(jnp.asarray([v]) for v in values))


# log-probabilities -10 and -12, of 4 and 6 tokens; under the reference -11 and -11.
PAIR = _pair(-10.0, -12.0, 4.0, 6.0, -11.0, -11.0)


def _sigmoid(x):
  return 1 / (1 + math.exp(-x))


def test_dpo_literals():
  # beta ((-10 + 11) - (-12 + 11)) = 0.2
  loss, margin = preference.dpo(Dpo(beta=0.1), PAIR)
  assert float(margin[0]) == pytest.approx(0.2)
  assert float(loss[0]) == pytest.approx(-math.log(_sigmoid(0.2)))
  smooth, _ = preference.dpo(Dpo(beta=0.1, label_smoothing=0.25), PAIR)
  expected = -0.75 * math.log(_sigmoid(0.2)) - 0.25 * math.log(_sigmoid(-0.2))
  assert float(smooth[0]) == pytest.approx(expected)


def test_ipo_literals():
  loss, margin = preference.ipo(Ipo(beta=0.1), PAIR)
  assert float(margin[0]) == pytest.approx(2)
  assert float(loss[0]) == pytest.approx((2 - 5) ** 2)


def test_orpo_literals():
  loss, margin = preference.orpo(Orpo(weight=0.5), PAIR)
  p, q = math.exp(-10 / 4), math.exp(-12 / 6)
  odds = math.log((p / (1 - p)) / (q / (1 - q)))
  assert float(margin[0]) == pytest.approx(odds, rel=1e-5)
  assert float(loss[0]) == pytest.approx(2.5 - 0.5 * math.log(_sigmoid(odds)), rel=1e-5)


def test_simpo_literals():
  loss, margin = preference.simpo(SimPo(beta=2.0, margin=0.5), PAIR)
  assert float(margin[0]) == pytest.approx(2 * (-2.5 + 2))
  assert float(loss[0]) == pytest.approx(-math.log(_sigmoid(-1 - 0.5)))


@pytest.mark.parametrize('chosen', [-1e-9, 0.0, -1e-4, -50.0, -1e4])
def test_orpo_is_finite_for_certain_and_impossible_answers(chosen):
  def loss(x):
    return preference.orpo(Orpo(), _pair(0.0, -3.0, 1.0, 2.0)._replace(chosen=x))[0].sum()

  value, gradient = jax.value_and_grad(loss)(jnp.asarray([chosen]))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def _batch(chosen, rejected):
  records = [packing.pack(s, 8, 30, together=False) for s in (chosen, rejected)]
  first, second = map(packing.batch_arrays, records)
  return {**first, **{f'rejected_{name}': value for name, value in second.items()}}


BATCH = _batch(
  [Tokens([1, 2, 3, 4], [0, 0, 1, 1]), Tokens([1, 5, 6], [0, 1, 1])],
  [Tokens([1, 2, 7], [0, 0, 1]), Tokens([1, 5, 8, 9, 9], [0, 1, 1, 1, 1])],
)
CONFIGS = [Dpo(), Ipo(), Orpo(), SimPo()]


def test_dpo_at_the_reference_is_log_two():
  variables = init(MODEL, jax.random.key(0))
  total, count, aux = loss_of(
    Dpo(), Decoder(MODEL), variables, BATCH, reference=variables)
  assert float(count) == 2
  assert float(total / count) == pytest.approx(math.log(2))
  assert float(aux['margin_sum']) == 0


def test_log_probs_equal_a_loop_over_tokens():
  variables = init(MODEL, jax.random.key(0))
  found, counts, _ = log_probs_of(Decoder(MODEL), variables, BATCH)
  log_probs = jax.nn.log_softmax(
    jax.jit(Decoder(MODEL).apply)(variables, jnp.asarray([[1, 2, 3]])))
  assert float(found[0]) == pytest.approx(float(log_probs[0, 1, 3] + log_probs[0, 2, 4]), rel=1e-5)
  assert counts.tolist() == [2, 2]


def test_reference_may_be_computed_before():
  variables, reference = (init(MODEL, jax.random.key(i)) for i in range(2))
  model = Decoder(MODEL)
  chosen, *_ = log_probs_of(model, reference, BATCH)
  rejected_batch = {name: BATCH[f'rejected_{name}'] for name in
                    ('tokens', 'targets', 'weights', 'segment_ids', 'positions')}
  rejected, *_ = log_probs_of(model, reference, rejected_batch)
  stored = {**BATCH, 'reference_log_probs': jnp.stack([chosen, rejected], axis=1)}
  now = loss_of(Dpo(), model, variables, BATCH, reference=reference)[0]
  before = loss_of(Dpo(), model, variables, stored)[0]
  assert float(now) == pytest.approx(float(before), rel=1e-6)
  with pytest.raises(ValueError, match='compares with a reference'):
    preference.preference_loss(Dpo(), model, variables, BATCH)


@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: c.kind)
def test_gradients_raise_the_preferred_and_lower_the_other(config):
  def loss(chosen, rejected):
    pair = PAIR._replace(chosen=chosen, rejected=rejected)
    return preference.FORMULAS[config.kind](config, pair)[0].sum()

  chosen, rejected = jax.grad(loss, argnums=(0, 1))(PAIR.chosen, PAIR.rejected)
  assert chosen[0] < 0 < rejected[0]


def test_a_step_down_the_gradient_widens_the_margin():
  reference = init(MODEL, jax.random.key(0))

  @jax.jit
  def step(variables):
    def loss(variables):
      total, count, aux = preference.preference_loss(
        Dpo(), Decoder(MODEL), variables, BATCH, None, reference)
      return total / count, aux['margin_sum']

    found, grads = jax.value_and_grad(loss, has_aux=True)(variables)
    return found, jax.tree.map(lambda p, g: p - 0.1 * g, variables, grads)

  first, moved = step(reference)
  second, _ = step(moved)
  assert second[0] < first[0] and second[1] > first[1] == 0


def test_padding_pairs_count_for_nothing():
  variables, reference = (init(MODEL, jax.random.key(i)) for i in range(2))
  padded = {name: jnp.concatenate([value, jnp.zeros_like(value[:1])]) for name, value in
            BATCH.items()}
  results = [loss_of(Dpo(), Decoder(MODEL), variables, batch, None, reference)
             for batch in (BATCH, padded)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_configs_are_chosen_by_kind():
  adapter = pydantic.TypeAdapter(
    Annotated[Dpo | Ipo | Orpo | SimPo, pydantic.Field(discriminator='kind')])
  for config in CONFIGS:
    assert adapter.validate_python({'kind': config.kind}) == config
    assert config.kind in preference.FORMULAS
