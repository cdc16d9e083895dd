"""The log-probabilities of given tokens: of prompts (echo), continuations, and whole texts."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from jaxllm import sharding
from jaxllm.generation.sampling import check_ids, power_of_two
from jaxllm.models.decoder import Decoder
from jaxllm.models.log_probs import TokenScores, score_tokens

# Tokens of one batch, and the smallest sizes that are compiled.
BATCH_TOKENS, LEAST_TOKENS, LEAST_TOP = 4096, 16, 4


def score(
  model: Decoder, variables: Any, sequences: Sequence[Sequence[int]],
  places: Sequence[Sequence[int]] | None = None, num_top: int = 0,
) -> list[TokenScores]:
  """Score tokens of each sequence, given those before them; the scores are NumPy arrays.

  What several sequences begin with is computed once where one is, but for its last token, a prefix
  of another: so it is with the choices of one token that a question has.

  Args:
    variables: its variables; stacked ones compile faster, and give the same.
    sequences: token ids, at least one, and at most one more than the context's length.
    places: which tokens of each sequence are scored, from 1 on; None: all but the first.
    num_top: at least so many of the most probable tokens are found for each place.

  Raises:
    ValueError: a sequence is empty or too long, or an id is not in the vocabulary.
  """
  config = model.config
  for row, sequence in enumerate(sequences):
    if not 1 <= len(sequence) <= config.max_length + 1:
      raise ValueError(f'sequences[{row}] has {len(sequence)} tokens; between 1 and the context of '
                       f'the model, {config.max_length}, and one')
    check_ids(config, f'sequences[{row}]', sequence)
  if places is None:
    places = [range(1, len(sequence)) for sequence in sequences]
  num_kept = min(power_of_two(num_top, LEAST_TOP), config.vocab_size) if num_top else 0
  nothing = TokenScores(np.zeros(0, np.float32), np.zeros(0, bool),
                        np.zeros((0, num_kept), np.int32), np.zeros((0, num_kept), np.float32))
  results = [nothing] * len(sequences)
  inputs = [tuple(sequence[: max(scored, default=0)])
            for sequence, scored in zip(sequences, places, strict=True)]
  for groups in bar(list(_batches(inputs))):
    length = min(_rounded(len(inputs[groups[0][0]])), config.max_length)
    tokens_BT = np.zeros((_rounded(len(groups), 1, 4), length), np.int32)
    for tokens_T, group in zip(tokens_BT, groups, strict=False):
      tokens_T[: len(inputs[group[0]])] = inputs[group[0]]
    asked = [(i, place - 1, sequences[row][place])
             for i, group in enumerate(groups) for row in group for place in places[row]]
    asked_N3 = np.zeros((_rounded(len(asked)), 3), np.int32)
    asked_N3[: len(asked)] = asked
    found = sharding.to_host(_score(model, variables, tokens_BT, asked_N3, num_kept))
    start = 0
    for row in (row for group in groups for row in group):
      stop = start + len(places[row])
      results[row] = TokenScores(*(leaf[start:stop] for leaf in found))
      start = stop
  return results


def rolling(
  model: Decoder, variables: Any, sequences: Sequence[Sequence[int]],
  places: Sequence[Sequence[int]], context_length: int, stride: int,
) -> list[np.ndarray]:
  """Return rolling log-likelihoods (float64) of tokens of sequences that may exceed the context.

  Args:
    sequences: token ids.
    places: which tokens of each sequence are scored, from 1 on, in order.
    context_length: tokens that are read at most to predict one.
    stride: tokens that a window after the first predicts; the others are only context.
  """
  windows, scored = [], []
  for row, (sequence, wanted) in enumerate(zip(sequences, places, strict=True)):
    done = 1
    while done < len(sequence):
      stop = min(len(sequence), context_length + 1 if done == 1 else done + stride)
      start = max(0, stop - context_length - 1)
      first, last = np.searchsorted(wanted, (done, stop))
      windows.append((row, sequence[start:stop]))
      scored.append([place - start for place in wanted[first:last]])
      done = stop
  found = score(model, variables, [window for _, window in windows], scored)
  parts: list[list[np.ndarray]] = [[np.zeros(0)] for _ in sequences]
  for (row, _), one in zip(windows, found, strict=True):
    parts[row].append(one.log_probs_N)
  return [np.concatenate(several, dtype=np.float64) for several in parts]


def bar(batches: Iterable[Any]) -> Iterable[Any]:
  """Return batches; at a terminal a bar shows how far a long work has come."""
  return tqdm.tqdm(batches, unit='batch', leave=False, delay=3, disable=None)


def _batches(inputs: Sequence[tuple[int, ...]]) -> Iterator[list[list[int]]]:
  """Yield batches of groups of row numbers; a group's first row begins with all the others."""
  groups: list[list[int]] = []
  # In this order what begins with a row comes right before it.
  for row in sorted(filter(inputs.__getitem__, range(len(inputs))),
                    key=inputs.__getitem__, reverse=True):
    if groups and inputs[groups[-1][0]][: len(inputs[row])] == inputs[row]:
      groups[-1].append(row)
    else:
      groups.append([row])
  groups.sort(key=lambda group: -len(inputs[group[0]]))
  while groups:
    size = power_of_two(BATCH_TOKENS // _rounded(len(inputs[groups[0][0]])) + 1) // 2 or 1
    yield groups[:size]
    del groups[:size]


def _rounded(number: int, least: int = LEAST_TOKENS, steps: int = 8) -> int:
  """Round up to one of a few sizes: the next power of two has so many steps."""
  step = max(least, power_of_two(number) // steps)
  return -(-number // step) * step


@functools.partial(jax.jit, static_argnames=('model', 'num_top'))
def _score(
  model: Decoder, variables: Any, tokens_BT: jax.Array, asked_N3: jax.Array, num_top: int
) -> TokenScores:
  """Score tokens that are asked for as (row, place before it, token)."""
  hidden: Any = model.apply(variables, tokens_BT, method='hidden')
  row_N, place_N, target_N = asked_N3.T
  return score_tokens(model, variables, hidden[0][row_N, place_N], target_N, num_top)
