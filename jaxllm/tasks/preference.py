"""Preference: two answers to a prompt, of which one is better; how often a model agrees."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from jaxllm.tasks import base, chat, fields
from jaxllm.tasks.chat import ChatTemplate
from jaxllm.tasks.records import RecordsConfig, RecordSource


class Preference(base.CompletionConfig):
  """Find the `chosen` answer to `prompt` likelier than the `rejected` one.

  The default data are functions of Python's standard library, each with the first line of its
  docstring and of another one's.
  """

  kind: Literal['preference'] = 'preference'
  """'preference'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:stdlib-preferences'),), group='prompt')
  """Records with `prompt`, `chosen` and `rejected`: texts, or messages, of which the latter two may
  begin with the prompt."""
  prompt: str = '{prompt}\nAnswer:'
  """Text before the answer."""
  target: str = ' {answer}'
  """An answer; {answer} stands for the chosen or the rejected one."""
  template: ChatTemplate | Literal['model'] | None = None
  """How conversations become text, in the place of prompt and target: by a template, or by that of
  the 'model'; None: by prompt and target, for which they may hold one question alone."""


def example(config: Preference, record: base.Record) -> base.Example:
  """Return the example of a record: to be trained on the chosen answer, with both as choices.

  Raises:
    ValueError: the record needs a template, or the template is the model's own.
  """
  if config.template == 'model':
    raise ValueError("template='model': what a chat says is known only together with the model")
  if config.template is not None:
    return examples(config, [record], config.template)[0]
  question, *more = record['prompt']
  if more or question['role'] != 'user':
    roles = ', '.join(message['role'] for message in record['prompt'])
    raise ValueError(f"field 'prompt' has messages of {roles}; only one of the user is a prompt by "
                     "itself: set task.template to 'model' or to a template")
  answers = record['chosen'], record['rejected']
  return base.chosen(config, {**record, 'prompt': question['content']}, 'answer', answers, 0)


def examples(
  config: Preference, records: Sequence[base.Record], template: chat.Template, *unused: Any
) -> list[base.Example]:
  """Return the examples of records as conversations; see `chat.segments`."""
  written = chat.examples(
    [{'messages': [*record['prompt'], {'role': 'assistant', 'content': record[name]}]}
     for name in ('chosen', 'rejected') for record in records], template)
  said = [one.segments[len(base.prompt_of(one.segments))].text for one in written]
  return [
    base.Example(written[i].segments, 0, record, (said[i], said[i + len(records)]))
    for i, record in enumerate(records)]


def rejected(example: base.Example) -> base.Example:
  """Return the example whose target is the rejected answer."""
  prompt = base.prompt_of(example.segments)
  _, *end = example.segments[len(prompt) :]
  return example._replace(segments=(*prompt, base.Segment(example.choices[1], 1.0), *end))


def shape(config: Preference, record: base.Record) -> base.Record:
  """Return a record with messages as `prompt`, and texts as answers, where it has conversations.

  Raises:
    ValueError: they are no conversations that differ in the last answer alone.
  """
  found: dict[str, Any] = {}
  before = []
  for name in ('chosen', 'rejected'):
    value = [record[name]] if isinstance(record.get(name), dict) else record.get(name)
    if chat.are_messages(value):
      *start, last = chat.messages(value, name)
      if last['role'] != 'assistant':
        raise fields.refused(last['role'], f'{name}[-1].role', 'the assistant, who answers')
      before.append(start)
      found[name] = last['content']
  prompt = record.get('prompt')
  if any(before):
    if len(before) < 2 or before[0] != before[1]:
      raise ValueError("fields 'chosen' and 'rejected' differ before their last messages; expected "
                       'two answers to one prompt')
    if prompt is not None and chat.turns(prompt, 'prompt', 'user') not in (
        before[0], before[0][-1:]):
      raise fields.refused(prompt, 'prompt', "what 'chosen' and 'rejected' begin with")
    prompt = before[0]
  start = [] if config.template is None else chat.opening(record)
  if start and prompt is not None and (
      said := chat.turns(prompt, 'prompt', 'user'))[:1] != start:
    prompt = start + said
  return {**record, **found, **({} if prompt is None else {'prompt': prompt})}


def read(config: Preference, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return {'choice', 'score'}: 0 where the chosen answer is likelier, and its share."""
  share_C = base.probabilities(answer.log_likelihoods)
  return {'choice': int(np.argmax(share_C)), 'score': float(share_C.max())}


TASK = base.Task(
  Preference, 'choose',
  {'prompt': chat.asked, 'chosen': fields.text, 'rejected': fields.text},
  example, read, {'accuracy': itemgetter('choice')}, shape=shape, by_template=examples)
