"""What bodies of requests mean, and that every field is either understood or refused by name."""

import json
import types

import pytest

from jaxllm.serving import access, bodies, protocol
from jaxllm.serving.access import ApiError, Keys, LimitsConfig, read_keys
from jaxllm.serving.engine import Statistics
from jaxllm.serving.middleware import Metrics

LIMITS = LimitsConfig(max_rows=4)
VOCAB = 300
TEXT = {'model': 'm', 'prompt': 'x'}
CHAT = {'model': 'm', 'messages': [{'role': 'user', 'content': 'x'}]}


def read(model, body):
  return bodies.read(model, body, limits=LIMITS, vocab_size=VOCAB)


def completion(**changes):
  return read(protocol.CompletionRequest, TEXT | changes)


def chat(**changes):
  return read(protocol.ChatCompletionRequest, CHAT | changes)


def refusal(read, *args, **changes):
  with pytest.raises(ApiError) as caught:
    read(*args, **changes)
  error = caught.value
  assert error.status == 400
  assert set(error.content()) == {'error'}
  assert set(error.content()['error']) == {'message', 'type', 'param', 'code'}
  assert json.loads(error.response().body) == error.content()
  return error


@pytest.mark.parametrize('body', [
  b'', b'{', b'[]', b'null', b'"x"', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}',
  b'{"a": ' + b'9' * 20_000 + b'}', b'[' * 100_000, b'{"a":' * 100_000, b'{"a": 1, "a": 2}',
  b'\xff\xfe', '{"a": "x"}'.encode('utf-16'), b'{"a": 01}', b"{'a': 1}", b'{"a": 1} x',
])
def test_bodies_that_are_no_json_object(body):
  assert refusal(bodies.parse, body).param is None


def test_defaults_are_those_of_the_api():
  request = completion()
  assert request.prompt == ['x'] and not request.echo and not request.include_usage
  assert request.length == 16 and request.n == 1 and request.seed is None
  assert request.stop == [] and request.num_top is None and request.text_schema is None
  assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
  assert chat().length is None
  assert chat(max_completion_tokens=7).length == chat(max_tokens=7).length == 7
  assert chat(logprobs=True).num_top == 0
  assert chat(logprobs=False).num_top is None
  assert completion(logprobs=0).num_top == 0


def test_null_is_the_same_as_nothing():
  for ask, needed in ((completion, TEXT), (chat, CHAT)):
    names = type(ask()).model_fields.keys() - needed.keys()
    assert len(names) > 30 and ask(**dict.fromkeys(names)) == ask()


def test_every_value_arrives():
  request = completion(
    prompt=[[1, 2], [3]], max_tokens=3, temperature=0, top_p=0.5, top_k=4, min_p=0.1,
    repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2, logit_bias={'7': -100},
    n=2, seed=-5, stop=['a', 'b'], logprobs=5, echo=True, stream=True,
    stream_options={'include_usage': True}, user='me', metadata={'a': 'b'})
  assert request.prompt == [[1, 2], [3]] and request.echo
  assert request.sampling.model_dump(include={
    'temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'presence_penalty',
    'frequency_penalty', 'logit_bias'}) == {
      'temperature': 0, 'top_p': 0.5, 'top_k': 4, 'min_p': 0.1, 'repetition_penalty': 1.5,
      'presence_penalty': -1, 'frequency_penalty': 2, 'logit_bias': ((7, -100.0),)}
  assert (request.length, request.n, request.seed) == (3, 2, -5)
  assert (request.stop, request.num_top) == (['a', 'b'], 5)
  assert request.stream and request.include_usage


HUGE = 'x' * 1_000_000
REFUSED = [
  ('max_tokens', 0), ('max_tokens', -1), ('max_tokens', 10**18), ('max_tokens', 1e18),
  ('max_tokens', True), ('max_tokens', '5'), ('max_tokens', 5.0),
  ('temperature', -1), ('temperature', 2.1), ('temperature', float('nan')), ('temperature', '1'),
  ('temperature', True), ('temperature', [1]), ('top_p', 0), ('top_p', 2), ('top_p', -0.1),
  ('top_k', -2), ('min_p', 1.5), ('repetition_penalty', 0), ('presence_penalty', 3),
  ('frequency_penalty', -3), ('n', 0), ('n', 10**6), ('n', 1.5), ('seed', 2**63), ('seed', 'a'),
  ('stop', ['a'] * 5), ('stop', ''), ('stop', ['a', '']), ('stop', HUGE),
  ('stop', 5), ('stop', '\ud800'), ('logit_bias', {'300': 1}), ('logit_bias', {'-1': 1}),
  ('logit_bias', {'x': 1}), ('logit_bias', {'\u0663': 1}), ('logit_bias', {'1': 101}),
  ('logit_bias', {'1': True}), ('logit_bias', [1]), ('logit_bias', {'1': 1, '01': 2}),
  ('logit_bias', {str(i): 1 for i in range(600)}), ('stream', 'yes'), ('user', 5),
  ('stream_options', {'include_usage': True}), ('model', None), ('model', ''), ('model', 5),
  ('response_format', 'json'), ('response_format', {'type': 'xml'}),
  ('response_format', {'type': 'text', 'x': 1}), ('response_format', {}),
  ('response_format', {'type': 'json_schema'}),
  ('response_format', {'type': 'json_schema', 'json_schema': {'name': 'a'}}),
  ('store', True), ('service_tier', 'flex'), ('temprature', 1), ('x' * 100_000, 1),
]


