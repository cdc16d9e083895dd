"""The server as OpenAI's own client sees it: every answer fits its typed models, strictly."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import types

import httpx
import numpy as np
import openai
import pytest
from http_server import (
  END,
  NAME,
  TEMPLATE,
  TURN,
  TURN_END,
  make_engine,
  running,
  save,
  shared,
  tiny_model,
)
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from jaxllm import loading
from jaxllm.data import tokenizers
from jaxllm.generation import scoring
from jaxllm.generation.text import TextPiece, text_of
from jaxllm.interop import chat as templates
from jaxllm.models.decoder import Decoder
from jaxllm.serving.access import ApiError, LimitsConfig
from jaxllm.serving.responses import Choice, Names
from jaxllm.serving.service import Service
from jaxllm.tasks.chat import Chat, ChatTemplate

PROMPT, HELLO = 'To be', [{'role': 'user', 'content': 'Hello'}]
TEXT = {'model': NAME, 'prompt': PROMPT, 'max_tokens': 12, 'seed': 3}
CHAT = {'model': NAME, 'messages': HELLO, 'max_tokens': 12, 'seed': 3}


@pytest.fixture(scope='module')
def server():
  with running(*shared()) as started:
    yield started


@pytest.fixture(scope='module')
def client(server):
  with openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0) as made:
    yield made


def check(answer, kind):
  """Validate an answer strictly: no field is missing, of another type, or unknown."""
  assert type(answer) is kind
  content = json.loads(answer.to_json(exclude_unset=True))
  for choice in content.get('choices', []):
    if kind is Completion:
      # OpenAI's stream has null here, and the first token of an echoed prompt no probability;
      # its types know neither.
      choice['finish_reason'] = choice['finish_reason'] or 'stop'
      for name in ('token_logprobs', 'top_logprobs'):
        if choice['logprobs'] and choice['logprobs'][name][:1] == [None]:
          del choice['logprobs'][name][0]
  kind.model_validate_json(json.dumps(content), strict=True)
  nothing_unknown(answer)
  return answer


def nothing_unknown(value):
  if isinstance(value, BaseModel):
    assert not value.model_extra, (type(value), value.model_extra)
    for name in value.model_fields_set:
      nothing_unknown(getattr(value, name))
  elif isinstance(value, list):
    for item in value:
      nothing_unknown(item)


def test_the_check_can_fail(client):
  answer = client.completions.create(**TEXT)
  for broken in ({'created': None}, {'id': None}, {'more': 1}):
    broken = {**answer.to_dict(), **broken}
    with pytest.raises((ValueError, AssertionError)):
      check(Completion.construct(**broken), Completion)


def test_models(client):
  models = client.models.list()
  assert [check(model, Model).id for model in models.data] == [NAME]
  assert not models.model_extra and models.object == 'list'
  check(client.models.retrieve(NAME), Model)
  with pytest.raises(openai.NotFoundError) as caught:
    client.models.retrieve('other/one')
  assert caught.value.code == 'model_not_found' and caught.value.param == 'model'


@pytest.mark.parametrize('options', [
  {}, {'n': 3}, {'stop': ['e', '\ufffd']}, {'temperature': 0}, {'logprobs': 0}, {'logprobs': 5},
  {'echo': True}, {'echo': True, 'logprobs': 2, 'n': 2}, {'prompt': ['a', 'bc'], 'n': 2},
  {'prompt': [1, 2, 3]}, {'prompt': [[1, 2], [3]], 'echo': True, 'logprobs': 1},
  {'prompt': 'é🙂', 'echo': True, 'logprobs': 1}, {'user': 'me'},
  {'extra_body': {'top_k': 5, 'min_p': 0.01, 'repetition_penalty': 1.2}},
  {'presence_penalty': 1, 'frequency_penalty': 1, 'logit_bias': {'65': 50}, 'top_p': 0.9},
  {'extra_body': {'response_format': {'type': 'json_object'}}},
], ids=str)
def test_streamed_completions_equal_whole_ones(client, options):
  whole = check(client.completions.create(**TEXT | options), Completion)
  assert whole.id.startswith('cmpl-') and whole.model == NAME
  streamed, usage = {}, None
  for part in client.completions.create(
      **TEXT | options, stream=True, stream_options={'include_usage': True}):
    check(part, Completion)
    usage = part.usage
    for choice in part.choices:
      streamed.setdefault(choice.index, []).append(choice)
  assert usage == whole.usage and usage.total_tokens == (
    usage.prompt_tokens + usage.completion_tokens)
  assert [choice.index for choice in whole.choices] == sorted(streamed)
  for choice in whole.choices:
    parts = streamed[choice.index]
    assert ''.join(part.text for part in parts) == choice.text
    reasons = [part.finish_reason for part in parts]
    assert reasons[-1] == choice.finish_reason and set(reasons[:-1]) <= {None}
    assert (choice.logprobs is not None) == ('logprobs' in options)
    if choice.logprobs:
      for name in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset'):
        assert sum((getattr(part.logprobs, name) for part in parts), []) == getattr(
          choice.logprobs, name)


@pytest.mark.parametrize('options', [
  {}, {'n': 2}, {'stop': 'e'}, {'logprobs': True}, {'logprobs': True, 'top_logprobs': 20},
  {'logit_bias': {str(TURN_END): 100}},
  {'max_tokens': None, 'max_completion_tokens': 5}, {'response_format': {'type': 'json_object'}},
  {'messages': [{'role': 'developer', 'content': 'Be brief.'},
                {'role': 'user', 'content': [{'type': 'text', 'text': 'Hello'}]}]},
], ids=str)
def test_streamed_chats_equal_whole_ones(client, options):
  asked = {name: value for name, value in (CHAT | options).items() if value is not None}
  whole = check(client.chat.completions.create(**asked), ChatCompletion)
  streamed, usages = {}, []
  for part in client.chat.completions.create(
      **asked, stream=True, stream_options={'include_usage': True}):
    check(part, ChatCompletionChunk)
    usages.append(part.usage)
    for choice in part.choices:
      streamed.setdefault(choice.index, []).append(choice)
  assert usages[-1] == whole.usage and set(usages[:-1]) == {None}
  for choice in whole.choices:
    parts = streamed[choice.index]
    assert [part.delta.role for part in parts] == ['assistant'] + [None] * (len(parts) - 1)
    assert parts[0].delta.content is not None
    assert ''.join(part.delta.content or '' for part in parts) == choice.message.content
    assert parts[-1].finish_reason == choice.finish_reason
    if 'logprobs' in options:
      assert sum((part.logprobs.content for part in parts), []) == choice.logprobs.content
      for token in choice.logprobs.content:
        assert len(token.top_logprobs) == options.get('top_logprobs', 0)
  assert len(whole.choices) == options.get('n', 1)


def test_the_async_client(server):
  async def ask():
    async with openai.AsyncOpenAI(
        base_url=f'{server.url}/v1', api_key='none', max_retries=0) as client:
      wholes = await asyncio.gather(*(
        client.completions.create(**TEXT | {'seed': seed}) for seed in range(8)))
      texts = []
      for seed in range(2):
        stream = await client.completions.create(**TEXT | {'seed': seed}, stream=True)
        texts.append(''.join([check(part, Completion).choices[0].text async for part in stream]))
      chat = check(await client.chat.completions.create(**CHAT), ChatCompletion)
      parts = [check(part, ChatCompletionChunk) async for part in
               await client.chat.completions.create(**CHAT, stream=True)]
      return wholes, texts, chat, parts

  wholes, texts, chat, parts = asyncio.run(ask())
  assert [check(whole, Completion).choices[0].text for whole in wholes[:2]] == texts
  assert len({whole.choices[0].text for whole in wholes}) > 4
  assert ''.join(part.choices[0].delta.content or '' for part in parts) == (
    chat.choices[0].message.content)


def test_answers_are_the_models(client):
  model, _ = shared()
  ids = {Names(model.tokenizer).name(token): token for token in range(259)}
  got = client.completions.create(
    **TEXT | {'max_tokens': 11}, temperature=0, logprobs=2).choices[0]
  drawn = [ids[name] for name in got.logprobs.tokens]
  assert got.text == text_of(model.tokenizer, drawn) and len(drawn) == 11
  prompt = model.encode_prompt(PROMPT)
  want, = scoring.score(Decoder(model.config), model.unstacked, [prompt + drawn], num_top=2)
  log_probs_N, is_greedy_N, top_ids_NA, top_log_probs_NA = (
    array[len(prompt) - 1:] for array in want)
  assert all(is_greedy_N)
  np.testing.assert_allclose(got.logprobs.token_logprobs, log_probs_N, atol=1e-4)
  for top, ids_A, log_probs_A in zip(
    got.logprobs.top_logprobs, top_ids_NA, top_log_probs_NA, strict=True
  ):
    assert [ids[name] for name in top] == [*ids_A[:2]]
    np.testing.assert_allclose([*top.values()], log_probs_A[:2], atol=1e-4)


def test_an_echoed_prompt_is_scored_as_the_model_scores_it(client):
  model, _ = shared()
  ids = [*'né to'.encode(), TURN, *b'x']
  answer = client.completions.create(model=NAME, prompt=ids, echo=True, logprobs=1, max_tokens=1)
  choice = answer.choices[0]
  want, = scoring.score(Decoder(model.config), model.unstacked, [ids], num_top=2)
  # lm-eval counts on one more token than the prompt has.
  assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(ids) + 1
  assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
  np.testing.assert_allclose(choice.logprobs.token_logprobs[1:-1], want.log_probs_N, atol=1e-4)
  greedy = [logprob == max(top.values()) for logprob, top in zip(
    choice.logprobs.token_logprobs[1:-1], choice.logprobs.top_logprobs[1:-1], strict=True)]
  assert greedy == [*want.is_greedy_N]
  assert choice.text.startswith('né tox') and choice.logprobs.tokens[6] == '<|im_start|>'
  assert choice.logprobs.tokens[1:3] == ['bytes:\\xc3', 'bytes:\\xa9']
  assert choice.logprobs.text_offset == [0, 1, 1, 2, 3, 4, 5, 5, 6]
  assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 1


def test_offsets_of_a_prompt_that_a_tokenizer_puts_a_space_before():
  choice = Choice(Names(shared()[0].tokenizer), 0, 'ab', scored=True)
  prompt = choice.take(TextPiece(0, ' ab', [*b' ab'], [None, -1.0, -1.0], [], None))
  drawn = choice.take(TextPiece(0, 'c', [*b'c'], [-1.0], [], 'length'))
  assert (prompt.text, drawn.text) == ('ab', 'c') and choice.num_tokens == 1
  assert [item.offset for item in (*prompt.scored, *drawn.scored)] == [0, 0, 1, 2]


def test_a_scored_prompt_has_one_token_more_even_where_the_text_would_end(client):
  answer = client.completions.create(
    model=NAME, prompt='a', echo=True, logprobs=1, max_tokens=1, logit_bias={str(END): 100})
  assert len(answer.choices[0].logprobs.tokens) == 2
  plain = client.completions.create(model=NAME, prompt='a', logit_bias={str(END): 100})
  assert (plain.choices[0].text, plain.choices[0].finish_reason) == ('', 'stop')


def test_seeds_and_choices(client):
  both = client.completions.create(**TEXT, n=2)
  second = client.completions.create(**TEXT | {'seed': 4})
  assert both.choices[1].text == second.choices[0].text != both.choices[0].text
  # A prompt among others has its own answer, and a seed may be negative.
  batch = client.completions.create(**TEXT | {'prompt': ['x', PROMPT], 'seed': -1})
  alone = client.completions.create(**TEXT | {'seed': -1})
  assert batch.choices[1].text == alone.choices[0].text
  free = [client.completions.create(model=NAME, prompt='a').choices[0].text for _ in range(2)]
  assert free[0] != free[1]


def test_chats_end_with_the_turn_and_go_through_the_template(client):
  model, _ = shared()
  content = 'Hi<|im_end|><|endoftext|>'
  messages = [{'role': 'user', 'content': content}]
  prompt = [TURN, *b'user\n', *content.encode(), TURN_END, TURN, *b'assistant\n']
  assert templates.encode_all(model.tokenizer, TEMPLATE, [messages]) == [prompt]
  free = {'temperature': 0, 'logit_bias': {str(TURN_END): -100, str(END): -100}}
  answer = client.chat.completions.create(**CHAT | {'messages': messages}, **free)
  # Spelled special tokens stay text: as many tokens as the bytes and those of the template.
  assert answer.usage.prompt_tokens == len(prompt)
  want = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, **free)
  assert answer.choices[0].message.content == want.choices[0].text
  ended = client.chat.completions.create(**CHAT, logit_bias={str(TURN_END): 100})
  assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ('', 'stop')
  # In a completion it is a token like another.
  other = client.completions.create(**TEXT, logit_bias={str(TURN_END): 100})
  assert other.usage.completion_tokens == 12


def test_a_run_tuned_on_chats_is_served_by_their_template():
  template = ChatTemplate(prefix='[{role}]', suffix='a', controls=())
  run = types.SimpleNamespace(
    task=Chat(template=template), data=types.SimpleNamespace(add_bos=False))
  small = tiny_model()
  model = loading.make_model(small.config, small.variables, small.tokenizer, run)
  engine = make_engine(model)
  with running(model, engine) as server, openai.OpenAI(
      base_url=f'{server.url}/v1', api_key='x') as client:
    # 'b' follows twelve times; an 'a' ends the turn.
    for bias, want, reason in (('b', 'b' * 12, 'length'), ('a', '', 'stop')):
      answer = client.chat.completions.create(
        **CHAT | {'messages': [{'role': 'user', 'content': 'Hi'}]},
        logit_bias={str(ord(bias)): 100})
      assert answer.usage.prompt_tokens == len('[user]Hia[assistant]')
      assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (want, reason)
    # Too long for the context, and not for the memory.
    many = server.chat(messages=[{'role': 'user', 'content': ''}] * 20_000)
    assert many.json()['error']['code'] == 'context_length_exceeded'
    # What is bound to a form may hold what ends a turn.
    formed = client.chat.completions.create(
      **CHAT | {'max_tokens': 40}, logit_bias={str(ord('a')): 5},
      response_format={'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {
        'enum': ['banana']}}})
    assert json.loads(formed.choices[0].message.content) == 'banana'
  engine.close(10)


def test_json(client):
  schema = {'type': 'object', 'properties': {'yes': {'type': 'boolean'}}, 'required': ['yes'],
            'additionalProperties': False}
  form = {'type': 'json_schema', 'json_schema': {'name': 'a', 'strict': True, 'schema': schema}}
  answer = client.chat.completions.create(**CHAT | {'max_tokens': 60}, response_format=form, n=2,
                                          temperature=0)
  for choice in answer.choices:
    assert choice.finish_reason == 'stop'
    value = json.loads(choice.message.content)
    assert list(value) == ['yes'] and isinstance(value['yes'], bool)
  with pytest.raises(openai.BadRequestError) as caught:
    schema['patternProperties'] = {'(': {}}
    client.chat.completions.create(**CHAT, response_format=form)
  assert caught.value.param == 'response_format.json_schema.schema'


def test_embeddings(client, server):
  model, _ = shared()
  inputs = ['Hello', 'é', 'a' * 100]
  # The client asks for base64 by itself.
  answer = check(client.embeddings.create(model=NAME, input=inputs), CreateEmbeddingResponse)
  floats = client.embeddings.create(model=NAME, input=inputs, encoding_format='float')
  want = model.hidden(model.encode_prompt(inputs[2])).mean(axis=0)
  np.testing.assert_allclose(answer.data[2].embedding, want, atol=1e-4)
  assert [item.index for item in answer.data] == [0, 1, 2]
  for item, same in zip(answer.data, floats.data, strict=True):
    np.testing.assert_array_equal(np.float32(item.embedding), np.float32(same.embedding))
  assert answer.usage.prompt_tokens == 107
  raw = server.post('/v1/embeddings', {
    'model': NAME, 'input': [1, 2], 'encoding_format': 'base64'}).json()
  packed = base64.b64decode(raw['data'][0]['embedding'])
  assert len(struct.unpack('<16f', packed)) == 16


def test_tokens(server):
  def post(path, **content):
    return server.post(path, content).json()

  assert post('/tokenize', prompt='a<|im_end|><|')['tokens'] == [*b'a', TURN_END, *b'<|']
  assert post('/tokenize', prompt='é', add_special_tokens=False) == {
    'tokens': [0xC3, 0xA9], 'count': 2}
  assert post('/detokenize', tokens=[*'né'.encode(), TURN]) == {'prompt': 'né'}
  info = server.get('/tokenizer_info').json()
  assert info['eos_token'] == '<|endoftext|>' and info['chat_template'] == TEMPLATE
  assert post('/tokenize', prompt=info['eos_token'], add_special_tokens=False)['tokens'] == [END]
  assert text_of(shared()[0].tokenizer, [END]) == ''


def test_errors_reach_the_client_as_its_own(client, server):
  with pytest.raises(openai.BadRequestError) as caught:
    client.completions.create(**TEXT, best_of=2)
  assert caught.value.param == 'best_of' and caught.value.type == 'invalid_request_error'
  with pytest.raises(openai.NotFoundError) as caught:
    client.chat.completions.create(**CHAT | {'model': 'gpt-4'})
  assert caught.value.code == 'model_not_found' and caught.value.request_id.startswith('req_')
  with pytest.raises(openai.BadRequestError) as caught:
    client.completions.create(**TEXT | {'prompt': 'a' * 600})
  assert caught.value.code == 'context_length_exceeded'


def test_keys_are_needed_everywhere_but_for_health(monkeypatch):
  monkeypatch.setattr('jaxllm.serving.access.WrongKeys.delay', lambda self, address: 0.0)
  with running(*shared(), keys=['correct-horse', 'battery-staple']) as server:
    for path in ('/v1/models', '/metrics', '/', '/static/app.js', '/tokenizer_info', '/nope'):
      for headers in ({}, {'authorization': 'Bearer wrong-horse'}, {'authorization': 'Bearer'},
                      {'authorization': 'correct-horse'}, {'authorization': 'Basic !'}):
        answer = server.get(path, **headers)
        assert answer.status_code == 401 and 'www-authenticate' in answer.headers
        assert answer.json()['error']['code'] == 'invalid_api_key'
    metrics = server.get('/metrics', authorization='Bearer correct-horse')
    assert metrics.status_code == 401 and '--metrics_key_file' in metrics.text
    assert server.complete().status_code == 401
    assert server.get('/health').status_code == server.get('/ready').status_code == 200
    assert server.get('/v1/models', authorization='Bearer battery-staple').status_code == 200
    # As a browser sends it when it has asked for a name and a password.
    basic = base64.b64encode(b'me:correct-horse').decode()
    assert server.get('/v1/models', authorization=f'Basic {basic}').status_code == 200
    with openai.OpenAI(base_url=f'{server.url}/v1', api_key='correct-horse') as client:
      assert client.completions.create(**TEXT).choices[0].text
    with openai.OpenAI(base_url=f'{server.url}/v1', api_key='x', max_retries=0) as client:
      with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_names_of_the_host(server):
  for host, status in (('localhost:8000', 200), ('127.0.0.1', 200), ('[::1]:80', 200),
                       ('evil.example', 403), ('localhost.evil.example', 403)):
    assert server.get('/v1/models', host=host).status_code == status
  answer = server.get('/v1/models')
  assert "default-src 'none'" in answer.headers['content-security-policy']
  assert 'access-control-allow-origin' not in answer.headers
  assert 'server' not in answer.headers


def test_metrics(server, client):
  def read():
    lines = server.get('/metrics').text.splitlines()
    return {line.rpartition(' ')[0]: float(line.rpartition(' ')[2])
            for line in lines if not line.startswith('#')}

  server.get('/')
  server.wait_until_idle()
  before = read()
  assert before['jaxllm_requests_total{route="/",status="200"}'] >= 1
  assert not [name for name in before if '_created' in name]
  client.completions.create(**TEXT | {'logit_bias': {str(END): -100}}, n=2)
  server.wait_until_idle()
  after = read()

  def gained(name):
    return after[name] - before.get(name, 0)

  assert gained('jaxllm_requests_total{route="/v1/completions",status="200"}') == 1
  assert gained('jaxllm_time_to_first_token_seconds_count') == 2
  assert gained('jaxllm_time_per_output_token_seconds_count') == 2
  assert gained('jaxllm_completion_tokens_total') == 24
  assert gained('jaxllm_prompt_tokens_total') == 2 * len(PROMPT)
  assert gained('jaxllm_compilations_total') == 0
  assert gained('jaxllm_rows_finished_total{reason="length"}') == 2
  for name in ('queue_rows', 'slots_busy', 'batch_fill_ratio', 'cache_fill_ratio'):
    assert after[f'jaxllm_{name}'] == 0
  assert after['jaxllm_slots'] == 4 and not math.isnan(sum(after.values()))


def test_the_program_serves_and_drains(tmp_path):
  save(tiny_model(), tmp_path / 'small')
  key = 'key-of-this-test'
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
  program = [sys.executable, '-m', 'jaxllm.serve', f'--model={tmp_path}/small']
  open_to_all = subprocess.run([*program, '--host=0.0.0.0'], capture_output=True, text=True,
                               check=False)
  assert open_to_all.returncode == 2 and '--api_keys_file' in open_to_all.stderr
  log = tmp_path / 'log'
  with log.open('w') as output, subprocess.Popen(
      [*program, f'--port={port}', '--num_slots=1', '--context_length=300'], stderr=output,
      env={**os.environ, 'JAXLLM_API_KEYS': key}) as process:
    try:
      serve_and_drain(f'http://127.0.0.1:{port}', process, log, key)
    finally:
      process.kill()
  said = log.read_text()
  assert 'POST /v1/completions 200' in said
  assert key not in said and str(tmp_path) not in said and 'Traceback' not in said


def serve_and_drain(url, process, log, key):
  wait_for(url, process, log)
  assert httpx.get(f'{url}/v1/models').status_code == 401
  body = {'model': 'small', 'prompt': 'a', 'stream': True, 'max_tokens': 250, 'n': 3}
  with httpx.stream('POST', f'{url}/v1/completions', json=body, timeout=30,
                    headers={'authorization': f'Bearer {key}'}) as stream:
    process.send_signal(signal.SIGTERM)
    parts = [line for line in stream.iter_lines() if line]
  assert parts[-1] == 'data: [DONE]' and len(parts) > 8
  assert process.wait(20) == 0


def wait_for(url, process, log, seconds=120):
  """Return once a server answers."""
  end = time.monotonic() + seconds
  while True:
    try:
      assert httpx.get(f'{url}/ready').status_code == 200
      return
    except httpx.TransportError:
      assert process.poll() is None and time.monotonic() < end, log.read_text()
      time.sleep(0.1)


TOOL_TEMPLATE = (
  "{% if tools %}T{{ tools[0].function.name }}{{ tools[0] | tojson }};{% endif %}"
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}"
  "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}"
  "{% endif %}{% if m.role == 'tool' %}!{% endif %}{% endfor %}"
  "{% if enable_thinking is defined and not enable_thinking %}<quiet>{% endif %}")


def planned(model, body):
  """Return the prompt that a chat becomes."""
  service = Service(model, shared()[1], NAME, LimitsConfig())
  try:
    plan = service.chat(json.dumps(CHAT | body).encode())
  finally:
    service.close()
  return bytes(plan.requests[0].prompt).decode()


def test_templates_get_tools_calls_and_variables():
  model, _ = shared()
  files = model.tokenizer.files() | {'chat_template.jinja': TOOL_TEMPLATE.encode()}
  tooled = loading.make_model(model.config, model.variables, tokenizers.from_files(files))
  tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}]
  history = [
    {'role': 'user', 'content': 'x'},
    {'role': 'assistant', 'content': None, 'tool_calls': [
      {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"a": 7}'}}]},
    {'role': 'tool', 'tool_call_id': 'c', 'content': 'ok'}]
  assert planned(tooled, {'messages': history}) == '[user]x[assistant]f(7)[tool]ok!'
  text = planned(tooled, {'messages': history[:1], 'tools': tools})
  assert text.startswith('Tf{"type": "function", "function": {"name": "f"')
  assert planned(tooled, {'messages': history[:1], 'tools': tools, 'tool_choice': 'none'}
                 ) == '[user]x'
  quiet = {'messages': history[:1], 'chat_template_kwargs': {'enable_thinking': False}}
  assert planned(tooled, quiet) == '[user]x<quiet>'
  assert planned(tooled, {'messages': history[:1], 'reasoning_effort': 'none'}) == '[user]x<quiet>'
  for body, param in (({'reasoning_effort': 'low'}, 'reasoning_effort'),
                      ({'messages': history}, 'messages[1].tool_calls'),
                      ({'messages': history[2:]}, 'messages[0].role'), ({'tools': tools}, 'tools')):
    with pytest.raises(ApiError) as caught:
      planned(model if param != 'reasoning_effort' else tooled, body)
    assert caught.value.content()['error']['param'] == param


def test_json_needs_a_tokenizer_whose_text_is_that_of_its_bytes():
  import tokenizers as library

  signs = ['[UNK]', *map(chr, range(33, 127)), *(f'##{chr(byte)}' for byte in range(33, 127))]
  inner = library.Tokenizer(library.models.WordPiece(
    {text: i for i, text in enumerate(signs)}, unk_token='[UNK]'))
  inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
  inner.decoder = library.decoders.WordPiece()
  model, _ = shared()
  pieces = dataclasses.replace(model, tokenizer=tokenizers.from_files(
    {'tokenizer.json': inner.to_str().encode()}))
  body = {'model': NAME, 'prompt': 'a', 'response_format': {'type': 'json_object'}}
  for served, works in ((model, True), (pieces, False)):
    service = Service(served, shared()[1], NAME, LimitsConfig())
    with contextlib.nullcontext() if works else pytest.raises(ApiError, match='cannot spell JSON'):
      assert service.completion(json.dumps(body).encode()).requests[0].constraint is not None
    service.close()
