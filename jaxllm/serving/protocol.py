"""Requests of OpenAI's API as pydantic models: every field is checked, and none is ignored.

Messages, tools and template variables of conversations come first, then the requests.
`bodies.read` makes them, in the context of `limits` (a `LimitsConfig`) and `vocab_size`.
"""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo

from jaxllm.generation import constraint
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.serving.bodies import Body, Name, String, Text, field_error, unsupported
from jaxllm.serving.programs import MAX_BIASES

# What the server says to the renderer of templates.
_RESERVED = {'messages', 'conversations', 'tokenizer', 'template', 'tools', 'documents',
             'add_generation_prompt'}


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
  try:
    constraint.check_depth(value)
  except ValueError:
    raise field_error(f'nested deeper than {constraint.MAX_DEPTH} levels') from None
  return value


def _unreserved(value: dict[str, Any]) -> dict[str, Any]:
  for name in value.keys() & _RESERVED:
    raise field_error('the server sets it itself; leave it out', name)
  return value


def _decoded(value: Any) -> Any:
  """Return what a string of JSON holds; templates read the arguments of a call so."""
  if not isinstance(value, str):
    raise field_error('Input should be a string of JSON')
  try:
    return json.loads(value or '{}')
  except (ValueError, RecursionError):
    raise field_error('the string is not JSON') from None


ShallowObject = Annotated[dict[str, Any], AfterValidator(_shallow)]
Variables = Annotated[ShallowObject, AfterValidator(_unreserved)]


class _Function(Body):
  name: Name
  description: String = ''
  parameters: ShallowObject = {}
  strict: bool = False


class _Tool(Body):
  type: Literal['function']
  function: _Function


def _tool(value: Any) -> Any:
  """Check a function that the model may call, and return it as it was given."""
  _Tool.model_validate(value)
  return value


Tool = Annotated[Any, PlainValidator(_tool)]


class _TextPart(Body):
  type: Literal['text']
  text: String


class _RefusalPart(Body):
  type: Literal['refusal']
  refusal: String


def _part(value: Any) -> str:
  if isinstance(value, dict) and value.get('type') == 'refusal':
    return _RefusalPart.model_validate(value).refusal
  return _TextPart.model_validate(value).text


_PARTS = pydantic.TypeAdapter(Annotated[
  list[Annotated[str, PlainValidator(_part)]], pydantic.Field(min_length=1)])


def _joined(value: Any) -> Any:
  """Return the text of parts, which follow each other directly."""
  return ''.join(_PARTS.validate_python(value)) if isinstance(value, list) else value


class _Call(Body):
  name: Text
  arguments: Annotated[ShallowObject, BeforeValidator(_decoded)] = {}
  parsed_arguments: Any = pydantic.Field(None, exclude=True)


class _ToolCall(Body):
  id: Text
  type: Literal['function'] = 'function'
  function: _Call


Content = Annotated[String, BeforeValidator(_joined)]


class _Message(Body):
  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: Content
  type: Literal['text'] = 'text'
  name: None = unsupported('write the name into the content')
  function_call: None = unsupported('send tool_calls')
  audio: None = unsupported('leave it out')
  annotations: None = unsupported('leave it out', [])


class _UserMessage(_Message):
  tool_calls: None = unsupported('only the assistant calls tools', [])
  tool_call_id: None = unsupported('only a message of the role tool has one')
  refusal: None = unsupported('leave it out')


class _AssistantMessage(_Message):
  content: Content = ''
  refusal: String = ''
  tool_calls: list[_ToolCall] = []
  tool_call_id: None = unsupported('only a message of the role tool has one')
  reasoning_content: String = ''
  # Of the client's own messages: the content once more.
  parsed: Any = None


class _ToolMessage(_Message):
  tool_call_id: Text
  tool_calls: None = unsupported('only the assistant calls tools', [])
  refusal: None = unsupported('leave it out')


def _message(value: Any) -> dict[str, Any]:
  """Return a message as templates read it: content is always a string."""
  role = value.get('role') if isinstance(value, dict) else None
  if role == 'assistant':
    model: type[_Message] = _AssistantMessage
  else:
    model = _ToolMessage if role == 'tool' else _UserMessage
  message = model.model_validate(value)
  found = message.model_dump(include={'tool_calls', 'tool_call_id', 'reasoning_content'})
  return {'role': 'system' if message.role == 'developer' else message.role,
          'content': message.content or getattr(message, 'refusal', None) or '',
          **{name: item for name, item in found.items() if item}}


Message = Annotated[dict[str, Any], PlainValidator(_message)]


MAX_STOPS, MAX_STOP_CHARACTERS, MAX_CHOICES = 4, 256, 128
LARGEST = 2**31 - 1

T = TypeVar('T')


