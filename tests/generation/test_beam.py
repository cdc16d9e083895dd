"""Beam search: exhaustive where possible, independent of the batch, equal to Transformers."""

import itertools

import jax
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.generation import beam, scoring
from jaxllm.generation.beam import BeamConfig, beam_search
from jaxllm.generation.decode import generate
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig

CONFIG = DecoderConfig(
  vocab_size=7, vocab_multiple=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
  max_length=32, initializer=InitializerConfig(stddev=None),
)
MODEL = Decoder(CONFIG)
VARIABLES = decoder.unstack(decoder.init(CONFIG, jax.random.key(5)))
PROMPTS = [[1, 2, 3], [4], [5, 6, 5, 6, 5]]
SHORT = SamplingConfig(max_new_tokens=3)


def test_enough_beams_find_the_best_sequence_of_all():
  # 49 beams hold every prefix of two tokens.
  beams, = beam_search(MODEL, VARIABLES, PROMPTS[:1], BeamConfig(num_beams=49, num_return=5), SHORT)
  every = [*itertools.product(range(7), repeat=3)]
  scores = scoring.score(
    MODEL, VARIABLES, [[*PROMPTS[0], *one] for one in every], [[3, 4, 5]] * len(every))
  totals = [score.log_probs_N.sum() for score in scores]
  order = np.argsort(np.negative(totals))[:5]
  assert [result.tokens for result in beams] == [list(every[place]) for place in order]
  np.testing.assert_allclose([result.score for result in beams],
                             [totals[place] / 3 for place in order], atol=1e-5)


def test_one_beam_is_greedy():
  config = SamplingConfig(max_new_tokens=9, temperature=0.0, no_repeat_ngram_size=2)
  results = beam_search(MODEL, VARIABLES, PROMPTS, BeamConfig(num_beams=1), config, [2])
  greedy = generate(MODEL, VARIABLES, PROMPTS, config, eos_token_ids=[2])
  assert [beams[0].tokens for beams in results] == [result.tokens for result in greedy]
  assert [beams[0].finish_reason for beams in results] == [r.finish_reason for r in greedy]


@pytest.mark.parametrize('early_stopping', ['yes', 'no', 'never'])
def test_batched_equals_alone(early_stopping):
  config = BeamConfig(num_beams=3, num_return=3, early_stopping=early_stopping, length_penalty=0.7)
  limits = SamplingConfig(max_new_tokens=8)
  together = beam_search(MODEL, VARIABLES, PROMPTS, config, limits, eos_token_ids=[0])
  count = beam._search._cache_size()
  beam_search(MODEL, VARIABLES, PROMPTS[::-1], config.replace(length_penalty=2.0),
              limits.replace(repetition_penalty=1.0), eos_token_ids=[0])
  assert beam._search._cache_size() == count
  for prompt, results in zip(PROMPTS, together, strict=True):
    alone, = beam_search(MODEL, VARIABLES, [prompt], config, limits, eos_token_ids=[0])
    assert [result.tokens for result in alone] == [result.tokens for result in results]
    np.testing.assert_allclose([r.score for r in alone], [r.score for r in results], atol=1e-5)


def test_more_returned_than_beams_is_refused():
  with pytest.raises(ConfigError, match='num_return=3 is more than num_beams=2'):
    BeamConfig(num_beams=2, num_return=3)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """Return the same random model, theirs and ours."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from jaxllm.interop import huggingface, weights

  torch.manual_seed(0)
  theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=19, n_positions=48, n_embd=24, n_layer=2, n_head=2, initializer_range=0.4,
    bos_token_id=0, eos_token_id=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
  )).eval()
  path = tmp_path_factory.mktemp('model')
  theirs.save_pretrained(path)
  source = huggingface.open_model(path)
  return theirs, Decoder(source.config), decoder.unstack(weights.load(source))


@pytest.mark.parity
@pytest.mark.parametrize('early_stopping', ['yes', 'no', 'never'])
@pytest.mark.parametrize('fields', [
  {}, {'length_penalty': 0.0}, {'length_penalty': 2.0}, {'length_penalty': -1.0},
  {'no_repeat_ngram_size': 2, 'repetition_penalty': 1.4},
  {'min_new_tokens': 4, 'logit_bias': ((5, -100.0),)},
], ids=str)
def test_equals_transformers(pair, early_stopping, fields):
  torch = pytest.importorskip('torch')
  theirs, model, variables = pair
  penalty = {name: fields[name] for name in fields if name == 'length_penalty'}
  rules = {name: fields[name] for name in fields if name != 'length_penalty'}
  config = BeamConfig(num_beams=4, num_return=3, early_stopping=early_stopping, **penalty)
  prompts = np.random.default_rng(len(str(fields))).integers(4, 19, size=(4, 5)).tolist()
  ours = beam_search(model, variables, prompts, config,
                     SamplingConfig(max_new_tokens=12, **rules), eos_token_ids=[3])
  theirs_rules = {name: value for name, value in rules.items() if name != 'logit_bias'}
  if biases := rules.get('logit_bias'):
    theirs_rules['sequence_bias'] = {(token,): bias for token, bias in biases}
  for prompt, beams in zip(prompts, ours, strict=True):
    out = theirs.generate(
      torch.tensor([prompt]), num_beams=4, num_return_sequences=3, max_new_tokens=12,
      do_sample=False, early_stopping={'yes': True, 'no': False, 'never': 'never'}[early_stopping],
      output_scores=True, return_dict_in_generate=True, pad_token_id=3, **penalty, **theirs_rules,
    )
    for got, sequence, score in zip(beams, out.sequences, out.sequences_scores, strict=True):
      want = sequence[5:].tolist()
      want = want[: want.index(3)] if 3 in want else want
      assert got.tokens == want
      np.testing.assert_allclose(got.score, float(score), rtol=1e-4)
