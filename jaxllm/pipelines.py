"""One function per application, with the inputs and outputs of Transformers' pipelines.

    translate = pipeline('translation', 'runs/translation')
    translate(['A dog runs.'], source='en', target='de')     # [{'translation_text': ...}]

A model that was fine-tuned on a task answers in the form that it was trained on, any other by the
default prompt of the task, or where it has a chat template by its request. `PIPELINES` lists them.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

from jaxllm import loading
from jaxllm.generation import chat as conversation
from jaxllm.generation import text as texts_lib
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.model import Model
from jaxllm.tasks import TASKS, predict
from jaxllm.tasks.base import Prediction, Record
from jaxllm.tasks.chat import PLAIN
from jaxllm.tasks.question_answering import ExtractiveQuestionAnswering, QuestionAnswering

Pipeline = Callable[..., Any]

_DECODING = {*texts_lib.BeamConfig.model_fields, *texts_lib.SpeculationConfig.model_fields}


@overload
def pipeline(
  task: Literal['translation', 'summarization', 'sentiment-analysis', 'text-classification'],
  model: Model | str | os.PathLike[str], batch_size: int = ..., mesh: Any = ...,
  dtype: str | None = ..., **fields: Any,
) -> Callable[..., list[Prediction]]: ...
@overload
def pipeline(
  task: str, model: Model | str | os.PathLike[str], batch_size: int = ..., mesh: Any = ...,
  dtype: str | None = ..., **fields: Any,
) -> Pipeline: ...
def pipeline(
  task: str, model: Model | str | os.PathLike[str], batch_size: int = predict.BATCH_SIZE,
  mesh: Any = None, dtype: str | None = None, **fields: Any,
) -> Pipeline:
  """Return a function that does a task.

  It takes one input or a list of them; the result of one does not depend on the others:

      translation(texts, source=None, target=None)  -> [{'translation_text'}]
      summarization(texts)                          -> [{'summary_text'}]
      sentiment-analysis, text-classification(texts) -> [{'label', 'score'}]
      question-answering(question=, context=None)   -> {'answer', 'score', 'start', 'end'}
      text-generation(prompts, return_full_text=True) -> [{'generated_text'}]
      chat(messages)                                -> [{'generated_text': messages}]

  Lists of questions, prompts and conversations give lists of these results. A call may change the
  fields below for itself: `continue_text('To be', max_new_tokens=5)`.

  Args:
    task: one of `PIPELINES`.
    model: from `jaxllm.load`, or what it takes.
    batch_size: inputs that are computed together.
    mesh: the devices to split the model over, and
    dtype: of its parameters, as in `jaxllm.load`.
    **fields: of the task's config, such as `prompt`, `labels`, `max_new_tokens`; for
      text-generation and chat those of `SamplingConfig`, and `stop`, texts that end an answer.
      All that generate also take `num_beams`, `length_penalty`, `early_stopping`, `num_drafted`
      and `draft`, as `jaxllm.generate` does.

  Raises:
    ValueError: there is no such task or field, or no model.
  """
  if task not in PIPELINES:
    raise ValueError(f'task={task!r}: one of {", ".join(PIPELINES)}')
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size}: at least 1')
  loaded = loading.load(model, mesh, dtype)

  def make(fields: Mapping[str, Any]) -> Pipeline:
    draft = loading.as_draft(fields.get('draft'), loaded.placement)
    _, way = texts_lib.read_options(
      {name: value for name, value in fields.items() if name in _DECODING}, draft=draft)
    others = {name: value for name, value in fields.items() if name not in {*_DECODING, 'draft'}}
    return PIPELINES[task](loaded, others, _How(batch_size, way, draft))

  own = make(fields)
  named = inspect.signature(own).parameters

  @functools.wraps(own)
  def run(*inputs: Any, **options: Any) -> Any:
    changes = {name: value for name, value in options.items() if name not in named}
    asked = {name: value for name, value in options.items() if name in named}
    chosen = make({**fields, **changes}) if changes else own
    return chosen(*inputs, **asked)

  return run


class _How(NamedTuple):
  """How answers are computed: inputs at once, the way of decoding, and a model that drafts."""

  batch_size: int
  way: texts_lib.Way
  draft: texts_lib.Draft | None


def _translation(model: Model, fields: Mapping[str, Any], how: _How) -> Pipeline:
  config = _config(model, fields, 'translation')

  def translate(
    texts: str | Sequence[str], source: str | None = None, target: str | None = None
  ) -> list[Prediction]:
    """Translate from a language into another; None: those of the config."""
    named = {'source_language': source, 'target_language': target}
    languages = {name: language for name, language in named.items() if language}
    template = config.prompt + ('' if model.task else config.request or '')
    for name, language in languages.items():
      if language != getattr(config, name) and f'{{{name}}}' not in template:
        raise ValueError(f'{name}={language!r}: this model always translates from '
                         f'{config.source_language!r} into {config.target_language!r}, since its '
                         f'prompt has no {{{name}}}')
    records = [{'source': text, **languages} for text in _several(texts)]
    return _answer(model, how, config, records)

  return translate


def _summarization(model: Model, fields: Mapping[str, Any], how: _How) -> Pipeline:
  config = _config(model, fields, 'summarization')
  return lambda texts: _answer(model, how, config, [{'document': one} for one in _several(texts)])


def _classification(model: Model, fields: Mapping[str, Any], how: _How) -> Pipeline:
  config = _config(model, fields, 'sentiment', 'classification')
  if how.way:
    raise ValueError('num_beams, num_drafted, draft: a label is chosen, not generated')

  def classify(texts: str | Sequence[str]) -> list[Prediction]:
    """Say the most likely label of texts, and its probability among the labels."""
    found = _answer(model, how, config, [{'text': text} for text in _several(texts)])
    return [{name: one[name] for name in ('label', 'score')} for one in found]

  return classify


def _question_answering(model: Model, fields: Mapping[str, Any], how: _How) -> Pipeline:
  own = _config(model, fields, 'question_answering', 'extractive_question_answering')
  common = {name: getattr(own, name) for name in QuestionAnswering.model_fields if name != 'kind'}

  def answer(
    question: str | Sequence[str], context: str | Sequence[str] | None = None
  ) -> Prediction | list[Prediction]:
    """Answer questions with a stretch of their contexts; without, in the model's own words.

    context[start:end] is the answer; a question without an answer gives ''. Several questions may
    share one context.
    """
    questions = _several(question)
    shared = context is None or isinstance(context, str)
    contexts = [context] * len(questions) if shared else list(context or ())
    if len(contexts) != len(questions):
      raise ValueError(f'{len(questions)} questions and {len(contexts)} contexts: one for each, or '
                       'one for all')
    records = [{'question': q, 'context': c} for q, c in zip(questions, contexts, strict=True)]
    config: Any = QuestionAnswering if context is None else ExtractiveQuestionAnswering
    found = _answer(model, how, config(**common), records)
    return found[0] if isinstance(question, str) else found

  return answer


def _text_generation(model: Model, fields: Mapping[str, Any], how: _How) -> Pipeline:
  sampling, stop = _sampling(fields)

  def generate(
    prompts: str | Sequence[str], return_full_text: bool = True
  ) -> list[Prediction] | list[list[Prediction]]:
    """Continue prompts; `return_full_text` puts them before the generated text."""
    several = _several(prompts)
    ids = [model.encode_prompt(prompt) for prompt in several]
    found = _continue(model, how, ids, sampling, stop, model.eos_token_ids)
    results = [
      [{'generated_text': (prompt if return_full_text else '') + text}]
      for prompt, text in zip(several, found, strict=True)]
    return results[0] if isinstance(prompts, str) else results

  return generate


def _chat(model: Model, fields: Mapping[str, Any], how: _How) -> Pipeline:
  chat = model.chat_format or loading.chat_format(model, PLAIN)
  sampling, stop = _sampling(fields)
  room = max(model.config.max_length - sampling.max_new_tokens, model.config.max_length // 2)

  def reply(
    messages: str | Sequence[Any]
  ) -> list[Prediction] | list[list[Prediction]]:
    """Answer a conversation: what the user says, or a list of {'role', 'content'}.

    A list of conversations gives a list of results. The result is the conversation with its answer;
    one that does not fit the context loses its oldest exchanges before the model reads it.
    """
    if isinstance(messages, str):
      messages = [{'role': 'user', 'content': messages}]
    single = bool(messages) and isinstance(messages[0], Mapping)
    several: list[list[Any]] = [[*messages]] if single else [[*one] for one in messages]
    ids = [conversation.fit(one, chat.encode, room)[1] for one in several]
    found = _continue(model, how, ids, sampling, (*stop, *chat.stop), chat.eos_token_ids)
    results = [
      [{'generated_text': [*one, {'role': 'assistant', 'content': text.strip()}]}]
      for one, text in zip(several, found, strict=True)]
    return results[0] if single else results

  return reply


def _config(model: Model, fields: Mapping[str, Any], *kinds: str) -> Any:
  """Return the model's own config of one of the kinds, or the default of the first, changed."""
  own = model.task
  config = own if own is not None and own.kind in kinds else TASKS[kinds[0]].config()
  # A prompt of one's own takes the place of the request.
  for prompt, request in (('prompt', 'request'),
                          ('prompt_without_context', 'request_without_context')):
    if prompt in fields and hasattr(config, request):
      fields = {request: None, **fields}
  return config.replace(**fields)


