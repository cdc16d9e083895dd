"""Clients with keys of their own: none learns from another, none takes what others need."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import pytest
from http_server import NAME, make_engine, running, shared, tiny_model

from jaxllm.generation.sampling import SamplingConfig
from jaxllm.serving.access import ApiError
from jaxllm.serving.shares import Budget, Workers, fits
from jaxllm.serving.streams import QueueFullError, Request

ALICE, BOB, WATCHER = 'the-key-of-alice-x', 'the-key-of-bob-xxx', 'the-key-of-metrics'
LONG = {'max_tokens': 400, 'logit_bias': {'256': -100}}


@pytest.fixture(scope='module')
def engine():
  made = make_engine(tiny_model())
  yield made
  made.close(5)


@pytest.fixture(scope='module')
def server(engine):
  with running(tiny_model(), engine, keys=[ALICE, BOB], metrics_keys=[WATCHER],
               body_seconds=2) as started:
    yield started


def ask(server, key, **fields):
  return server.post('/v1/completions', {'model': NAME, 'prompt': 'ab', 'max_tokens': 2} | fields,
                     authorization=f'Bearer {key}')


def hits(engine):
  return engine.statistics().prefix_hit_tokens


def test_one_key_learns_nothing_of_the_prompts_of_another(server, engine):
  # By the counter of reused tokens, which tells more than any time.
  secret = 'x' * 124 + '4711' + ' and a question'
  assert ask(server, ALICE, prompt=secret).status_code == 200
  before = hits(engine)
  for guess in range(4700, 4712):
    assert ask(server, BOB, prompt='x' * 124 + str(guess) + ' z').status_code == 200
  # Only what Bob himself had sent: the first chunk of 64.
  assert hits(engine) - before == 11 * 64
  before = hits(engine)
  assert ask(server, ALICE, prompt='x' * 124 + '4711' + ' again').status_code == 200
  assert hits(engine) - before == 128
  for key in (ALICE, BOB, 'x'):
    assert server.get('/metrics', authorization=f'Bearer {key}').status_code == 401
  assert server.get('/metrics', authorization=f'Bearer {WATCHER}').status_code == 200


def test_a_client_with_many_choices_leaves_a_row_to_others(server, engine):
  body = {'model': NAME, 'prompt': 'a', 'n': 24, 'stream': True, **LONG}
  with httpx.stream('POST', f'{server.url}/v1/completions', json=body,
                    headers={'authorization': f'Bearer {ALICE}'}) as held:
    lines = held.iter_lines()
    next(lines)
    assert engine.statistics().busy_slots == 3
    steps = engine.statistics().decode_steps
    assert ask(server, BOB).status_code == 200
    # Not after a row of Alice's has ended, which takes 400.
    assert engine.statistics().decode_steps - steps < 100
    assert engine.statistics().queued == 21
  server.wait_until_idle()


def test_requests_of_one_client_take_turns(engine):
  # A row for each, not all rows of the first before those of the second.
  sampling = SamplingConfig(max_new_tokens=40, temperature=0.0, logit_bias=((256, -100.0),))

  async def finish(stream, order, name):
    async for piece in stream:
      if piece.finish_reason:
        order.append(name)

  async def both():
    order = []
    many = engine.submit([Request((1, 2), sampling, 0)] * 16)
    few = engine.submit([Request((3, 4), sampling.replace(max_new_tokens=5), 0)])
    await asyncio.gather(finish(many, order, 'many'), finish(few, order, 'few'))
    return order

  assert asyncio.run(both()).index('few') <= 4


def test_nobody_fills_the_queue(engine):
  request = Request((1, 2), SamplingConfig(max_new_tokens=400, logit_bias=((256, -100.0),)), 0)
  first = engine.submit([request] * 27, 'a')
  try:
    with pytest.raises(QueueFullError):
      engine.submit([request] * 2, 'a')
    engine.submit([request] * 4, 'b').cancel()
  finally:
    first.cancel()


def test_half_bodies_take_no_place(engine):
  with running(tiny_model(), engine, max_concurrency=2, body_seconds=20) as server:
    with contextlib.ExitStack() as stack:
      for _ in range(20):
        half = stack.enter_context(socket.create_connection(('127.0.0.1', server.port)))
        half.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n'
                     b'content-type: application/json\r\ncontent-length: 100\r\n\r\n{"model"')
      time.sleep(0.1)
      assert server.complete().status_code == 200


def test_shares():
  assert fits(6, 6, 0, '') and not fits(7, 6, 0, '')
  assert fits(1, 1, 0, 'a') and not fits(1, 1, 1, 'a') and not fits(1, 0, 0, 'a')
  # One client gets 6 of 8, the next may have 2.
  assert [fits(1, 8 - held, held, 'a') for held in range(8)] == [True] * 6 + [False] * 2
  assert fits(1, 2, 0, 'b')
  budget = Budget(8, 'too many')
  with budget.taking('a') as take:
    take(6)
    with pytest.raises(ApiError, match='too many'):
      take(1)
    with budget.taking('b') as other:
      other(1)
    assert budget.used == 6
  assert budget.used == 0


def test_threads_go_to_who_has_the_fewest_and_to_small_jobs_first():
  async def order():
    workers, done = Workers(2, 'test'), []
    first, second = threading.Event(), threading.Event()

    async def run(client, size, work=lambda: None):
      await workers.run(client, size, work)
      done.append((client, size))

    def start(*jobs):
      return [asyncio.ensure_future(run(*job)) for job in jobs]

    blocking = start(('a', 1, first.wait), ('c', 1, second.wait))
    await asyncio.sleep(0.01)
    waiting = start(('a', 9), ('a', 3), ('b', 8))
    gone, = start(('b', 2))
    await asyncio.sleep(0.01)
    gone.cancel()
    # The thread is busy though nobody waits for it.
    blocking[1].cancel()
    await asyncio.sleep(0.01)
    assert not done
    second.set()
    await waiting[2]
    await asyncio.sleep(0.01)
    # The last thread is not for who has the others.
    assert done == [('b', 8)]
    first.set()
    await asyncio.gather(*waiting, *blocking, gone, return_exceptions=True)
    assert workers._free == 2 and not workers._held.total()
    workers.close()
    return done

  assert asyncio.run(order()) == [('b', 8), ('a', 1), ('a', 3), ('a', 9)]


def test_the_texts_of_a_body_are_bounded():
  with running(*shared(), max_text_bytes=1000) as server:
    text, ids = 'x' * 1001, [1] * 1001
    messages = [{'role': 'user', 'content': 'x' * 600}] * 2
    for path, name, value in (
        ('/tokenize', 'prompt', text), ('/detokenize', 'tokens', ids),
        ('/v1/completions', 'prompt', text), ('/v1/completions', 'prompt', ids),
        ('/v1/embeddings', 'input', ['a', text]), ('/v1/chat/completions', 'messages', messages)):
      answer = server.post(path, {'model': NAME, name: value})
      assert answer.status_code == 400, path
      assert answer.json()['error']['param'].startswith(name)
    assert len(server.post('/tokenize', {'prompt': 'x' * 1000}).json()['tokens']) == 1000


def test_large_answers_are_those_of_small_ones(monkeypatch):
  with running(*shared()) as server:
    asked = {'prompt': 'ab', 'seed': 3, 'logprobs': 5, 'n': 3, 'max_tokens': 20}
    small = server.complete(**asked).json()['choices']
    monkeypatch.setattr('jaxllm.serving.service.MAX_ENTRIES', 1)
    assert server.complete(**asked).json()['choices'] == small
    vectors = server.post('/v1/embeddings', {'model': NAME, 'input': ['a', 'bc']}).json()
    assert [len(item['embedding']) for item in vectors['data']] == [16, 16]
