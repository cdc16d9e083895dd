"""Text in, text out: stop strings, streaming of whole characters, log-probabilities, echo.

`stream_text` yields text while it grows, `complete` returns it whole; both give the same. The text
of tokens is what the tokenizer makes of them after the prompt: that of their bytes, or else what it
adds to the text of the tokens before. A character that spans tokens appears once it is complete,
and bytes that are no UTF-8 become U+FFFD.
"""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation import decode, scoring
from jaxllm.generation.decode import FinishReason, Top
from jaxllm.generation.requests import make_requests
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.models.decoder import Decoder

# Steps between two looks for stop strings where nobody waits for the text.
STEPS_PER_LOOK = 8
# Ids before a token that decide its text, where it is not that of its bytes.
_WINDOW = 6


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """What one row gained; the text may lag behind the tokens.

  Attributes:
    row: number of the prompt.
    text: whole characters that no stop string can begin in any more.
    tokens: ids.
    logprobs: of each, before any rule.
    top: the most probable tokens at each place, where they were asked for.
    finish_reason: 'stop' (a stop string or id came), 'length', or None: more follows.
    stop: the stop string that ended the row.
  """

  row: int
  text: str
  tokens: list[int]
  logprobs: list[float]
  top: list[Top]
  finish_reason: FinishReason | None
  stop: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
  """A finished continuation.

  Attributes:
    text: without the stop string; with the prompt's where it was asked to echo it.
    tokens: all that were drawn, those of the stop string included; with the prompt's when echoed.
    logprobs: of each, before any rule; None for the first token of an echoed prompt.
    top: the most probable tokens at each place, where they were asked for.
    finish_reason: as in `TextPiece`.
    stop: as in `TextPiece`.
  """

  text: str
  tokens: list[int]
  logprobs: list[float | None]
  top: list[Top]
  finish_reason: FinishReason
  stop: str | None = None


