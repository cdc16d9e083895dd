"""Multiple choice: which of the record's own choices is the most likely answer."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from jaxllm.tasks import base, fields
from jaxllm.tasks.records import RecordsConfig, RecordSource

_LABELS = 'choices.label'


class MultipleChoice(base.CompletionConfig):
  """Choose the answer to `question` among `choices`.

  The default data are functions of Python's standard library with four docstring lines, one of
  which is theirs.
  """

  kind: Literal['multiple_choice'] = 'multiple_choice'
  """'multiple_choice'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:stdlib-choices'),), group='question')
  """Records with `question`, `choices` (texts) and `answer`: its number from 0, its text, or its
  letter. Or with ARC's `choices` ({'text', 'label'}) and `answerKey`, the label of one."""
  prompt: str = '{question}\nAnswer:'
  """Text before the answer."""
  target: str = ' {choice}'
  """An answer; {choice} stands for the choice's text."""


def example(config: MultipleChoice, record: base.Record) -> base.Example:
  """Return the example of a record; without an `answer` it can only be answered."""
  texts = record['choices']
  reference = None
  if 'answer' in record:
    reference = _answer_index(record['answer'], texts, record.get(_LABELS, ()))
  return base.chosen(config, record, 'choice', texts, reference)


def _answer_index(answer: Any, texts: list[str], labels: Sequence[Any]) -> int:
  """Return which choice is meant; of equal ones the first."""
  if not isinstance(answer, str | int | float):
    raise fields.refused(answer, 'answer', 'text or a whole number')
  said = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer)
  if isinstance(answer, bool):
    meant = {i for i, text in enumerate(texts)
             if text.casefold() in (('yes', 'true') if answer else ('no', 'false'))}
  elif said in map(str, labels):
    meant = {[*map(str, labels)].index(said)}
  else:
    names = [] if labels else [(str(i), chr(ord('A') + i), chr(ord('a') + i))
                               for i in range(len(texts))]
    meant = {texts.index(text) for text in texts if text == said}
    meant |= {texts.index(texts[i]) for i, name in enumerate(names) if said in name}
  if len(meant) != 1:
    raise fields.refused(answer, 'answer', 'the text, the letter or the number from 0 of one of '
                         f'the choices {texts}' + (f', not of {len(meant)}' if meant else ''))
  return meant.pop()


def shape(config: MultipleChoice, record: base.Record) -> base.Record:
  """Return a record whose choices are texts, and their labels besides where they have some."""
  record = {'answer': record['answerKey'], **record} if 'answerKey' in record else record
  choices = fields.from_json(record.get('choices'))
  if isinstance(choices, list) and choices and all(isinstance(item, Mapping) for item in choices):
    choices = {key: [item.get(key) for item in choices] for key in ('text', 'label')}
  if not isinstance(choices, Mapping) or not {'text', 'label'} <= choices.keys():
    return record
  if not all(isinstance(choices[key], list) for key in ('text', 'label')) or (
      len(choices['text']) != len(choices['label'])):
    raise fields.refused(choices, 'choices', "as many items in 'text' as in 'label'")
  return {**record, 'choices': choices['text'], _LABELS: choices['label']}


def read(config: MultipleChoice, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return the choice by likelihood, by likelihood per character, and the shares of both.

  'choice' and 'normalized_choice' are numbers from 0; 'score' and 'normalized_score' lie in [0, 1].
  """
  log_likelihoods_C = np.array(answer.log_likelihoods)
  per_character_C = log_likelihoods_C / [len(choice.strip()) or 1 for choice in example.choices]
  found: base.Prediction = {}
  for prefix, values_C in (('', log_likelihoods_C), ('normalized_', per_character_C)):
    best = int(values_C.argmax())
    found[f'{prefix}choice'] = best
    found[f'{prefix}score'] = float(base.probabilities(values_C)[best])
  return found


TASK = base.Task(
  MultipleChoice, 'choose',
  {'question': fields.text, 'choices': fields.listed(fields.text, 2, 'at least two texts'),
   'answer': lambda value, name: value}, example, read,
  {'accuracy': itemgetter('choice'), 'normalized_accuracy': itemgetter('normalized_choice')},
  shape=shape)
