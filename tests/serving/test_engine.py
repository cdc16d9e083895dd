"""The engine: a request under load is the request alone, bit for bit; no slot is ever lost."""

import asyncio
import collections
import contextlib
import dataclasses
import random

import jax
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.adapters import lora
from jaxllm.adapters.lora import LoraConfig
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation import scoring, text
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.model import Model
from jaxllm.models import decoder
from jaxllm.models.config import ExpertsConfig
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.positions import LearnedPositions
from jaxllm.serving.batch import chunk_size
from jaxllm.serving.engine import Engine, EngineConfig
from jaxllm.serving.streams import ClosedError, FailedError, QueueFullError, Request

TOKENIZER = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
ROTARY = DecoderConfig(
  vocab_size=257, vocab_multiple=8, embed_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
  mlp_dim=24, max_length=96, initializer=InitializerConfig(stddev=None),
)
LEARNED = ROTARY.replace(
  positions=LearnedPositions(), num_layers=1, num_kv_heads=None, max_length=72)
MIXTURE = ROTARY.replace(num_layers=1, experts=ExpertsConfig(num_experts=4, top_k=2))
CONFIG = EngineConfig(num_slots=3, prefill_chunk=16)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
SYSTEM = (*range(60, 97),)


def load(config):
  variables = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(2))
  return Model(config, variables, TOKENIZER)


MODEL = load(ROTARY)


class Lowercase:
  """Allows small letters, and after five of them nothing but the end."""

  def __init__(self):
    self.count = 0

  def allowed(self):
    mask = np.zeros(257, bool)
    mask[[256] if self.count == 5 else range(97, 123)] = True
    return mask

  def advance(self, token):
    assert 97 <= token < 123
    self.count += 1


def requests():
  """Return requests of every kind, new each time: constraints have a state."""
  warm = SamplingConfig(temperature=0.9, top_p=0.9, max_new_tokens=14)
  eager = warm.replace(logit_bias=((256, -100.0), (101, 12.0)), frequency_penalty=0.4)
  return [
    Request((5, 6, 7), GREEDY, 0, num_top=4),
    Request((*SYSTEM, 1, 2, 3), GREEDY, 0),
    Request((*SYSTEM, 9, 8), warm, 3, num_top=1),
    Request((*SYSTEM, *range(25)), GREEDY.replace(max_new_tokens=30), 0),
    Request((200, 201), eager, 5, stop=('ee', 'x')),
    Request((9,) * 33, warm.replace(top_p=0.9, no_repeat_ngram_size=2), 7,
            stop_token_ids=(9, 10)),
    Request((104, 105), warm, 9, constraint=Lowercase()),
    Request((*range(30),), GREEDY.replace(max_new_tokens=1), 0, num_top=2, score_prompt=True),
    Request((*range(1, 70),), GREEDY.replace(max_new_tokens=90), 0),
    Request((42,), warm.replace(min_p=0.05, repetition_penalty=1.3, top_k=40), 11),
  ]


@contextlib.contextmanager
def running(model=MODEL, **changes):
  engine = Engine(model, CONFIG.replace(**changes))
  try:
    yield engine
  finally:
    engine.close(30)
    assert not engine._thread.is_alive()


async def collect(stream):
  """Return what each request of a stream gave as one tuple, floats and all."""
  rows = collections.defaultdict(list)
  async for piece in stream:
    rows[piece.row].append(piece)
  return [(
    ''.join(piece.text for piece in pieces), sum((piece.tokens for piece in pieces), []),
    sum((piece.logprobs for piece in pieces), []), sum((piece.top for piece in pieces), []),
    pieces[-1].finish_reason, pieces[-1].stop,
  ) for _, pieces in sorted(rows.items())]


async def together(engine, given):
  return await collect(engine.submit(given))


def alone(engine, request):
  return asyncio.run(together(engine, [request]))[0]


async def settled(engine, cancelled=0, **want):
  for _ in range(1000):
    got = engine.statistics()
    done = got.finished.get('cancelled', 0) >= cancelled
    if done and all(getattr(got, name) == value for name, value in want.items()):
      return got
    await asyncio.sleep(0.01)
  raise AssertionError(f'{got} never had {want}')


