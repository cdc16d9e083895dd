"""Conversations as people keep them, as lists of messages {'role', 'content'}.

A message of the assistant may have a `weight` besides: how much it counts in the loss.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxllm.tasks import fields

Messages = list[dict[str, Any]]

ROLES = {
  **{role: role for role in ('system', 'user', 'assistant')},
  **{'developer': 'system', 'human': 'user'},
  **dict.fromkeys(('gpt', 'chatgpt', 'bot', 'model'), 'assistant'),
}
"""Role in the data, in small letters -> role."""

_NAMES = {'from': 'role', 'value': 'content', 'train': 'weight', 'loss': 'weight'}
_WRITTEN = re.compile(r'''\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:''')


def messages(value: Any, name: str) -> Messages:
  """Read a conversation, as the readers of `fields` do; a message with unread keys is refused."""
  return fields.listed(_message, 1, "messages {'role', 'content'}")(value, name)


def _message(value: Any, name: str) -> dict[str, Any]:
  if not isinstance(value, Mapping):
    raise fields.refused(value, name, "a message {'role', 'content'}")
  # Arrow gives every message the keys of all, null where there was none.
  pairs = [(_NAMES.get(str(key), str(key)), item) for key, item in value.items()
           if item is not None and item != []]
  found = dict(pairs)
  if len(found) < len(pairs):
    raise fields.refused(value, name, 'one role, one content and one weight')
  if unread := sorted(found.keys() - {'role', 'content', 'weight'}):
    raise fields.refused(value, name, f'a message without {", ".join(unread)}, which is not read: '
                         'leave the conversation out, or write it into the content')
  role = ROLES.get(str(found.get('role')).lower())
  if role is None:
    raise fields.refused(found.get('role'), f'{name}.role', f'one of {", ".join(ROLES)}')
  read = fields.any_text if role == 'system' else fields.text
  message = {'role': role, 'content': read(_content(found), f'{name}.content')}
  weight = found.get('weight', role == 'assistant')
  if not isinstance(weight, bool | int | float) or not 0 <= weight <= (role == 'assistant'):
    raise fields.refused(weight, f'{name}.weight', '0 to 1, or true or false, of the assistant, '
                         'and 0 or false of others, who are not trained on')
  return message if weight == (role == 'assistant') else {**message, 'weight': float(weight)}


def _content(message: Mapping[str, Any]) -> Any:
  """Return the content; parts that are text alone are joined."""
  content = message.get('content')
  if isinstance(content, list) and content and all(
      isinstance(part, Mapping) and part.get('type') == 'text' and isinstance(part.get('text'), str)
      for part in content):
    return ''.join(part['text'] for part in content)
  return content


def shape(record: Mapping[str, Any]) -> Mapping[str, Any]:
  """Return a record with `messages`, from whichever form it has.

  These are `messages`; ShareGPT's `conversations`; `prompt` and `completion`, texts or messages, of
  which the completion is trained on; Alpaca's `instruction`, `input` and `output`.

  Raises:
    ValueError: a field is refused, or the record holds what would be lost.
  """
  start = opening(record)
  if name := next((n for n in ('messages', 'conversations', 'conversation')
                   if record.get(n) is not None), ''):
    found = messages(record[name], name)
  elif 'prompt' in record and 'completion' in record:
    found = asked(record['prompt'], 'prompt') + turns(
      record['completion'], 'completion', 'assistant')
  elif 'instruction' in record and 'output' in record:
    extra = fields.optional(fields.text)(record.get('input'), 'input')
    said = fields.text(record['instruction'], 'instruction') + (f'\n\n{extra}' if extra else '')
    found = turns(said, '', 'user') + turns(record['output'], 'output', 'assistant')
  else:
    return record
  return {**record, 'messages': found if found[:1] == start else start + found}


def opening(record: Mapping[str, Any]) -> Messages:
  """Return the message of a record's `system` or `system_prompt`, which stands first.

  A record with tools or earlier turns in fields of their own is refused.
  """
  for name in ('tools', 'functions', 'history'):
    if fields.from_json(record.get(name)):
      raise fields.refused(record[name], name, 'none: tools and turns of other fields are not read')
  texts = (fields.optional(fields.text)(record.get(name), name)
           for name in ('system', 'system_prompt'))
  return [{'role': 'system', 'content': text} for text in texts if text]


def asked(value: Any, name: str) -> Messages:
  """Read what is answered, of which nothing is trained on: messages, or a text of the user."""
  return [{**message, 'weight': 0.0} if message['role'] == 'assistant' else message
          for message in turns(value, name, 'user')]


def turns(value: Any, name: str, role: str) -> Messages:
  """Read messages, or a text as one message of a role."""
  return messages(value, name) if are_messages(value) else [
    {'role': role, 'content': fields.text(value, name)}]


def are_messages(value: Any) -> bool:
  """Return whether a value is a list, or a text that writes messages, as CSV has them."""
  return isinstance(value, list) or isinstance(value, str) and bool(_WRITTEN.match(value))