@pytest.mark.parametrize('name, value', REFUSED, ids=lambda item: str(item)[:30])
@pytest.mark.parametrize('read', [completion, chat])
def test_refusals_name_the_field(read, name, value):
  error = refusal(read, **{name: value})
  assert error.param.startswith(name[:64])
  assert name[:64] in error.message and len(error.message) < 600
  assert 'xxxxx' not in error.message.replace(name[:64], '')


@pytest.mark.parametrize('name, value', [
  ('prompt', None), ('prompt', ''), ('prompt', []), ('prompt', [[]]), ('prompt', ['']),
  ('prompt', [-1]), ('prompt', [300]), ('prompt', [1, True]), ('prompt', [1.0]), ('prompt', {}),
  ('prompt', ['a', [1]]), ('prompt', [[1], 'a']), ('prompt', [[1], [301]]), ('prompt', 5),
  ('prompt', ['a'] * 5), ('prompt', [None]), ('prompt', '\udc00'), ('logprobs', 6),
  ('logprobs', True), ('echo', 1), ('best_of', 2), ('suffix', 'x'), ('messages', []),
  ('max_completion_tokens', 5), ('top_logprobs', 1), ('tools', []),
])
def test_refusals_of_completions(name, value):
  assert refusal(completion, **{name: value}).param.startswith(name)


def call(arguments):
  return {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}


def user(content, **more):
  return [{'role': 'user', 'content': content, **more}]


@pytest.mark.parametrize('name, value', [
  ('messages', None), ('messages', []), ('messages', 'hi'), ('messages', ['hi']),
  ('messages', [{'role': 'user'}]), ('messages', [{'content': 'x'}]), ('messages', user(None)),
  ('messages', [{'role': 'robot', 'content': 'x'}]), ('messages', [{'role': 1, 'content': 'x'}]),
  ('messages', [{'role': 'tool', 'content': 'x'}]), ('messages', user('x', type='image')),
  ('messages', [{'role': 'assistant', 'tool_calls': [{'id': 'a', 'function': {'name': 'f'}}, {}]}]),
  ('messages', [{'role': 'assistant', 'tool_calls': [call('[1]')]}]),
  ('messages', [{'role': 'assistant', 'tool_calls': [call('{')]}]),
  ('messages', [{'role': 'assistant', 'tool_calls': [call('{"a":' * 100 + '1' + '}' * 100)]}]),
  ('messages', [{'role': 'assistant', 'tool_calls': {}}]), ('messages', [{'role': 'function'}]),
  ('messages', [{'role': ['user'], 'content': 'x'}]), ('messages', user(5)), ('messages', user([])),
  ('messages', user('\ud800')), ('messages', user('x', name='me')),
  ('messages', user('x', tool_calls=[{}])), ('messages', user(['x'])),
  ('messages', user([{'type': 'image_url', 'image_url': {'url': 'x'}}])),
  ('messages', user([{'type': 'text'}])), ('messages', user([{'type': 'text', 'text': None}])),
  ('logprobs', 1), ('top_logprobs', 1), ('tools', [{}]), ('tools', {}),
  ('tools', [{'type': 'custom', 'custom': {}}]), ('tools', [{'type': 'function', 'function': {}}]),
  ('tools', [{'type': 'function', 'function': {'name': 'f', 'x': 1}}]),
  ('tool_choice', 'required'), ('tool_choice', {'type': 'function', 'function': {'name': 'f'}}),
  ('chat_template_kwargs', []), ('chat_template_kwargs', {'template': 'x'}),
  ('chat_template_kwargs', {'messages': []}), ('safety_identifier', 5), ('prompt_cache_key', {}),
  ('functions', [{}]), ('function_call', 'auto'), ('audio', {}), ('modalities', ['audio']),
  ('prediction', []), ('reasoning_effort', 'lots'), ('verbosity', 'low'),
  ('web_search_options', {}), ('prompt', 'x'), ('echo', True), ('parallel_tool_calls', 1),
])
def test_refusals_of_chats(name, value):
  assert refusal(chat, **{name: value}).param.startswith(name)


