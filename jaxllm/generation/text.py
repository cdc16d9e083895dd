"""Text in, text out: stop strings, streaming of whole characters.

`stream_text` yields text while it grows, `complete` returns it whole; both give the same. The text
of tokens is what the tokenizer makes of them after the prompt: that of their bytes, or else what it
adds to the text of the tokens before. A character that spans tokens appears once it is complete,
and bytes that are no UTF-8 become U+FFFD.
"""

import codecs
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation import beam, decode, speculation
from jaxllm.generation.beam import BeamConfig
from jaxllm.generation.decode import Completion, TextPiece
from jaxllm.generation.rules import RULES
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.speculation import Draft, SpeculationConfig
from jaxllm.models.decoder import Decoder

__all__ = ['Completion', 'TextDecoder', 'TextPiece', 'complete', 'stream_text', 'text_of']

# Decode steps between two looks for stop strings where nobody waits for the text.
STEPS_PER_LOOK = 8
Way = BeamConfig | SpeculationConfig | None
"""How text is decoded, where that is not plain sampling."""

# Fields of `SamplingConfig` that beam search does not read.
SAMPLED = (*(name for name in RULES if name not in beam.RANKING), 'seed')
# Ids before a token that decide its text, where it is not that of its bytes.
_WINDOW = 6


class TextDecoder:
  """Turn tokens into text as they come, up to the first stop string.

  Args of the constructor:
    tokenizer: gives the text.
    stop: strings at the first of which the text ends; where several end with the same token, at
      the one that begins first.
    context: the ids before, which a tokenizer of words needs to know.
    skip_space: whether white space at the beginning is left out.
  """

  def __init__(
    self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = (),
    skip_space: bool = False,
  ):
    if any(not text for text in stop):
      raise ValueError("stop: '' would end every row before it begins; leave it out")
    self._skips_space = skip_space
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
    if self._skips_space:
      text = text.lstrip()
      self._skips_space = not text
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


def read_options(
  options: Mapping[str, Any], num_return_sequences: int = 1, draft: Any = None
) -> tuple[SamplingConfig, Way]:
  """Sort options into (how tokens are sampled, the way the text is decoded; None: plain).

  Args:
    options: fields of `SamplingConfig`, `BeamConfig` and `SpeculationConfig` by name. `num_beams=1`
      and `num_drafted=0` ask for plain decoding.
    num_return_sequences: continuations of each prompt.
    draft: a draft model, if there is one; it implies speculation.

  Raises:
    ValueError: a value is not accepted, or options exclude each other.
  """
  if num_return_sequences < 1:
    raise ValueError(f'num_return_sequences={num_return_sequences}: at least 1')
  fields = dict(options)
  beams, drafts = ({name: fields.pop(name) for name in config.model_fields if name in fields}
                   for config in (BeamConfig, SpeculationConfig))
  has_beams = beams.get('num_beams', 1) != 1
  has_drafts = drafts.get('num_drafted', 0) != 0 or draft is not None
  if has_beams and has_drafts:
    raise ValueError('num_beams with num_drafted or draft: these are different ways to decode; '
                     'choose one')
  if not has_beams and beams.keys() - {'num_beams'}:
    raise ValueError(f'{max(beams.keys() - {"num_beams"})} works with num_beams above 1 only')
  if not has_drafts and 'longest_ngram' in drafts:
    raise ValueError('longest_ngram works with num_drafted only')
  if has_beams and (sampled := {*SAMPLED} & fields.keys()):
    raise ValueError(f'{min(sampled)} works without num_beams only: beams are not sampled')
  sampling = SamplingConfig(**fields)
  if has_beams:
    return sampling, BeamConfig(**{'num_return': num_return_sequences, **beams})
  if has_drafts:
    return sampling, SpeculationConfig(**{**drafts, 'num_drafted': drafts.get('num_drafted') or 4})
  return sampling, None