def _answer(
  model: Model, how: _How, config: Any, records: Sequence[Record]
) -> list[Prediction]:
  examples = []
  for number, record in enumerate(records):
    try:
      examples.append(TASKS[config.kind].example(config, record))
    except ValueError as error:
      raise ValueError(f'input {number}: {error}') from None
  return predict.predict(config, examples, model, *how)


def _continue(
  model: Model, how: _How, prompts: Sequence[Sequence[int]], sampling: SamplingConfig,
  stop: Sequence[str], eos_token_ids: Sequence[int],
) -> Iterator[str]:
  """Yield continuations; each is sampled with the seed of the config, wherever it stands."""
  for start in range(0, len(prompts), how.batch_size):
    rows = prompts[start : start + how.batch_size]
    for completion in texts_lib.complete(
      model.decoder, model.unstacked, model.tokenizer, rows, sampling, stop, eos_token_ids,
      seeds=[sampling.seed] * len(rows), way=how.way, draft=how.draft,
    ):
      yield completion.text


def _sampling(fields: Mapping[str, Any]) -> tuple[SamplingConfig, tuple[str, ...]]:
  stop = fields.get('stop') or ()
  config = SamplingConfig(**{name: value for name, value in fields.items() if name != 'stop'})
  return config, (stop,) if isinstance(stop, str) else tuple(stop)


def _several(inputs: str | Sequence[str]) -> list[str]:
  several = [inputs] if isinstance(inputs, str) else list(inputs)
  for place, text in enumerate(several):
    if not isinstance(text, str):
      raise ValueError(f'input {place} is {text!r}; expected a text')
  return several


PIPELINES: Mapping[str, Callable[[Model, Mapping[str, Any], _How], Pipeline]] = {
  'translation': _translation,
  'summarization': _summarization,
  'sentiment-analysis': _classification,
  'text-classification': _classification,
  'question-answering': _question_answering,
  'text-generation': _text_generation,
  'chat': _chat,
}
"""Task -> function that makes its pipeline."""
