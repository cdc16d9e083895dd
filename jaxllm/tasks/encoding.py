"""Segments to token ids and weights: the only place where a task meets a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.objectives import completion
from jaxllm.objectives.completion import Tokens, Truncation
from jaxllm.tasks.base import Example, Segment, prompt_of


def encode(
  segments: Sequence[Segment],
  tokenizer: Tokenizer,
  special_ids: Mapping[str, int] | None = None,
  add_bos: bool = True,
) -> Tokens:
  """Tokenize each segment by itself, so that weights and tokens cannot come apart.

  Args:
    segments: texts and control tokens.
    tokenizer: BOS or EOS is left out where it has none.
    special_ids: spelling -> id of its other special tokens; a control segment that is not among
      them is tokenized as text.
    add_bos: whether the model wants BOS; without, it is left out.

  Returns:
    ids and the weight of each as a target.
  """
  bos_id = tokenizer.bos_id if add_bos else None
  known = {'bos': bos_id, 'eos': tokenizer.eos_id, **(special_ids or {})}
  ids: list[int] = []
  weights: list[float] = []
  continues = False
  for segment in segments:
    if segment.control and segment.text in known:
      special = known[segment.text]
      new = [] if special is None else [special]
      continues = False
    else:
      new = _continued(segment.text, tokenizer) if continues else tokenizer.encode(segment.text)
      continues = True
    ids += new
    weights += [segment.weight] * len(new)
  return Tokens(ids, weights)


def _continued(text: str, tokenizer: Tokenizer) -> list[int]:
  """Tokenize text that follows other text: without the space that some put before all text."""
  border = '\n'
  before = tokenizer.encode(border)
  if b''.join(tokenizer.id_bytes[token] for token in before) == border.encode():
    return tokenizer.encode(text)
  return tokenizer.encode(border + text)[len(before) :]


class Omitted(NamedTuple):
  """How many examples are not trained on, or in part.

  Attributes:
    too_long: left out, as they are longer than the context.
    silent: left out, as nothing in them is an answer.
    cut: kept without what was too much.
  """

  too_long: int
  silent: int
  cut: int


def omitted(before: Sequence[Tokens], after: Sequence[Tokens | None]) -> Omitted:
  """Compare sequences with what is kept of them."""
  silent = sum(not any(tokens.weights[1:]) for tokens in before)
  cut = sum(len(tokens.ids) < len(whole.ids)
            for whole, tokens in zip(before, after, strict=True) if tokens)
  return Omitted(sum(tokens is None for tokens in after) - silent, silent, cut)


def training_sequences(
  examples: Sequence[Example],
  tokenizer: Tokenizer,
  context_length: int,
  truncation: Truncation = 'start',
  special_ids: Mapping[str, int] | None = None,
  add_bos: bool = True,
) -> tuple[list[Tokens | None], Omitted]:
  """Tokenize and cut examples, prompts without weight, for training.

  Args:
    examples: of any tasks.
    tokenizer: text to ids.
    context_length: T.
    truncation: what is done to an example that is longer; see `completion.truncate`.
    special_ids: as in `encode`.
    add_bos: as in `encode`.

  Returns:
    One sequence per example, None where nothing of it is left to learn from; and how many are.

  Raises:
    ValueError: an example is too long and `truncation` is 'error'.
  """
  encoded = [encode(example.segments, tokenizer, special_ids, add_bos) for example in examples]
  cut = [completion.truncate(tokens, context_length, truncation) for tokens in encoded]
  return cut, omitted(encoded, cut)


def prompts(
  examples: Sequence[Example],
  tokenizer: Tokenizer,
  context_length: int,
  truncation: Truncation = 'start',
  add_bos: bool = True,
) -> list[Tokens | None]:
  """Tokenize and cut prompts alone, for a classifier that reads them.

  Args:
    examples: of a task with labels.
    tokenizer: text to ids.
    context_length: T; no prompt is longer.
    truncation: what is done to one that is: its start is cut, BOS excepted, or its end, or it is
      left out ('drop'), or refused ('error').
    add_bos: as in `encode`.

  Returns:
    One sequence per example, without weights; None where it is left out.

  Raises:
    ValueError: a prompt is too long and `truncation` is 'error'.
  """
  found: list[Tokens | None] = []
  for example in examples:
    ids = encode(prompt_of(example.segments), tokenizer, None, add_bos).ids
    # `truncate` keeps what has weight: the end, or the beginning.
    weights = [0.0] * (len(ids) - 1) + [1.0] if truncation == 'start' else [1.0] * len(ids)
    # Batches read all but the last token of a row.
    cut = completion.truncate(Tokens(ids, weights), context_length - 1, truncation)
    found.append(cut and Tokens(cut.ids, [0.0] * len(cut.ids)))
  return found