def test_values_that_ask_for_nothing_are_accepted():
  assert chat(tools=[], tool_choice='auto', modalities=['text'], store=False, service_tier='auto',
              verbosity='medium', stop=[], top_logprobs=0, logit_bias={}) == chat()


def test_what_changes_no_answer_is_accepted():
  asked = {'user': '', 'safety_identifier': 'u', 'metadata': {}, 'prompt_cache_key': 'k',
           'prompt_cache_retention': '24h', 'prompt_cache_options': {},
           'prediction': {'type': 'content', 'content': 'x'}}
  assert chat(**asked) == chat()
  assert completion(**asked) == completion()
  assert completion(top_k=-1) == completion(top_k=0) == completion()


TOOL = {'type': 'function', 'function': {
  'name': 'f', 'description': '', 'parameters': {'type': 'object'}, 'strict': True}}


def test_tools_and_variables_of_the_template():
  asked = chat(tools=[TOOL], chat_template_kwargs={'enable_thinking': False, 'style': [1]})
  assert asked.variables == {'enable_thinking': False, 'style': [1], 'tools': [TOOL]}
  assert chat(tools=[TOOL], tool_choice='none').variables == {}
  assert chat(tools=[TOOL], tool_choice='auto', parallel_tool_calls=True).variables == {
    'tools': [TOOL]}
  assert refusal(chat, tools=[TOOL], parallel_tool_calls=False).param == 'parallel_tool_calls'
  assert chat(reasoning_effort='low').variables == {'reasoning_effort': 'low'}
  assert chat(reasoning_effort='none', chat_template_kwargs={'a': 1}).variables == {
    'reasoning_effort': 'none', 'enable_thinking': False, 'a': 1}


def test_lengths_and_options_that_contradict_each_other():
  assert refusal(chat, max_tokens=1, max_completion_tokens=2).param == 'max_tokens'
  assert chat(max_tokens=2, max_completion_tokens=2).length == 2
  assert refusal(chat, top_logprobs=21, logprobs=True).param == 'top_logprobs'


def test_messages():
  request = chat(messages=[
    {'role': 'developer', 'content': 'a'},
    {'role': 'assistant', 'content': 'b', 'refusal': None, 'annotations': [], 'tool_calls': None},
    *user([{'type': 'text', 'text': 'c'}, {'type': 'text', 'text': 'd'}]), *user(''),
  ])
  assert [(message['role'], message['content']) for message in request.messages] == [
    ('system', 'a'), ('assistant', 'b'), ('user', 'cd'), ('user', '')]


