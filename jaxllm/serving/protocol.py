"""What requests of OpenAI's API mean here: every field is checked, and none is ignored.

`completion`, `chat`, `embedding`, `tokenize` and `detokenize` read the body of a request. A field
that is not in their tables is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxllm.generation.sampling import SamplingConfig
from jaxllm.serving import fields, messages
from jaxllm.serving.errors import invalid
from jaxllm.serving.fields import REQUIRED, Check, Field, Unsupported
from jaxllm.serving.limits import LimitsConfig

MAX_STOPS = 4
MAX_CHOICES = 128
LARGEST = 2**31 - 1

# A text, or the token ids themselves.
Prompt = str | tuple[int, ...]
# 'json_object', or a schema.
Form = Literal['json_object'] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Generation:
  """What completions and chats have in common.

  Attributes:
    model: which model was asked for.
    sampling: how tokens are drawn; the number of tokens is in `max_tokens`.
    max_tokens: of each choice; None: as many as there is room for.
    num_choices: continuations of each prompt.
    seed: of the first choice; None: a new one each time.
    stop: strings that end a choice.
    num_top: alternatives that come with each token; None: no log-probabilities.
    form: JSON that the text must be.
    stream: whether the text is sent while it grows.
    include_usage: whether the stream ends with the numbers of tokens.
  """

  model: str
  sampling: SamplingConfig
  max_tokens: int | None
  num_choices: int
  seed: int | None
  stop: tuple[str, ...]
  num_top: int | None
  form: Form | None
  stream: bool
  include_usage: bool


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
  """Prompts to continue; `echo`: each text begins with its prompt."""

  generation: Generation
  prompts: tuple[Prompt, ...]
  echo: bool


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  """A conversation to continue, with tools and variables for the template."""

  generation: Generation
  messages: tuple[dict[str, Any], ...]
  tools: list[dict[str, Any]]
  variables: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
  """Texts to embed; `encoding`: as a list of numbers, or as the bytes of float32."""

  model: str
  inputs: tuple[Prompt, ...]
  encoding: Literal['float', 'base64']


def completion(body: Mapping[str, Any], limits: LimitsConfig, vocab_size: int) -> CompletionRequest:
  """Read the body of `POST /v1/completions`.

  Args:
    body: from `fields.parse`.
    limits: what is accepted.
    vocab_size: of the model.

  Raises:
    ApiError: a field is unknown or its value is not accepted.
  """
  table = _sampling_fields(limits, vocab_size) | {
    'prompt': Field(_prompts(limits.max_rows, vocab_size), REQUIRED),
    'max_tokens': Field(fields.integer(1, LARGEST), 16),
    'logprobs': Field(fields.integer(0, 5)),
    'echo': Field(fields.boolean, False),
  }
  values = fields.read(body, table, _UNSUPPORTED | _UNSUPPORTED_COMPLETION)
  return CompletionRequest(
    _generation(values, values['max_tokens'], values['logprobs']), values['prompt'],
    values['echo'])


def chat(body: Mapping[str, Any], limits: LimitsConfig, vocab_size: int) -> ChatRequest:
  """Read the body of `POST /v1/chat/completions`; arguments and errors as `completion`."""
  table = _sampling_fields(limits, vocab_size) | {
    'messages': Field(messages.messages, REQUIRED),
    'tools': Field(messages.tools, []),
    'tool_choice': Field(_tool_choice),
    'parallel_tool_calls': Field(fields.boolean, True),
    'chat_template_kwargs': Field(messages.variables, {}),
    'reasoning_effort': Field(fields.one_of(*_EFFORTS)),
    'max_tokens': Field(fields.integer(1, LARGEST)),
    'max_completion_tokens': Field(fields.integer(1, LARGEST)),
    'logprobs': Field(fields.boolean, False),
    'top_logprobs': Field(fields.integer(0, 20)),
  }
  values = fields.read(body, table, _UNSUPPORTED | _UNSUPPORTED_CHAT)
  lengths = {values['max_tokens'], values['max_completion_tokens']} - {None}
  if len(lengths) > 1:
    raise invalid('max_tokens', 'differs from max_completion_tokens; give one of them')
  if values['tools'] and not values['parallel_tool_calls']:
    raise invalid('parallel_tool_calls', 'the model decides how many tools it calls; leave it out')
  if values['top_logprobs'] and not values['logprobs']:
    raise invalid('top_logprobs', 'needs logprobs=true')
  num_top = (values['top_logprobs'] or 0) if values['logprobs'] else None
  effort = values['reasoning_effort']
  variables = {} if effort is None else {'reasoning_effort': effort}
  if effort == 'none':
    variables['enable_thinking'] = False
  return ChatRequest(
    _generation(values, next(iter(lengths), None), num_top), values['messages'],
    [] if values['tool_choice'] == 'none' else values['tools'],
    variables | values['chat_template_kwargs'])


def embedding(body: Mapping[str, Any], limits: LimitsConfig, vocab_size: int) -> EmbeddingRequest:
  """Read the body of `POST /v1/embeddings`; arguments and errors as `completion`."""
  values = fields.read(body, {
    'model': Field(fields.text(256), REQUIRED),
    'input': Field(_prompts(limits.max_inputs, vocab_size), REQUIRED),
    'encoding_format': Field(fields.one_of('float', 'base64'), 'float'),
    'user': Field(fields.any_text),
  }, {'dimensions': Unsupported('embeddings have the width of the model; leave it out')})
  return EmbeddingRequest(values['model'], values['input'], values['encoding_format'])


def tokenize(body: Mapping[str, Any]) -> tuple[str | None, str, bool]:
  """Read the body of `POST /tokenize`: model, text, whether the model's first token is added."""
  values = fields.read(body, {
    'model': Field(fields.text(256)),
    'prompt': Field(fields.any_text, REQUIRED),
    'add_special_tokens': Field(fields.boolean, True),
  })
  return values['model'], values['prompt'], values['add_special_tokens']


