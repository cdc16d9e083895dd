"""Chat: messages become segments in which only what the assistant says has weight.

Conversations are lists of messages {'role', 'content'}, however people keep them; a message of the
assistant may have a `weight` besides: how much it counts in the loss.

A template is any program that writes a conversation after its beginning, `ChatTemplate` or a
model's own. What a model is asked is what it writes before an answer, with the assistant's turn
opened; the rest of what it writes up to the answer's end is learnt. Where it writes earlier turns
otherwise, or gives an answer no end, there is one sequence a turn.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from jaxllm.config import Config
from jaxllm.data.tokenizer_settings import StandIns
from jaxllm.generation.chat import without_oldest
from jaxllm.tasks import base, fields, language_modeling
from jaxllm.tasks.records import RecordsConfig, RecordSource

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


Message = Mapping[str, Any]
# A code point that never stands for a character.
_STAND_IN = '\ufdd0'


class WrittenTemplate(NamedTuple):
  """A template of which only these parts are known.

  Attributes:
    render: (conversations, open_turn) -> texts, with `open_turn` up to where the assistant begins.
    controls: texts that are single tokens where the template writes them; contents only spell them.
    stops: the controls that end an answer; None: whatever the template writes after it does.
  """

  render: Callable[..., Sequence[str]]
  controls: tuple[str, ...] = ()
  stops: Container[str] | None = None


class ChatTemplate(Config):
  """How messages become text: `prefix`, content and `suffix` of each; the defaults are ChatML.

  {role} stands for the role of the message.
  """

  prefix: str = '<|im_start|>{role}\n'
  """Before a message; the assistant's alone is what makes it answer."""
  suffix: str = '<|im_end|>\n'
  """After a message."""
  names: tuple[tuple[str, str], ...] = ()
  """(role, how the template spells it) pairs; other roles keep their names."""
  controls: tuple[str, ...] = ('<|im_start|>', '<|im_end|>')
  """Texts in prefix and suffix that are single tokens, where the tokenizer has them."""

  @property
  def stops(self) -> None:
    """The suffix ends an answer."""

  def render(
    self, conversations: Sequence[Sequence[Message]], open_turn: bool = False
  ) -> list[str]:
    """Return the texts of conversations, with `open_turn` up to where the assistant begins."""
    end: list[Message] = [{'role': 'assistant', 'content': _STAND_IN}] if open_turn else []
    texts = (''.join(map(self._turn, [*messages, *end])) for messages in conversations)
    return [text.rpartition(_STAND_IN)[0] if open_turn else text for text in texts]

  def jinja(self, with_bos: bool) -> str:
    """Return the same as the chat templates of Hugging Face, which are programs.

    Args:
      with_bos: whether the texts begin with BOS.
    """
    role = "m['role']"
    if self.names:
      pairs = ', '.join(f'{_quoted(name)}: {_quoted(spelled)}' for name, spelled in self.names)
      role = f"({{{pairs}}}.get({role}) or {role})"
    prefix = f' ~ {role} ~ '.join(map(_quoted, self.prefix.split('{role}')))
    opened, = self.render([[]], open_turn=True)
    return (
      ('{{ bos_token }}' if with_bos else '') + '{% for m in messages %}'
      f"{{{{ {prefix} ~ m['content'] ~ {_quoted(self.suffix)} }}}}" '{% endfor %}'
      f'{{% if add_generation_prompt %}}{{{{ {_quoted(opened)} }}}}{{% endif %}}')

  def _turn(self, message: Message) -> str:
    role = dict(self.names).get(message['role']) or message['role']
    return self.prefix.replace('{role}', role) + message['content'] + self.suffix


Template = ChatTemplate | WrittenTemplate


def _quoted(text: str) -> str:
  """Return a literal of Jinja."""
  return "'" + text.encode('unicode_escape').decode().replace("'", "\\'") + "'"


PLAIN = ChatTemplate(
  prefix='{role}:\n', suffix='\n\n', names=(('user', 'User'), ('assistant', 'Assistant')),
  controls=())
"""For a tokenizer without chat tokens."""


class Chat(base.TaskConfig):
  """Say what the assistant says in `messages`.

  The default data are a chat bot's conversations.
  """

  kind: Literal['chat'] = 'chat'
  """'chat'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:chatterbot-corpus/english'),), group='question')
  """Records with `messages`: a list of {'role', 'content'}, of the assistant's with or without a
  `weight`; or as `conversations`, `prompt` and `completion`, or `instruction` and `output`."""
  template: ChatTemplate | None = ChatTemplate()
  """How they become text; None: by the model's own template."""
  max_new_tokens: int = pydantic.Field(default=256, gt=0)
  """Most tokens of an answer."""
  stop: str | None = None
  """A generated answer ends before this text; None: only with the end of the turn."""


def example(config: Chat, record: base.Record) -> base.Example:
  """Return the example of a record by a template that is not the model's own; see `examples`."""
  if config.template is None:
    raise ValueError("template=None: what a chat says is known only together with a model's own "
                     'template; see tasks.chat.examples')
  return examples([record], config.template)[0]


