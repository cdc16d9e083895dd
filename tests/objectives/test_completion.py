"""Completion-only loss: exact masks, truncation, packing that changes nothing."""

import jax
import numpy as np
import pytest

from jaxllm.data import packing
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives.next_token import NextToken, next_token_loss
from jaxllm.tasks import encoding
from jaxllm.tasks.encoding import Tokens

MODEL = DecoderConfig(
  vocab_size=30, vocab_multiple=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=12,
  max_length=16, scan_layers=False,
)


def test_literal_batch():
  records = packing.pack([Tokens([1, 5, 6, 7], [0, 0, 1, 1]), Tokens([1, 8, 9], [0, 1, 0.5])],
                            context_length=7, vocab_size=30)
  batch = packing.batch_arrays(records)
  assert batch['tokens'].tolist() == [[1, 5, 6, 7, 1, 8, 9]]
  assert batch['targets'].tolist() == [[5, 6, 7, 1, 8, 9, 0]]
  assert batch['weights'].tolist() == [[0, 1, 1, 0, 1, 0.5, 0]]
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 1, 2, 2, 2]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
  assert batch['weights'].dtype == np.float32


def test_a_segment_that_fills_the_record_keeps_its_last_target():
  records = packing.pack([Tokens([1, 2, 3], [0, 1, 1])], context_length=2, vocab_size=30)
  batch = packing.batch_arrays(records)
  assert batch['targets'].tolist() == [[2, 3]] and batch['weights'].tolist() == [[1, 1]]


@pytest.mark.parametrize(
  'policy, ids, weights',
  [
    ('start', [0, 3, 4, 5, 6], [0, 0, 0, 1, 1]),
    ('end', [0, 1, 2, 3, 4], None),
    ('drop', None, None),
  ],
)
def test_truncation(policy, ids, weights):
  found = encoding.truncate(Tokens(range(7), [0, 0, 0, 0, 0, 1, 1]), 4, policy)
  if weights is None:
    assert found is None
  else:
    assert found == Tokens(ids, weights)


def test_truncation_of_the_target_itself():
  tokens = Tokens(range(7), [0, 0, 1, 1, 1, 1, 1])
  assert encoding.truncate(tokens, 4, 'start') == Tokens([0, 2, 3, 4, 5], [0, 1, 1, 1, 1])
  assert encoding.truncate(tokens, 4, 'end') == Tokens([0, 1, 2, 3, 4], [0, 0, 1, 1, 1])
  assert encoding.truncate(Tokens(range(5), [0, 0, 0, 0, 1]), 4, 'drop') is not None
  with pytest.raises(ValueError, match='7 tokens, but the context is 4'):
    encoding.truncate(tokens, 4, 'error')


def test_packing_is_tight_and_keeps_every_sequence_once():
  rng = np.random.default_rng(0)
  sequences = [
    Tokens([1, *[i % 28 + 2] * int(n)], [0, *[1] * int(n)])
    for i, n in enumerate(rng.integers(1, 32, 200))
  ]
  records = packing.pack(sequences, context_length=63, vocab_size=30)
  total = sum(len(s.ids) for s in sequences)
  assert len(records) <= 1.02 * total / 64 + 1
  found = []
  for record in records:
    for segment in range(1, record['segment_ids'].max() + 1):
      inside = record['segment_ids'] == segment
      found.append((record['tokens'][inside].tolist(), record['weights'][inside].tolist()))
  key = [(list(s.ids), [float(w) for w in s.weights]) for s in sequences]
  assert sorted(found) == sorted(key)


def test_the_first_packed_records_are_like_the_others():
  """Neither the longest sequences nor those that came first are at one end."""
  sequences = [Tokens([1 + i // 100] * n, [1] * n) for i in range(200) for n in (2 + i % 14,)]
  records = packing.pack(sequences, context_length=15, vocab_size=30)
  segments = records['segment_ids'].max(axis=1)
  half = len(records) // 2
  assert abs(segments[:half].mean() - segments[half:].mean()) < 0.35
  again = packing.pack(sequences, context_length=15, vocab_size=30)
  np.testing.assert_array_equal(records, again)
  # Alone, they stay in the order of what else is known of them, such as labels.
  alone = packing.pack(sequences, 15, 30, together=False)
  assert alone['tokens'][:, 0].tolist() == [1] * 100 + [2] * 100


def test_packed_equals_unpacked():
  rng = np.random.default_rng(1)
  sequences = []
  for length in (3, 9, 5, 12, 4, 2):
    weights = (rng.random(length) < 0.6).astype(float)
    sequences.append(Tokens(rng.integers(1, 30, length).tolist(), weights.tolist()))
  variables = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))

  @jax.jit
  def loss(variables, batch):
    total, count, aux = next_token_loss(NextToken(), Decoder(MODEL), variables, batch)
    return total, (count, aux)

  results = []
  for together in (True, False):
    records = packing.pack(sequences, 14, 30, together)
    results.append(jax.value_and_grad(loss, has_aux=True)(
      variables, packing.batch_arrays(records)
    ))
  assert len(packing.pack(sequences, 14, 30)) < len(sequences)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results)
  assert results[0][0][1][0] == sum(sum(s.weights[1:]) for s in sequences)


def test_the_prompt_has_no_gradient_of_its_own():
  """Other prompt targets change nothing: only what has weight is learned."""
  batch = packing.batch_arrays(
    packing.pack([Tokens([1, 5, 6, 7, 8], [0, 0, 0, 1, 1])], 4, 30))
  changed = {**batch, 'targets': np.where(batch['weights'] == 0, 29, batch['targets'])}
  variables = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
  loss = jax.jit(next_token_loss, static_argnums=(0, 1))
  losses = [loss(NextToken(), Decoder(MODEL), variables, b)[0] for b in (batch, changed)]
  assert losses[0] == losses[1]


@pytest.mark.parametrize(
  'tokens, message',
  [(Tokens(range(10), [1] * 10), 'does not fit'), (Tokens([1, 30], [0, 1]), 'not all in the')],
)
def test_bad_sequences_are_named(tokens, message):
  with pytest.raises(ValueError, match=message):
    packing.pack([tokens], 4, 30)
