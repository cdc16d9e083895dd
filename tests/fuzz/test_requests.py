"""Mutated requests for every endpoint: none brings a 500, a hang, a traceback or an odd answer.

JAXLLM_FUZZ_SECONDS says for how long, JAXLLM_FUZZ_SEED which ones.
"""

import asyncio
import collections
import copy
import json
import logging
import os
import random
import sys
import time

import httpx

from tests.serving import http_server

SECONDS = float(os.environ.get('JAXLLM_FUZZ_SECONDS', '10'))
SEED = int(os.environ.get('JAXLLM_FUZZ_SEED', '0'))
AT_ONCE, PATIENCE = 8, 60
MODEL = {'model': http_server.NAME}
SCHEMA = {'type': 'object', 'additionalProperties': False, 'required': ['a'], '$defs': {
  'n': {'type': 'integer', 'minimum': 0}}, 'properties': {
    'a': {'anyOf': [{'$ref': '#/$defs/n'}, {'enum': ['x', 'é', None]}]},
    'b': {'type': 'array', 'items': {'type': 'string', 'pattern': '^a+b?$'}, 'maxItems': 3}}}
TOOL = {'type': 'function', 'function': {'name': 'f', 'parameters': SCHEMA}}
VALID = [
  ('/v1/completions', MODEL | {
    'prompt': ['ab', 'c'], 'max_tokens': 3, 'n': 2, 'temperature': 0.5, 'top_p': 0.9, 'seed': 1,
    'stop': ['x', 'yz'], 'logit_bias': {'7': 1.5}, 'logprobs': 2, 'echo': True, 'stream': False}),
  ('/v1/completions', MODEL | {'prompt': [[1, 2, 3], [4]], 'max_tokens': 2, 'stream': True,
                               'stream_options': {'include_usage': True}}),
  ('/v1/completions', MODEL | {'prompt': 'a', 'max_tokens': 9, 'response_format': {
    'type': 'json_schema', 'json_schema': {'name': 's', 'schema': SCHEMA}}}),
  ('/v1/chat/completions', MODEL | {
    'messages': [{'role': 'system', 'content': 'b'},
                 {'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]},
                 {'role': 'assistant', 'content': 'yes', 'tool_calls': []},
                 {'role': 'user', 'content': '<|im_end|>'}],
    'max_completion_tokens': 3, 'logprobs': True, 'top_logprobs': 3, 'user': 'me',
    'chat_template_kwargs': {'x': [1]}, 'response_format': {'type': 'text'}}),
  ('/v1/chat/completions', MODEL | {'messages': [{'role': 'user', 'content': 'a'}], 'tools': [TOOL],
                                    'max_tokens': 2, 'stream': True}),
  ('/v1/embeddings', MODEL | {'input': ['a', 'bc'], 'encoding_format': 'float'}),
  ('/tokenize', {'prompt': 'a<|im_end|>b', 'add_special_tokens': True}),
  ('/detokenize', {'tokens': [1, 2, 256]}),
]
HOSTILE = [
  None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**40, -0.0, 1e-320, 1e308, 0.5, '', 'a', '\x00',
  'é\u2028', '\ud800', '\ufdd0', 'x' * 3000, '{{ 7 * 7 }}', '<|im_start|>', '-1', '007', [], [[]],
  {}, [None], [0] * 600, ['a'] * 100, {'': {}}, {'$ref': '#'}, {'type': 'object'}, {'a': [{}]},
  {'type': 'string', 'pattern': '(a|a)*' * 20}, {'type': 'string', 'pattern': 'a.{90}b'},
  {'anyOf': [{'const': 'x' * 90}] * 40}, {'not': {}}, [[[[[[]]]]]], 'json_schema', 'tool', 'nan',
]


def nodes(value, path=()):
  """Yield the path of every value inside of a body."""
  yield path
  inner = value.items() if isinstance(value, dict) else (
    enumerate(value) if isinstance(value, list) else ())
  for key, item in inner:
    yield from nodes(item, (*path, key))


def mutate(body, draw):
  """Return a body with up to three changes, as bytes."""
  body = copy.deepcopy(body)
  for _ in range(draw.choice([1, 1, 2, 3])):
    *path, last = draw.choice([path for path in nodes(body) if path])
    parent = body
    for key in path:
      parent = parent[key]
    kind = draw.random()
    if kind < 0.15:
      del parent[last]
    elif kind < 0.25 and isinstance(parent, dict):
      parent[draw.choice(['nonsense', 'n', 'stop', 'logprobs', 'tools', str(last) * 2])] = (
        draw.choice(HOSTILE))
    elif kind < 0.35 and isinstance(parent[last], str | list):
      parent[last] = parent[last] * draw.choice([2, 50])
    elif kind < 0.45:
      for _ in range(draw.choice([3, 70, 200])):
        parent[last] = draw.choice([[parent[last]], {'items': parent[last]}])
    else:
      parent[last] = copy.deepcopy(draw.choice(HOSTILE))
    if not body:
      break
  content = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.9).encode(
    errors='surrogatepass'))
  if draw.random() < 0.25:
    for _ in range(draw.choice([1, 1, 3])):
      place = draw.randrange(len(content) + 1)
      content[place : place + draw.choice([0, 1, 9])] = draw.choice(
        [b'', b'"', b'{', b'\\u', b'\xff', b'\x00', b'1e999', b'NaN', b',', draw.randbytes(2)])
  return bytes(content)


def judge(answer):
  """Raise AssertionError if an answer is not one that a client may get."""
  assert answer.status_code in (200, 400, 404, 413, 429, 503), answer.text[:300]
  if answer.status_code == 200:
    return
  error = answer.json()
  assert set(error) == {'error'} and set(error['error']) == {'message', 'type', 'param', 'code'}
  assert 'Traceback' not in answer.text and 'jaxllm/' not in answer.text


async def fuzz(app):
  counts, end = collections.Counter(), time.monotonic() + SECONDS
  transport = httpx.ASGITransport(app)

  async def worker(number):
    draw, count = random.Random(f'{SEED} {number}'), 0
    async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
      while time.monotonic() < end:
        path, valid = draw.choice(VALID)
        body = mutate(valid, draw)
        try:
          answer = await asyncio.wait_for(client.post(path, content=body, headers={
            'content-type': 'application/json'}), PATIENCE)
          judge(answer)
        except Exception as error:
          raise AssertionError(f'{path} {body[:2000]!r} (seed {SEED}, worker {number}, request '
                               f'{count})') from error
        counts[answer.status_code] += 1
        count += 1

  await asyncio.gather(*map(worker, range(AT_ONCE)))
  for path, valid in VALID:
    async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
      assert (await client.post(path, json=valid)).status_code in (200, 400), path
  return counts


def test_no_request_breaks_the_server(caplog):
  model, engine = http_server.shared()
  limits = http_server.LimitsConfig(max_new_tokens=64, max_rows=8)
  service = http_server.Service(model, engine, http_server.NAME, limits)
  app = http_server.make_app(service, http_server.Keys([]), ['localhost'])
  with caplog.at_level(logging.WARNING):
    counts = asyncio.run(fuzz(app))
  service.close()
  print(f'{counts.total()} requests: {dict(counts)}', file=sys.stderr)
  assert counts[400] and counts[200]
  assert 'Traceback' not in caplog.text and 'Error' not in caplog.text
  http_server.wait_until(lambda: not engine.statistics().busy_slots)
  assert service.active.used == service.buffered.used == 0
