"""What a task is: records become prompts and targets, and a model's answers become predictions.

A task is a config class (its data, its prompt as plain text with {fields}) and two pure functions,
`example` and `read`. One file per task; `jaxllm.tasks.TASKS` lists them.
"""

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic

from jaxllm.config import Config
from jaxllm.data.readers import plain
from jaxllm.tasks import fields
from jaxllm.tasks.fields import Reader
from jaxllm.tasks.records import RecordsConfig

Record = Mapping[str, Any]
Prediction = dict[str, Any]
Truncation = Literal['start', 'end', 'drop', 'error']


class Segment(NamedTuple):
  """A stretch of text that is tokenized by itself.

  Attributes:
    text: the text, or for a control segment the name of one token.
    weight: of each of its tokens as a target of the loss.
    control: whether `text` names one special token: 'bos', 'eos', or as the tokenizer spells it.
      Other text never becomes a special token, whatever it says.
  """

  text: str
  weight: float = 0.0
  control: bool = False


BOS = Segment('bos', control=True)
EOS = Segment('eos', 1.0, control=True)
CONVERSATION = Segment('conversation', control=True)
"""Begins a conversation: its texts are encoded as one, after BOS where the model wants it and the
template does not write it. A template that writes earlier turns otherwise needs several."""


class Example(NamedTuple):
  """One record, put before a model.

  Attributes:
    segments: the prompt (weight 0) and the target, in this order, for training.
    reference: what a prediction is scored against.
    record: the record itself.
    choices: the continuations to compare; empty where an answer is generated.
    neutral: segments of a prompt that says nothing, after which the prior of the choices is
      measured; None where it is not.
    request: what a chat model is asked instead of the prompt; None: nothing.
    instruction: what a model that was not fine-tuned is told besides.
  """

  segments: tuple[Segment, ...]
  reference: Any
  record: Record
  choices: tuple[str, ...] = ()
  neutral: tuple[Segment, ...] | None = None
  request: str | None = None
  instruction: str = ''


