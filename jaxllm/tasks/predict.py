"""A model does a task: prompts go in, answers come out and are read back as predictions."""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxllm import sharding
from jaxllm.data import packing
from jaxllm.generation import scoring, text
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.model import Model
from jaxllm.models.decoder import Decoder
from jaxllm.objectives import classification
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.tasks import TASKS, base, encoding
from jaxllm.tasks.encoding import Tokens, encode, truncate
from jaxllm.tasks.records import rows

BATCH_SIZE = 8
_LEAST_LENGTH = 32


def examples(config: Any, split: str) -> list[base.Example]:
  """Return the examples of a split of a task's data.

  Raises:
    ValueError: the data cannot be read, or a record is not what the task takes; the message names
      file, line and field.
  """
  task = TASKS[config.kind]
  return task.together(config, _read(config, split, task.example))


def records(config: Any, split: str) -> list[base.Record]:
  """Return the records of a split of a task's data, checked; as `examples`."""
  return _read(config, split, TASKS[config.kind].checked)


def _read(config: Any, split: str, read: Callable[[Any, base.Record, bool], Any]) -> list[Any]:
  found = []
  for row in rows(config.data, split):
    try:
      found.append(read(config, row.fields, True))
    except ValueError as error:
      raise ValueError(f'{row.where}: {error}') from None
  return found


def predict(
  config: Any, examples: Sequence[base.Example], model: Model, batch_size: int = BATCH_SIZE,
  way: text.Way = None, draft: text.Draft | None = None,
) -> list[base.Prediction]:
  """Answer each example, greedily or by beam search where text is generated.

  A prompt that leaves no room in the context loses its beginning, BOS excepted. A model with a
  classifier does the task with its labels by that; a chat model that was not fine-tuned is asked
  through its template where the task has a request.

  Args:
    examples: from `examples`, or from `TASKS[config.kind].example` for records without answers.
    batch_size: rows of one call.
    way: how text is generated; None: greedily.
    draft: as in `text.complete`.
  """
  task = TASKS[config.kind]
  generate = functools.partial(_generate, way=way, draft=draft)
  answer: Any = {'generate': generate, 'choose': _choose, 'measure': _measure}[task.kind]
  if model.classifier and model.labels and getattr(config, 'labels', None) == model.labels:
    answer = _classify
  answers = answer(config, examples, model, batch_size)
  return [
    task.read(config, example, answer) for example, answer in zip(examples, answers, strict=True)]


def log_likelihoods(model: Model, sequences: Sequence[Tokens]) -> list[float]:
  """Return the weighted log-likelihood of each sequence, in nats.

  One that is longer than the context loses the start of what has no weight.
  """
  context_length = model.config.max_length
  fitting = [truncate(s, context_length, 'start') or Tokens([0], [0]) for s in sequences]
  _tell(sum(len(s.ids) > context_length + 1 for s in sequences), len(sequences), context_length)
  places = list(map(_weighted, fitting))
  found = scoring.score(model.decoder, model.variables, [s.ids for s in fitting], places)
  return [_weigh(s, own, one.log_probs_N)
          for s, own, one in zip(fitting, places, found, strict=True)]


def _weighted(tokens: Tokens) -> list[int]:
  """Return the places that are predicted and have a weight."""
  return [place for place, weight in enumerate(tokens.weights) if place and weight]


def _weigh(tokens: Tokens, places: Sequence[int], log_probs_N: np.ndarray) -> float:
  return float(np.dot([tokens.weights[place] for place in places], log_probs_N.astype(float)))


