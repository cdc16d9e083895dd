"""Rules on paths: what is frozen stays, without state; rates differ as told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.adapters import rules
from jaxllm.adapters.rules import PathRule
from jaxllm.optim.optimizers import OptimizerConfig, make_optimizer

PARAMS = {
  'embed': {'embedding': jnp.ones((4, 2))},
  'layers': {'mlp': {'kernel': jnp.ones((2, 2, 3))}, 'norm': {'scale': jnp.ones((2, 2))}},
}
GRADS = jax.tree.map(lambda p: jnp.arange(1.0, p.size + 1).reshape(p.shape), PARAMS)


def test_factors_by_the_first_rule_that_matches():
  found = rules.factors(
    [PathRule(pattern='layers/mlp/.*', factor=0.5), PathRule(pattern='layers/.*')], PARAMS)
  assert found == {
    'embed': {'embedding': 1.0}, 'layers': {'mlp': {'kernel': 0.5}, 'norm': {'scale': 0.0}}}


def test_every_rule_must_match():
  with pytest.raises(ValueError, match="rule 'layers/attn/.*' matches no parameter"):
    rules.factors([PathRule(pattern='layers/attn/.*')], PARAMS)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lion', 'muon'])
def test_every_optimizer_obeys(name):
  config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.01, clip_norm=1.0)
  tx = make_optimizer(config, optax.constant_schedule(0.1), PARAMS)
  some = [PathRule(pattern='embed/.*'), PathRule(pattern='layers/norm/.*', factor=0.5)]
  restricted = rules.apply_rules(some, tx, PARAMS)
  state = restricted.init(PARAMS)
  updates, state = jax.jit(restricted.update)(GRADS, state, PARAMS)
  np.testing.assert_array_equal(updates['embed']['embedding'], 0)
  # The optimizer of the trained parameters alone gives the same, before the factor.
  trained = {'layers': PARAMS['layers']}
  alone = make_optimizer(config.replace(decay_names=('kernel',)), optax.constant_schedule(0.1),
                         trained)
  expected, _ = alone.update({'layers': GRADS['layers']}, alone.init(trained), trained)
  np.testing.assert_allclose(updates['layers']['mlp']['kernel'],
                             expected['layers']['mlp']['kernel'], rtol=1e-5)
  np.testing.assert_allclose(updates['layers']['norm']['scale'],
                             0.5 * expected['layers']['norm']['scale'], rtol=1e-5)
  size = sum(leaf.size for leaf in jax.tree.leaves(state))
  full = sum(leaf.size for leaf in jax.tree.leaves(tx.init(PARAMS)))
  assert size < full


def test_no_rules_change_nothing():
  tx = optax.sgd(0.1)
  assert rules.apply_rules([], tx, PARAMS) is tx