@pytest.mark.parametrize(
  'config, cache_dtype', [(ROTARY, None), (LEARNED, 'int8'), (MIXTURE, None)])
def test_under_load_is_alone_bit_for_bit(config, cache_dtype):
  model = MODEL if config == ROTARY else load(config)
  with running(model, cache_dtype=cache_dtype) as engine:
    engine._batch.held = _Forgetful([()] * 3)
    want = [alone(engine, request) for request in requests()]
    assert engine.statistics().prefix_hit_tokens == 0

  async def arrive(engine, request, pause):
    await asyncio.sleep(pause)
    return (await together(engine, [request]))[0]

  async def load_it(engine, seed):
    chance = random.Random(seed)
    arriving = [arrive(engine, request, chance.random() / 5) for request in requests()]
    return await asyncio.gather(*arriving)

  for seed in range(2):
    with running(model, cache_dtype=cache_dtype) as engine:
      assert asyncio.run(load_it(engine, seed)) == want
      assert engine.statistics().busy_slots == 0
  reasons = {result[4] for result in want}
  assert reasons == {'stop', 'length'} and any(result[5] for result in want)


class _Forgetful(list):
  """A list that stays as it is: no row ever holds anything."""

  def __setitem__(self, index, value):
    pass


def test_tokens_are_those_of_complete():
  greedy = [request for request in requests() if request.sampling.temperature == 0]
  assert len(greedy) == 5
  wanted = text.complete(
    Decoder(ROTARY), MODEL.unstacked, TOKENIZER, [request.prompt for request in greedy],
    [request.sampling for request in greedy])
  with running() as engine:
    found = asyncio.run(together(engine, greedy))
    for request, want, got in zip(greedy, wanted, found, strict=True):
      echoed = len(request.prompt) if request.score_prompt else 0
      assert got[1][echoed:] == want.tokens and got[0].endswith(want.text)
      assert got[4:] == (want.finish_reason, want.stop)
      np.testing.assert_allclose(got[2][echoed:], want.logprobs, atol=3e-5)


def test_shared_prefixes_are_taken_over_exactly():
  first, second, longer = (Request((*SYSTEM, *rest), GREEDY, 0, num_top=2)
                           for rest in ((1, 2), (3,), (4,) * 30))
  with running() as engine:
    want = [alone(engine, request) for request in (second, longer)]
  with running() as engine:
    engine._batch.held = _Forgetful([()] * 3)
    assert [alone(engine, request) for request in (second, longer)] == want
  with running() as engine:

    async def while_the_first_runs():
      pieces = engine.submit([first]).__aiter__()
      await anext(pieces)
      got = await together(engine, [second, longer])
      await pieces.aclose()
      return got

    assert asyncio.run(while_the_first_runs()) == want
    assert engine.statistics().prefix_hit_tokens == 2 * (len(SYSTEM) // 16 * 16)


def test_a_cancelled_row_frees_its_slot():
  long = Request((1, 2), GREEDY.replace(max_new_tokens=80, logit_bias=((256, -100.0),)), 0)

  async def run(engine):
    listening, unheard, waiting, patient = (
      engine.submit([request]) for request in (long, long, long, requests()[0]))
    pieces = listening.__aiter__()
    await anext(pieces)
    waiting.cancel()
    await pieces.aclose()
    unheard.cancel()
    unheard.cancel()
    result, = await collect(patient)
    assert await collect(unheard) == await collect(waiting) == await collect(waiting) == []
    await settled(engine, 3, busy_slots=0, queued=0)
    return result

  with running(num_slots=1) as engine:
    assert asyncio.run(run(engine)) == alone(engine, requests()[0])
    assert engine.statistics().finished['cancelled'] == 3


def test_a_full_queue_takes_all_or_nothing():
  request = Request((1, 2), GREEDY.replace(max_new_tokens=90), 0)
  with running(num_slots=1, max_queue=2) as engine:
    with pytest.raises(QueueFullError, match='max_queue=2'):
      engine.submit([request] * 4)
    assert engine.statistics().queued == engine.statistics().busy_slots == 0
    streams = [engine.submit([request] * 2), engine.submit([request])]
    with pytest.raises(QueueFullError):
      engine.submit([Request((1,), GREEDY, 0, pool=True)])
    streams[1].cancel()
    streams.append(engine.submit([request]))

    async def all_of_them():
      found = await asyncio.gather(*map(collect, streams))
      return [[result[4] for result in results] for results in found]

    assert asyncio.run(all_of_them()) == [['length'] * 2, [], ['length']]


@pytest.mark.parametrize('refused, message', [
  (Request((), GREEDY, 0), 'is empty'),
  (Request((1,) * 97, GREEDY, 0), '97 tokens, but a row holds 96'),
  (Request((257,), GREEDY, 0), '257 is no token id'),
  (Request((1,), GREEDY, 0, stop=('',)), 'stop'),
  (Request((1,), GREEDY, 0, stop_token_ids=(300,)), '300 is no token id'),
  (Request((1,), GREEDY, 0, stop_token_ids=(*range(17),)), 'at most 16'),
  (Request((1,), GREEDY, 0, num_top=21), 'num_top=21'),
  (Request((1,), GREEDY, -1), 'seed'),
])
def test_what_cannot_be_served_is_refused(refused, message):
  with running() as engine:
    with pytest.raises(ValueError, match=message):
      engine.submit([requests()[0], refused])
    assert engine.statistics().queued == engine.statistics().busy_slots == 0


def test_nothing_is_compiled_after_the_start():
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if 'backend_compile' in name else None)
  with running(prefill_chunk=32) as engine:
    assert compiled, 'compilations are seen'
    before = engine.statistics().compilations
    compiled.clear()
    asyncio.run(together(engine, requests()))
    asyncio.run(embed(engine, [[1, 2], [3] * 90]))
    assert engine.statistics().compilations == before and not compiled


