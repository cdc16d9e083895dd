"""Messages, tools and template variables of a conversation: from OpenAI's API to chat templates."""

import json
from typing import Any

from jaxllm.generation import json_schema
from jaxllm.serving import fields
from jaxllm.serving.errors import invalid
from jaxllm.serving.fields import REQUIRED, Field, Unsupported

_ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant',
          'tool': 'tool'}
_LEAVE_OUT = Unsupported('leave it out')
_UNSUPPORTED = {
  'name': Unsupported('write the name into the content'),
  'tool_calls': Unsupported('only the assistant calls tools', ([],)),
  'tool_call_id': Unsupported('only a message of the role tool has one'),
  'function_call': Unsupported('send tool_calls'),
  'refusal': _LEAVE_OUT,
  'audio': _LEAVE_OUT,
  'annotations': Unsupported('leave it out', ([],)),
}
# What the server says to the renderer of templates.
_RESERVED = {'messages', 'conversations', 'tokenizer', 'template', 'tools', 'documents',
             'add_generation_prompt', 'cpu_seconds', 'memory_bytes'}


def messages(name: str, value: Any) -> tuple[dict[str, Any], ...]:
  """Return the messages of a conversation as templates read them: content is always a string."""
  items = fields.array(name, value, 'a list of messages')
  return tuple(_message(f'{name}[{index}]', item) for index, item in enumerate(items))


def tools(name: str, value: Any) -> list[dict[str, Any]]:
  """Return functions that the model may call, as they are given."""
  if not isinstance(value, list):
    raise invalid(name, f'{fields.shown(value)} is not a list of tools')
  for index, tool in enumerate(value):
    at = f'{name}[{index}]'
    function = fields.read(fields.obj(at, tool), {
      'type': Field(fields.one_of('function'), REQUIRED), 'function': Field(fields.obj, REQUIRED),
    }, where=at)['function']
    fields.read(function, {
      'name': Field(fields.text(64), REQUIRED), 'description': Field(fields.any_text),
      'parameters': Field(_shallow_object), 'strict': Field(fields.boolean),
    }, where=f'{at}.function')
  return value


def variables(name: str, value: Any) -> dict[str, Any]:
  """Return variables of a template, as `enable_thinking`."""
  for key in _shallow_object(name, value):
    if key in _RESERVED:
      raise invalid(f'{name}.{key}', 'the server sets it itself; leave it out')
  return value


def _message(name: str, value: Any) -> dict[str, Any]:
  role = fields.obj(name, value).get('role')
  table = {
    'role': Field(fields.one_of(*_ROLES), REQUIRED),
    'content': Field(_content, REQUIRED),
    'type': Field(fields.one_of('text')),
  }
  if role == 'assistant':
    table |= {
      'content': Field(_content, ''),
      'refusal': Field(fields.any_text, ''),
      'tool_calls': Field(_tool_calls),
      'reasoning_content': Field(fields.any_text),
      # Of the client's own messages: the content once more.
      'parsed': Field(lambda at, parsed: parsed),
    }
  elif role == 'tool':
    table['tool_call_id'] = Field(fields.text(), REQUIRED)
  values = fields.read(value, table, _UNSUPPORTED, where=name)
  more = {key: values[key] for key in ('tool_calls', 'tool_call_id', 'reasoning_content')
          if values.get(key)}
  content = values['content'] or values.get('refusal', '')
  return {'role': _ROLES[values['role']], 'content': content, **more}


def _content(name: str, value: Any) -> str:
  """Return the text of a message, whose parts follow each other directly."""
  if isinstance(value, str):
    return fields.valid_text(name, value)
  texts = []
  for index, part in enumerate(fields.array(name, value, 'a string or a list of parts')):
    at = f'{name}[{index}]'
    kind = fields.one_of('text', 'refusal')(f'{at}.type', fields.obj(at, part).get('type'))
    texts.append(fields.read(part, {
      'type': Field(fields.any_text, REQUIRED), kind: Field(fields.any_text, REQUIRED),
    }, where=at)[kind])
  return ''.join(texts)


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
  """Return calls whose arguments are objects, as templates read them, and not JSON."""
  if not isinstance(value, list):
    raise invalid(name, f'{fields.shown(value)} is not a list of tool calls')
  return [_tool_call(f'{name}[{index}]', call) for index, call in enumerate(value)]


def _tool_call(name: str, value: Any) -> dict[str, Any]:
  call = fields.read(fields.obj(name, value), {
    'id': Field(fields.text(), REQUIRED), 'type': Field(fields.one_of('function'), 'function'),
    'function': Field(fields.obj, REQUIRED),
  }, where=name)
  at = f'{name}.function'
  function = fields.read(call['function'], {
    'name': Field(fields.text(), REQUIRED), 'arguments': Field(fields.any_text, '{}'),
    'parsed_arguments': Field(lambda at, parsed: parsed),
  }, where=at)
  try:
    arguments = json.loads(function['arguments'] or '{}')
  except (ValueError, RecursionError):
    raise invalid(f'{at}.arguments', 'the string is not JSON') from None
  return {**call, 'function': {'name': function['name'],
                               'arguments': _shallow_object(f'{at}.arguments', arguments)}}


def _shallow_object(name: str, value: Any) -> dict[str, Any]:
  try:
    json_schema.check_depth(fields.obj(name, value))
  except ValueError:
    raise invalid(name, f'nested deeper than {json_schema.MAX_DEPTH} levels') from None
  return value