def test_what_assistants_and_tools_said():
  said = {'role': 'assistant', 'annotations': None, 'audio': None, 'function_call': None}
  found = chat(messages=[
    *user('x', type='text'), said, {**said, 'content': None}, {**said, 'content': ''},
    {**said, 'content': None, 'refusal': 'no'}, {**said, 'content': 'y', 'parsed': {'a': 1}},
    {**said, 'content': [{'type': 'refusal', 'refusal': 'no'}]},
    {**said, 'content': None, 'tool_calls': [call('{"a": [1]}'), call('')]},
    {'role': 'tool', 'tool_call_id': 'c', 'content': '7'},
    {**said, 'content': 'z', 'reasoning_content': 'r', 'tool_calls': []},
  ]).messages
  assert [message['content'] for message in found] == [
    'x', '', '', '', 'no', 'y', 'no', '', '7', 'z']
  calls = [{'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}
           for arguments in ({'a': [1]}, {})]
  assert found[7] == {'role': 'assistant', 'content': '', 'tool_calls': calls}
  assert found[8] == {'role': 'tool', 'content': '7', 'tool_call_id': 'c'}
  assert found[9] == {'role': 'assistant', 'content': 'z', 'reasoning_content': 'r'}
  assert all(set(message) == {'role', 'content'} for message in found[:7])


def test_response_formats():
  assert chat(response_format={'type': 'text'}).text_schema is None
  assert chat(response_format={'type': 'json_object'}).text_schema == {'type': 'object'}
  schema = {'type': 'object', 'properties': {}}
  form = {'type': 'json_schema', 'json_schema': {'name': 'a', 'strict': True, 'schema': schema}}
  assert chat(response_format=form).text_schema == schema


def test_embeddings_and_tokens():
  def embedding(**changes):
    return read(protocol.EmbeddingRequest, {'model': 'm', 'input': 'a'} | changes)

  assert embedding().input == ['a'] and embedding().encoding_format == 'float'
  assert embedding(input=[[1], [2]], encoding_format='base64').input == [[1], [2]]
  for name, value in (('dimensions', 5), ('encoding_format', 'int8'), ('input', ['a'] * 5),
                      ('input', None), ('input', '')):
    assert refusal(embedding, **{name: value}).param == name
  asked = read(protocol.TokenizeRequest, {'prompt': ''})
  assert (asked.model, asked.prompt, asked.add_special_tokens) == (None, '', True)
  assert read(protocol.DetokenizeRequest, {'tokens': []}).tokens == []
  for tokens in (None, False, 0, '', {}, [300], [-1], [True]):
    assert refusal(read, protocol.DetokenizeRequest, {'tokens': tokens}).param.startswith('tokens')


def test_unknown_fields_have_a_hint():
  assert "did you mean 'temperature'" in refusal(completion, temprature=1).message


def test_keys(tmp_path):
  path = tmp_path / 'keys'
  one, two, three, four, five = (f'{name}-of-sixteen-or-more' for name in 'abcde')
  path.write_text(f'# two people\n{one}\n\n{two}\n')
  keys = read_keys(str(path), {'JAXLLM_API_KEYS': f'{three}, {four}'})
  assert [keys.client(key, '/v1/models') for key in (one, two, three, four)] == [*'1234']
  for wrong in ('', one[:-1], f'{one} ', '# two people', f'{five}\ud800'):
    assert keys.client(wrong, '/v1/models') is None
    assert keys.client(wrong, '/health') == ''
  assert not read_keys(None, {}) and read_keys(None, {}).client('', '/metrics') == ''
  assert read_keys(None, {'JAXLLM_API_KEYS': one}).client(one, '/v1/models') == ''
  for keys_given in (f'{one},fifteen-letters', f'{one},{one}'):
    with pytest.raises(ValueError, match='number 2|twice') as caught:
      read_keys(None, {'JAXLLM_API_KEYS': keys_given})
    assert 'fifteen' not in str(caught.value) and one not in str(caught.value)
  path.write_text('# nothing\n')
  with pytest.raises(ValueError, match='no key'):
    read_keys(str(path), {})
  assert one not in repr(vars(Keys([one], [two])))


def test_metrics_have_a_key_of_their_own(tmp_path):
  one, two = 'a-key-of-a-client', 'the-key-of-metrics'
  path = tmp_path / 'metrics'
  path.write_text(two)
  for given, metrics, opened in [
      ({}, None, {'/metrics': ['', one], '/v1/models': ['', one]}),
      ({'JAXLLM_API_KEYS': one}, None, {'/metrics': [], '/v1/models': [one]}),
      ({'JAXLLM_API_KEYS': one}, str(path), {'/metrics': [two], '/v1/models': [one]}),
      ({}, str(path), {'/metrics': [two], '/v1/models': ['', one, two]})]:
    keys = read_keys(None, given, metrics)
    for route, right in opened.items():
      for key in ('', one, two):
        assert (keys.client(key, route) is not None) == (key in right or right == ['', one]), route


def test_wrong_keys_wait_longer_and_longer(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(access.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(access, 'MAX_ADDRESSES', 2)
  wrong = access.WrongKeys()
  assert [wrong.delay('a') for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2, 3.2]
  assert wrong.delay('b') == 0.1
  now[0] += 601
  assert wrong.delay('a') == 0.1
  assert wrong.delay('c') == 0.1 and len(wrong._tries) == 2


def test_metrics_are_cumulative():
  statistics = Statistics(4, 2, 1, 7, 8, 0, 9, 20, 80, 5, {'stop': 3})
  metrics = Metrics(types.SimpleNamespace(statistics=lambda: statistics), lambda: 2)
  for seconds in (0.001, 0.02, 0.02, 1000.0):
    metrics.first_token_seconds.observe(seconds)
  metrics.requests.labels('/x', 200).inc(2)
  text = metrics.text().decode()
  name = 'jaxllm_time_to_first_token_seconds'
  for line in (f'{name}_bucket{{le="0.005"}} 1', f'{name}_bucket{{le="0.025"}} 3',
               f'{name}_bucket{{le="600.0"}} 3', f'{name}_bucket{{le="+Inf"}} 4',
               f'{name}_sum 1000.041', f'{name}_count 4', '# TYPE jaxllm_slots gauge',
               'jaxllm_requests_active 2', 'jaxllm_batch_fill_ratio 0.5',
               '# TYPE jaxllm_decode_steps_total counter', 'jaxllm_decode_steps_total 9',
               'jaxllm_requests_total{route="/x",status="200"} 2',
               'jaxllm_rows_finished_total{reason="stop"} 3'):
    assert f'{line}\n' in text.replace('.0\n', '\n')
