"""Tokens are scored as by one whole pass each, however sequences are grouped, padded and cut."""

import jax
import numpy as np
import pytest

from jaxllm.generation import scoring
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig

CONFIG = DecoderConfig(vocab_size=31, vocab_multiple=16, embed_dim=16, num_layers=2, num_heads=2,
                       mlp_dim=16, max_length=48, initializer=InitializerConfig(stddev=0.5))
MODEL = Decoder(CONFIG)
VARIABLES = decoder.init(CONFIG, jax.random.key(0))
apply = jax.jit(MODEL.apply)
IDS = np.random.default_rng(0).integers(0, 31, 200).tolist()


def log_probs(ids):
  """Return (N, V) log-probabilities of what follows each id, by one pass."""
  tokens = np.zeros((1, 48), np.int32)
  tokens[0, : len(ids)] = ids
  return np.asarray(jax.nn.log_softmax(apply(VARIABLES, tokens)[0, : len(ids), :31]))


def check(sequences, places, found):
  for sequence, wanted, one in zip(sequences, places, found, strict=True):
    own_NV = log_probs(sequence[:-1])[np.array(wanted, int) - 1]
    targets = [sequence[place] for place in wanted]
    np.testing.assert_allclose(one.log_probs_N, own_NV[range(len(targets)), targets], atol=2e-5)
    assert one.is_greedy_N.tolist() == (own_NV.argmax(-1) == targets).tolist()
    best = np.argsort(-own_NV, kind='stable')[:, :3]
    assert one.top_ids_NA[:, :3].tolist() == best.tolist()
    np.testing.assert_allclose(one.top_log_probs_NA[:, :3],
                               np.take_along_axis(own_NV, best, 1), atol=2e-5)


def test_scores_are_those_of_whole_passes():
  greedy = int(log_probs(IDS[:20])[-1].argmax())
  sequences = [IDS[:21], [*IDS[:20], greedy], IDS[:49], [*IDS[:5], 3, 4], [*IDS[:5], 3, 5], IDS[:1],
               IDS[50:60], IDS[:21]]
  places = [[20], [20], range(1, 49), [5, 6], [6], [], [2, 4], range(3, 20)]
  found = scoring.score(MODEL, VARIABLES, sequences, places, num_top=3)
  check(sequences, places, found)
  assert found[1].is_greedy_N.tolist() == [True]
  unstacked = scoring.score(MODEL, decoder.unstack(VARIABLES), sequences, places, num_top=3)
  for one, other in zip(found, unstacked, strict=True):
    np.testing.assert_allclose(one.log_probs_N, other.log_probs_N, atol=1e-6)


def test_what_begins_another_is_not_read_again(monkeypatch):
  monkeypatch.setattr(scoring, 'BATCH_TOKENS', 64)
  count, read = scoring._score._cache_size(), []
  run = scoring._score
  monkeypatch.setattr(scoring, '_score', lambda *a: read.append(a[2].shape) or run(*a))
  choices = [[*IDS[:12], choice] for choice in range(20)]
  found = scoring.score(MODEL, VARIABLES, choices, [[12]] * 20, num_top=3)
  assert read == [(1, 16)]
  np.testing.assert_allclose([one.log_probs_N[0] for one in found], log_probs(IDS[:12])[-1][:20],
                             atol=2e-5)
  # Batches are of about as many tokens, and of few sizes.
  scoring.score(MODEL, VARIABLES, [IDS[i : i + n] for i in range(9) for n in (17, 15, 14, 3)],
                num_top=3)
  assert read[1:] == [(4, 16), (4, 16), (1, 16)]
  monkeypatch.setattr(scoring, '_score', run)
  assert scoring._score._cache_size() - count <= 3


@pytest.mark.parametrize('context_length, stride', [(48, 24), (9, 9), (7, 2)])
def test_a_rolling_log_likelihood_is_that_of_its_windows(context_length, stride):
  places = [range(1, 120), [3, 60, 61], [1], range(1, 1)]
  sequences = [IDS[:120], IDS[40:130], IDS[:2], IDS[:1]]
  found = scoring.rolling(MODEL, VARIABLES, sequences, places, context_length, stride)
  whole, done = np.zeros(120), 1
  while done < 120:
    stop = min(120, done + (context_length if done == 1 else stride))
    start = max(0, stop - 1 - context_length)
    values = log_probs(IDS[start : stop - 1])
    whole[done:stop] = [values[i - start - 1, IDS[i]] for i in range(done, stop)]
    done = stop
  np.testing.assert_allclose(found[0], whole[1:], atol=2e-5)
  assert list(map(len, found)) == [119, 3, 1, 0] and found[0].dtype == np.float64
  assert found[2][0] == pytest.approx(whole[1], abs=2e-5)
  assert found[1][0] == pytest.approx(log_probs(IDS[40:43])[-1, IDS[43]], abs=2e-5)


@pytest.mark.parametrize('sequence, message', [
  ([], r'sequences\[1\] has 0 tokens'), ([1] * 50, r'sequences\[1\] has 50 tokens'), ([31], '31')])
def test_what_does_not_fit_is_refused(sequence, message):
  with pytest.raises(ValueError, match=message):
    scoring.score(MODEL, VARIABLES, [[1, 2], sequence])