def stream_text(
  model: Decoder, variables: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig], stop: Sequence[str] = (),
  stop_token_ids: Sequence[int] = (), seeds: Sequence[int] | None = None,
  steps_per_piece: int = 1, cache_dtype: Any = None, skip_space: bool = False,
) -> Iterator[TextPiece]:
  """Yield text while it grows.

  Arguments and errors as `decode.stream`, at the call, and:

  Args:
    tokenizer: of the model; its EOS tokens end a row.
    stop: strings that end a row, across the borders of tokens; the prompt does not count.
    stop_token_ids: tokens that end a row, besides EOS.
    skip_space: whether white space at the beginning is left out, and stops nothing.

  Raises:
    ValueError: a stop string is empty.
  """
  cancelled: set[int] = set()
  pieces = decode.stream(
    model, variables, prompts, sampling, (*tokenizer.eos_token_ids, *stop_token_ids), seeds,
    tokenizer.bos_id, steps_per_piece, cancelled, cache_dtype)
  decoders = [TextDecoder(tokenizer, stop, prompt, skip_space) for prompt in prompts]
  return _texts(pieces, decoders, cancelled)


def complete(
  model: Decoder, variables: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig], stop: Sequence[str] = (),
  stop_token_ids: Sequence[int] = (), seeds: Sequence[int] | None = None,
  cache_dtype: Any = None, skip_space: bool = False, way: Way = None,
  draft: Draft | None = None,
) -> list[Completion]:
  """Continue prompts.

  Arguments and errors as `stream_text`, and:

  Args:
    way: how beams compete, or how tokens are guessed. Beam search gives `num_return` completions of
      each prompt, best first, and samples nothing; speculation gives what plain decoding gives.
    draft: a smaller model that guesses the tokens of speculation.

  Raises:
    ValueError: `way` with an option that only plain decoding has.
  """
  if way is None:
    steps = STEPS_PER_LOOK if stop else model.config.max_length
    return decode.collect(
      stream_text(model, variables, tokenizer, prompts, sampling, stop, stop_token_ids, seeds,
                  steps, cache_dtype, skip_space), len(prompts))
  if cache_dtype is not None:
    raise ValueError('cache_dtype: not with beams or speculation; leave it out, or num_beams, '
                     'num_drafted and draft')
  eos_token_ids = (*tokenizer.eos_token_ids, *stop_token_ids)
  if isinstance(way, BeamConfig):
    assert isinstance(sampling, SamplingConfig)
    found = [one for several in beam.beam_search(
      model, variables, prompts, way, sampling, eos_token_ids, tokenizer.bos_id) for one in several]
  else:
    found, per_pass = speculation.generate(
      model, variables, prompts, sampling, way, draft, eos_token_ids, seeds, tokenizer.bos_id)
    logging.info('%.2f tokens per pass of the model.', per_pass)
  count = len(found) // max(len(prompts), 1)
  pieces = (TextPiece(row, '', one.tokens, one.logprobs, [], one.finish_reason)
            for row, one in enumerate(found))
  decoders = [TextDecoder(tokenizer, stop, prompts[row // count], skip_space)
              for row in range(len(found))]
  return [dataclasses.replace(result, score=one.score) for result, one in zip(
    decode.collect(_texts(pieces, decoders, set()), len(found)), found, strict=True)]


def text_of(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> str:
  """Return the text of ids, which continues that of others: a leading space is kept."""
  decoder = TextDecoder(tokenizer, context=context)
  return ''.join([*map(decoder.push, ids), decoder.finish()])


def _texts(
  pieces: Iterator[TextPiece], decoders: Sequence[TextDecoder], cancelled: set[int]
) -> Iterator[TextPiece]:
  for piece in pieces:
    decoder, text, used = decoders[piece.row], '', 0
    while used < len(piece.tokens) and decoder.stop is None:
      text += decoder.push(piece.tokens[used])
      used += 1
    if piece.finish_reason is not None and decoder.stop is None:
      text += decoder.finish()
    if decoder.stop is not None:
      cancelled.add(piece.row)
    yield dataclasses.replace(
      piece, text=text, tokens=piece.tokens[:used], logprobs=piece.logprobs[:used],
      stop=decoder.stop,
      finish_reason=piece.finish_reason if decoder.stop is None else 'stop')


def _begun(text: str, stop: str) -> int:
  """Return how many characters at the end of `text` may be the beginning of `stop`."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
