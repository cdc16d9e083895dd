"""Summarisation: a document in, a few words out; scored by ROUGE."""

from operator import itemgetter
from typing import Literal

import pydantic

from jaxllm.tasks import base, fields
from jaxllm.tasks.records import RecordsConfig, RecordSource


class Summarization(base.CompletionConfig):
  """Say what `document` says in the words of `summary`.

  The default data are functions of Python's standard library and what their docstrings begin with.
  """

  kind: Literal['summarization'] = 'summarization'
  """'summarization'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:stdlib'),), group='document')
  """Records with `document` and `summary`, a text or several to score against, of which the first
  is trained on."""
  prompt: str = '{document}\nSummary:'
  """Text before the answer."""
  target: str = ' {summary}'
  """The answer."""
  request: str | None = '{document}\n\nSummarize this in one or two sentences.'
  """What a chat model is asked."""
  max_new_tokens: int = pydantic.Field(default=128, gt=0)
  """Most tokens of a summary."""


def example(config: Summarization, record: base.Record) -> base.Example:
  """Return the example of a record; without a `summary` it can only be answered."""
  summary = record.get('summary')
  return base.written(config, record, summary, summary=fields.first(summary or ''))


def read(config: Summarization, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return {'summary_text'}."""
  return {'summary_text': answer.text.strip()}


TASK = base.Task(
  Summarization, 'generate', {'document': fields.text, 'summary': fields.several}, example, read,
  {'rouge': itemgetter('summary_text')})