def test_a_failing_step_fails_everyone(monkeypatch):
  with running() as engine:
    monkeypatch.setattr(engine._batch, 'decode_step', lambda *args: 1 / 0)
    pooled = engine.submit([Request((1,) * 90, GREEDY, 0, pool=True)] * 20)
    stream = engine.submit(requests())
    with pytest.raises(FailedError):
      asyncio.run(collect(stream))
    with pytest.raises(FailedError):
      asyncio.run(collect(pooled))
    with pytest.raises(FailedError) as caught:
      engine.submit(requests())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
  # Once its thread has ended: it fails one stream after the other.
  assert engine.statistics().busy_slots == engine.statistics().queued == 0


def test_a_failing_constraint_fails_its_row_alone():
  class Broken(Lowercase):
    def advance(self, token):
      raise KeyError('secret')

  async def run(engine):
    bad = engine.submit([Request((1,), GREEDY, 0, constraint=Broken())])
    good = engine.submit([requests()[1]])
    with pytest.raises(RuntimeError, match='failed on the server: KeyError$'):
      await collect(bad)
    return await collect(good)

  with running() as engine:
    assert asyncio.run(run(engine)) == [alone(engine, requests()[1])]


def test_closing_finishes_what_was_taken():
  with running() as engine:
    want = [alone(engine, request) for request in requests()[:6]]

  async def run(engine):
    stream = engine.submit(requests()[:6])
    closing = asyncio.get_running_loop().run_in_executor(None, engine.close, 60)
    got = await collect(stream)
    await closing
    return got

  with running() as engine:
    assert asyncio.run(run(engine)) == want
    with pytest.raises(ClosedError):
      engine.submit(requests()[:1])
  with running(num_slots=1) as engine:
    long = Request((1,), GREEDY.replace(max_new_tokens=90), 0)
    streams = [engine.submit([long]) for _ in range(4)]
    engine.close(0)
    for stream in streams[1:]:
      with pytest.raises(ClosedError):
        asyncio.run(collect(stream))


