"""Answers as OpenAI's API gives them, whole or in chunks of a stream.

What a choice gains with each piece of text is a `Delta`. A whole answer is the sum of its deltas,
so that it says what the stream says.
"""

import codecs
import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation.decode import FinishReason, Top
from jaxllm.generation.text import TextPiece

# What stands for the logarithm of 0, which JSON does not have.
LEAST_LOGPROB = -9999.0


class Names:
  """What tokens are called where they stand alone."""

  def __init__(self, tokenizer: Tokenizer):
    self._bytes = tokenizer.id_bytes
    self._special = {token: text for text, token in tokenizer.special_tokens.items()}

  def bytes_of(self, token: int) -> list[int] | None:
    """Return the bytes of a token; None: it has none, as one that only the model knows."""
    return list(self._bytes[token]) if token < len(self._bytes) and self._bytes[token] else None

  def name(self, token: int) -> str:
    """Return the text of a token; bytes that are no UTF-8 are written out."""
    content = bytes(self.bytes_of(token) or b'')
    if not content:
      return self._special.get(token, f'<|{token}|>')
    try:
      return content.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in content)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A token with its log-probability (None: the first of a prompt), and where its text begins."""

  token: int
  logprob: float | None
  top: Top
  offset: int


@dataclasses.dataclass(frozen=True)
class Delta:
  """What a choice gained."""

  index: int
  text: str = ''
  scored: tuple[Scored, ...] = ()
  finish_reason: FinishReason | None = None


def total(deltas: Sequence[Delta]) -> Delta:
  """Return what all deltas of a choice, in order, add up to."""
  return Delta(
    deltas[0].index, ''.join(delta.text for delta in deltas),
    tuple(item for delta in deltas for item in delta.scored), deltas[-1].finish_reason)


class Choice:
  """Turn the pieces of one row into deltas.

  Args of the constructor:
    names: of tokens.
    index: number of the choice.
    echo: the text of the prompt, where the choice begins with it.
    scored: whether log-probabilities are wanted; of the prompt too, where it is echoed.
  """

  def __init__(self, names: Names, index: int, echo: str | None, scored: bool):
    self._names, self._index, self._echo, self._scored = names, index, echo, scored
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._offset = 0
    self._begun = False
    self.num_tokens = 0
    """Tokens drawn so far."""

  def take(self, piece: TextPiece) -> Delta:
    """Return what a piece adds."""
    if not self._begun:
      self._begun = True
      if self._echo is not None and self._scored:
        return self._prompt_delta(self._echo, piece)
      self._offset = len(self._echo or '')
      text = (self._echo or '') + piece.text
    else:
      text = piece.text
    self.num_tokens += len(piece.tokens)
    scored = self._score(piece.tokens, piece.logprobs, piece.top) if self._scored else []
    return Delta(self._index, text, tuple(scored), piece.finish_reason)

  def _prompt_delta(self, echo: str, piece: TextPiece) -> Delta:
    """Return what the first piece of a scored prompt, which is the prompt, adds."""
    scored = self._score(piece.tokens, piece.logprobs, piece.top)
    # A tokenizer may put a space before every text, which is not echoed.
    extra = max(len(piece.text) - len(echo), 0)
    scored = [dataclasses.replace(item, offset=max(item.offset - extra, 0)) for item in scored]
    self._offset = len(echo)
    self._utf8.reset()
    return Delta(self._index, echo, tuple(scored), piece.finish_reason)

  def _score(
    self, tokens: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top]
  ) -> list[Scored]:
    result = []
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
      result.append(Scored(token, logprob, top[place] if top else [], self._offset))
      self._offset += len(self._utf8.decode(bytes(self._names.bytes_of(token) or ())))
    return result


@dataclasses.dataclass(frozen=True)
class Answer:
  """What all parts of an answer have in common.

  Attributes:
    names: of tokens.
    model: name of the model.
    is_chat: whether it is a message, or a text.
    scored: whether log-probabilities are wanted.
    include_usage: whether a stream ends with the numbers of tokens.
    name: unique.
    created: seconds since 1970.
  """

  names: Names
  model: str
  is_chat: bool
  scored: bool
  include_usage: bool = False
  name: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))


def whole(answer: Answer, choices: Sequence[Delta], prompt_tokens: int, new_tokens: int
          ) -> dict[str, Any]:
  """Return an answer that was not streamed."""
  kind = 'chat.completion' if answer.is_chat else 'text_completion'
  said = []
  for choice in choices:
    message = {'role': 'assistant', 'content': choice.text, 'refusal': None}
    said.append(_choice(answer, choice, 'message', message))
  return {**_frame(answer, kind, said), 'usage': usage(prompt_tokens, new_tokens)}


def chunk(answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
  """Return a part of a stream; `first`: of this choice."""
  kind = 'chat.completion.chunk' if answer.is_chat else 'text_completion'
  said: dict[str, Any] = {'role': 'assistant'} if first else {}
  if delta.text or first:
    said['content'] = delta.text
  part = _frame(answer, kind, [_choice(answer, delta, 'delta', said)])
  return {**part, 'usage': None} if answer.include_usage else part


def last_chunk(answer: Answer, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
  """Return the part of a stream that tells the numbers of tokens."""
  kind = 'chat.completion.chunk' if answer.is_chat else 'text_completion'
  return {**_frame(answer, kind, []), 'usage': usage(prompt_tokens, new_tokens)}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
  """Return the numbers of tokens."""
  return {'prompt_tokens': prompt_tokens, 'completion_tokens': new_tokens,
          'total_tokens': prompt_tokens + new_tokens}


def _frame(answer: Answer, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
  prefix = 'chatcmpl' if answer.is_chat else 'cmpl'
  return {'id': f'{prefix}-{answer.name}', 'object': kind, 'created': answer.created,
          'model': answer.model, 'choices': choices}


def _choice(answer: Answer, delta: Delta, key: str, said: dict[str, Any]) -> dict[str, Any]:
  scores = _chat_scores if answer.is_chat else _text_scores
  return {
    'index': delta.index,
    **({key: said} if answer.is_chat else {'text': delta.text}),
    'logprobs': scores(answer.names, delta.scored) if answer.scored else None,
    'finish_reason': delta.finish_reason,
  }


def _chat_scores(names: Names, scored: Sequence[Scored]) -> dict[str, Any]:
  def entry(token: int, logprob: float | None) -> dict[str, Any]:
    return {'token': names.name(token), 'bytes': names.bytes_of(token),
            'logprob': _number(logprob)}

  return {'refusal': None, 'content': [
    {**entry(item.token, item.logprob), 'top_logprobs': [entry(*other) for other in item.top]}
    for item in scored]}


def _text_scores(names: Names, scored: Sequence[Scored]) -> dict[str, Any]:
  """Return scores in the form of completions: lists, of which the top ones hold the token too."""
  top: list[dict[str, float | None] | None] = []
  for item in scored:
    found: dict[str, float | None] = {}
    for token, logprob in [*item.top, (item.token, item.logprob)]:
      found.setdefault(names.name(token), _number(logprob))
    top.append(found if item.logprob is not None else None)
  return {
    'tokens': [names.name(item.token) for item in scored],
    'token_logprobs': [_number(item.logprob) for item in scored],
    'top_logprobs': top,
    'text_offset': [item.offset for item in scored],
  }


def _number(logprob: float | None) -> float | None:
  return None if logprob is None else max(logprob, LEAST_LOGPROB)