def _in_vocabulary(token: int, info: ValidationInfo) -> int:
  context: Any = info.context
  if token >= context['vocab_size']:
    raise field_error(f'Input should be less than {context["vocab_size"]}, the vocabulary')
  return token


def _few(value: Any, info: ValidationInfo) -> Any:
  """Bound the number of prompts."""
  context: Any = info.context
  if len(value) > (most := context['limits'].max_rows):
    raise field_error(f'{len(value)} texts are too many; {most} are accepted')
  return value


TokenId = Annotated[int, Field(ge=0), AfterValidator(_in_vocabulary)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
# A text, or the token ids themselves.
Prompt = str | list[int]
_TEXT, _IDS, _TEXTS, _ID_LISTS = (
  pydantic.TypeAdapter[Any](kind, config={'strict': True})
  for kind in (Text, TokenIds, list[Text], list[TokenIds]))


def _prompts(value: Any, info: ValidationInfo) -> list[Prompt]:
  """Read a string, a list of token ids, or a list of either."""
  if isinstance(value, str):
    return [_TEXT.validate_python(value)]
  if isinstance(value, list) and value:
    if isinstance(value[0], int):
      return [_ids(value, info)]
    for kind, adapter in ((str, _TEXTS), (list, _ID_LISTS)):
      if isinstance(value[0], kind):
        return adapter.validate_python(value, context=info.context)
  raise field_error('Input should be a string, a list of token ids, or a list of either')


def _ids(value: Any, info: ValidationInfo) -> list[int]:
  """Read token ids, of which no more are looked at than can be worked on."""
  context: Any = info.context
  most = context['limits'].max_text_bytes
  if isinstance(value, list) and most is not None and len(value) > most:
    raise field_error(f'{len(value)} ids are too many; {most} are accepted')
  return _IDS.validate_python(value, context=context) if value != [] else []


def _listed(value: Any) -> Any:
  return [pydantic.TypeAdapter(Stop).validate_python(value)] if isinstance(value, str) else value


def _spelled_id(key: str) -> int:
  if not re.fullmatch('0|[1-9][0-9]{0,9}', key):
    raise field_error('the name of an entry is a token id, as a string of digits')
  return int(key)


Prompts = Annotated[list[Prompt], PlainValidator(_prompts)]
ModelName = Annotated[Text, Field(max_length=256)]
Length = Annotated[int, Field(ge=1, le=LARGEST)]
# Says who asks and why, or makes the answer come sooner, and does not change it.
Ignored = Annotated[T | None, AfterValidator(lambda _: None)]
BiasKey = Annotated[str, AfterValidator(_spelled_id), AfterValidator(_in_vocabulary)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Effort = Literal['none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max']
Stop = Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]


class _JsonSchema(Body):
  name: Name
  description: String = ''
  # The mask follows the schema either way.
  strict: bool = False
  document: dict[str, Any] = Field(alias='schema')


class _ResponseFormat(Body):
  type: Literal['text', 'json_object', 'json_schema']
  json_schema: _JsonSchema | None = None

  @pydantic.model_validator(mode='after')
  def _check(self) -> '_ResponseFormat':
    if (self.json_schema is None) == (self.type == 'json_schema'):
      raise field_error('needed where type is json_schema, and nowhere else', 'json_schema')
    return self


class _StreamOptions(Body):
  include_usage: bool = False
  include_obfuscation: None = unsupported('leave it out', False)


class ModelRequest(Body):
  """What all requests have in common."""

  model: ModelName | None = None


class GenerationRequest(ModelRequest):
  """What completions and chats have in common."""

  model: ModelName
  temperature: float = Field(1.0, ge=0, le=2)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: Annotated[int, Field(ge=-1, le=LARGEST), AfterValidator(lambda top_k: max(top_k, 0))] = 0
  min_p: float = Field(0.0, ge=0, le=1)
  repetition_penalty: float = Field(1.0, gt=0, le=100)
  presence_penalty: float = Field(0.0, ge=-2, le=2)
  frequency_penalty: float = Field(0.0, ge=-2, le=2)
  logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MAX_BIASES)] = {}
  max_tokens: Length | None = None
  n: int = Field(1, ge=1, le=MAX_CHOICES)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_listed)] = []
  response_format: _ResponseFormat | None = None
  stream: bool = False
  stream_options: _StreamOptions | None = None
  user: Ignored[str] = None
  safety_identifier: Ignored[str] = None
  metadata: Ignored[dict[str, Any]] = None
  prompt_cache_key: Ignored[str] = None
  prompt_cache_retention: Ignored[str] = None
  prompt_cache_options: Ignored[dict[str, Any]] = None
  prediction: Ignored[dict[str, Any]] = None
  store: None = unsupported('nothing is stored here; send false or leave it out', False)
  service_tier: None = unsupported('there is one; leave it out', 'auto', 'default')
  suffix: None = unsupported('text is only continued; leave it out')
  best_of: None = unsupported('use n, and choose among the choices by their logprobs', 1)

  @pydantic.model_validator(mode='after')
  def _check_stream(self) -> 'GenerationRequest':
    if self.stream_options and not self.stream:
      raise field_error('needs stream=true', 'stream_options')
    return self

  @property
  def num_top(self) -> int | None:
    """Alternatives that come with each token; None: no log-probabilities."""
    return None

  @property
  def length(self) -> int | None:
    """Tokens of each choice; None: as many as there is room for."""
    return self.max_tokens

  @property
  def include_usage(self) -> bool:
    """Whether the stream ends with the numbers of tokens."""
    return self.stream_options is not None and self.stream_options.include_usage

  @property
  def sampling(self) -> SamplingConfig:
    """How tokens are sampled; the number of tokens is not among it."""
    names = type(self).model_fields.keys() & SamplingConfig.model_fields.keys() - {'seed'}
    values = {name: getattr(self, name) for name in names}
    return SamplingConfig(**values | {'logit_bias': tuple(self.logit_bias.items())})

  @property
  def text_schema(self) -> dict[str, Any] | None:
    """The JSON Schema of the text; None: any text will do."""
    form = self.response_format
    if form is None or form.type == 'text':
      return None
    return form.json_schema.document if form.json_schema else {'type': 'object'}


