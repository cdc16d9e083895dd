"""Chat templates: conversations to token ids, without trusting the template or the messages.

The template, a program from outside, is rendered by `chat_worker` in a process of its own, in
Jinja's sandbox, with limits of CPU time and memory. What messages say is plain text: a user who
writes '<|im_end|>' does not end the turn.
"""

import json
import pathlib
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.data.tokenizers import Tokenizer

# What ends a turn in the usual templates.
_TURN_ENDS = (
  '<|im_end|>', '<|eot_id|>', '<end_of_turn>', '<|end|>', '<|endoftext|>', '</s>', '<|return|>'
)
# How many conversations are rendered by one process, which has a limit of time.
_AT_ONCE = 256
CPU_SECONDS, MEMORY_BYTES, MAX_CHARACTERS = 5, 512_000_000, 10_000_000
MAX_TEMPLATE_CHARACTERS = 1_000_000

Message = Mapping[str, Any]


class TemplateError(ValueError):
  """A chat template could not be rendered; the message says why."""


def render(
  template: str, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = True,
  cpu_seconds: int = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES, **variables: Any,
) -> list[str]:
  """Render conversations by a chat template.

  Args:
    template: Jinja, as in tokenizer_config.json.
    conversations: each a list of messages {'role': ..., 'content': ...}.
    add_generation_prompt: whether the text ends where the assistant begins.
    cpu_seconds: how long the template may compute.
    memory_bytes: how much the process may take, Python itself included.
    **variables: what else the template may use: `bos_token`, `tools`, ...

  Returns:
    One text per conversation.

  Raises:
    TemplateError: the template is damaged, refuses the conversation, or exceeds the limits.
  """
  if len(conversations) > _AT_ONCE:
    parts = (conversations[i : i + _AT_ONCE] for i in range(0, len(conversations), _AT_ONCE))
    return [text for part in parts for text in render(
      template, part, add_generation_prompt, cpu_seconds, memory_bytes, **variables)]
  if len(template) > MAX_TEMPLATE_CHARACTERS:
    raise TemplateError(f'chat template: longer than {MAX_TEMPLATE_CHARACTERS} characters')
  request = json.dumps({
    'template': template,
    'variables': [
      {**variables, 'messages': list(messages), 'add_generation_prompt': add_generation_prompt}
      for messages in conversations
    ],
    'cpu_seconds': cpu_seconds, 'memory_bytes': memory_bytes, 'max_characters': MAX_CHARACTERS,
  })
  worker = pathlib.Path(__file__).with_name('chat_worker.py')
  try:
    done = subprocess.run(
      [sys.executable, '-I', '-c', _START, str(worker)], input=request.encode(),
      capture_output=True, check=False, timeout=20 * cpu_seconds, env={},
    )
  except subprocess.TimeoutExpired:
    raise TemplateError(f'chat template: no answer in {20 * cpu_seconds} seconds') from None
  try:
    answer = json.loads(done.stdout)
  except ValueError:
    # Ended by the kernel (CPU time), or by Python (memory) before it could answer.
    raise TemplateError(f'chat template: it takes more than {cpu_seconds} s of CPU time or '
                        f'{memory_bytes} bytes of memory') from None
  if 'error' in answer:
    raise TemplateError(f'chat template: {answer["error"]}')
  return answer['texts']


def encode(
  tokenizer: Tokenizer, template: str, messages: Sequence[Message],
  add_generation_prompt: bool = True, **variables: Any,
) -> list[int]:
  """Return the token ids of a conversation; see `encode_all`."""
  return encode_all(tokenizer, template, [messages], add_generation_prompt, **variables)[0]


def encode_all(
  tokenizer: Tokenizer, template: str, conversations: Sequence[Sequence[Message]],
  add_generation_prompt: bool = True, **variables: Any,
) -> list[list[int]]:
  """Return the token ids of conversations.

  Special tokens that the template writes become tokens; those that a message spells stay text.

  Args:
    tokenizer: of the model.
    template: its chat template.
    conversations: each a list of messages.
    add_generation_prompt: whether they end where the assistant begins.
    **variables: what else the template may use.

  Raises:
    TemplateError: as `render`.
  """
  special = tokenizer.special_tokens
  ids = {value: token for token, value in special.items()}
  for name, value in (('bos_token', tokenizer.bos_id), ('eos_token', tokenizer.eos_id)):
    variables.setdefault(name, '' if value is None else ids.get(value, ''))
  # Stands in messages for what spells a special token, and is put back once the text is cut.
  stand_in = f'\ue000{secrets.token_hex(8)}\ue001'
  hidden: list[str] = []
  if special:
    spelled = _any_of(special)
    conversations = [[_hide(message, spelled, stand_in, hidden) for message in messages]
                     for messages in conversations]
  put_back = re.compile(re.escape(stand_in) + r'(\d+);')

  def restore(plain: str) -> str:
    return put_back.sub(lambda match: hidden[int(match[1])], plain)

  texts = render(template, conversations, add_generation_prompt, **variables)
  return [encode_with_special(tokenizer, text, restore) for text in texts]


def encode_with_special(
  tokenizer: Tokenizer, text: str, restore: Callable[[str], str] = lambda plain: plain
) -> list[int]:
  """Return the ids of a text in which special tokens are spelled: they become tokens.

  Only for text that can be trusted; `Tokenizer.encode` leaves them plain text.

  Args:
    tokenizer: of the model.
    text: for example '<|im_start|>user: Hello!<|im_end|>'.
    restore: changes each stretch between special tokens before it is encoded.
  """
  special = tokenizer.special_tokens
  result, at = [], 0
  for part in _any_of(special).finditer(text) if special else ():
    plain = restore(text[at : part.start()])
    result += [*(tokenizer.encode(plain) if plain else []), special[part[0]]]
    at = part.end()
  last = restore(text[at:])
  return result + (tokenizer.encode(last) if last else [])


def turn_ends(special: Mapping[str, int]) -> tuple[int, ...]:
  """Return which of the special tokens end the assistant's turn; it need not be EOS."""
  return tuple(special[text] for text in _TURN_ENDS if text in special)


# As a file it would put its own directory, with modules of common names, on the path.
_START = 'import runpy, sys; runpy.run_path(sys.argv[1], run_name="__main__")'


def _any_of(special: Mapping[str, int]) -> re.Pattern[str]:
  return re.compile('|'.join(sorted(map(re.escape, special), key=len, reverse=True)))


def _hide(value: Any, spelled: re.Pattern[str], stand_in: str, hidden: list[str]) -> Any:
  """Replace what spells a special token, in all texts of a message."""
  if isinstance(value, str):
    def replace(match: re.Match[str]) -> str:
      hidden.append(match[0])
      return f'{stand_in}{len(hidden) - 1};'

    return spelled.sub(replace, value)
  if isinstance(value, Mapping):
    return {key: _hide(item, spelled, stand_in, hidden) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_hide(item, spelled, stand_in, hidden) for item in value]
  return value
