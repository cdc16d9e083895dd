"""A long text, passage by passage: the sum is that of a loop, and cuts do not depend on tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.model import Model
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig
from jaxllm.tasks.language_modeling import measure_passages, split_passages

BYTES = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
MODEL = DecoderConfig(
  vocab_size=BYTES.vocab_size, vocab_multiple=1, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=12,
  max_length=64, scan_layers=False, initializer=InitializerConfig(stddev=0.4),
)
apply = jax.jit(Decoder.apply, static_argnums=0)


@pytest.fixture(scope='module')
def model():
  variables = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
  return Model(MODEL, variables, BYTES)


def loop(model, ids, context_length, stride):
  """Return the log-probability of each token but the first, by one full pass per window."""
  values, start = [], 0
  while len(values) < len(ids) - 1:
    window = ids[start : start + context_length]
    tokens = jnp.zeros((1, 64), jnp.int32).at[0, : len(window)].set(jnp.asarray(window))
    log_probs = jax.nn.log_softmax(apply(model.decoder, model.variables, tokens))[0]
    new = start + len(window) - 1 - len(values)
    values += [float(log_probs[i, window[i + 1]]) for i in range(len(window) - 1)][-new:]
    start = min(start + stride, max(len(ids) - context_length, 0))
  return values


@pytest.mark.parametrize('context_length, stride', [(64, 32), (17, 16), (9, 3)])
def test_the_sum_is_that_of_a_loop(model, context_length, stride):
  text = 'To be, or not to be, that is the question: whether it is nobler in mind to suffer ü.'
  ids = [BYTES.bos_id, *text.encode()]
  found, = measure_passages(model, [text], context_length, stride)
  assert (found['tokens'], found['bytes']) == (len(ids) - 1, len(text.encode()))
  expected = sum(loop(model, ids, context_length, stride))
  assert found['log_likelihood'] == pytest.approx(expected, rel=1e-5)


def test_without_bos_the_first_token_does_not_count(model):
  found, = measure_passages(dataclasses.replace(model, add_bos=False), ['abcd'], 64, 32)
  assert (found['tokens'], found['bytes']) == (3, 3)
  assert measure_passages(dataclasses.replace(model, add_bos=False), ['a'], 64, 32) == []
  assert measure_passages(model, [''], 64, 32) == []


def test_passages_are_the_text_and_have_their_own_sums(model):
  words = ' '.join(f'word{i}' for i in range(900)) + '\n'
  parts = split_passages(words)
  assert ''.join(parts) == words and len(parts) == 3
  assert all(part[-1].isspace() and len(part) >= 2000 for part in parts)
  assert split_passages('') == [] and split_passages('x' * 5000) == ['x' * 5000]
  found = measure_passages(model, [words], 64, 63)
  for name in ('bytes', 'tokens'):
    assert [one[name] for one in found] == list(map(len, parts))
  whole = loop(model, [BYTES.bos_id, *words.encode()], 64, 63)
  ends = np.cumsum([one['tokens'] for one in found])
  sums = [sum(part) for part in np.split(np.array(whole), ends[:-1])]
  assert [one['log_likelihood'] for one in found] == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize('context_length, stride, message', [
  (65, 3, 'context_length=65: between 2 and the context of the model, 64'),
  (8, 8, 'stride=8: between 1 and context_length - 1, 7'),
])
def test_lengths_that_do_not_fit_are_refused(model, context_length, stride, message):
  with pytest.raises(ValueError, match=message):
    measure_passages(model, ['text'], context_length, stride)
