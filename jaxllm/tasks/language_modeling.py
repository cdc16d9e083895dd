"""Language modelling: how likely a text is; loss, perplexity and bits per byte.

A long text is measured passage by passage. A passage ends where white space ends, not where a token
or a window does, so that models with different tokenizers are compared on the same stretches.
"""

import itertools
import re
from collections.abc import Iterable
from operator import itemgetter
from typing import Literal

import numpy as np

from jaxllm.generation import scoring
from jaxllm.model import Model
from jaxllm.tasks import base, fields
from jaxllm.tasks.base import BOS, Prediction, Segment
from jaxllm.tasks.encoding import encode
from jaxllm.tasks.records import RecordsConfig, RecordSource


class LanguageModeling(base.TaskConfig):
  """Measure `text`.

  The default data are the help topics of Python.
  """

  kind: Literal['language_modeling'] = 'language_modeling'
  """'language_modeling'."""
  data: RecordsConfig = RecordsConfig(sources=(RecordSource(location='package:python-help'),))
  """Records with `text`."""


def example(config: LanguageModeling, record: base.Record) -> base.Example:
  """Return the example of a record: the whole text, without a token for its end."""
  return base.Example((base.BOS, base.Segment(record['text'], 1.0)), None, record)


def read(config: base.TaskConfig, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return {'log_likelihood', 'tokens', 'bytes'}: in nats, of all that has weight."""
  return {
    'log_likelihood': sum(answer.log_likelihoods),
    'tokens': sum(answer.num_tokens),
    'bytes': sum(len(segment.text.encode()) for segment in example.segments
                 if segment.weight and not segment.control) - answer.unpredicted_bytes,
  }


METRICS = dict.fromkeys(
  ('perplexity', 'bits_per_byte'), itemgetter('log_likelihood', 'tokens', 'bytes'))

TASK = base.Task(LanguageModeling, 'measure', {'text': fields.any_text}, example, read, METRICS)


# Up to the next white space, and the last one to the end.
_PASSAGE = re.compile(r'(?s).{2000}(?:.{,2000}\Z|\S*\s*)|.+')


def split_passages(text: str) -> list[str]:
  """Cut a text at white space into passages of at least 2000 characters."""
  return [match.group() for match in _PASSAGE.finditer(text)]


def measure_passages(
  model: Model, texts: Iterable[str], context_length: int, stride: int
) -> list[Prediction]:
  """Measure texts by their rolling log-likelihoods, in windows that overlap.

  Args:
    texts: of any length; each is tokenized whole.
    context_length: most tokens of a window.
    stride: tokens that a window after the first predicts; the others are only context.

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
  texts = list(texts)
  ids = [encode([BOS, Segment(text, 1.0)], model.tokenizer, model.add_bos).ids
         for text in texts]
  log_probs = scoring.rolling(model.decoder, model.variables, ids,
                              [range(1, len(own)) for own in ids], context_length - 1, stride)
  id_bytes = model.tokenizer.id_bytes
  return [one for text, own, found in zip(texts, ids, log_probs, strict=True)
          for one in _by_passage(text, [len(id_bytes[token]) for token in own], found)]


def _by_passage(text: str, lengths: list[int], log_probs: np.ndarray) -> Iterable[Prediction]:
  """Yield the sums of each passage; `lengths` are the bytes of the tokens, the first included."""
  sizes = [len(passage.encode()) for passage in split_passages(text)]
  # Where each token begins; a tokenizer that normalises has other bytes than the text.
  starts = (np.cumsum(lengths) - lengths) * (sum(sizes) / max(sum(lengths), 1))
  number = np.searchsorted(list(itertools.accumulate(sizes)), starts[1:], side='right')
  for i, size in enumerate(sizes):
    mine = number == i
    if mine.any():
      yield {'log_likelihood': float(log_probs[mine].sum()), 'tokens': int(mine.sum()),
             'bytes': int(size - (0 if i else lengths[0]))}
