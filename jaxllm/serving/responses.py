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
from jaxllm.serving.protocol import ChatCompletionRequest, GenerationRequest

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


class Choice:
  """Turns the pieces of one row into deltas.

  `echo` is the text of the prompt, where the choice begins with it; `scored` is whether
  log-probabilities are wanted, those of an echoed prompt among them.
  """

  def __init__(self, names: Names, index: int, echo: str | None, scored: bool):
    self._names, self._index, self._echo, self._scored = names, index, echo, scored
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._offset = 0
    self.deltas: list[Delta] = []
    self.num_tokens = 0
    """Tokens sampled so far."""

  def take(self, piece: TextPiece) -> Delta:
    """Return what a piece adds."""
    echo = self._echo if not self.deltas else None
    if echo is not None and self._scored:
      scored = self._score(piece)
      # A tokenizer may put a space before every text, which is not echoed.
      extra = max(len(piece.text) - len(echo), 0)
      scored = [dataclasses.replace(item, offset=max(item.offset - extra, 0)) for item in scored]
      self._offset, text = len(echo), echo
      self._utf8.reset()
    else:
      self._offset += len(echo or '')
      text = (echo or '') + piece.text
      self.num_tokens += len(piece.tokens)
      scored = self._score(piece) if self._scored else []
    self.deltas.append(Delta(self._index, text, tuple(scored), piece.finish_reason))
    return self.deltas[-1]

  def total(self) -> Delta:
    """Return the sum of all deltas so far."""
    return Delta(self._index, ''.join(delta.text for delta in self.deltas),
                 tuple(item for delta in self.deltas for item in delta.scored),
                 self.deltas[-1].finish_reason)

  def _score(self, piece: TextPiece) -> list[Scored]:
    result = []
    for place, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True)):
      result.append(Scored(token, logprob, piece.top[place] if piece.top else [], self._offset))
      self._offset += len(self._utf8.decode(bytes(self._names.bytes_of(token) or ())))
    return result


class Answer:
  """The answer to a request, while it grows; see `Choice`. Each prompt is counted once."""

  def __init__(self, request: GenerationRequest, names: Names, echoes: Sequence[str | None],
               prompt_tokens: int):
    self._names, self._model, self._prompt_tokens = names, request.model, prompt_tokens
    self._is_chat = isinstance(request, ChatCompletionRequest)
    self._scored = request.num_top is not None
    self.stream, self.include_usage = request.stream, request.include_usage
    self.choices = [Choice(names, index, echo, self._scored) for index, echo in enumerate(echoes)]
    self._id = f'{"chatcmpl" if self._is_chat else "cmpl"}-{uuid.uuid4().hex}'
    self._created = int(time.time())

  @property
  def num_entries(self) -> int:
    """How many tokens the answer says something of."""
    return sum(1 + len(item.top) for choice in self.choices for delta in choice.deltas
               for item in delta.scored)

  def whole(self) -> dict[str, Any]:
    """Return an answer that is not streamed."""
    choices = []
    for delta in (choice.total() for choice in self.choices):
      message = {'role': 'assistant', 'content': delta.text, 'refusal': None}
      choices.append(self._choice(delta, 'message', message))
    return {**self._frame('', choices), 'usage': self._usage()}

  def chunk(self, delta: Delta, is_first: bool) -> dict[str, Any]:
    """Return a part of a stream; `is_first`: of this choice."""
    said: dict[str, Any] = {'role': 'assistant'} if is_first else {}
    if delta.text or is_first:
      said['content'] = delta.text
    part = self._frame('.chunk', [self._choice(delta, 'delta', said)])
    return {**part, 'usage': None} if self.include_usage else part

  def last_chunk(self) -> dict[str, Any]:
    """Return the part of a stream that tells the numbers of tokens."""
    return {**self._frame('.chunk', []), 'usage': self._usage()}

  def _usage(self) -> dict[str, int]:
    new_tokens = sum(choice.num_tokens for choice in self.choices)
    return {'prompt_tokens': self._prompt_tokens, 'completion_tokens': new_tokens,
            'total_tokens': self._prompt_tokens + new_tokens}

  def _frame(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = f'chat.completion{suffix}' if self._is_chat else 'text_completion'
    return {'id': self._id, 'object': kind, 'created': self._created, 'model': self._model,
            'choices': choices}

  def _choice(self, delta: Delta, key: str, said: dict[str, Any]) -> dict[str, Any]:
    logprobs = _chat_logprobs if self._is_chat else _text_logprobs
    return {
      'index': delta.index,
      **({key: said} if self._is_chat else {'text': delta.text}),
      'logprobs': logprobs(self._names, delta.scored) if self._scored else None,
      'finish_reason': delta.finish_reason,
    }


def _chat_logprobs(names: Names, scored: Sequence[Scored]) -> dict[str, Any]:
  def entry(token: int, logprob: float | None) -> dict[str, Any]:
    return {'token': names.name(token), 'bytes': names.bytes_of(token),
            'logprob': _number(logprob)}

  return {'refusal': None, 'content': [
    {**entry(item.token, item.logprob), 'top_logprobs': [entry(*other) for other in item.top]}
    for item in scored]}


def _text_logprobs(names: Names, scored: Sequence[Scored]) -> dict[str, Any]:
  """Return log-probabilities as completions have them; the top ones hold the token too."""
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
