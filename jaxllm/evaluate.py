"""Score a model: `python -m jaxllm.evaluate --model=runs/quickstart`.

- A run is scored on its held-out records, or on the task that it was fine-tuned on.
- `--tasks=sentiment,translation` scores any model on tasks, on their default data; a .json file
  gives their configs, `--data` the records of a single one.
- `--text=FILE` scores any model on a text of any kind that training reads: loss and perplexity per
  token, and bits per byte, which tokenizers do not change.
- `--baseline=OTHER` scores another model on the same examples, with a paired significance test.
- `--quantize=int8` scores the model with smaller weights, beside itself as it is: what they cost.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm import config, mistakes

FLAGS = config.Flags()
MODEL, MESH, DTYPE = FLAGS.model()
BASELINE = FLAGS.string('baseline', None, 'Another model, to be compared with.')
QUANTIZE = FLAGS.enum(
  'quantize', None, ['int8', 'int4'], 'Store the weights smaller; the baseline is then the model.')
TASKS = FLAGS.string('tasks', None, 'Kinds of tasks, or a .json file of their configs.')
DATA = FLAGS.string(
  'data', None, 'Records of the task: a file, package:NAME, tfds:NAME?split= or hf:NAME?split=.'
)
TEXT = FLAGS.multi_string('text', [], 'A file to measure; may be repeated.')
SPLIT = FLAGS.string('split', None, "What is scored: 'test' of tasks, else 'validation'.")
LIMIT = FLAGS.integer('limit', None, 'Most records of a task.', 1)
CONTEXT_LENGTH = FLAGS.integer(
  'context_length', None, "Tokens of a window of a text; by default the model's, at most 1024.", 2
)
STRIDE = FLAGS.integer(
  'stride', None, 'Tokens that a window of a text predicts; by default half of it.', 1
)
BATCH_SIZE = FLAGS.integer('batch_size', 8, 'Records or prompts in one batch.', 1)
OUTPUT = FLAGS.string('output', None, 'File for scores and predictions, as JSON.')


def main(_) -> None:  # noqa: D103
  from jaxllm import loading
  from jaxllm.evaluation import tables
  from jaxllm.tasks import suite

  _check_inputs()
  model = loading.load(MODEL.value, MESH.value, DTYPE.value)
  baseline = loading.load(BASELINE.value, MESH.value, DTYPE.value) if BASELINE.value else None
  if QUANTIZE.value:
    model, baseline = model.quantized(QUANTIZE.value), baseline or model
  own = model.task
  _check_flags(own)
  if not (TASKS.value or TEXT.value or own):
    if BASELINE.value:
      raise ValueError(f'--baseline={BASELINE.value}: say on what, by --tasks or --text')
    scores = _held_out(model)
    whole = _held_out(baseline) if baseline else {}
    for name, value in scores.items():
      number = '{:,.0f}'.format if name == 'tokens' else tables.number
      beside = f'  ({number(whole[name])} unless {QUANTIZE.value})' if whole else ''
      print(f'{name.replace("_", " "):>14}  {number(value)}{beside}')
    _write({**scores, 'baseline': whole} if whole else scores)
    return
  split = SPLIT.value or 'test'
  names = TASKS.value or ('' if TEXT.value else own.kind)
  selected = suite.select(names, split, own, DATA.value, LIMIT.value) if names else {}
  results = {name: _task(model, baseline, task, split) for name, task in selected.items()}
  results |= {path: _text(model, baseline, path) for path in TEXT.value}
  print(tables.render({name: result['lines'] for name, result in results.items()},
                      {name: result['examples'] for name, result in results.items()}))
  for name, result in results.items():
    if overlap := result.get('contamination'):
      print(f'{name}: {overlap["overlapping"]} of {overlap["texts"]} texts share a run of '
            f'{overlap["ngram_words"]} words (or are whole) with the training records')
    if confusion := result.get('confusion'):
      print(f'{name}:\n{tables.render_confusion(confusion)}')
    result['scores'] = tables.as_json(result.pop('lines'))
  _write({'model': MODEL.value, 'quantize': QUANTIZE.value, 'baseline': BASELINE.value,
          'tasks': results})


def _check_inputs() -> None:
  """Find what is missing or misspelt before a model is loaded."""
  from jaxllm.data import documents
  from jaxllm.interop import sources
  from jaxllm.tasks import TASKS as KINDS
  from jaxllm.tasks import suite

  for path in filter(None, (MODEL.value, BASELINE.value)):
    sources.check_exists(path)
  if OUTPUT.value:
    mistakes.check_writeable(OUTPUT.value, '--output')
  names = TASKS.value or ''
  if names.endswith('.json'):
    suite.select(names, SPLIT.value or 'test', None, DATA.value, LIMIT.value)
  for kind in names.split(',') if names and not names.endswith('.json') else ():
    if kind not in KINDS:
      raise ValueError(f'--tasks={names}: there is no task {kind!r}; one of {", ".join(KINDS)}'
                       f'{mistakes.hint(kind, KINDS)}')
  if DATA.value and not set(':*?[') & set(DATA.value) and not pathlib.Path(DATA.value).exists():
    raise ValueError(f'--data: {mistakes.no_such_path(DATA.value)}')
  for location in TEXT.value:
    next(documents.documents(documents.SourceConfig(location=location)), None)


def _check_flags(own: Any) -> None:
  """Refuse flags that nothing would read."""
  has_text = bool(TEXT.value)
  has_task = bool(TASKS.value or (own and not has_text))
  for flag, read, what in ((DATA, has_task, '--tasks'), (LIMIT, has_task, '--tasks'),
                           (SPLIT, has_task or not has_text, '--tasks'),
                           (STRIDE, has_text, '--text'), (CONTEXT_LENGTH, has_text, '--text')):
    if flag.value is not None and not read:
      raise ValueError(f'--{flag.name}={flag.value} is for {what}, which was not given')


def _task(model, baseline, task, split: str) -> dict[str, Any]:
  """Return what a model and a baseline say to the examples of a task, and how it is scored."""
  from jaxllm import loading
  from jaxllm.evaluation import contamination, scores
  from jaxllm.tasks import TASKS as KINDS
  from jaxllm.tasks import predict, suite

  def answer(one, task) -> tuple[list[Any], list[Any]]:
    examples = loading.task_examples(task, split, one.tokenizer)
    return examples, predict.predict(task, examples, one, BATCH_SIZE.value)

  examples, found = answer(model, task)
  theirs = answer(baseline, suite.in_format_of(task, baseline.task))[1] if baseline else None
  references = [example.reference for example in examples]
  rows = [{'record': example.record, 'reference': example.reference} for example in examples]
  labels = [label for label, _ in getattr(task, 'labels', ())]
  said = [prediction.get('label') for prediction in found]
  confusion = labels and {'labels': labels, 'counts': scores.confusion_matrix(
    said, references, labels).tolist()}
  return {
    'config': json.loads(task.to_json()), 'split': split, 'confusion': confusion or None,
    **_result(model, KINDS[task.kind].metrics, found, theirs, references,
              [contamination.longest_text(example.record) for example in examples], rows),
  }


def _text(model, baseline, path: str) -> dict[str, Any]:
  """Return how likely the passages of a text are."""
  from jaxllm.data import documents
  from jaxllm.tasks import language_modeling

  texts = [found.text for found in documents.documents(documents.SourceConfig(location=path))]
  models = [model] if baseline is None else [model, baseline]
  length = CONTEXT_LENGTH.value or min(1024, *(one.config.max_length for one in models))
  stride = STRIDE.value or max(length // 2, 1)
  found, theirs = (*(language_modeling.measure_passages(one, texts, length, stride)
                     for one in models), None)[:2]
  if not found:
    raise ValueError(f'--text={path} has no token to predict')
  parts = [part for text in texts for part in language_modeling.split_passages(text)]
  return {'context_length': length, 'stride': stride,
          **_result(model, language_modeling.METRICS, found, theirs, [None] * len(found), parts,
                    [{}] * len(found))}


def _result(
  model, metrics, found, theirs, references, texts: Sequence[str], rows
) -> dict[str, Any]:
  """Return the scores of predictions, and the rows with them."""
  from jaxllm.evaluation import tables

  rows = [{**row, 'prediction': one} for row, one in zip(rows, found, strict=True)]
  if theirs is not None:
    rows = [{**row, 'baseline': one} for row, one in zip(rows, theirs, strict=True)]
  return {'examples': len(found), 'lines': tables.score(metrics, found, references, theirs),
          'contamination': _contamination(model, texts), 'predictions': rows}


def _contamination(model, texts: Sequence[str]) -> dict[str, Any] | None:
  """Return how many texts stand in the training records; None where these cannot be read."""
  from jaxllm.evaluation import contamination

  try:
    training = _training_texts(model)
    if training is None:
      return None
    return contamination.summary(contamination.overlaps(texts, training))
  except (OSError, ValueError, ImportError) as error:
    print(f'contamination is not checked: the training records cannot be read: {error}')
    return None


def _training_texts(model) -> Iterable[str] | None:
  """Return what a run was trained on; None where that is not known."""
  from jaxllm.evaluation import contamination
  from jaxllm.tasks import records as task_records

  if own := model.task:
    return map(contamination.longest_text, task_records.load(own.data, 'train'))
  if not model.experiment or _records(model) is None:
    return None
  directory = pathlib.Path(model.experiment.records_dir) / model.experiment.name
  return contamination.record_texts(directory, model.tokenizer)


def _records(model) -> Any:
  """Return the manifest of the records that a run was trained on, if they still lie there."""
  from jaxllm.checkpoints import store
  from jaxllm.training import dataset

  return dataset.find_records(
    model.experiment, store.read_bundle(MODEL.value).manifest.get('fingerprint'))


def _held_out(model) -> dict[str, float]:
  """Return the scores of a run on its held-out records, on any devices."""
  import jax

  from jaxllm import sharding
  from jaxllm.data import records
  from jaxllm.training import dataset, scoring

  experiment, split = model.experiment, SPLIT.value or 'validation'
  if experiment is None:
    raise ValueError(f'--model={MODEL.value} was not trained here, so it has no held-out records: '
                     'give --text=FILE or --tasks=NAME,...')
  if _records(model) is None:
    directory = pathlib.Path(experiment.records_dir) / experiment.name
    records.prepare(experiment.data, experiment.tokenizer, directory)
  prepared = dataset.prepared(experiment)
  placement, variables = model.placement, model.variables
  if placement is None:
    # Of the mesh that it was trained on nothing is needed but the rules.
    devices = jax.devices()[: math.gcd(BATCH_SIZE.value, jax.device_count())]
    mesh_config = sharding.MeshConfig(rules=experiment.mesh.rules)
    placement = sharding.Placement(
      sharding.make_mesh(mesh_config, devices), mesh_config)
    variables = jax.device_put(variables, sharding.replicated(placement.mesh))
  parts = math.prod(placement.mesh.shape[axis] for axis in dict(placement.config.rules)['batch'])
  if BATCH_SIZE.value % parts:
    raise ValueError(f'--batch_size={BATCH_SIZE.value}: a multiple of {parts} is needed, the '
                     'devices that split a batch')
  used = experiment.replace(
    model=model.config, mesh=placement.config,
    evaluation=experiment.evaluation.replace(batch_size=BATCH_SIZE.value))
  return scoring.make_held_out(used, prepared, placement.mesh, None, split)(variables)


def _write(results: Any) -> None:
  if OUTPUT.value:
    pathlib.Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    # Records may hold dates.
    text = json.dumps(results, indent=2, ensure_ascii=False, default=str)
    pathlib.Path(OUTPUT.value).write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
  config.run_program(main, FLAGS)
