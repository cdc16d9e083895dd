"""Messages, tools and template variables of a conversation: from OpenAI's API to chat templates."""

import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, PlainValidator

from jaxllm.generation import json_schema
from jaxllm.serving.bodies import Body, Name, String, Text, field_error, unsupported

# What the server says to the renderer of templates.
_RESERVED = {'messages', 'conversations', 'tokenizer', 'template', 'tools', 'documents',
             'add_generation_prompt', 'cpu_seconds', 'memory_bytes'}


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
  try:
    json_schema.check_depth(value)
  except ValueError:
    raise field_error(f'nested deeper than {json_schema.MAX_DEPTH} levels') from None
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
