"""Preference: two answers to a prompt, of which one is better; how often a model agrees."""

from operator import itemgetter
from typing import Literal

import numpy as np

from jaxllm.tasks.base import (
  EOS,
  Answer,
  CompletionConfig,
  Example,
  Prediction,
  Record,
  Segment,
  Task,
  completion,
  fill,
  probabilities,
  prompt_of,
)
from jaxllm.tasks.records import RecordsConfig, RecordSource


class Preference(CompletionConfig):
  """Find the `chosen` answer to `prompt` likelier than the `rejected` one.

  The default data are functions of Python's standard library, each with the first line of its
  docstring and of another one's.
  """

  kind: Literal['preference'] = 'preference'
  """'preference'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:stdlib-preferences'),), group='prompt'
  )
  """Records with `prompt`, `chosen` and `rejected`."""
  prompt: str = '{prompt}\nAnswer:'
  """Text before the answer."""
  target: str = ' {answer}'
  """An answer; {answer} stands for the chosen or the rejected one."""


def example(config: Preference, record: Record) -> Example:
  """Return the example of a record: to be trained on the chosen answer, with both as choices."""
  choices = tuple(fill(config.target, {**record, 'answer': record[name]})
                  for name in ('chosen', 'rejected'))
  segments = completion(config, {**record, 'answer': record['chosen']})
  return Example(segments, 0, record, choices)


def rejected(example: Example) -> Example:
  """Return the example whose target is the rejected answer."""
  segments = (*prompt_of(example.segments), Segment(example.choices[1], 1.0), EOS)
  return example._replace(segments=segments)


def read(config: Preference, example: Example, answer: Answer) -> Prediction:
  """Return {'choice', 'score'}: 0 where the chosen answer is likelier, and its share."""
  share_C = probabilities(answer.log_likelihoods)
  return {'choice': int(np.argmax(share_C)), 'score': float(share_C.max())}


TASK = Task(
  Preference, 'choose', ('prompt', 'chosen', 'rejected'), example, read,
  {'accuracy': itemgetter('choice')},
)
