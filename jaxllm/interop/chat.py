"""Chat templates: conversations to token ids, without trusting the template or the messages.

The template, a program from outside, is rendered in a process of its own (`generation.sandbox`),
in Jinja's sandbox, with limits of CPU time and memory. Messages stay plain text: a user who
writes '<|im_end|>' does not end the turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.data import tokenizer_settings
from jaxllm.data.tokenizer_settings import StandIns
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation import sandbox

# Special tokens that end a turn in the usual templates.
_TURN_ENDS = (
  '<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<end_of_turn>', '<turn|>', '<|end|>', '<|return|>',
  '<|call|>', '<|endoftext|>', '<|end_of_text|>', '<end_of_utterance>', '</s>', '<eos>', '<EOT>',
  '_<EOT>', '[EOT]', '[EOS]', '[e~[', '<\uff5cend\u2581of\u2581sentence\uff5c>',
)
# How many conversations are rendered by one process, which has a limit of time.
_AT_ONCE = 256
CPU_SECONDS, MEMORY_BYTES, MAX_CHARACTERS = 5, 512_000_000, 10_000_000
"""What rendering them may take, and how long a text may be."""
MAX_TEMPLATE_CHARACTERS = 1_000_000

Message = Mapping[str, Any]
Templates = str | Mapping[str, str]


class TemplateError(ValueError):
  """A chat template could not be rendered; the message says why."""


def render(
  template: str, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = True,
  **variables: Any,
) -> list[str]:
  """Render conversations by a chat template, one text each, as `transformers` does.

  Args:
    template: Jinja, as in tokenizer_config.json.
    conversations: lists of messages {'role', 'content'}; a key whose value is None is left out.
    add_generation_prompt: whether the text ends where the assistant begins.
    **variables: of the template: `bos_token`, `tools` (JSON schemas of functions; a template tells
      None from []), `documents` ({'title', 'text'} each), `enable_thinking`, ...

  Raises:
    TemplateError: the template is damaged, refuses the conversation, or exceeds the limits.
  """
  if len(template) > MAX_TEMPLATE_CHARACTERS:
    raise TemplateError(f'chat template: longer than {MAX_TEMPLATE_CHARACTERS} characters')
  variables = {'tools': None, 'documents': None, **variables,
               'add_generation_prompt': add_generation_prompt}
  several = [{**variables, 'messages': list(map(_plain, one))} for one in conversations]
  try:
    return [text for start in range(0, len(several), _AT_ONCE) for text in sandbox.run(
      'render', CPU_SECONDS, MEMORY_BYTES, template=template, max_characters=MAX_CHARACTERS,
      variables=several[start : start + _AT_ONCE])]
  except sandbox.SandboxError as error:
    raise TemplateError(f'chat template: {error}') from None


def encode_all(
  tokenizer: Tokenizer, template: Templates, conversations: Sequence[Sequence[Message]],
  add_generation_prompt: bool = True, *, bos_id: int | None = None, **variables: Any,
) -> list[list[int]]:
  """Return the token ids of conversations.

  Special tokens that the template writes become tokens; those that a message or a variable spells
  stay text. Arguments and errors as `render`, and:

  Args:
    tokenizer: its special tokens are variables of the template too.
    template: its chat template, or several by name: 'tool_use' is for tools, else 'default'.
    bos_id: the token that all begin with, whether or not the template writes it; None: none.

  Raises:
    TemplateError: none of the templates is the default.
  """
  special, given = tokenizer.special_tokens, [list(map(list, conversations)), variables]
  stand_ins = StandIns(special, given)
  conversations, variables = stand_ins.hide(given)
  texts = render(_choose(template, variables.get('tools')), conversations, add_generation_prompt,
                 **{**tokenizer.named_tokens, **variables})
  begin = [] if bos_id is None else [bos_id]
  result = []
  for text in texts:
    parts = [special[piece] if control else piece for piece, control in stand_ins.cut(text)]
    result.append(tokenizer.encode_parts(parts if parts[:1] == begin else [*begin, *parts]))
  return result


def _choose(template: Templates, tools: Sequence[Any] | None = None) -> str:
  """Return the template for a conversation with or without tools."""
  if isinstance(template, str):
    return template
  name = 'tool_use' if tools is not None and 'tool_use' in template else 'default'
  if name not in template:
    raise TemplateError(f'chat template: of the templates {", ".join(sorted(template))} none is '
                        'the default')
  return template[name]


def encode_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
  """Return the ids of a text in which special tokens are spelled: they become tokens.

  Only for text that can be trusted; `Tokenizer.encode` leaves them plain text.
  """
  special = tokenizer.special_tokens
  pieces = tokenizer_settings.spelled(tuple(special)).split(text)
  return tokenizer.encode_parts(
    [special[piece] if i % 2 else piece for i, piece in enumerate(pieces)])


def turn_ends(special: Mapping[str, int]) -> tuple[int, ...]:
  """Return the special tokens that end the assistant's turn in the usual templates."""
  # Where there are two more ends, this one is between the parts of a turn.
  between = '<|end|>' if {'<|return|>', '<|call|>'} <= special.keys() else None
  return tuple(special[text] for text in _TURN_ENDS if text in special and text != between)


def answer_ends(tokenizer: Tokenizer, template: Templates) -> tuple[int, ...]:
  """Return the special tokens that end an answer: the usual ones, and the template's own."""
  special = tokenizer.special_tokens
  ends, said = turn_ends(special), '\ufdd0'
  talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': said}]
  try:
    text, = render(_choose(template), [talk], False, **tokenizer.named_tokens)
  except TemplateError:
    return ends
  _, found, after = text.rpartition(said)
  first = tokenizer_settings.spelled(tuple(special)).search(after) if found else None
  return tuple(dict.fromkeys([*ends, *([special[first[0]]] if first else [])]))


def _plain(message: Message) -> Message:
  """Return a message without empty keys, its reasoning under the names that templates read."""
  kept = {key: value for key, value in message.items() if value is not None}
  names = ('reasoning_content', 'thinking', 'reasoning')
  reasoning = next((kept[name] for name in names if name in kept), None)
  if reasoning is None:
    return kept
  return {'thinking': reasoning, **kept, 'reasoning_content': reasoning}
