"""How likely a long text is, passage by passage: what loss, perplexity and bits per byte add up.

A passage ends where white space ends, not where a token or a window does, so that models with
different tokenizers are compared on the same stretches of text.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from jaxllm.generation import scoring
from jaxllm.model import Model
from jaxllm.tasks import predict
from jaxllm.tasks.base import BOS, Prediction, Segment
from jaxllm.tasks.encoding import Tokens, encode

# Up to the next white space, and the last one to the end.
_PASSAGE = re.compile(r'(?s).{2000}(?:.{,2000}\Z|\S*\s*)|.+')


def split(text: str) -> list[str]:
  """Cut a text at white space into passages of at least 2000 characters."""
  return [match.group() for match in _PASSAGE.finditer(text)]


def measure(
  model: Model, text: str, context_length: int, stride: int, batch_size: int = predict.BATCH_SIZE
) -> list[Prediction]:
  """Measure a text by overlapping windows, in which each token is predicted once.

  Args:
    model: what scores.
    text: of any length; it is tokenized whole.
    context_length: most tokens of a window.
    stride: tokens that a window after the first predicts; the others are only context.
    batch_size: windows of one call.

  Returns:
    {'log_likelihood' in nats, 'tokens', 'bytes'} of each passage, as `language_modeling.read`
    gives them. Without BOS the first token is not predicted and its bytes do not count.

  Raises:
    ValueError: the lengths do not fit the model.
  """
  if not 2 <= context_length <= model.config.max_length:
    raise ValueError(f'context_length={context_length}: between 2 and the context of the model, '
                     f'{model.config.max_length}')
  if not 1 <= stride < context_length:
    raise ValueError(f'stride={stride}: between 1 and context_length - 1, {context_length - 1}')
  ids = encode([BOS, Segment(text, 1.0)], model.tokenizer, model.add_bos).ids
  if len(ids) < 2:
    return []
  log_probs = _log_probs(model, ids, context_length, stride, batch_size)
  lengths = np.array([len(model.tokenizer.id_bytes[token]) for token in ids], float)
  sizes = [len(passage.encode()) for passage in split(text)]
  # Where each token begins; a tokenizer that normalises has other bytes than the text.
  starts = (np.cumsum(lengths) - lengths) * (sum(sizes) / max(lengths.sum(), 1))
  number = np.searchsorted(list(itertools.accumulate(sizes)), starts[1:], side='right')
  found = []
  for i, size in enumerate(sizes):
    mine = number == i
    unpredicted = lengths[0] if i == 0 else 0
    found.append({'log_likelihood': float(log_probs[mine].sum()), 'tokens': int(mine.sum()),
                  'bytes': int(size - unpredicted)})
  return [one for one in found if one['tokens']]


def _log_probs(
  model: Model, ids: Sequence[int], context_length: int, stride: int, batch_size: int
) -> np.ndarray:
  """Return the float64 log-probability of every token but the first."""
  windows = list(predict.windows(Tokens(ids, [1.0] * len(ids)), context_length - 1, stride))
  found = []
  for start in range(0, len(windows), batch_size):
    batch = windows[start : start + batch_size]
    found += scoring.score_from(
      model.decoder, model.unstacked, [window.ids for window in batch],
      [int(np.argmax(np.asarray(window.weights[1:]) > 0)) + 1 for window in batch])
  return np.concatenate([one.log_probs_N for one in found]).astype(np.float64)