class TextDecoder:
  """Turn tokens into text as they come, up to the first stop string.

  Args of the constructor:
    tokenizer: gives the text.
    stop: strings at the first of which the text ends; where several end with the same token, at
      the one that begins first.
    context: the ids before, which a tokenizer of words needs to know.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
    self._tokenizer, self._stops, self._held = tokenizer, tuple(stop), ''
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
    # Where the tokenizer does not join bytes: the last ids, and how many of them have been said.
    self._ids = [] if tokenizer.joins_bytes else [*filter(self._bytes_of, context)][-_WINDOW:]
    self._said = len(self._ids)
    self.stop: str | None = None
    """The stop string that ended the text."""

  def push(self, token: int) -> str:
    """Return the text that is certain after this token."""
    if self._tokenizer.joins_bytes:
      return self._give(self._utf8.decode(self._bytes_of(token)), final=False)
    if not self._bytes_of(token):
      return ''
    self._ids.append(token)
    return self._give(self._more(final=False), final=False)

  def finish(self) -> str:
    """Return what was held back, when no token follows."""
    if self._tokenizer.joins_bytes:
      return self._give(self._utf8.decode(b'', final=True), final=True)
    return self._give(self._more(final=True), final=True)

  def _bytes_of(self, token: int) -> bytes:
    # A model may have more ids than its tokenizer; they say nothing.
    known = token < len(self._tokenizer.id_bytes)
    return self._tokenizer.id_bytes[token] if known else b''

  def _more(self, final: bool) -> str:
    """Return what the last ids add to the text of those before them."""
    before = self._tokenizer.decode(self._ids[: self._said])
    text = self._tokenizer.decode(self._ids)
    # A character may lack its last bytes.
    if text.endswith('\ufffd') and not final and len(self._ids) < self._said + 4:
      return ''
    self._ids = self._ids[-_WINDOW:]
    self._said = len(self._ids)
    return text[len(before) :]

  def _give(self, text: str, final: bool) -> str:
    if self.stop is not None:
      return ''
    text = self._held + text
    found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
    if found:
      # Of those that begin together the longest.
      place, self.stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
      self._held = ''
      return text[:place]
    keep = 0 if final else max((_begun(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]


def stream_text(
  model: Decoder,
  variables: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  num_top: int = 0,
  steps_per_piece: int = 1,
  cache_dtype: Any = None,
) -> Iterator[TextPiece]:
  """Yield text while it grows.

  Args:
    model: the decoder.
    variables: its variables; unstacked ones decode faster.
    tokenizer: of the model; its `eos_token_ids` end a row.
    prompts: token ids.
    sampling: one config for all rows, or one per row.
    stop: strings that end a row, across the borders of tokens; the prompt does not count.
    stop_ids: more tokens that end a row.
    seeds: one per row.
    num_top: how many of the most probable tokens come with each token.
    steps_per_piece: decoding steps between two pieces of a row.
    cache_dtype: of keys and values; the model's by default, int8 to quantise them.

  Raises:
    ValueError: as `decode.generate`, or a stop string is empty; at the call.
  """
  if any(not text for text in stop):
    raise ValueError("stop: '' would end every row before it begins; leave it out")
  requests = make_requests(
    model.config, prompts, sampling, [*tokenizer.eos_token_ids, *stop_ids], seeds, tokenizer.bos_id)
  cancelled: set[int] = set()
  pieces = decode.run(model, variables, requests, steps_per_piece, num_top, cancelled, cache_dtype)
  decoders = [TextDecoder(tokenizer, stop, request.prompt) for request in requests]
  return _texts(pieces, decoders, cancelled)


def complete(
  model: Decoder,
  variables: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  num_top: int = 0,
  echo: bool = False,
  cache_dtype: Any = None,
) -> list[Completion]:
  """Continue prompts; arguments and errors as `stream_text`.

  Args:
    model: see there, like all that follow but `echo`.
    variables: see there.
    tokenizer: see there.
    prompts: see there.
    sampling: see there.
    stop: see there.
    stop_ids: see there.
    seeds: see there.
    num_top: see there.
    echo: whether results begin with the prompt, scored like the rest.
    cache_dtype: see there.
  """
  steps = STEPS_PER_LOOK if stop else model.config.max_length
  empty = Completion('', [], [], [], 'length')
  results = [empty] * len(prompts)
  for piece in stream_text(model, variables, tokenizer, prompts, sampling, stop, stop_ids, seeds,
                           num_top, steps, cache_dtype):
    old = results[piece.row]
    results[piece.row] = Completion(
      old.text + piece.text, old.tokens + piece.tokens, [*old.logprobs, *piece.logprobs],
      old.top + piece.top, piece.finish_reason or 'length', piece.stop,
    )
  if not echo:
    return results
  bos_id = tokenizer.bos_id
  prompts = [prompt or ([] if bos_id is None else [bos_id]) for prompt in prompts]
  scores = scoring.score(model, variables, prompts, num_top)
  return [
    dataclasses.replace(
      result, text=text_of(tokenizer, prompt) + result.text, tokens=[*prompt, *result.tokens],
      logprobs=[*score.logprobs, *result.logprobs], top=[*score.top, *result.top],
    )
    for result, prompt, score in zip(results, prompts, scores, strict=True)
  ]


def text_of(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> str:
  """Return the text of ids, which continues that of others: a leading space is kept."""
  decoder = TextDecoder(tokenizer, context=context)
  return ''.join([*map(decoder.push, ids), decoder.finish()])


def _texts(
  pieces: Iterator[decode.Piece], decoders: Sequence[TextDecoder], cancelled: set[int]
) -> Iterator[TextPiece]:
  for piece in pieces:
    decoder, parts, used = decoders[piece.row], [], 0
    while used < len(piece.tokens) and decoder.stop is None:
      parts.append(decoder.push(piece.tokens[used]))
      used += 1
    reason = piece.finish_reason
    if reason is not None and decoder.stop is None:
      parts.append(decoder.finish())
    if decoder.stop is not None:
      cancelled.add(piece.row)
      reason = 'stop'
    yield TextPiece(piece.row, ''.join(parts), piece.tokens[:used], piece.logprobs[:used],
                    piece.top[:used], reason, decoder.stop)


def _begun(text: str, stop: str) -> int:
  """Return how many characters at the end of `text` may be the beginning of `stop`."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
