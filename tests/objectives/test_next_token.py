"""The loss against formulas in NumPy; chunked equals plain; sums add over parts of a batch."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.models import decoder
from jaxllm.models.families import PRESETS
from jaxllm.objectives import next_token
from jaxllm.objectives.next_token import NextToken, next_token_loss, token_sums

VOCAB, PADDED, BATCH, LENGTH = 50, 64, 4, 10
DECODER = decoder.Decoder(
  PRESETS['gpt2_124m'].replace(
    vocab_size=VOCAB, vocab_multiple=16, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
    max_length=16, dropout_rate=0.5,
  )
)


class Bigram:
  """As much of a `Decoder` as the loss sees, and quicker to compile."""

  def __init__(self, vocab_size=VOCAB):
    self.config = types.SimpleNamespace(vocab_size=vocab_size)

  def apply(self, variables, inputs, *_, method, **options):
    if method == 'hidden':
      return jnp.tanh(variables['embedding'][inputs]), {}
    logits = inputs @ variables['kernel']
    return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -1e30)


BIGRAM = Bigram()


def bigram_variables(vocab=PADDED, dim=8):
  keys = jax.random.split(jax.random.key(0))
  return {'embedding': jax.random.normal(keys[0], (vocab, dim)),
          'kernel': jax.random.normal(keys[1], (dim, vocab))}


@pytest.fixture(scope='module')
def variables():
  return bigram_variables()


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 50, (BATCH, LENGTH + 1)).astype(np.int32)
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': rng.choice(np.float32([0, 0.5, 1]), (BATCH, LENGTH)),
    'segment_ids': np.ones((BATCH, LENGTH), np.int32),
    'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
  }


@functools.cache
def compiled(config, model):
  def loss(variables, batch, key):
    loss_sum, weight_sum, aux = next_token_loss(config, model, variables, batch, key)
    return loss_sum, aux | {'loss_sum': loss_sum, 'weight_sum': weight_sum}

  return jax.jit(jax.grad(loss, has_aux=True))


def grads_and_sums(config, variables, batch, key=None, model=BIGRAM):
  return compiled(config, model)(variables, batch, key)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected
  )


def formula(logits_BTV, targets_BT, weights_BT, smoothing, z_loss):
  """The sums in NumPy float64, over the true vocabulary, one token at a time."""
  totals = dict.fromkeys(('loss_sum', 'cross_entropy_sum', 'z_loss_sum', 'correct_sum'), 0.0)
  vocab_size = logits_BTV.shape[-1]
  for row, column in np.ndindex(targets_BT.shape):
    logits, weight = np.float64(logits_BTV[row, column]), weights_BT[row, column]
    target = targets_BT[row, column]
    partition = np.log(np.sum(np.exp(logits)))
    log_probs = logits - partition
    wanted = np.full(vocab_size, smoothing / vocab_size)
    wanted[target] += 1 - smoothing
    z = z_loss * partition**2
    totals['loss_sum'] += weight * (-np.sum(wanted * log_probs) + z)
    totals['cross_entropy_sum'] -= weight * log_probs[target]
    totals['z_loss_sum'] += weight * z
    totals['correct_sum'] += weight * (np.argmax(logits) == target)
  return totals | {'weight_sum': float(weights_BT.sum())}


@pytest.mark.parametrize('chunk_size', [None, 2])
def test_the_loss_of_text_leaves_borders_out(chunk_size):
  """Bits per byte are of text; loss, perplexity and accuracy are of its ends too."""
  vocab, targets = 5, jnp.array([[1, 4, 2, 4]])
  batch = {'tokens': jnp.array([[0, 1, 4, 2]]), 'targets': targets,
           'weights': jnp.array([[1.0, 1.0, 1.0, 0.0]]), 'segment_ids': jnp.ones((1, 4), jnp.int32),
           'positions': jnp.arange(4)[None]}
  variables = bigram_variables(vocab)
  logits_TV = jnp.tanh(variables['embedding'][batch['tokens'][0]]) @ variables['kernel']
  losses = -jax.nn.log_softmax(logits_TV)[jnp.arange(4), targets[0]]
  total, count, aux = next_token_loss(
    NextToken(chunk_size=chunk_size), Bigram(vocab), variables,
    {**batch, 'is_text': targets != 4})
  assert count == 3 and float(total) == pytest.approx(float(losses[:3].sum()), rel=1e-5)
  assert float(aux['text_sum']) == pytest.approx(float(losses[0] + losses[2]), rel=1e-5)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
  sums = token_sums(
    NextToken(z_loss=0.5), jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), jnp.int32),
    jnp.ones((1, 3)), vocab_size=8,
  )
  np.testing.assert_allclose(sums['cross_entropy_sum'], 3 * np.log(8), rtol=1e-6)
  np.testing.assert_allclose(sums['z_loss_sum'], 3 * 0.5 * np.log(8) ** 2, rtol=1e-6)


@pytest.mark.parametrize('smoothing, z_loss', [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.003)])
def test_equals_the_formula(variables, batch, smoothing, z_loss):
  config = NextToken(label_smoothing=smoothing, z_loss=z_loss)
  _, sums = grads_and_sums(config, variables, batch)
  hidden_BTD, _ = BIGRAM.apply(variables, batch['tokens'], method='hidden')
  logits_BTV = (hidden_BTD @ variables['kernel'])[..., :VOCAB]  # The rest is padding.
  expected = formula(np.array(logits_BTV), batch['targets'], batch['weights'], smoothing, z_loss)
  if not z_loss:
    del expected['z_loss_sum']
  assert_trees_close(sums, expected, rtol=2e-5)


def test_the_gradient_of_the_logits_is_softmax_minus_what_is_wanted():
  rng = np.random.default_rng(1)
  logits_BTV = jnp.asarray(rng.normal(size=(1, 2, 6)), jnp.float32)
  targets_BT, weights_BT = jnp.array([[3, 0]]), jnp.array([[1.0, 0.25]])
  config = NextToken(label_smoothing=0.3)
  gradient = jax.grad(
    lambda x: token_sums(config, x, targets_BT, weights_BT, vocab_size=5)['loss_sum']
  )(logits_BTV.at[..., 5].set(-1e30))
  probabilities = np.exp(logits_BTV[0, :, :5]) / np.exp(logits_BTV[0, :, :5]).sum(-1)[:, None]
  wanted = 0.3 / 5 + 0.7 * np.eye(5)[[3, 0]]
  expected = (probabilities - wanted) * np.array([[1.0], [0.25]])
  np.testing.assert_allclose(gradient[0, :, :5], expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(gradient[0, :, 5], 0)


@pytest.mark.parametrize('chunk_size', [1, 4, 5, 10, 64])  # 4 does not divide the length.
def test_chunked_equals_plain(variables, batch, chunk_size):
  config = NextToken(label_smoothing=0.1, z_loss=0.01)
  plain = grads_and_sums(config, variables, batch)
  chunked = grads_and_sums(config.replace(chunk_size=chunk_size), variables, batch)
  assert_trees_close(chunked, plain)


@pytest.fixture(scope='module')
def decoder_variables():
  return jax.jit(lambda key: decoder.init(DECODER.config, key))(jax.random.key(0))


def test_chunked_equals_plain_in_a_decoder(decoder_variables, batch):
  config, key = NextToken(z_loss=0.01), jax.random.key(1)
  plain = grads_and_sums(config, decoder_variables, batch, key, DECODER)
  chunked = grads_and_sums(
    config.replace(chunk_size=4), decoder_variables, batch, key, DECODER
  )
  assert_trees_close(chunked, plain)


def test_dropout_only_with_a_key(decoder_variables, batch):
  loss = jax.jit(
    lambda key: next_token_loss(NextToken(), DECODER, decoder_variables, batch, key)[0]
  )
  losses = [float(loss(key)) for key in (None, jax.random.key(1), jax.random.key(1),
                                         jax.random.key(2))]
  assert losses[1] == losses[2] and len(set(losses)) == 3


def test_chunks_never_hold_the_logits_of_the_batch():
  length, vocab = 64, 8192
  variables = jax.eval_shape(lambda: bigram_variables(vocab))
  batch = {
    name: jax.ShapeDtypeStruct((BATCH, length), jnp.float32 if name == 'weights' else jnp.int32)
    for name in ('tokens', 'targets', 'weights', 'segment_ids', 'positions')
  }

  def temporary_bytes(chunk_size):
    config = NextToken(chunk_size=chunk_size)
    loss = lambda v, b: next_token_loss(config, Bigram(vocab), v, b)[0]  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(variables, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits_bytes = BATCH * length * vocab * 4
  assert temporary_bytes(None) >= logits_bytes
  assert temporary_bytes(4) < logits_bytes / 4


def test_weight_zero_contributes_nothing_whatever_the_target(variables, batch):
  hidden = batch | {'weights': batch['weights'].copy(), 'targets': batch['targets'].copy()}
  hidden['weights'][:, 5:] = 0
  expected = grads_and_sums(NextToken(), variables, hidden)
  hidden['targets'][:, 5:] = [[49, 50, 60, -1, 10**6]]  # Padding, and what no table has.
  for chunk_size in (None, 3):
    actual = grads_and_sums(NextToken(chunk_size=chunk_size), variables, hidden)
    assert_trees_close(actual, expected)


@pytest.mark.parametrize('chunk_size', [None, 4])
def test_all_weights_zero_is_zero_and_not_nan(variables, batch, chunk_size):
  config = NextToken(label_smoothing=0.1, z_loss=0.1, chunk_size=chunk_size)
  nothing = batch | {'weights': np.zeros_like(batch['weights'])}
  for leaf in jax.tree.leaves(grads_and_sums(config, variables, nothing)):
    np.testing.assert_array_equal(leaf, 0)
  assert next_token.average(jnp.float32(0), jnp.float32(0)) == 0
  assert next_token.average(jnp.float32(3), jnp.float32(2)) == 1.5


def test_sums_add_over_microbatches(variables, batch):
  config = NextToken(label_smoothing=0.1, z_loss=0.01, chunk_size=4)
  whole = grads_and_sums(config, variables, batch)
  parts = [
    grads_and_sums(config, variables, {name: x[rows] for name, x in batch.items()})
    for rows in (slice(0, 2), slice(2, 4))
  ]
  assert_trees_close(jax.tree.map(jnp.add, *parts), whole)


def test_large_logits_stay_finite():
  logits_BTV = jnp.array([[[1e4, -1e4, 0.0]]])
  loss = lambda x: token_sums(  # noqa: E731
    NextToken(), x, jnp.array([[1]]), jnp.ones((1, 1)), vocab_size=3
  )['loss_sum']
  value, gradient = jax.value_and_grad(loss)(logits_BTV)
  assert value == 2e4
  np.testing.assert_array_equal(gradient[0, 0], [1, -1, 0])


def test_configs_name_what_is_wrong():
  for field, value in [('label_smoothing', 1.0), ('z_loss', -1.0), ('chunk_size', 0)]:
    with pytest.raises(ConfigError, match=field):
      NextToken(**{field: value})
