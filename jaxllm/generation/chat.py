"""A conversation with a model in a terminal: history, streaming, `/reset`.

How a conversation becomes tokens is the caller's (`encode`): a chat template, usually.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation.sampling import MAX_SEED, SamplingConfig
from jaxllm.generation.text import stream_text
from jaxllm.models.decoder import Decoder

Message = Mapping[str, str]
HELP = '/reset forgets the conversation, /quit ends it.'


def fit(
  messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], max_tokens: int
) -> tuple[list[Message], list[int]]:
  """Drop the oldest exchanges until a conversation fits; return (the messages left, their ids).

  Args:
    messages: maybe a system message, then user and assistant in turn; the last is the user's.
    encode: conversation to token ids.
    max_tokens: most ids that fit.

  Raises:
    ValueError: the last message alone is too long.
  """
  kept = list(messages)
  while len(ids := encode(kept)) > max_tokens:
    if not (shorter := without_oldest(kept)):
      raise ValueError(f'the message has {len(ids)} tokens with its template; {max_tokens} fit')
    kept = shorter
  return kept, ids


def without_oldest(messages: Sequence[Message]) -> list[Message]:
  """Return a conversation without its oldest exchange, up to the user's next message.

  The system message stays. [] where there is no next one.
  """
  first = 1 if messages and messages[0]['role'] == 'system' else 0
  for start in range(first + 1, len(messages)):
    if messages[start]['role'] == 'user':
      return [*messages[:first], *messages[start:]]
  return []


def converse(
  model: Decoder, variables: Any, tokenizer: Tokenizer,
  encode: Callable[[Sequence[Message]], list[int]], sampling: SamplingConfig, lines: Iterable[str],
  write: Callable[[str], None], system: str | None = None, stop: Sequence[str] = (),
  stop_token_ids: Sequence[int] = (),
) -> list[Message]:
  """Answer lines until there are no more, or one says /quit; return the conversation.

  Args:
    model: as all that are not named here, in `stream_text`.
    encode: conversation to token ids, up to where the assistant begins.
    sampling: of the answers; each has the next seed.
    lines: messages of the user.
    write: takes text as it comes.
    system: the system message, which `/reset` keeps.
  """
  begin: list[Message] = [{'role': 'system', 'content': system}] if system else []
  messages, seeds = list(begin), itertools.count(sampling.seed)
  # The prompt leaves an answer room for its tokens.
  room = max(model.config.max_length - sampling.max_new_tokens, model.config.max_length // 2)
  for line in lines:
    line = line.strip()
    if line == '/quit':
      break
    if line == '/reset':
      messages = list(begin)
      write('(forgotten)\n')
    elif line.startswith('/'):
      write(f'{HELP}\n')
    elif line:
      try:
        asked: list[Message] = [*messages, {'role': 'user', 'content': line}]
        kept, ids = fit(asked, encode, room)
      except ValueError as error:
        write(f'({error})\n')
        continue
      parts = []
      try:
        for piece in stream_text(model, variables, tokenizer, [ids], sampling, stop, stop_token_ids,
                                 [next(seeds) % (MAX_SEED + 1)]):
          parts.append(piece.text)
          write(piece.text)
        write('\n')
      except KeyboardInterrupt:
        # What was said so far is the answer.
        write(' (interrupted)\n')
      messages = [*kept, {'role': 'assistant', 'content': ''.join(parts)}]
  return messages