def prompt_of(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
  """Return the segments before the last run of weighted ones: what a model is given."""
  end = max((i for i, segment in enumerate(segments, 1) if segment.weight), default=0)
  if not end:
    return segments
  while end and segments[end - 1].weight:
    end -= 1
  return segments[:end]


class Answer(NamedTuple):
  """What a model said.

  Attributes:
    text: the generated text; '' where none was asked for.
    log_likelihoods: of each choice given the prompt, in nats; where nothing is chosen or generated,
      that of the target alone.
    num_tokens: tokens of each of these continuations.
    neutral_log_likelihoods: of each choice after the neutral prompt, where the example has one.
    score: geometric mean of the generated tokens' probabilities.
    unpredicted_bytes: of a measured text whose first token nothing precedes, the size of that.
  """

  text: str = ''
  log_likelihoods: tuple[float, ...] = ()
  num_tokens: tuple[int, ...] = ()
  neutral_log_likelihoods: tuple[float, ...] = ()
  score: float = 1.0
  unpredicted_bytes: int = 0


class TaskConfig(Config):
  """What all tasks share."""

  data: RecordsConfig
  """Where the records come from."""
  max_new_tokens: int = pydantic.Field(default=64, gt=0)
  """Most tokens of a generated answer; half of the context at most."""
  stop: str | None = '\n'
  """A generated answer ends before this text, once it has begun; None: only with EOS."""
  truncation: Truncation = 'start'
  """What is done to a training example longer than the context: cut the start of the prompt and
  only then the end ('start'), cut the end ('end'), leave it out ('drop'), or stop ('error')."""


class CompletionConfig(TaskConfig):
  """A task whose prompt and target are templates: text in which {name} stands for a field."""

  prompt: str
  """Text before the answer."""
  target: str
  """The answer that is trained on. White space before it belongs here, where tokenizers keep it
  with the word that follows."""
  request: str | None = None
  """What the user says to a chat model that was not fine-tuned, in place of the prompt; None, as
  where a prompt alone is given: it gets the prompt."""

  @pydantic.model_validator(mode='before')
  @classmethod
  def _prompt_alone(cls, values: Any) -> Any:
    if not isinstance(values, Mapping):
      return values
    asked = (name.replace('prompt', 'request') for name in values if name.startswith('prompt'))
    return {**{name: None for name in asked if name in cls.model_fields}, **values}

  @pydantic.model_validator(mode='after')
  def _check_templates(self) -> 'CompletionConfig':
    placeholders(self.prompt), placeholders(self.target), placeholders(self.request or '')
    if self.prompt != self.prompt.rstrip():
      raise ValueError(f'prompt={self.prompt!r} ends with white space; begin the target with it')
    return self


class Task(NamedTuple):
  """A task.

  Attributes:
    config: its config class; the defaults run offline.
    kind: whether a model generates the answer, chooses one, or is measured on the target.
    fields: what a record must have -> reader; answers may be missing where nothing is scored.
    make: (config, record, as its readers return it) -> example.
    read: (config, example, answer) -> prediction, in the shape of the pipeline of that name.
    metrics: name in `evaluation.scores.METRICS` -> the part of a prediction that it compares.
    optional: what a record may have -> reader.
    shape: (config, record) -> record with `fields`, from the other forms that people have.
    together: (config, examples) -> examples, where they depend on one another.
    by_template: (config, records, template, too_long) -> examples of conversations; those that are
      too long lose their oldest exchanges.
  """

  config: type[Any]
  kind: Literal['generate', 'choose', 'measure']
  fields: Mapping[str, Reader]
  make: Callable[[Any, Record], Example]
  read: Callable[[Any, Example, Answer], Prediction]
  metrics: Mapping[str, Callable[[Prediction], Any]]
  optional: Mapping[str, Reader] = {}
  shape: Callable[[Any, Record], Record] = lambda config, record: record
  together: Callable[[Any, list[Example]], list[Example]] = lambda config, examples: examples
  by_template: Callable[..., list[Example]] | None = None

  def checked(self, config: Any, record: Record, scored: bool = False) -> Record:
    """Return a record with its fields as their readers return them.

    Raises:
      ValueError: a field is refused, or missing where all are needed, as they are when `scored`.
    """
    shaped = self.shape(config, plain(record))
    for name in self.fields if scored else ():
      if name not in shaped:
        raise ValueError(f'there is no field {name!r} (fields: {", ".join(map(str, record))}); '
                         f"name it in data.fields, as (('{name}', 'its name in the data'),)")
    readers = {**self.fields, **self.optional}
    return {**shaped, **{n: read(shaped[n], n) for n, read in readers.items() if n in shaped}}

  def example(self, config: Any, record: Record, scored: bool = False) -> Example:
    """Return the example of a record; as `checked`."""
    return self.make(config, self.checked(config, record, scored))._replace(record=record)


def placeholders(template: str) -> tuple[str, ...]:
  """Return the field names in a template; refuse one that is not plain text with {name}s."""
  names = []
  try:
    for _, name, spec, conversion in string.Formatter().parse(template):
      if name is not None:
        if not name.isidentifier() or spec or conversion:
          raise ValueError(f'{{{name}}} is no field name')
        names.append(name)
  except ValueError as error:
    raise ValueError(f'template {template!r}: {error}; write a field as {{name}} and a literal '
                     'brace twice') from None
  return tuple(names)


def fill(template: str, record: Record) -> str:
  """Put a record's fields into a template.

  Raises:
    ValueError: the record lacks a field, or holds something else than text or a number there.
  """
  texts = {}
  for name in placeholders(template):
    if name not in record:
      raise ValueError(f'template {template!r}: the record has no field {name!r} (fields: '
                       f'{", ".join(map(str, record))})')
    texts[name] = fields.filling(record[name], name)
  return template.format_map(texts)


def completion(config: CompletionConfig, record: Record) -> tuple[Segment, ...]:
  """Return the prompt and the target of a record as segments, between BOS and EOS."""
  return (BOS, Segment(fill(config.prompt, record)), Segment(fill(config.target, record), 1.0), EOS)


def written(config: CompletionConfig, record: Record, reference: Any, **named: Any) -> Example:
  """Return the example of a task whose answer is written, with more fields for its templates."""
  filled = {**record, **named}
  asked = None if config.request is None else fill(config.request, filled)
  return Example(completion(config, filled), reference, record, request=asked)


def chosen(
  config: CompletionConfig, record: Record, name: str, choices: Iterable[str], right: int | None
) -> Example:
  """Return the example of a task whose answer is one of `choices`, `name` in its templates."""
  filled = [{**record, name: choice} for choice in choices]
  return Example(completion(config, filled[right or 0]), right, record,
                 tuple(fill(config.target, one) for one in filled))


def probabilities(log_likelihoods: Sequence[float] | np.ndarray) -> np.ndarray:
  """Return exp(log-likelihoods) / sum: how a model divides its belief between the choices."""
  shifted = np.asarray(log_likelihoods, np.float64)
  shifted = np.exp(shifted - shifted.max())
  return shifted / shifted.sum()
