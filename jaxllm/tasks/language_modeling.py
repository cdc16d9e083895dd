"""Language modelling: how likely a text is; loss, perplexity and bits per byte."""

from operator import itemgetter
from typing import Literal

from jaxllm.tasks import base, fields
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