def examples(records: Sequence[base.Record], template: Template) -> list[base.Example]:
  """Return the examples of records by any template, such as a model's own; see `segments`."""
  found = segments([record['messages'] for record in records], template)
  return [base.Example(one, None, record) for one, record in zip(found, records, strict=True)]


def fitting(
  records: Sequence[base.Record], template: Template, too_long: Callable[[base.Example], bool]
) -> list[base.Example]:
  """Return the examples of records, those that are too long without their oldest exchanges."""
  found = examples(records, template)
  left = {i: list(records[i]['messages']) for i, one in enumerate(found) if too_long(one)}
  while left:
    left = {i: shorter for i, messages in left.items()
            if (shorter := without_oldest(messages))}
    again = examples([{'messages': messages} for messages in left.values()], template)
    for i, one in zip(left, again, strict=True):
      found[i] = one._replace(record=records[i])
    left = {i: messages for i, messages in left.items() if too_long(found[i])}
  return found


def segments(
  conversations: Sequence[Sequence[Message]], template: Template
) -> list[tuple[base.Segment, ...]]:
  """Return conversations as segments; the assistant's contents and their ends have weight.

  An answer ends with the first of the template's stops after it, or, where no stop is known, with
  what is written after it but for white space; with EOS where there is no such end.

  Args:
    conversations: lists of messages {'role', 'content'}; the assistant's may have a `weight`.
    template: called twice.

  Returns:
    For each, one sequence or several: see `CONVERSATION`.

  Raises:
    ValueError: a message is not of that form, or what the assistant says cannot be told apart.
  """
  for messages in conversations:
    for i, message in enumerate(messages):
      if not all(isinstance(message.get(key), str) for key in ('role', 'content')):
        raise ValueError(f"messages[{i}]={message!r}: expected {{'role': text, 'content': text}}")
  stand_ins = StandIns(template.controls, list(map(list, conversations)))
  whole: list[list[dict[str, Any]]] = []
  opened: list[list[dict[str, Any]]] = []
  for messages in stand_ins.hide(list(conversations)):
    plain = [{key: item for key, item in one.items() if key != 'weight'} for one in messages]
    for i, message in enumerate(messages):
      if _weight(message):
        # The same message with a stand-in shows what of the turn is the template's.
        whole += [plain[: i + 1], [*plain[:i], {**plain[i], 'content': _STAND_IN}]]
        opened.append(plain[:i])
    if not any(map(_weight, messages)):
      opened.append(plain)
  whole_texts, opened_texts = iter(template.render(whole, False)), template.render(opened, True)
  asked_texts = iter(opened_texts)
  result = []
  for messages in conversations:
    found: list[base.Segment] = []
    written: str | None = None
    for weight in list(filter(None, map(_weight, messages))) or [0.0]:
      asked = next(asked_texts)
      if written is None or not asked.startswith(written):
        found.append(base.CONVERSATION)
        written = ''
      found += _split(stand_ins, asked[len(written):], 0.0)
      if weight:
        said, end, written = _turn(asked, next(whole_texts), next(whole_texts), stand_ins, template)
        found += _split(stand_ins, said, weight)
        found += _split(stand_ins, end, weight) or [base.EOS._replace(weight=weight)]
    result.append(tuple(found))
  return result


def _weight(message: Message) -> float:
  return float(message.get('weight', 1.0)) if message['role'] == 'assistant' else 0.0


def _turn(
  asked: str, text: str, marked: str, stand_ins: StandIns, template: Template
) -> tuple[str, str, str | None]:
  """Return the answer in a text (`marked` has a stand-in for it), its end, the text up to there."""
  _, stand_in, after = marked.partition(_STAND_IN)
  stop = len(text) - len(after)
  if not stand_in or not text.startswith(asked) or not text.endswith(after) or stop < len(asked):
    before, written = (''.join(piece for piece, _ in stand_ins.cut(one))[-80:]
                       for one in (asked, text))
    raise ValueError(
      'the chat template writes a conversation otherwise when it has an answer: it is asked with '
      f'{before!r}, and writes {written!r}, so that what the assistant says cannot be told apart; '
      'use another template')
  if template.stops is None:
    end = after.rstrip() or after
  else:
    pieces = stand_ins.cut(after)
    stops = [i for i, (piece, control) in enumerate(pieces, 1)
             if control and piece in template.stops]
    end = ''.join(piece for piece, _ in pieces[: stops[0]]) if stops else ''
  return text[len(asked) : stop], end, (text[: stop + len(end)] if end else None)


def _split(stand_ins: StandIns, text: str, weight: float) -> list[base.Segment]:
  return [base.Segment(piece, weight, control) for piece, control in stand_ins.cut(text)]


TASK = base.Task(
  Chat, 'measure', {'messages': messages}, example, language_modeling.read,
  # The end of a turn has no bytes.
  {'perplexity': language_modeling.METRICS['perplexity']},
  shape=lambda config, record: shape(record),
  by_template=lambda config, records, template, too_long: fitting(records, template, too_long))
