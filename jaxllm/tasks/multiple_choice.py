"""Multiple choice: which of the record's own choices is the most likely answer."""

from operator import itemgetter
from typing import Literal

import numpy as np

from jaxllm.tasks.base import (
  Answer,
  CompletionConfig,
  Example,
  Prediction,
  Record,
  Task,
  completion,
  fill,
  probabilities,
)
from jaxllm.tasks.records import RecordsConfig, RecordSource


class MultipleChoice(CompletionConfig):
  """Choose the answer to `question` among `choices`.

  The default data are functions of Python's standard library with four docstring lines, one of
  which is theirs.
  """

  kind: Literal['multiple_choice'] = 'multiple_choice'
  """'multiple_choice'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:stdlib-choices'),), group='question'
  )
  """Records with `question`, `choices` (texts) and `answer`: its number from 0, its text, or its
  letter."""
  prompt: str = '{question}\nAnswer:'
  """Text before the answer."""
  target: str = ' {choice}'
  """An answer; {choice} stands for the choice's text."""


def example(config: MultipleChoice, record: Record) -> Example:
  """Return the example of a record; without an `answer` it can only be answered.

  Raises:
    ValueError: the answer is none of the choices.
  """
  texts = [str(choice) for choice in record['choices']]
  reference = _answer_index(record['answer'], texts) if 'answer' in record else None
  choices = tuple(fill(config.target, {**record, 'choice': text}) for text in texts)
  filled = {**record, 'choice': texts[reference or 0]}
  return Example(completion(config, filled), reference, record, choices)


def _answer_index(answer: str | int, texts: list[str]) -> int:
  letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[: len(texts)]
  known: dict[str | int, int] = {i: i for i in range(len(texts))}
  known |= {letter: i for i, letter in enumerate(letters)}
  known |= {text: i for i, text in enumerate(texts)}
  if answer not in known:
    raise ValueError(f'answer {answer!r} is none of the choices {texts}')
  return known[answer]


def read(config: MultipleChoice, example: Example, answer: Answer) -> Prediction:
  """Return the choice by likelihood, by likelihood per character, and the shares of both.

  'choice' and 'normalized_choice' are numbers from 0; 'score' and 'normalized_score' lie in [0, 1].
  """
  log_likelihoods_C = np.array(answer.log_likelihoods)
  per_character_C = log_likelihoods_C / [len(choice.strip()) or 1 for choice in example.choices]
  found: Prediction = {}
  for prefix, values_C in (('', log_likelihoods_C), ('normalized_', per_character_C)):
    best = int(values_C.argmax())
    found[f'{prefix}choice'] = best
    found[f'{prefix}score'] = float(probabilities(values_C)[best])
  return found


TASK = Task(
  MultipleChoice, 'choose', ('question', 'choices', 'answer'), example, read,
  {'accuracy': itemgetter('choice'), 'normalized_accuracy': itemgetter('normalized_choice')},
)
