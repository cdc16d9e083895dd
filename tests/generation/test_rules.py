"""Logit rules that look at the tokens so far: literal cases, and equality with Transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.generation import decode, decode_state, sampling
from jaxllm.generation.rules import BASIC, RULES, History
from jaxllm.generation.sampling import SamplingConfig, make_requests
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig

VOCAB = 12
# Rows with prompts of 1, 3 and 4 tokens; what follows the last token must not matter.
TOKENS = [[5], [1, 2, 1, 3, 1], [4, 4, 7, 4, 4, 7, 9, 4], [2, 3, 2, 3, 2]]
PROMPTS, LIMITS, STOPS = [1, 3, 4, 4], [9, 6, 20, 6], [[0], [0, 3], [8], [2]]
LOGITS = np.random.default_rng(3).normal(size=(4, VOCAB)).astype(np.float32) * 2
APPLY = jax.jit(sampling.apply_rules)


def history():
  tokens = np.full((4, 10), 6, np.int32)
  for row, ids in enumerate(TOKENS):
    tokens[row, : len(ids)] = ids
  stops = np.array([ids + [-1] * (4 - len(ids)) for ids in STOPS], np.int32)
  return History(*map(jnp.asarray, (
    tokens, np.array(PROMPTS, np.int32), np.array([len(ids) for ids in TOKENS], np.int32),
    np.array(LIMITS, np.int32), stops,
  )))


def ruled(configs):
  values = jax.tree.map(jnp.asarray, sampling.row_values(configs, STOPS))
  return np.asarray(APPLY(jnp.asarray(LOGITS), values, history()))


def one(**fields):
  return ruled([SamplingConfig(**fields)] * 4)


def banned(logits):
  return [np.flatnonzero(np.isneginf(row)).tolist() for row in logits]


def test_no_repeat_ngram_in_literals():
  assert banned(one(no_repeat_ngram_size=1)) == [[5], [1, 2, 3], [4, 7, 9], [2, 3]]
  assert banned(one(no_repeat_ngram_size=2)) == [[], [2, 3], [4, 7], [3]]
  assert banned(one(no_repeat_ngram_size=3)) == [[], [], [], [3]]
  assert banned(one(no_repeat_ngram_size=5)) == [[]] * 4
  assert banned(one(no_repeat_ngram_size=50)) == [[]] * 4


def test_biases_in_literals():
  got = one(logit_bias=((3, 1.5), (4, -2.0), (3, 0.25)))
  want = LOGITS.copy()
  want[:, 3] += 1.75
  want[:, 4] -= 2
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_presence_and_frequency_count_the_continuation():
  want = LOGITS.copy()
  want[1, [3, 1]] -= 0.5
  want[2, [4, 7, 9]] -= 0.5
  want[3, 2] -= 0.5
  np.testing.assert_allclose(one(presence_penalty=0.5), want, atol=1e-6)
  want = LOGITS.copy()
  want[1, [3, 1]] -= 0.5
  want[2, [4, 7, 9]] -= [1.0, 0.5, 0.5]
  want[3, 2] -= 0.5
  np.testing.assert_allclose(one(frequency_penalty=0.5), want, atol=1e-6)


def test_ends_are_forbidden():
  # New tokens so far: 0, 2, 4, 1.
  assert banned(one(min_new_tokens=2)) == [[0], [], [], [2]]


def test_rows_mix_rules():
  configs = [
    SamplingConfig(repetition_penalty=1.7, top_p=0.6), SamplingConfig(no_repeat_ngram_size=2),
    SamplingConfig(logit_bias=((4, 3.0),), frequency_penalty=1.0), SamplingConfig(),
  ]
  got = ruled(configs)
  for row, config in enumerate(configs):
    np.testing.assert_array_equal(got[row], ruled([config] * 4)[row])
  np.testing.assert_array_equal(got[3], LOGITS[3])


def test_rules_that_no_row_asks_for_are_not_there():
  assert set(sampling.row_values([SamplingConfig(top_k=3)])) == set(BASIC)
  more = [SamplingConfig(), SamplingConfig(no_repeat_ngram_size=2)]
  assert set(sampling.row_values(more)) == set(RULES)


MODEL_CONFIG = DecoderConfig(
  vocab_size=23, vocab_multiple=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
  max_length=32,
)
MODEL = Decoder(MODEL_CONFIG)
VARIABLES = decoder.unstack(decoder.init(MODEL_CONFIG, jax.random.key(0)))
PLAIN = SamplingConfig(temperature=1.5, max_new_tokens=12)


def test_decoding_with_rules():
  prompts = [[1, 2, 3], [4, 5, 4, 5], [6], [7, 8]]
  configs = [
    PLAIN.replace(no_repeat_ngram_size=1), PLAIN.replace(min_new_tokens=12, temperature=0.0),
    PLAIN.replace(logit_bias=((0, -100.0), (1, -100.0)), top_k=3), PLAIN,
  ]
  together = decode.generate(MODEL, VARIABLES, prompts, configs, [11, 12], seeds=[3] * 4)
  assert len({*together[0].tokens, 1, 2, 3}) == len(together[0].tokens) + 3
  assert len(together[1].tokens) == 12
  assert not {0, 1} & {*together[2].tokens}
  for row in range(4):
    alone, = decode.generate(
      MODEL, VARIABLES, [prompts[row]], [configs[row]], eos_token_ids=[11, 12], seeds=[3])
    assert alone.tokens == together[row].tokens
  # All sets of rules but the basic one share their programs.
  count = decode_state.decode_steps._cache_size()
  changed = [PLAIN.replace(presence_penalty=1.0, logit_bias=((3, -4.0),))] + [PLAIN] * 3
  decode.generate(MODEL, VARIABLES, prompts, changed, eos_token_ids=[11])
  assert decode_state.decode_steps._cache_size() == count


# One value of every rule that shapes a draw.
EVERY = {
  'top_k': 2, 'top_p': 0.3, 'min_p': 0.5, 'repetition_penalty': 3.0,
  'presence_penalty': 2.0, 'frequency_penalty': 1.5, 'no_repeat_ngram_size': 1,
  'logit_bias': ((6, 2.0), (6, 1.0)),
  'min_new_tokens': 5,
}


def test_every_rule_alone_is_that_rule_among_the_others():
  assert set(EVERY) | {'temperature', 'biases'} == set(RULES) | {'logit_bias'}
  configs = [PLAIN.replace(**{name: value}) for name, value in EVERY.items()]
  prompts = [[1 + i, 5, 4, 5][: 1 + i % 4] for i in range(len(configs))]
  seeds = [3] * len(configs)
  together = decode.generate(MODEL, VARIABLES, prompts, configs, eos_token_ids=[11], seeds=seeds)
  plain = decode.generate(MODEL, VARIABLES, prompts, PLAIN, eos_token_ids=[11], seeds=seeds)
  for row, config in enumerate(configs):
    alone, = decode.generate(MODEL, VARIABLES, [prompts[row]], [config], [11], seeds=[3])
    assert alone.tokens == together[row].tokens
  # Many rules show in so short a text.
  changed = sum(a.tokens != b.tokens for a, b in zip(together, plain, strict=True))
  assert changed >= 4


@pytest.mark.parametrize('fields, message', [
  ({'repetition_penalty': 0.0}, 'repetition_penalty'),
  ({'logit_bias': ((1, float('nan')),)}, 'logit_bias'),
])
def test_bad_values_are_named(fields, message):
  with pytest.raises(ConfigError, match=message):
    SamplingConfig(**fields)


@pytest.mark.parametrize('fields', [
  {'logit_bias': ((23, 1.0),)}, {'logit_bias': ((-1, 1.0),)}])
def test_ids_of_another_vocabulary_are_refused(fields):
  with pytest.raises(ValueError, match='is no token id of the model'):
    make_requests(MODEL_CONFIG, [[1]], SamplingConfig(**fields))


def test_state_holds_rules_by_row():
  requests = make_requests(
    MODEL_CONFIG, [[1], [2]], [PLAIN.replace(logit_bias=((1, 2.0),)), PLAIN])
  values = decode_state.init_decode_state(MODEL_CONFIG, requests, stacked=False).values
  assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(values))


PROCESSORS = {
  'repetition_penalty': ('RepetitionPenaltyLogitsProcessor', 1.3, {}),
  'no_repeat_ngram_size': ('NoRepeatNGramLogitsProcessor', 2, {}),
  'top_k': ('TopKLogitsWarper', 4, {}),
  'top_p': ('TopPLogitsWarper', 0.6, {}),
  'min_p': ('MinPLogitsWarper', 0.2, {}),
  'min_new_tokens': ('MinNewTokensLengthLogitsProcessor', 2, {}),
}


def processor(name, row):
  transformers = pytest.importorskip('transformers')
  made, value, _ = PROCESSORS[name]
  make = getattr(transformers.generation.logits_process, made)
  if name == 'min_new_tokens':
    return make(PROMPTS[row], value, STOPS[row])
  return make(value)


@pytest.mark.parity
@pytest.mark.parametrize('names', [(name,) for name in PROCESSORS] + [
  ('repetition_penalty', 'no_repeat_ngram_size', 'top_k', 'top_p')])
def test_rules_equal_the_processors_of_transformers(names):
  torch = pytest.importorskip('torch')
  got = one(**{name: PROCESSORS[name][1] for name in names})
  for row, ids in enumerate(TOKENS):
    want = torch.tensor(LOGITS[row : row + 1])
    for name in names:
      want = processor(name, row)(torch.tensor([ids]), want)
    np.testing.assert_allclose(got[row], want[0].numpy(), atol=1e-5)