def test_a_long_prompt_does_not_stall_and_a_silent_listener_does_not_either(monkeypatch):
  with running() as engine:
    steps = []
    prefill, decode = engine._batch.prefill, engine._batch.decode_step
    monkeypatch.setattr(engine._batch, 'prefill', lambda row, prompt, start: (
      steps.append(chunk_size(len(prompt), start, engine._batch.chunk, engine._batch.small))
      or prefill(row, prompt, start)))
    monkeypatch.setattr(
      engine._batch, 'decode_step', lambda *args: steps.append(0) or decode(*args))

    async def run():
      silent = engine.submit([Request((1,), GREEDY.replace(max_new_tokens=40), 0)])
      await together(engine, [Request((*range(90),), GREEDY, 0), Request((3,) * 80, GREEDY, 0)])
      return (await collect(silent))[0]

    assert asyncio.run(run())[4] in ('length', 'stop')
  between = ''.join('.' if step else '|' for step in steps).strip('.').split('|')
  assert max(map(len, between)) == 1, 'one chunk between two tokens'
  assert sum(steps) >= 170


async def embed(engine, prompts):
  stream = engine.submit([Request((*prompt,), GREEDY, 0, pool=True) for prompt in prompts])
  return [one.mean_D for one in sorted([one async for one in stream])]


def test_embeddings_are_means_of_hidden_states():
  prompts = [[1, 2, 3], [*range(50)], [7]]
  with running() as engine:
    engine.submit(requests())
    means = asyncio.run(embed(engine, prompts))
    for prompt, mean in zip(prompts, means, strict=True):
      assert mean.shape == (24,) and mean.dtype == np.float32
      np.testing.assert_allclose(mean, MODEL.hidden(prompt).mean(axis=0), atol=2e-5)
    engine.submit([Request((1,), GREEDY, 0, pool=True)]).cancel()
    assert asyncio.run(settled(engine, 1, busy_slots=0, queued=0)).finished['cancelled'] == 1


def test_a_mesh_gives_the_tokens_of_one_device():
  """With adapters merged into the model where it lies, under load, and embeddings among it."""
  placement = sharding.make_placement({'data': 2, 'tensor': 2})
  shapes, axes = decoder.abstract(ROTARY)
  where = sharding.shardings(axes, shapes, placement.mesh, placement.config)
  adapters = lora.init(LoraConfig(rank=2), MODEL.variables['params'], jax.random.key(0))
  adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
  one, split = (
    {'params': lora.merge(params, adapters)}
    for params in (MODEL.variables['params'], jax.device_put(MODEL.variables, where)['params']))
  split = dataclasses.replace(MODEL, variables=split, placement=placement)
  prompts = [[1, 2, 3], [*range(50)]]
  greedy = [request for request in requests() if request.sampling.temperature == 0]
  with running(dataclasses.replace(MODEL, variables=one)) as engine:
    means = asyncio.run(embed(engine, prompts))
    want = asyncio.run(together(engine, greedy))
  with running(split, num_slots=4) as engine:
    keys = engine._batch._state.cache.keys[0]
    assert keys.addressable_shards[0].data.shape[:2] == (2, 1), 'two rows and a head on each device'
    before = engine.statistics().compilations
    got = asyncio.run(together(engine, greedy))
    np.testing.assert_allclose(asyncio.run(embed(engine, prompts)), means, atol=2e-5)
    assert engine.statistics().compilations == before
  for ours, theirs in zip(got, want, strict=True):
    assert (ours[0], ours[1], ours[4]) == (theirs[0], theirs[1], theirs[4])
    np.testing.assert_allclose(ours[2][1:], theirs[2][1:], atol=3e-5)


def test_scored_prompts_are_scored_as_elsewhere():
  prompt = (*range(3, 53),)
  with running() as engine:
    stream = engine.submit([Request(prompt, GREEDY, 0, num_top=3, score_prompt=True)])

    async def first_piece():
      return [piece async for piece in stream][0]

    piece = asyncio.run(first_piece())
  want, = scoring.score(Decoder(ROTARY), MODEL.unstacked, [prompt], num_top=3)
  assert piece.tokens == [*prompt] and piece.text == text.text_of(TOKENIZER, prompt)
  assert piece.finish_reason is None and piece.logprobs[0] is None and piece.top[0] == []
  np.testing.assert_allclose(piece.logprobs[1:], want.log_probs_N, atol=2e-5)
  assert [[token for token, _ in top] for top in piece.top[1:]] == want.top_ids_NA[:, :3].tolist()
