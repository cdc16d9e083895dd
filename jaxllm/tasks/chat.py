"""Chat: messages become segments in which only what the assistant says has weight.

A template is any function from conversations to texts that only ever appends, `ChatTemplate.render`
or a model's own. What it writes for the assistant is found by rendering one message more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pydantic

from jaxllm.config import Config
from jaxllm.tasks import conversations, language_modeling
from jaxllm.tasks.base import BOS, Answer, Example, Prediction, Record, Segment, Task, TaskConfig
from jaxllm.tasks.records import RecordsConfig, RecordSource

Message = Mapping[str, Any]
Render = Callable[[Sequence[Sequence[Message]], bool], Sequence[str]]
"""(conversations, whether the assistant's turn is opened after each) -> their texts."""

# A code point that never stands for a character.
_STAND_IN = '\ufdd0'


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


def _quoted(text: str) -> str:
  """Return a literal of Jinja."""
  escaped = text.encode('unicode_escape').decode().replace("'", "\\'")
  return f"'{escaped}'"


PLAIN = ChatTemplate(
  prefix='{role}:\n', suffix='\n\n', names=(('user', 'User'), ('assistant', 'Assistant')),
  controls=(),
)
"""For a tokenizer without chat tokens."""


class Chat(TaskConfig):
  """Say what the assistant says in `messages`.

  The default data are a chat bot's conversations.
  """

  kind: Literal['chat'] = 'chat'
  """'chat'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:chatterbot-corpus/english'),), group='question'
  )
  """Records with `messages`: a list of {'role', 'content'}, of the assistant's with or without a
  `weight`; or as `conversations`, `prompt` and `completion`, or `instruction` and `output`."""
  template: ChatTemplate | None = ChatTemplate()
  """How they become text; None: by the model's own template."""
  max_new_tokens: int = pydantic.Field(default=256, gt=0)
  """Most tokens of an answer."""
  stop: str | None = None
  """A generated answer ends before this text; None: only with the end of the turn."""


def example(config: Chat, record: Record) -> Example:
  """Return the example of a record.

  Raises:
    ValueError: the template is the model's own; see `examples`.
  """
  if config.template is None:
    raise ValueError("template=None: what a chat says is known only together with a model's own "
                     'template; see tasks.chat.examples')
  return examples([record], config.template.render, config.template.controls)[0]


def examples(
  records: Sequence[Record], render: Render, controls: Sequence[str] = ()
) -> list[Example]:
  """Return the examples of records by any template, such as a model's own; see `segments`."""
  found = segments([record['messages'] for record in records], render, controls)
  return [
    Example((BOS, *one), None, record) for one, record in zip(found, records, strict=True)
  ]


def segments(
  conversations: Sequence[Sequence[Message]], render: Render, controls: Sequence[str] = ()
) -> list[tuple[Segment, ...]]:
  """Return conversations as segments; the assistant's contents and their ends have weight 1.

  The end of a turn is what the template writes after the content; white space is part of it only
  where there is nothing else.

  Args:
    conversations: each a list of messages {'role', 'content'}; one of the assistant may have a
      `weight`.
    render: the template; called twice.
    controls: texts that are single tokens where the template writes them; in contents they are
      text like any other.

  Raises:
    ValueError: a message is not of that form, or the template changes what it wrote before.
  """
  whole: list[list[Message]] = []
  opened: list[list[Message]] = []
  for messages in conversations:
    for count, message in enumerate(messages, start=1):
      _check(message, count)
      earlier = list(messages[: count - 1])
      # The same message with a stand-in shows what of the turn is the template's.
      whole += [[*earlier, message], [*earlier, {**message, 'content': _STAND_IN}]]
      if message['role'] == 'assistant':
        opened.append(earlier)
  whole_texts, opened_texts = iter(render(whole, False)), iter(render(opened, True))
  result = []
  for messages in conversations:
    written, found = '', []
    for message in messages:
      speaks = message['role'] == 'assistant'
      closed, marked = next(whole_texts), next(whole_texts)
      start = next(opened_texts) if speaks else written
      if not (start.startswith(written) and closed.startswith(start) and marked.startswith(start)):
        raise _changing()
      found += _split(start[len(written):], 0.0, controls)
      found += _turn(closed[len(start):], marked[len(start):], _weight(message), controls)
      written = closed
    result.append(tuple(found))
  return result


def _check(message: Message, count: int) -> None:
  if not isinstance(message.get('role'), str) or not isinstance(message.get('content'), str):
    raise ValueError(f"messages[{count - 1}]={message!r}: expected {{'role': text, 'content': "
                     'text}')


def _weight(message: Message) -> float:
  return float(message.get('weight', 1.0)) if message['role'] == 'assistant' else 0.0


def _turn(text: str, marked: str, weight: float, controls: Sequence[str]) -> list[Segment]:
  """Return one turn, whose template is `marked`."""
  before, stand_in, after = marked.partition(_STAND_IN)
  said = text[len(before) : len(text) - len(after)]
  if not stand_in or before + said + after != text:
    raise _changing()
  end = after.rstrip() or after
  return [
    *_split(before, 0.0, controls),
    *([Segment(said, weight)] if said else []),
    *_split(end, weight, controls),
    *_split(after[len(end):], 0.0, controls),
  ]


def _changing() -> ValueError:
  return ValueError('the chat template writes a message otherwise when another is added or its '
                    'content changes, so what the assistant says cannot be told apart; use a '
                    'template that only appends')


def _split(text: str, weight: float, controls: Sequence[str]) -> list[Segment]:
  if not controls:
    return [Segment(text, weight)] if text else []
  pieces = re.split(f'({"|".join(map(re.escape, controls))})', text)
  return [Segment(piece, weight, piece in controls) for piece in pieces if piece]


def read(config: Chat, example: Example, answer: Answer) -> Prediction:
  """Return {'log_likelihood', 'tokens', 'bytes'} of what the assistant says."""
  measured: Any = config
  return language_modeling.read(measured, example, answer)


TASK = Task(
  Chat, 'measure', {'messages': conversations.messages}, example, read, language_modeling.METRICS,
  shape=lambda config, record: conversations.shape(record),
  by_template=lambda config, *args: examples(*args),
)