class CompletionRequest(GenerationRequest):
  """The body of `POST /v1/completions`."""

  prompt: Annotated[Prompts, AfterValidator(_few)]
  max_tokens: Length | None = 16
  logprobs: int | None = Field(None, ge=0, le=5)
  echo: bool = False
  messages: None = unsupported('send a conversation to /v1/chat/completions')
  max_completion_tokens: None = unsupported('here it is max_tokens')
  top_logprobs: None = unsupported('here logprobs is their number, 0 to 5')

  @property
  def num_top(self) -> int | None:  # noqa: D102
    return self.logprobs


class ChatCompletionRequest(GenerationRequest):
  """The body of `POST /v1/chat/completions`."""

  messages: list[Message] = Field(min_length=1)
  tools: list[Tool] = []
  tool_choice: Literal['auto', 'none'] = 'auto'
  parallel_tool_calls: bool = True
  chat_template_kwargs: Variables = {}
  reasoning_effort: Effort | None = None
  max_completion_tokens: Length | None = None
  logprobs: bool = False
  top_logprobs: int = Field(0, ge=0, le=20)
  functions: None = unsupported('send tools', [])
  function_call: None = unsupported('send tool_choice', 'none')
  audio: None = unsupported('text is all there is; leave it out')
  modalities: None = unsupported("text is all there is; send ['text'] or leave it out", ['text'])
  moderation: None = unsupported('leave it out')
  verbosity: None = unsupported('ask for it in a message', 'medium')
  web_search_options: None = unsupported('leave it out')
  prompt: None = unsupported('send a text to /v1/completions')
  echo: None = unsupported('only /v1/completions echoes')

  @pydantic.model_validator(mode='after')
  def _check_chat(self) -> 'ChatCompletionRequest':
    if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
      raise field_error('differs from max_completion_tokens; give one of them', 'max_tokens')
    if self.tools and not self.parallel_tool_calls:
      raise field_error('the model decides how many tools it calls; leave it out',
                        'parallel_tool_calls')
    if self.top_logprobs and not self.logprobs:
      raise field_error('needs logprobs=true', 'top_logprobs')
    return self

  @property
  def num_top(self) -> int | None:  # noqa: D102
    return self.top_logprobs if self.logprobs else None

  @property
  def length(self) -> int | None:  # noqa: D102
    return self.max_tokens or self.max_completion_tokens

  @property
  def variables(self) -> dict[str, Any]:
    """Variables of the chat template, `tools` among them."""
    effort = {} if self.reasoning_effort is None else {'reasoning_effort': self.reasoning_effort}
    quiet = {'enable_thinking': False} if self.reasoning_effort == 'none' else {}
    tools = {'tools': self.tools} if self.tools and self.tool_choice == 'auto' else {}
    return effort | quiet | self.chat_template_kwargs | tools


class EmbeddingRequest(ModelRequest):
  """The body of `POST /v1/embeddings`."""

  model: ModelName
  input: Annotated[Prompts, AfterValidator(_few)]
  encoding_format: Literal['float', 'base64'] = 'float'
  user: Ignored[str] = None
  dimensions: None = unsupported('embeddings have the width of the model; leave it out')


class TokenizeRequest(ModelRequest):
  """The body of `POST /tokenize`."""

  prompt: String
  add_special_tokens: bool = True


class DetokenizeRequest(ModelRequest):
  """The body of `POST /detokenize`."""

  tokens: Annotated[list[int], PlainValidator(_ids)]
