"""How probable given tokens are: scores of prompts (echo) and of continuations (choices)."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxllm import sharding
from jaxllm.generation.decode import Top
from jaxllm.generation.requests import check_ids
from jaxllm.generation.sampling import power_of_two
from jaxllm.models import log_probs
from jaxllm.models.decoder import Decoder

# Rows of one batch, and the smallest sizes that are compiled.
ROWS, LEAST_TOKENS, LEAST_SCORED, LEAST_TOP = 16, 16, 4, 4


@dataclasses.dataclass(frozen=True)
class Score:
  """How probable each token of a sequence is, given those before it.

  Attributes:
    logprobs: natural logarithms; None for the first token.
    is_greedy: whether the token is the most probable one; None for the first token.
    top: the most probable tokens at each place, best first; nothing for the first.
  """

  logprobs: list[float | None]
  is_greedy: list[bool | None]
  top: list[Top]


def score(
  model: Decoder, variables: Any, sequences: Sequence[Sequence[int]], num_top: int = 0
) -> list[Score]:
  """Score every token of every sequence.

  Args:
    model: the decoder.
    variables: its variables, stacked or not.
    sequences: token ids, at least one, and at most one more than the context's length.
    num_top: how many of the most probable tokens are returned for each place.

  Raises:
    ValueError: a sequence is empty or too long, or an id is not in the vocabulary.
  """
  results = []
  for found in score_from(model, variables, sequences, [1] * len(sequences), num_top):
    top: list[Top] = [
      [*zip(ids[:num_top].tolist(), values[:num_top].tolist(), strict=True)]
      for ids, values in zip(found.top_ids_NA, found.top_log_probs_NA, strict=True)
    ]
    results.append(Score([None, *found.log_probs_N.tolist()], [None, *found.is_greedy_N.tolist()],
                         [[], *top] if num_top else []))
  return results


def score_continuations(
  model: Decoder, variables: Any, contexts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]], context_length: int | None = None,
) -> list[tuple[float, bool]]:
  """Score continuations of contexts.

  Args:
    model: the decoder.
    variables: its variables.
    contexts: token ids, at least one each.
    continuations: token ids; a sequence that is too long loses the beginning of its context.
    context_length: tokens that are read at most to predict the last one; None: the model's.

  Returns:
    (log-probability of the whole continuation, whether greedy decoding would give it) for each.

  Raises:
    ValueError: as `score`; or a context is empty, or a continuation leaves it no room.
  """
  window = context_length or model.config.max_length
  for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
    if not context:
      raise ValueError(f'contexts[{row}] is empty; begin with BOS, or with the first token')
    if len(continuation) > window:
      raise ValueError(f'continuations[{row}] has {len(continuation)} tokens but the context is '
                       f'{window}')
  sequences = [[*context, *continuation][-(window + 1) :]
               for context, continuation in zip(contexts, continuations, strict=True)]
  firsts = [len(sequence) - len(continuation)
            for sequence, continuation in zip(sequences, continuations, strict=True)]
  return [(float(found.log_probs_N.astype(np.float64).sum()), bool(found.is_greedy_N.all()))
          for found in score_from(model, variables, sequences, firsts)]


def score_from(
  model: Decoder, variables: Any, sequences: Sequence[Sequence[int]], firsts: Sequence[int],
  num_top: int = 0,
) -> list[log_probs.TokenScores]:
  """Score the tokens of each sequence from a place on; logits exist for those alone.

  Args:
    model: the decoder.
    variables: its variables, stacked or not.
    sequences: as in `score`.
    firsts: place of the first token that is scored, at least 1, for each sequence.
    num_top: at least so many of the most probable tokens are found.

  Returns:
    NumPy arrays for each sequence.

  Raises:
    ValueError: as `score`.
  """
  config = model.config
  for row, sequence in enumerate(sequences):
    if not 1 <= len(sequence) <= config.max_length + 1:
      raise ValueError(f'sequences[{row}] has {len(sequence)} tokens; between 1 and the context of '
                       f'the model, {config.max_length}, and one')
    check_ids(config, f'sequences[{row}]', sequence)
  kept = min(power_of_two(num_top, LEAST_TOP), config.vocab_size) if num_top else 0
  counts = [len(sequence) - first for sequence, first in zip(sequences, firsts, strict=True)]
  order = sorted(range(len(sequences)), key=lambda row: (len(sequences[row]), counts[row]))
  results: dict[int, log_probs.TokenScores] = {}
  for start in batches(len(order), ROWS):
    rows = order[start : start + ROWS]
    length = min(power_of_two(len(sequences[rows[-1]]) - 1, LEAST_TOKENS), config.max_length)
    width = min(power_of_two(max(counts[row] for row in rows), LEAST_SCORED), length)
    tokens_BS = np.zeros((power_of_two(len(rows)), length + 1), np.int32)
    places_BK = np.zeros((len(tokens_BS), width), np.int32)
    for i, row in enumerate(rows):
      tokens_BS[i, : len(sequences[row])] = sequences[row]
      places_BK[i, : counts[row]] = np.arange(firsts[row] - 1, len(sequences[row]) - 1)
    host = sharding.to_host(_score(model, variables, tokens_BS, places_BK, kept))
    for i, row in enumerate(rows):
      results[row] = log_probs.TokenScores(*(leaf[i, : counts[row]] for leaf in host))
  return [results[row] for row in range(len(sequences))]


def batches(count: int, batch_size: int) -> Iterable[int]:
  """Return where batches begin; at a terminal a bar shows how far a long work has come."""
  starts = range(0, count, batch_size)
  return tqdm.tqdm(starts, unit='batch', leave=False, delay=3, disable=None)


def compilation_count() -> int:
  """Return how many programs this file has compiled in this process."""
  program: Any = _score
  return program._cache_size()


@functools.partial(jax.jit, static_argnames=('model', 'num_top'))
def _score(
  model: Decoder, variables: Any, tokens_BS: jax.Array, places_BK: jax.Array, num_top: int
) -> log_probs.TokenScores:
  """Score the tokens that follow K places of each row."""
  hidden: Any = model.apply(variables, tokens_BS[:, :-1], method='hidden')
  hidden_BKD = jnp.take_along_axis(hidden[0], places_BK[..., None], axis=1)
  targets_BK = jnp.take_along_axis(tokens_BS, places_BK + 1, axis=1)
  return log_probs.score_tokens(model, variables, hidden_BKD, targets_BK, num_top)
