"""Question answering: an answer in words, or a stretch of the context with its offsets.

A question may have no answer; the model then says so, and the prediction's answer is ''.
"""

import collections
import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal

from jaxllm.tasks import base, fields
from jaxllm.tasks.records import RecordsConfig, RecordSource

Span = tuple[int, int]


class QuestionAnswering(base.CompletionConfig):
  """Answer `question`, from `context` where the record has one.

  The default data are a chat bot's questions and answers, without context.
  """

  kind: Literal['question_answering'] = 'question_answering'
  """'question_answering'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:chatterbot-corpus/english'),), group='question')
  """Records with `question`, `answers` (accepted texts, none: unanswerable, of which the first is
  trained on; also as {'text': texts}) and maybe `context`."""
  prompt: str = '{context}\nQuestion: {question}\nAnswer:'
  """Text before the answer."""
  prompt_without_context: str = 'Question: {question}\nAnswer:'
  """The same for a record without context."""
  target: str = ' {answer}'
  """The answer; {answer} stands for the first accepted text."""
  request: str | None = '{context}\n\nAnswer in a few words of the text: {question}'
  """What a chat model is asked."""
  request_without_context: str | None = 'Answer in one sentence: {question}'
  """The same for a record without context."""

  unanswerable: str = 'unanswerable'
  """What the model says where there is no answer."""
  instruction: str = 'Where the text does not say, the answer is "{unanswerable}".'
  """What a model that was not fine-tuned is told besides, where the data have questions without an
  answer; {unanswerable} stands for that word."""


class ExtractiveQuestionAnswering(QuestionAnswering):
  """Answer `question` with a stretch of `context`: the one nearest to what the model says."""

  kind: Literal['extractive_question_answering'] = 'extractive_question_answering'  # type: ignore[assignment]
  """'extractive_question_answering'."""
  data: RecordsConfig
  """Records with `question`, `context` and `answers`."""


def example(config: QuestionAnswering, record: base.Record) -> base.Example:
  """Return the example of a record; without `answers` it can only be answered."""
  if not record.get('context'):
    config = config.replace(
      prompt=config.prompt_without_context, request=config.request_without_context)
  answers = record.get('answers')
  first = answers[0] if answers else config.unanswerable
  return base.written(config, record, answers, answer=first)


def instructed(config: QuestionAnswering, examples: list[base.Example]) -> list[base.Example]:
  """Give all examples the instruction, where one of them has no answer."""
  if all(example.reference for example in examples):
    return examples
  told = base.fill(config.instruction, {'unanswerable': config.unanswerable})
  return [example._replace(instruction=told) for example in examples]


def read(config: QuestionAnswering, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return {'answer', 'score', 'start', 'end'}.

  The offsets are those of the answer's first occurrence in the context; None where it is not there,
  and 0 where there is no answer.
  """
  text = answer.text.strip()
  if not text or text.strip(' ."\'').casefold() == config.unanswerable.casefold():
    return {'answer': '', 'score': answer.score, 'start': 0, 'end': 0}
  start, end = find(text, example.record.get('context') or '') or (None, None)
  return {'answer': text, 'score': answer.score, 'start': start, 'end': end}


def read_span(
  config: ExtractiveQuestionAnswering, example: base.Example, answer: base.Answer
) -> base.Prediction:
  """Return {'answer', 'score', 'start', 'end'}, where context[start:end] is the answer."""
  said = read(config, example, answer)
  if not said['answer']:
    return said
  context = example.record['context']
  start, end = find(said['answer'], context) or nearest(said['answer'], context)
  return {**said, 'answer': context[start:end], 'start': start, 'end': end}


def find(answer: str, context: str) -> Span | None:
  """Return where an answer first occurs as whole words, or else anywhere.

  Upper and lower case are the same where no exact occurrence is found, and so is all white space.
  """
  words = r'\s+'.join(map(re.escape, answer.split()))
  if not words:
    return None
  for pattern in (rf'(?<!\w){words}(?!\w)', words):
    for flags in (0, re.IGNORECASE):
      if match := re.search(pattern, context, flags):
        return match.span()
  return None


def nearest(answer: str, context: str) -> Span:
  """Return the words of the context that share most words with an answer, by F1; (0, 0): none."""
  wanted = collections.Counter(word.casefold() for word in re.findall(r'\w+', answer))
  words = [(match.group().casefold(), *match.span()) for match in re.finditer(r'\w+', context)]
  best, span = 0.0, (0, 0)
  for first, (word, start, _) in enumerate(words):
    if word not in wanted:
      continue
    left, shared = wanted.copy(), 0
    for length, (word, _, end) in enumerate(words[first : first + 2 * wanted.total()], start=1):
      shared += left[word] > 0
      left[word] -= 1
      f1 = 2 * shared / (length + wanted.total())
      if f1 > best:
        best, span = f1, (start, end)
  return span


def read_answers(value: Any, name: str) -> list[str]:
  """Read the accepted answers: a text or several, {'text': several}, or a list of {'text'}."""
  value = fields.from_json(value)
  if isinstance(value, Mapping) and 'text' in value:
    value = value['text']
  if isinstance(value, str):
    if re.fullmatch(r'''\s*(\[\s*['"].*\]|\{\s*['"].*\})\s*''', value, re.DOTALL):
      raise fields.refused(value, name, 'lists and objects as JSON writes them')
    return [fields.text(value, name)]
  if isinstance(value, list):
    value = [item['text'] if isinstance(item, Mapping) and 'text' in item else item
             for item in value]
  return fields.listed(fields.text, 0, 'texts, [] where there is no answer')(value, name)


TASK = base.Task(
  QuestionAnswering, 'generate', {'question': fields.text, 'answers': read_answers}, example, read,
  {'squad': itemgetter('answer')}, {'context': fields.optional(fields.any_text)},
  together=instructed)
EXTRACTIVE = base.Task(
  ExtractiveQuestionAnswering, 'generate', {**TASK.fields, 'context': fields.text}, example,
  read_span, {'squad': itemgetter('answer')}, together=instructed)