def detokenize(
  body: Mapping[str, Any], vocab_size: int
) -> tuple[str | None, tuple[int, ...]]:
  """Read the body of `POST /detokenize`: model, token ids."""
  values = fields.read(body, {
    'model': Field(fields.text(256)),
    'tokens': Field(lambda name, value: () if value == [] else _ids(name, value, vocab_size),
                    REQUIRED),
  })
  return values['model'], values['tokens']


def _sampling_fields(limits: LimitsConfig, vocab_size: int) -> dict[str, Field]:
  return {
    'model': Field(fields.text(256), REQUIRED),
    'temperature': Field(fields.number(0, 2), 1.0),
    'top_p': Field(fields.number(0, 1, above=True), 1.0),
    'top_k': Field(lambda name, value: max(fields.integer(-1, LARGEST)(name, value), 0), 0),
    'min_p': Field(fields.number(0, 1), 0.0),
    'repetition_penalty': Field(fields.number(0, 100, above=True), 1.0),
    'presence_penalty': Field(fields.number(-2, 2), 0.0),
    'frequency_penalty': Field(fields.number(-2, 2), 0.0),
    'logit_bias': Field(_logit_bias(limits.max_biases, vocab_size), ()),
    'n': Field(fields.integer(1, MAX_CHOICES), 1),
    'seed': Field(fields.integer(-(2**63), 2**63 - 1)),
    'stop': Field(_stop(limits.max_stop_characters), ()),
    'response_format': Field(_response_format),
    'stream': Field(fields.boolean, False),
    'stream_options': Field(_stream_options),
    # What follows says who asks and why, or makes the answer come sooner, and does not change it.
    'user': Field(fields.any_text),
    'safety_identifier': Field(fields.any_text),
    'metadata': Field(fields.obj),
    'prompt_cache_key': Field(fields.any_text),
    'prompt_cache_retention': Field(fields.any_text),
    'prompt_cache_options': Field(fields.obj),
    'prediction': Field(fields.obj),
  }


def _generation(values: Mapping[str, Any], max_tokens: int | None, num_top: int | None
                ) -> Generation:
  if values['stream_options'] is not None and not values['stream']:
    raise invalid('stream_options', 'needs stream=true')
  names = ('temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'presence_penalty',
           'frequency_penalty', 'logit_bias')
  return Generation(
    values['model'], SamplingConfig(**{name: values[name] for name in names}), max_tokens,
    values['n'], values['seed'], values['stop'], num_top, values['response_format'],
    values['stream'], bool(values['stream_options']),
  )


