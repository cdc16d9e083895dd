"""Scores of a finished model: on the held-out records of its run, on tasks, on texts."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from jaxllm import loading, mistakes, sharding, storage
from jaxllm.data import documents, preparing, records
from jaxllm.evaluation import contamination, tables
from jaxllm.interop import sources
from jaxllm.model import Model
from jaxllm.tasks import TASKS, language_modeling, predict, suite
from jaxllm.tasks import records as task_records
from jaxllm.training import dataset, scoring

AnyModel = Model | str | os.PathLike[str]


def evaluate(
  model: AnyModel, tasks: str | Sequence[Any] = (), text: str | Sequence[str] = (), *,
  baseline: AnyModel | None = None, quantize: str | None = None, data: str | None = None,
  split: str | None = None, limit: int | None = None, context_length: int | None = None,
  stride: int | None = None, batch_size: int = 8, mesh: Any = None, dtype: str | None = None,
) -> dict[str, Any]:
  """Score a model: on `tasks` and `text`, or else on its own task or held-out records.

  Args:
    model: from `jaxllm.load`, or what it takes.
    tasks: kinds and configs of tasks; or one text, kinds with commas between or a .json file of
      configs. The kind of the task that the model was fine-tuned on means its own config.
    text: files to measure, of any kind that training reads.
    baseline: another model that is scored on the same examples, with a paired significance test.
    quantize: 'int8' or 'int4' stores the weights smaller; the baseline is then the model itself.
    data: where the records of the one task come from: a file, package:NAME, tfds: or hf:.
    split: of the data; 'test' of tasks, else 'validation'.
    limit: most records of a task.
    context_length: tokens of a window of a text; by default the model's, at most 1024.
    stride: tokens that a window of a text predicts; by default half of it.
    batch_size: records or prompts in one batch.
    mesh: the devices to split the models over, and
    dtype: of their parameters, as in `jaxllm.load`.

  Returns:
    {'tasks': name or file -> {'examples', 'scores', 'predictions', 'contamination', ...}}, where
    `scores` are as in `tables.score`. Of a run without a task that is asked for neither tasks nor
    texts, the scores of its held-out records: {'loss', 'perplexity', 'bits_per_byte', ...} and,
    with `quantize`, those of the whole weights as 'baseline'.

  Raises:
    ValueError: there is no such model, task, text or data, or an option that nothing would read.
  """
  texts = [text] if isinstance(text, str) else list(text)
  _check_inputs(model, baseline, tasks, texts, data, split, limit)
  ours = _moved(loading.load(model, mesh, dtype), model)
  theirs = None if baseline is None else loading.load(baseline, mesh, dtype)
  if quantize:
    ours, theirs = ours.quantized(quantize), theirs or ours
  has_task = bool(tasks or (ours.task and not texts))
  for name, value, read, wanted in (
    ('data', data, has_task, 'tasks'), ('limit', limit, has_task, 'tasks'),
    ('split', split, has_task or not texts, 'tasks'),
    ('stride', stride, texts, 'text'), ('context_length', context_length, texts, 'text'),
  ):
    if value is not None and not read:
      raise ValueError(f'{name}={value} is for {wanted}, which was not given')
  if not (has_task or texts):
    if baseline is not None:
      raise ValueError(f'baseline={baseline}: say on what, by tasks or text')
    found = _held_out(ours, model, split or 'validation', batch_size)
    if theirs:
      found['baseline'] = _held_out(theirs, model, split or 'validation', batch_size)
    return found
  chosen = tasks or ('' if texts else ours.task.kind)
  split = split or 'test'
  selected = suite.select(chosen, split, ours.task, data, limit) if chosen else {}
  results = {name: _task(ours, theirs, task, split, batch_size)
             for name, task in selected.items()}
  results |= {path: _text(ours, theirs, path, context_length, stride) for path in texts}
  return {'tasks': results}


def _moved(model: Model, given: AnyModel) -> Model:
  """Return the model of a run that was moved, with the records that lie beside it."""
  experiment = model.experiment
  if experiment is None or isinstance(given, Model) or records.find(
      experiment.records_path, model.records):
    return model
  places = (parent / experiment.records_path.parent.name
            for parent in storage.path(given).absolute().parents)
  found = next((p for p in places if records.find(p / experiment.name, model.records)), None)
  return dataclasses.replace(
    model, experiment=experiment.replace(records_dir=str(found))) if found else model


def _check_inputs(
  model: AnyModel, baseline: AnyModel | None, tasks: str | Sequence[Any], texts: Sequence[str],
  data: str | None, split: str | None, limit: int | None,
) -> None:
  """Refuse missing files and misspelt names before a model is loaded."""
  for path in (model, baseline):
    if path is not None and not isinstance(path, Model):
      sources.check_exists(path)
  if isinstance(tasks, str) and tasks.endswith('.json'):
    suite.select(tasks, split or 'test', None, data, limit)
  elif tasks:
    suite.named_tasks(tasks)  # The rest of a config may be that of the model's own task.
  if data and not set(':*?[') & set(data) and not pathlib.Path(data).exists():
    raise ValueError(f'data: {mistakes.no_such_path(data)}')
  for location in texts:
    next(documents.documents(documents.SourceConfig(location=location)), None)


def _task(
  model: Model, baseline: Model | None, task: Any, split: str, batch_size: int
) -> dict[str, Any]:
  """Return the predictions of a model and a baseline for a task, and their scores."""
  def answer(one: Model, task: Any) -> tuple[list[Any], list[Any]]:
    examples = loading.task_examples(task, split, one.tokenizer)
    return examples, predict.predict(task, examples, one, batch_size)

  examples, found = answer(model, task)
  theirs = answer(baseline, suite.in_format_of(task, baseline.task))[1] if baseline else None
  references = [example.reference for example in examples]
  labels = [label for label, _ in getattr(task, 'labels', ())]
  confusion = None
  if labels:
    pairs = collections.Counter(
      zip(references, (prediction['label'] for prediction in found), strict=True))
    confusion = {'labels': labels, 'counts': [
      [pairs[true, answer] for answer in labels] for true in labels]}
  return {
    'config': json.loads(task.to_json()), 'split': split, 'confusion': confusion,
    **_result(model, TASKS[task.kind].metrics, found, theirs, references,
              [contamination.longest_text(example.record) for example in examples],
              [{'record': example.record, 'reference': example.reference} for example in examples])}


def _text(
  model: Model, baseline: Model | None, path: str, context_length: int | None, stride: int | None
) -> dict[str, Any]:
  """Return the log-likelihoods of the passages of a text, and their scores."""
  texts = [*documents.documents(documents.SourceConfig(location=path))]
  length = context_length or min(
    1024, *(one.config.max_length for one in (model, baseline) if one))
  stride = stride or max(length // 2, 1)
  found, theirs = (
    None if one is None else language_modeling.measure_passages(one, texts, length, stride)
    for one in (model, baseline))
  if not found:
    raise ValueError(f'text={path} has no token to predict')
  parts = [part for text in texts for part in language_modeling.split_passages(text)]
  return {'context_length': length, 'stride': stride,
          **_result(model, language_modeling.METRICS, found, theirs, [None] * len(found), parts,
                    [{}] * len(found))}


def _result(
  model: Model, metrics: Mapping[str, Any], found: Sequence[Any], theirs: Sequence[Any] | None,
  references: Sequence[Any], texts: Sequence[str], rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
  """Return the scores of predictions, and the rows with them."""
  rows = [{**row, 'prediction': one} for row, one in zip(rows, found, strict=True)]
  if theirs is not None:
    rows = [{**row, 'baseline': one} for row, one in zip(rows, theirs, strict=True)]
  overlap = None
  try:
    folder = model.experiment and records.find(model.experiment.records_path, model.records)
    training: Iterable[str] = contamination.record_texts(folder, model.tokenizer) if folder else ()
    if own := model.task:
      training = map(contamination.longest_text, task_records.load(own.data, 'train'))
    if own or folder:
      overlap = contamination.summary(contamination.overlaps(texts, training))
  except (OSError, ValueError, ImportError) as error:
    logging.warning(
      'contamination is not checked: the training records cannot be read: %s', error)
  return {'examples': len(found), 'scores': tables.score(metrics, found, references, theirs),
          'contamination': overlap, 'predictions': rows}


def _held_out(model: Model, given: Any, split: str, batch_size: int) -> dict[str, Any]:
  """Return the scores of a run on its held-out records, on any devices."""
  experiment = model.experiment
  if experiment is None:
    raise ValueError(f'model={given} was not trained here, so it has no held-out records: give '
                     'text=FILE or tasks=NAME,...')
  directory = experiment.records_path
  folder = records.find(directory, model.records)
  if folder is None:
    manifest = preparing.prepare(experiment.data, experiment.tokenizer, directory)
    folder = directory / manifest.folder
    if model.records not in (None, manifest.fingerprint):
      raise ValueError(f'model={given} was trained on other records than its sources give now, and '
                       f'those are not in {directory}: put them there, or give text=FILE')
  placement, variables = model.placement, model.variables
  if placement is None:
    # Of the mesh that it was trained on nothing is needed but the rules.
    devices = jax.devices()[: math.gcd(batch_size, jax.device_count())]
    config = sharding.MeshConfig(rules=experiment.mesh.rules)
    placement = sharding.Placement(sharding.make_mesh(config, devices), config)
    variables = jax.device_put(variables, sharding.replicated(placement.mesh))
  parts = math.prod(placement.mesh.shape[axis] for axis in dict(placement.config.rules)['batch'])
  if batch_size % parts:
    raise ValueError(f'batch_size={batch_size}: a multiple of {parts} is needed, the devices that '
                     'split a batch')
  used = experiment.replace(
    model=model.config, mesh=placement.config,
    evaluation=experiment.evaluation.replace(batch_size=batch_size))
  return scoring.make_held_out(
    used, dataset.prepared(experiment, folder), placement.mesh, None, split)(variables)
