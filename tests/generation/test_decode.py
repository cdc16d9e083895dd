"""Decoding: equal to repeated full forwards, batched equal to alone, bounded compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.generation import decode_state, sampling
from jaxllm.generation.decode import generate, stream
from jaxllm.generation.sampling import SamplingConfig, make_requests
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.positions import LearnedPositions
from jaxllm.sharding import MeshConfig

BASE = DecoderConfig(
  vocab_size=61, vocab_multiple=16, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2,
  mlp_dim=48, max_length=48, initializer=InitializerConfig(stddev=None),
)
WINDOWED = BASE.replace(
  positions=LearnedPositions(), layer_pattern=('local', 'global'), window=5, tied_head=True
)
# Rows of any of these prompts fall into one bucket: 16 for the prompt, 32 in all.
NEW = 18
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=NEW)
WARM = SamplingConfig(temperature=1.0, max_new_tokens=NEW, seed=5)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(20, 35)), [60, 0]]


def make(config, unstacked=True):
  variables = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(1))
  return Decoder(config), decoder.unstack(variables) if unstacked else variables


MODEL, VARIABLES = make(BASE)
_FORWARD = jax.jit(lambda model, variables, ids: model.apply(variables, ids), static_argnums=0)


def full_logits(model, variables, ids):
  """Logits of the token after `ids` by a full forward, padded on the right to one shape."""
  padded = np.zeros((1, model.config.max_length), np.int32)
  padded[0, : len(ids)] = ids
  logits = _FORWARD(model, variables, jnp.asarray(padded))[0, len(ids) - 1]
  return np.asarray(logits[: model.config.vocab_size])


@pytest.mark.parametrize('config', [BASE, WINDOWED], ids=['rotary', 'learned-window'])
@pytest.mark.parametrize('unstacked', [True, False])
def test_greedy_is_the_argmax_of_full_forwards(config, unstacked):
  model, variables = make(config, unstacked)
  results = generate(model, variables, PROMPTS, GREEDY)
  for prompt, result in zip(PROMPTS, results, strict=True):
    ids = list(prompt)
    for token, logprob in zip(result.tokens, result.logprobs, strict=True):
      logits = full_logits(model, variables, ids)
      assert token == logits.argmax()
      np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[token], atol=2e-5)
      ids.append(token)
    assert len(result.tokens) == NEW and result.finish_reason == 'length'


def test_draws_depend_on_seed_and_index_alone():
  config = WARM.replace(top_p=0.9)
  values = {name: jnp.asarray(value) for name, value in sampling.row_values([config]).items()}
  sample = jax.jit(sampling.sample)
  for row, result in enumerate(generate(MODEL, VARIABLES, PROMPTS, config)):
    ids = list(PROMPTS[row])
    for index, token in enumerate(result.tokens):
      logits = jnp.asarray(full_logits(MODEL, VARIABLES, ids))[None]
      # The padded vocabulary takes part in the draw, though it never wins.
      logits = jnp.pad(logits, ((0, 0), (0, 3)), constant_values=-1e30)
      key = jax.random.fold_in(jax.random.key(config.seed + row), index)
      assert token == int(sample(key[None], logits, values, None)[0])
      ids.append(token)


def test_finished_rows_do_not_change():
  configs = [GREEDY.replace(max_new_tokens=n) for n in (NEW, 1, 3, NEW)]
  requests = make_requests(BASE, PROMPTS, configs)
  before = decode_state.init_decode_state(BASE, requests, stacked=False)
  before = decode_state.prefill(MODEL, VARIABLES, before, 16)
  # Rows are replaced by row: every leaf has them on its first axis.
  rows = jax.tree.map(lambda leaf: np.array(leaf[1]), before)
  assert bool(rows.finished_B)
  after = decode_state.decode_steps(MODEL, VARIABLES, before, jnp.int32(5))
  assert after.finished_B.tolist() == [False, True, True, False]
  assert after.lengths_B.tolist() == [14, 2, 18, 8]
  jax.tree.map(np.testing.assert_array_equal, rows, jax.tree.map(lambda leaf: leaf[1], after))
  assert after.cache.lengths_B.tolist() == [13, 1, 17, 7]


def test_top_k_of_one_is_greedy():
  top_1 = SamplingConfig(temperature=1.3, top_k=1, max_new_tokens=NEW)
  greedy, drawn = (generate(MODEL, VARIABLES, PROMPTS, config) for config in (GREEDY, top_1))
  assert [g.tokens for g in greedy] == [d.tokens for d in drawn]


def test_batched_equals_alone():
  configs = [
    WARM.replace(min_p=0.2, temperature=2.0), GREEDY, WARM.replace(top_k=4, seed=9),
    WARM.replace(top_p=0.7, max_new_tokens=5),
  ]
  together = generate(MODEL, VARIABLES, PROMPTS, configs, eos_token_ids=[2, 50])
  for prompt, config, result in zip(PROMPTS, configs, together, strict=True):
    alone, = generate(MODEL, VARIABLES, [prompt], [config], eos_token_ids=[2, 50])
    assert alone.tokens == result.tokens and alone.finish_reason == result.finish_reason
    np.testing.assert_allclose(alone.logprobs, result.logprobs, atol=2e-5)


def test_seeds_belong_to_rows():
  prompts = [[7, 8]] * 4
  by_default = generate(MODEL, VARIABLES, prompts, WARM)
  explicit = generate(MODEL, VARIABLES, prompts, WARM, seeds=[8, 7, 6, 5])
  assert by_default == explicit[::-1]
  assert len({tuple(result.tokens) for result in by_default}) == 4
  assert generate(MODEL, VARIABLES, prompts, WARM, seeds=[1] * 4)[0] == generate(
    MODEL, VARIABLES, prompts, WARM, seeds=[1, 2, 3, 4])[0]


def test_eos_ends_its_row_and_no_other():
  free = generate(MODEL, VARIABLES, PROMPTS, WARM)
  eos = free[0].tokens[4]
  ended = generate(MODEL, VARIABLES, PROMPTS, WARM, eos_token_ids=[eos])
  for before, after in zip(free, ended, strict=True):
    cut = before.tokens.index(eos) if eos in before.tokens else None
    assert after.tokens == before.tokens[:cut]
    assert after.finish_reason == ('length' if cut is None else 'stop')
    assert len(after.logprobs) == len(after.tokens)
  assert 'stop' in {result.finish_reason for result in ended}


def test_eos_in_the_prompt_ends_nothing():
  result, = generate(MODEL, VARIABLES, [[5, 5, 5]], GREEDY, eos_token_ids=[5])
  free, = generate(MODEL, VARIABLES, [[5, 5, 5]], GREEDY)
  assert result.tokens == free.tokens[: len(result.tokens)] and 5 not in result.tokens


@pytest.mark.parametrize('steps_per_piece', [1, 5])
def test_streamed_equals_whole(steps_per_piece):
  configs = [WARM.replace(max_new_tokens=n) for n in (1, 3, NEW, 7)]
  whole = generate(MODEL, VARIABLES, PROMPTS, configs, eos_token_ids=[2, 50])
  pieces = list(stream(MODEL, VARIABLES, PROMPTS, configs, [2, 50],
                       steps_per_piece=steps_per_piece))
  for row, result in enumerate(whole):
    mine = [piece for piece in pieces if piece.row == row]
    assert sum((piece.tokens for piece in mine), []) == result.tokens
    assert sum((piece.logprobs for piece in mine), []) == result.logprobs
    assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [
      result.finish_reason]
    assert all(len(piece.tokens) <= steps_per_piece for piece in mine)


def test_context_fills_up():
  context = BASE.max_length
  prompts = [[1] * context, [2] * (context - 3), [3], [4]]
  results = generate(MODEL, VARIABLES, prompts, GREEDY.replace(max_new_tokens=1000))
  assert [len(result.tokens) for result in results] == [1, 4, context, context]
  assert {result.finish_reason for result in results} == {'length'}
  assert results[0].tokens[0] == full_logits(MODEL, VARIABLES, prompts[0]).argmax()


def compilations():
  return sum(program._cache_size() for program in (decode_state.prefill, decode_state.decode_steps))


def test_compilations_are_bounded_by_buckets():
  config = BASE.replace(mlp_dim=40)
  model, variables = make(config)

  def count(prompts, sampling):
    before = compilations()
    generate(model, variables, prompts, sampling, eos_token_ids=[1])
    return compilations() - before

  assert count([[2] * 3] * 3, GREEDY) == 2
  assert count([[2] * 9, [3], [4], [5] * 14], GREEDY) == 0
  # Neither sampling values nor seeds are part of a program.
  assert count([[2] * 5] * 4, WARM.replace(top_k=3, top_p=0.5, min_p=0.1)) == 0
  before = compilations()
  list(stream(model, variables, [[2] * 3] * 3, WARM))
  assert compilations() == before
  assert count([[2] * 3], GREEDY) == 2


def test_empty_prompt():
  given = generate(MODEL, VARIABLES, [[], [0], [1], []], WARM, bos_id=0)
  assert given == generate(MODEL, VARIABLES, [[0], [0], [1], [0]], WARM)
  with pytest.raises(ValueError, match=r'prompts\[1\] is empty'):
    generate(MODEL, VARIABLES, [[1], []], GREEDY)
  assert generate(MODEL, VARIABLES, [], GREEDY) == []


@pytest.mark.parametrize('prompts, changes, message', [
  ([[1], [1] * 49], {}, r'prompts\[1\] has 49 tokens but the context of the model is 48'),
  ([[1, 61]], {}, r'prompts\[0\]\[1\]=61 is no token id of the model \(0 to 60\)'),
  ([[-1]], {}, r'prompts\[0\]\[0\]=-1 is no token id'),
  ([[1]], {'eos_token_ids': [99]}, r'eos_token_ids\[0\]=99 is no token id'),
  ([[1]], {'seeds': [1, 2]}, '1 prompts with 1 sampling configs and 2 seeds'),
  ([[1]], {'seeds': [-1]}, r'seeds\[0\]=-1'),
])
def test_bad_requests_are_refused_before_the_device(prompts, changes, message):
  with pytest.raises(ValueError, match=message):
    stream(MODEL, VARIABLES, prompts, GREEDY, **changes)


def test_sharded_parameters_give_the_same_tokens():
  config = MeshConfig(data=1, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(config, jax.devices()[:4])
  variables = jax.jit(decoder.init, static_argnums=0)(BASE, jax.random.key(1))
  shapes, axes = decoder.abstract(BASE)
  variables = jax.device_put(variables, sharding.shardings(axes, shapes, mesh, config))
  split = generate(MODEL, decoder.unstack(variables), PROMPTS, WARM)
  whole = generate(MODEL, VARIABLES, PROMPTS, WARM)
  assert [result.tokens for result in split] == [result.tokens for result in whole]


def test_bfloat16_decodes():
  model, variables = make(BASE.replace(dtype='bfloat16'))
  results = generate(model, variables, PROMPTS, WARM)
  assert all(np.isfinite(result.logprobs).all() and len(result.tokens) == NEW for result in results)