def _generate(
  config: base.TaskConfig, examples: Sequence[base.Example], model: Model, batch_size: int,
  way: text.Way, draft: text.Draft | None,
) -> list[base.Answer]:
  context_length = model.config.max_length
  # In a short context prompt and answer have a half each.
  max_new_tokens = min(config.max_new_tokens, max(context_length // 2, 1))
  room = max(context_length - max_new_tokens, 1)
  if model.task is not None:
    examples = [example._replace(instruction='') for example in examples]
  requests = [example.request + (f' {example.instruction}' if example.instruction else '')
              for example in examples if example.request is not None]
  chat = model.chat_format if model.task is None else None
  if chat is not None and len(requests) == len(examples):
    prompts = chat.encode_all([[{'role': 'user', 'content': request}] for request in requests])
  else:
    prompts = [list(encode(_instructed(example), model.tokenizer, model.add_bos).ids)
               for example in examples]
  eos_ids = model.eos_token_ids if chat is None else chat.eos_token_ids
  begins = {model.tokenizer.bos_id, *model.tokenizer.special_tokens.values()}
  _tell(sum(len(ids) > room for ids in prompts), len(prompts), room)
  prompts = [_cut(ids, room, begins) for ids in prompts]
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  answers: list[base.Answer] = [base.Answer()] * len(prompts)
  for start in scoring.bar(range(0, len(order), batch_size)):
    rows = order[start : start + batch_size]
    # A last, smaller batch is filled up, which is cheaper than compiling for its size.
    padding = rows[:1] * (batch_size - len(rows)) if start else []
    # White space at the beginning is not the stop text.
    found = text.complete(
      model.decoder, model.unstacked, model.tokenizer, [prompts[i] for i in rows + padding],
      SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens),
      [config.stop] if config.stop else (), eos_ids, skip_space=True, way=way, draft=draft)
    for i, one in zip(rows, found, strict=False):
      answers[i] = base.Answer(text=one.text, score=float(np.exp(
        np.mean(one.logprobs or [0.0]) if one.score is None else one.score)))
  return answers


def _instructed(example: base.Example) -> tuple[base.Segment, ...]:
  """Return the prompt, with the instruction in a line of its own before it."""
  prompt = base.prompt_of(example.segments)
  told = [base.Segment(f'{example.instruction}\n')] if example.instruction else []
  return (*prompt[:1], *told, *prompt[1:])


def _tell(cut: int, total: int, room: int) -> None:
  if cut:
    logging.warning('%d of %d prompts or texts are longer than %d tokens and lost a part: a longer '
                    'context would give other scores', cut, total, room)


def _cut(ids: list[int], room: int, begins: Container[int | None]) -> list[int]:
  """Drop what is too much of the beginning, but not the token that begins a text."""
  if len(ids) <= room:
    return ids
  return ids[:1] + ids[len(ids) - room + 1 :] if ids[0] in begins else ids[-room:]


def _choose(
  config: base.TaskConfig, examples: Sequence[base.Example], model: Model, batch_size: int
) -> list[base.Answer]:
  asked: dict[tuple[tuple[base.Segment, ...], str], int] = {}
  sequences: list[Tokens] = []

  def ask(segments: tuple[base.Segment, ...], choice: str) -> int:
    """Return the number of the sequence; one that was asked for before is not measured again."""
    pair = base.prompt_of(segments), choice
    if pair not in asked:
      asked[pair] = len(sequences)
      sequences.append(
        encode((*pair[0], base.Segment(choice, 1.0)), model.tokenizer, model.add_bos))
    return asked[pair]

  plain = [[ask(e.segments, choice) for choice in e.choices] for e in examples]
  neutral = [[ask(e.neutral, choice) for choice in e.choices if e.neutral] for e in examples]
  found = log_likelihoods(model, sequences)
  return [
    base.Answer(
      log_likelihoods=tuple(found[i] for i in first),
      num_tokens=tuple(sum(map(bool, sequences[i].weights)) for i in first),
      neutral_log_likelihoods=tuple(found[i] for i in second),
    )
    for first, second in zip(plain, neutral, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _class_log_probs(
  head: ClassifierConfig, model: Decoder, variables: Any, batch: Any
) -> jax.Array:
  return jax.nn.log_softmax(classification.class_logits(head, model, variables, batch)[0])


def _classify(
  config: base.TaskConfig, examples: Sequence[base.Example], model: Model, batch_size: int
) -> list[base.Answer]:
  """Answer with the log-probabilities of the classes; each prompt is read once."""
  head: Any = model.classifier
  context_length = model.config.max_length
  # Every text gets an answer, also where it would not be trained on.
  policy: base.Truncation = 'end' if config.truncation == 'end' else 'start'
  prompts = encoding.prompts(examples, model.tokenizer, context_length, policy, model.add_bos)
  answers: list[base.Answer] = [base.Answer()] * len(examples)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i] or ''))
  for start in scoring.bar(range(0, len(order), batch_size)):
    rows = order[start : start + batch_size]
    texts = [prompts[i] or Tokens([0], [0]) for i in rows]
    texts += [Tokens([], [])] * (batch_size - len(rows))
    # A power of two, so that few lengths are ever compiled.
    longest = max(_LEAST_LENGTH, *(len(one.ids) for one in texts))
    length = min(1 << (longest - 1).bit_length(), context_length)
    records = packing.pack(texts, length, model.config.vocab_size, together=False)
    log_probs_BC = sharding.to_host(_class_log_probs(
      head, model.decoder, model.variables, packing.batch_arrays(records)))
    for i, log_probs_C in zip(rows, log_probs_BC.tolist(), strict=False):
      answers[i] = base.Answer(log_likelihoods=tuple(log_probs_C))
  return answers


def _measure(
  config: base.TaskConfig, examples: Sequence[base.Example], model: Model, batch_size: int
) -> list[base.Answer]:
  context_length = model.config.max_length
  encoded = [encoding.sequences(example.segments, model.tokenizer, model.add_bos)
             for example in examples]
  flat = [one for several in encoded for one in several]
  places = list(map(_weighted, flat))
  found = scoring.rolling(
    model.decoder, model.variables, [one.ids for one in flat], places, context_length,
    context_length // 2 or 1)
  totals = iter(map(_weigh, flat, places, found))
  return [
    base.Answer(
      log_likelihoods=tuple(next(totals) for _ in several),
      num_tokens=tuple(len(_weighted(one)) for one in several),
      # Without BOS nothing predicts the first token.
      unpredicted_bytes=sum(len(model.tokenizer.id_bytes[one.ids[0]])
                            for one in several if any(one.weights[:1])),
    )
    for several in encoded]
