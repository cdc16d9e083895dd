"""How probable given tokens are: scores of prompts (echo) and of continuations (choices)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generation.decode import Top
from jaxllm.generation.requests import make_requests
from jaxllm.generation.sampling import SamplingConfig, power_of_two
from jaxllm.models.decoder import Decoder

# Rows of one batch, and positions whose logits exist at a time.
ROWS, CHUNK, LEAST_TOKENS, LEAST_TOP = 16, 64, 16, 4


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
    sequences: token ids, each between 1 and the context's length of them.
    num_top: how many of the most probable tokens are returned for each place.

  Raises:
    ValueError: a sequence is empty or too long, or an id is not in the vocabulary.
  """
  requests = make_requests(model.config, sequences, SamplingConfig())
  order = sorted(range(len(requests)), key=lambda row: len(requests[row].prompt))
  results: dict[int, Score] = {}
  for start in range(0, len(order), ROWS):
    rows = order[start : start + ROWS]
    longest = len(requests[rows[-1]].prompt)
    length = min(power_of_two(longest, LEAST_TOKENS), model.config.max_length)
    tokens_BT = np.zeros((power_of_two(len(rows)), length), np.int32)
    for place, row in enumerate(rows):
      tokens_BT[place, : len(requests[row].prompt)] = requests[row].prompt
    kept = min(power_of_two(num_top, LEAST_TOP), model.config.vocab_size) if num_top else 0
    host = jax.device_get(_score(model, variables, jnp.asarray(tokens_BT), kept))
    for place, row in enumerate(rows):
      last = len(requests[row].prompt) - 1
      logprobs, is_greedy, ids, top = (leaf[place, :last] for leaf in host)
      results[row] = _to_score(logprobs, is_greedy, ids, top, num_top)
  return [results[row] for row in range(len(requests))]


def score_continuations(
  model: Decoder, variables: Any, contexts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
  """Score continuations of contexts.

  Args:
    model: the decoder.
    variables: its variables.
    contexts: token ids, at least one each.
    continuations: token ids; a sequence that is too long loses the beginning of its context.

  Returns:
    (log-probability of the whole continuation, whether greedy decoding would give it) for each.

  Raises:
    ValueError: as `score`; or a context is empty.
  """
  sequences = []
  for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
    if not context:
      raise ValueError(f'contexts[{row}] is empty; begin with BOS, or with the first token')
    excess = max(len(context) + len(continuation) - model.config.max_length, 0)
    if excess >= len(context):
      raise ValueError(f'continuations[{row}] has {len(continuation)} tokens but the context of '
                       f'the model is {model.config.max_length}, of which one precedes it')
    sequences.append([*context[excess:], *continuation])
  results = []
  for scored, continuation in zip(score(model, variables, sequences), continuations, strict=True):
    begin = len(scored.logprobs) - len(continuation)
    results.append((
      float(sum(logprob or 0.0 for logprob in scored.logprobs[begin:])),
      all(scored.is_greedy[begin:]),
    ))
  return results


def compilation_count() -> int:
  """Return how many programs `score` has compiled in this process."""
  program: Any = _score
  return program._cache_size()


@functools.partial(jax.jit, static_argnames=('model', 'num_top'))
def _score(
  model: Decoder, variables: Any, tokens_BT: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Return log-probabilities, greedy flags and top tokens of each place's successor."""
  hidden_BTD: Any = model.apply(variables, tokens_BT, method='hidden')
  batch, length, dim = hidden_BTD.shape
  targets_BT = jnp.concatenate([tokens_BT[:, 1:], tokens_BT[:, :1]], axis=1)
  chunk = min(CHUNK, batch * length)
  pad = -(batch * length) % chunk
  hidden_CD = jnp.pad(hidden_BTD.reshape(-1, dim), ((0, pad), (0, 0))).reshape(-1, chunk, dim)
  targets_C = jnp.pad(targets_BT.reshape(-1), (0, pad)).reshape(-1, chunk)

  def look(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    hidden_CD, targets_C = inputs
    logits_CV: Any = model.apply(variables, hidden_CD, method='logits')
    logprobs_CV = jax.nn.log_softmax(logits_CV)
    chosen_C = jnp.take_along_axis(logprobs_CV, targets_C[:, None], axis=1)[:, 0]
    top_CA, ids_CA = jax.lax.top_k(logprobs_CV, num_top)
    return chosen_C, jnp.argmax(logits_CV, axis=-1) == targets_C, ids_CA, top_CA

  found = jax.lax.map(look, (hidden_CD, targets_C))
  logprobs, is_greedy, ids, top = (
    leaf.reshape(batch * length + pad, *leaf.shape[2:])[: batch * length]
    .reshape(batch, length, *leaf.shape[2:]) for leaf in found
  )
  return logprobs, is_greedy, ids, top


def _to_score(
  logprobs_T: np.ndarray, is_greedy_T: np.ndarray, ids_TA: np.ndarray, top_TA: np.ndarray,
  num_top: int,
) -> Score:
  top: list[Top] = [
    [*zip(ids[:num_top].tolist(), logprobs[:num_top].tolist(), strict=True)]
    for ids, logprobs in zip(ids_TA, top_TA, strict=True)
  ]
  return Score([None, *logprobs_T.tolist()], [None, *is_greedy_T.tolist()],
               [[], *top] if num_top else [])