def _prompts(most: int, vocab_size: int) -> Check:
  """Accept a text, token ids, or a list of either."""
  what = 'a string, a list of token ids, or a list of these'

  def check(name: str, value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
      return (fields.text()(name, value),)
    items = fields.array(name, value, what)
    if isinstance(items[0], int):
      return (_ids(name, items, vocab_size),)
    fields.array(name, value, what, most)
    kind = type(items[0])
    prompts: list[Prompt] = []
    for index, item in enumerate(items):
      at = f'{name}[{index}]'
      if kind not in (str, list) or type(item) is not kind:
        raise invalid(at, f'{fields.shown(item)} where {what} is needed, all of one kind')
      prompts.append(fields.text()(at, item) if kind is str else _ids(at, item, vocab_size))
    return tuple(prompts)

  return check


def _ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
  check = fields.integer(0, vocab_size - 1)
  items = fields.array(name, value, 'a list of token ids')
  return tuple(check(f'{name}[{index}]', item) for index, item in enumerate(items))


def _stop(max_characters: int) -> Check:
  def check(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
      return (fields.text(max_characters)(name, value),)
    if value == []:
      return ()
    items = fields.array(name, value, f'a string or a list of up to {MAX_STOPS}', MAX_STOPS)
    return tuple(fields.text(max_characters)(f'{name}[{index}]', item)
                 for index, item in enumerate(items))

  return check


def _logit_bias(most: int, vocab_size: int) -> Check:
  in_range, bias = fields.integer(0, vocab_size - 1), fields.number(-100, 100)

  def check(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    entries = fields.obj(name, value)
    if len(entries) > most:
      raise invalid(name, f'{len(entries)} entries are too many; {most} are accepted')
    pairs = []
    for key, item in entries.items():
      at = f'{name}.{key[:32]}'
      if not (key.isascii() and key.removeprefix('-').isdigit() and len(key) < 20):
        raise invalid(at, 'the name of an entry is a token id, as a string of digits')
      pairs.append((in_range(at, int(key)), bias(at, item)))
    if len({token for token, _ in pairs}) < len(pairs):
      raise invalid(name, 'an id comes twice')
    return tuple(pairs)

  return check


def _response_format(name: str, value: Any) -> Form | None:
  kind = fields.obj(name, value).get('type')
  fields.one_of('text', 'json_object', 'json_schema')(f'{name}.type', kind)
  table = {'type': Field(fields.any_text, REQUIRED)}
  if kind == 'json_schema':
    table['json_schema'] = Field(fields.obj, REQUIRED)
  values = fields.read(value, table, where=name)
  if kind != 'json_schema':
    return 'json_object' if kind == 'json_object' else None
  return fields.read(values['json_schema'], {
    'name': Field(fields.text(64), REQUIRED),
    'description': Field(fields.text()),
    # The mask follows the schema either way.
    'strict': Field(fields.boolean),
    'schema': Field(fields.obj, REQUIRED),
  }, where=f'{name}.json_schema')['schema']


def _tool_choice(name: str, value: Any) -> str:
  if value not in ('auto', 'none'):
    raise invalid(name, "the model decides whether it calls a tool; send 'auto' or 'none'")
  return value


def _stream_options(name: str, value: Any) -> bool:
  values = fields.read(
    fields.obj(name, value), {'include_usage': Field(fields.boolean, False)},
    {'include_obfuscation': Unsupported('leave it out', (False,))}, where=name)
  return values['include_usage']


_LEAVE_OUT = Unsupported('leave it out')
_UNSUPPORTED = {
  'store': Unsupported('nothing is stored here; send false or leave it out', (False,)),
  'service_tier': Unsupported('there is one; leave it out', ('auto', 'default')),
}
_UNSUPPORTED_COMPLETION = {
  'best_of': Unsupported('use n, and choose among the choices by their logprobs', (1,)),
  'suffix': Unsupported('text is only continued; leave it out'),
  'messages': Unsupported('send a conversation to /v1/chat/completions'),
  'max_completion_tokens': Unsupported('here it is max_tokens'),
  'top_logprobs': Unsupported('here logprobs is their number, 0 to 5'),
}
_EFFORTS = ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max')
_UNSUPPORTED_CHAT = {
  'functions': Unsupported('send tools', ([],)),
  'function_call': Unsupported('send tool_choice', ('none',)),
  'audio': Unsupported('text is all there is; leave it out'),
  'modalities': Unsupported("text is all there is; send ['text'] or leave it out", (['text'],)),
  'moderation': _LEAVE_OUT,
  'verbosity': Unsupported('ask for it in a message', ('medium',)),
  'web_search_options': _LEAVE_OUT,
  'prompt': Unsupported('send a text to /v1/completions'),
  'echo': Unsupported('only /v1/completions echoes'),
  'suffix': Unsupported('text is only continued; leave it out'),
  'best_of': Unsupported('use n, and choose among the choices by their logprobs'),
}
