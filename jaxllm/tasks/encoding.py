"""Segments to token ids and weights: the only place where a task meets a tokenizer."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from jaxllm.data.tokenizer_settings import Part
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.tasks.base import CONVERSATION, Example, Segment, Truncation, prompt_of


class Tokens(NamedTuple):
  """A sequence.

  Attributes:
    ids: token ids.
    weights: weight of each token as a target; the first one never is a target.
  """

  ids: Sequence[int]
  weights: Sequence[float]


def truncate(tokens: Tokens, context_length: int, policy: Truncation) -> Tokens | None:
  """Make a sequence fit a record; return None where nothing would be left to learn from it.

  Args:
    context_length: T; a record holds one token more.
    policy: what to do with a longer one: cut the start of what has no weight, the first token (BOS)
      excepted, and then the end ('start'); cut the end ('end'); 'drop' it; refuse it ('error').

  Raises:
    ValueError: it is too long and the policy is 'error'.
  """
  ids, weights = list(tokens.ids), list(tokens.weights)
  excess = len(ids) - (context_length + 1)
  if excess > 0:
    if policy == 'error':
      raise ValueError(f'an example has {len(ids)} tokens, but the context is {context_length}; '
                       "choose a longer context or another truncation ('start', 'end', 'drop')")
    if policy == 'drop':
      return None
    if policy == 'start':
      first = next((i for i, weight in enumerate(weights) if weight), len(ids))
      cut = slice(1, 1 + min(excess, max(first - 1, 0)))
      del ids[cut], weights[cut]
    del ids[context_length + 1 :], weights[context_length + 1 :]
  return Tokens(ids, weights) if any(weights[1:]) else None


def encode(segments: Sequence[Segment], tokenizer: Tokenizer, add_bos: bool = True) -> Tokens:
  """Return ids and their weights as targets; each segment is tokenized by itself.

  A conversation is tokenized as `sequences` does; the last of its sequences is returned.

  Args:
    segments: texts and control tokens.
    tokenizer: BOS or EOS is left out where it has none; a control segment that names none of its
      other special tokens is tokenized as text.
    add_bos: whether the model wants BOS; without, it is left out.
  """
  if segments and segments[0] == CONVERSATION:
    return sequences(segments, tokenizer, add_bos)[-1]
  ids: list[int] = []
  weights: list[float] = []
  continues = False
  parts = _parts(segments, tokenizer, add_bos)
  for segment, part in zip(segments, parts, strict=True):
    if segment.control and part != segment.text:
      new = [part] if isinstance(part, int) else []
      continues = False
    else:
      new = _continued([part], tokenizer) if continues else tokenizer.encode(segment.text)
      continues = True
    ids += new
    weights += [segment.weight] * len(new)
  return Tokens(ids, weights)


def sequences(
  segments: Sequence[Segment], tokenizer: Tokenizer, add_bos: bool = True
) -> list[Tokens]:
  """Tokenize segments; a conversation may need several sequences.

  The text before an answer has the ids with which a model is asked for it. Where these do not begin
  with the ids so far, as a tokenizer joins an answer with what follows, another sequence begins.

  Returns:
    Sequences in which each answer has its weight once; arguments are those of `encode`.
  """
  if not segments or segments[0] != CONVERSATION:
    return [encode(segments, tokenizer, add_bos)]
  starts = [i for i, segment in enumerate(segments) if segment == CONVERSATION]
  found = []
  for start, stop in itertools.pairwise([*starts, len(segments)]):
    some = segments[start + 1 : stop]
    parts = _parts(some, tokenizer, add_bos)
    bos_id = tokenizer.bos_id
    begin = [bos_id] if add_bos and bos_id is not None and parts[:1] != [bos_id] else []
    found += _turns([*begin, *parts], [0.0] * len(begin) + [one.weight for one in some], tokenizer)
  return found


def _turns(parts: list[Part], weights: list[float], tokenizer: Tokenizer) -> list[Tokens]:
  found: list[Tokens] = []
  ids: list[int] = []
  own: list[float] = []
  stop = 0
  for weight, run in itertools.groupby(weights):
    start, stop = stop, stop + len(list(run))
    if not weight:
      continue
    asked = tokenizer.encode_parts(parts[:start])
    if asked[: len(ids)] != ids:
      found.append(Tokens(ids, own))
      ids, own = [], []
    whole = tokenizer.encode_parts(parts[:stop])
    said = (whole[len(asked) :] if whole[: len(asked)] == asked
            else _continued(parts[start:stop], tokenizer))
    own = [*own, *[0.0] * (len(asked) - len(ids)), *[weight] * len(said)]
    ids = asked + said
  if not ids:
    ids = tokenizer.encode_parts(parts)
    own = [0.0] * len(ids)
  return [*found, Tokens(ids, own)]


def _parts(segments: Sequence[Segment], tokenizer: Tokenizer, add_bos: bool) -> list[Part]:
  """Return the texts of segments, and the ids of controls; '' for those that there are not."""
  known = {'bos': tokenizer.bos_id if add_bos else None, 'eos': tokenizer.eos_id,
           **tokenizer.special_tokens}
  found = [known.get(segment.text, segment.text) if segment.control else segment.text
           for segment in segments]
  return ['' if part is None else part for part in found]


def _continued(parts: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
  """Tokenize what follows other text: without the space that some put before all text."""
  border = '\n'
  before = tokenizer.encode(border)
  if b''.join(tokenizer.id_bytes[token] for token in before) == border.encode():
    return tokenizer.encode_parts(parts)
  return tokenizer.encode_parts([border, *parts])[len(before) :]


class Omitted(NamedTuple):
  """How many examples are not trained on, or in part.

  Attributes:
    too_long: left out, as they are longer than the context.
    silent: left out, as nothing in them is an answer.
    cut: kept without what was too much.
    equal: left out, as both of their answers are the same.
  """

  too_long: int
  silent: int
  cut: int
  equal: int = 0

  @property
  def dropped(self) -> int:
    """How many are left out."""
    return self.too_long + self.silent + self.equal


def omitted(before: Sequence[Tokens], after: Sequence[Tokens | None]) -> Omitted:
  """Compare sequences with what is kept of them."""
  silent = sum(not any(tokens.weights[1:]) for tokens in before)
  cut = sum(len(tokens.ids) < len(whole.ids)
            for whole, tokens in zip(before, after, strict=True) if tokens)
  return Omitted(sum(tokens is None for tokens in after) - silent, silent, cut)


def training_sequences(
  examples: Sequence[Example], tokenizer: Tokenizer, context_length: int,
  truncation: Truncation = 'start', add_bos: bool = True,
) -> tuple[list[Tokens | None], Omitted]:
  """Tokenize (see `sequences`) and cut (see `truncate`) examples of any tasks for training.

  Returns:
    One sequence per example, for a conversation maybe several, None where nothing of it is left to
    learn from; and how many examples are left out or cut.

  Raises:
    ValueError: an example is too long and `truncation` is 'error'.
  """
  cut: list[Tokens | None] = []
  longest: list[Tokens] = []
  kept: list[Tokens | None] = []
  for example in examples:
    several = sequences(example.segments, tokenizer, add_bos)
    # A conversation has lost whole turns of its start before: see `chat.fitting`.
    is_chat = example.segments[:1] == (CONVERSATION,) and truncation == 'start'
    cut += [truncate(tokens, context_length, 'end' if is_chat else truncation)
            for tokens in several]
    longest.append(several[-1])
    kept.append(cut[-1])
  return cut, omitted(longest, kept)


def prompts(
  examples: Sequence[Example], tokenizer: Tokenizer, context_length: int,
  truncation: Truncation = 'start', add_bos: bool = True,
) -> list[Tokens | None]:
  """Tokenize and cut prompts alone, for a classifier that reads them; as `training_sequences`.

  No prompt is longer than the context: its start is cut, BOS excepted, or its end. No weights.
  """
  found: list[Tokens | None] = []
  for example in examples:
    ids = encode(prompt_of(example.segments), tokenizer, add_bos).ids
    # `truncate` keeps what has weight: the end, or the beginning.
    weights = [0.0] * (len(ids) - 1) + [1.0] if truncation == 'start' else [1.0] * len(ids)
    # Batches read all but the last token of a row.
    cut = truncate(Tokens(ids, weights), context_length - 1, truncation)
    found.append(cut and Tokens(cut.ids, [0.0] * len(cut.ids)))
  return found
