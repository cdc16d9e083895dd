"""Speculation changes nothing but the number of passes: token for token, drawn or greedy."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generation import speculation
from jaxllm.generation.decode import generate
from jaxllm.generation.decode_state import init_decode_state
from jaxllm.generation.sampling import SamplingConfig, make_requests
from jaxllm.generation.speculation import Draft, SpeculationConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig

CONFIG = DecoderConfig(
  vocab_size=23, vocab_multiple=8, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=16,
  max_length=48, initializer=InitializerConfig(stddev=None),
)
MODEL = Decoder(CONFIG)
VARIABLES = decoder.unstack(decoder.init(CONFIG, jax.random.key(1)))
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [7], [4, 5] * 5, [9, 8, 7]]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=20)
MIXED = [GREEDY, GREEDY.replace(temperature=1.0), GREEDY.replace(temperature=0.7, top_k=3),
         GREEDY.replace(temperature=1.0, max_new_tokens=7)]
SMALL = CONFIG.replace(num_layers=1, mlp_dim=8)
DRAFTS = {
  'lookup': None,
  'itself': Draft(MODEL, VARIABLES),
  'smaller': Draft(Decoder(SMALL), decoder.unstack(decoder.init(SMALL, jax.random.key(2)))),
}


@pytest.mark.parametrize('name', DRAFTS)
def test_the_same_tokens_as_without(name):
  config = SpeculationConfig(num_drafted=3)
  want = generate(MODEL, VARIABLES, PROMPTS, MIXED, eos_token_ids=[11, 12])
  got, rate = speculation.generate(
    MODEL, VARIABLES, PROMPTS, MIXED, config, DRAFTS[name], eos_token_ids=[11, 12])
  for ours, theirs in zip(got, want, strict=True):
    assert ours.tokens == theirs.tokens and ours.finish_reason == theirs.finish_reason
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
  # A draft that is the model itself is always right, greedy or drawn.
  assert rate > 1 and (name != 'itself' or rate > 2.2)


def test_rules_and_full_contexts_are_kept():
  rules = [GREEDY.replace(no_repeat_ngram_size=2, temperature=0.9, max_new_tokens=1000),
           GREEDY.replace(presence_penalty=1.0)] + [GREEDY] * 2
  want = generate(MODEL, VARIABLES, PROMPTS, rules, seeds=[5] * 4)
  got, _ = speculation.generate(
    MODEL, VARIABLES, PROMPTS, rules, SpeculationConfig(num_drafted=3), seeds=[5] * 4)
  assert [result.tokens for result in got] == [result.tokens for result in want]
  count = speculation._speculate._cache_size()
  speculation.generate(MODEL, VARIABLES, PROMPTS, rules[::-1], SpeculationConfig(num_drafted=3))
  assert speculation._speculate._cache_size() == count


def test_lookup_in_literals():
  prompts = [[1, 2, 3, 9, 1, 2, 3], [5, 6, 5, 7, 5], [4, 4, 4], [3, 1, 2, 8, 1, 2, 7, 1, 2]]
  slots = init_decode_state(CONFIG, make_requests(CONFIG, prompts, GREEDY), stacked=False)
  got = jax.jit(speculation.lookup, static_argnums=(1, 2))(slots, 3, 3)
  assert got.tolist() == [[9, 1, 2], [7, 5, 7], [4, 4, 4], [7, 1, 2]]


def test_distribution_of_drawn_tokens():
  rows = 1024
  config = SamplingConfig(temperature=1.0, max_new_tokens=2)
  got, _ = speculation.generate(
    MODEL, VARIABLES, [[1, 2, 1, 2]] * rows, config, SpeculationConfig(num_drafted=2))
  # The first token comes before any draft; the second is drafted wherever the pair was seen.
  first, _ = collections.Counter(result.tokens[0] for result in got).most_common(1)[0]
  logits = MODEL.apply(VARIABLES, jnp.array([[1, 2, 1, 2, first]]))[0, -1, :23]
  p = np.asarray(jax.nn.softmax(logits), np.float64)
  second = [result.tokens[1] for result in got if result.tokens[0] == first]
  rows = len(second)
  counts = np.bincount(second, minlength=23)
  often = p * rows >= 5
  chi_square = ((counts - p * rows) ** 2 / (p * rows))[often].sum()
  assert chi_square < often.sum() + 5 * np.sqrt(2 * often.sum())


def test_unfit_drafts_are_refused():
  for change in ({'vocab_size': 22}, {'max_length': 40}):
    draft = Draft(Decoder(CONFIG.replace(**change)), VARIABLES)
    with pytest.raises(ValueError, match='the draft has'):
      speculation.generate(MODEL, VARIABLES, [[1]], GREEDY, SpeculationConfig(), draft)
