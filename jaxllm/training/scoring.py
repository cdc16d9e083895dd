"""Scores of a model while it is trained, and the best checkpoint by them.

- `make_measurements`: the held-out loss, and how the model does tasks; `take` measures.
- `Selection`: the best checkpoint so far, and when to stop looking for a better one. It is read
  from metrics.jsonl, so that a resumed run decides as one that was never stopped.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxllm import loading, sharding, storage
from jaxllm.data import parallel
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.evaluation import perplexity, scores
from jaxllm.experiment import Experiment
from jaxllm.model import Model
from jaxllm.tasks import TASKS, predict
from jaxllm.tasks.base import Example
from jaxllm.training import metrics
from jaxllm.training import step as step_lib
from jaxllm.training.dataset import Dataset

Scores = dict[str, float]
Measure = Callable[[Any], Scores]


class Measurement(NamedTuple):
  """One kind of measurement.

  Attributes:
    group: prefix of its names, 'validation' or 'task'.
    every_steps: steps between two of them.
    measure: variables -> scores.
  """

  group: str
  every_steps: int
  measure: Measure


def make_measurements(
  experiment: Experiment, dataset: Dataset, mesh: Mesh
) -> list[Measurement]:
  """Return all that is measured during a run; errors as in `make_tasks`."""
  found = []
  if dataset.manifest.validation is not None:
    config = experiment.evaluation
    found.append(Measurement('validation', config.every_steps, make_held_out(
      experiment, dataset, mesh, config.max_batches)))
  if experiment.scored_tasks:
    found.append(Measurement(
      'task', experiment.scoring.every_steps, make_tasks(experiment, dataset, mesh)))
  return found


def take(measurements: Iterable[Measurement], variables: Any) -> Scores:
  """Return the scores of all measurements, named 'validation/NAME' and 'task/KIND/NAME'."""
  return {
    f'{one.group}/{name}': value for one in measurements
    for name, value in one.measure(variables).items()}


def make_held_out(
  experiment: Experiment, dataset: Dataset, mesh: Mesh, max_batches: int | None,
  split: str = 'validation',
) -> Measure:
  """Return `variables -> scores` over the records of a split.

  Args:
    max_batches: how many batches at most, of records that are drawn; None takes all.
    split: of the records.

  Raises:
    ValueError: the records have no such split.
  """
  held_out = dataset.manifest.split(split)
  # The first records as they lie may be of one source; in a random order, they are a sample.
  batches = dataset.make_batches(
    split, experiment.evaluation.batch_size or experiment.training.batch_size,
    max_batches is not None, 1)
  count = min(batches.num_batches, max_batches or batches.num_batches)
  batch_sharding = sharding.batch_sharding(mesh, experiment.mesh)
  if experiment.objective_record.by_token:
    eval_step = perplexity.make_eval_step(
      experiment.decoder, experiment.chunk_size, mesh, experiment.mesh,
      (dataset.tokenizer.bos_id, dataset.tokenizer.eos_id))
    return lambda variables: perplexity.evaluate(
      eval_step, variables, parallel.map_ahead(batches.batch_at, range(count)), batch_sharding,
      held_out.bytes_per_token)
  sums = step_lib.make_sums(experiment)

  @jax.jit
  def example_step(variables: Any, batch: Any) -> Any:
    with sharding.active(sharding.Placement(mesh, experiment.mesh)):
      return sums(variables, {}, batch, None)

  def validate(variables: Any) -> Scores:
    totals: collections.Counter[str] = collections.Counter()
    for batch in parallel.map_ahead(batches.batch_at, range(count)):
      found = example_step(variables, sharding.put_batch(batch, batch_sharding))
      totals.update({name: float(value) for name, value in found.items()})
    return {'loss': totals['cross_entropy_sum'] / totals['weight_sum'],
            'accuracy': totals['correct_sum'] / totals['weight_sum'],
            'examples': totals['weight_sum']}

  return validate


def make_tasks(experiment: Experiment, dataset: Dataset, mesh: Mesh) -> Measure:
  """Return `variables -> scores` of the tasks, named 'KIND/METRIC'.

  Raises:
    ValueError: the data of a task cannot be read.
    ImportError: a package that a score needs is not installed.
  """
  config = experiment.scoring
  examples: list[tuple[Any, list[Example]]] = []
  for task in experiment.scored_tasks:
    chosen = task.data.limit if config.max_examples is None else config.max_examples
    subset = task.replace(data=task.data.replace(limit=chosen))
    examples.append((task, loading.task_examples(subset, config.split, dataset.tokenizer)))
    if TASKS[task.kind].kind == 'generate':
      for name in TASKS[task.kind].metrics:  # What is not installed is named before the first step.
        scores.rows(name, ['a'], ['a'])
  bare = make_model(experiment, dataset.tokenizer, None, mesh)

  def measure(variables: Any) -> Scores:
    model = dataclasses.replace(bare, variables=variables)
    found: Scores = {}
    for task, some in examples:
      predictions = predict.predict(task, some, model, config.batch_size)
      values = score(task, some, predictions)
      found |= {f'{task.kind}/{name}': value for name, value in values.items()}
    return found

  return measure


def make_model(
  experiment: Experiment, tokenizer: Tokenizer, variables: Any, mesh: Mesh
) -> Model:
  """Return the model of a run as it is while it is trained, on the devices that train it."""
  model = loading.make_model(loading.to_use(experiment.decoder), variables, tokenizer, experiment)
  return dataclasses.replace(model, placement=sharding.Placement(mesh, experiment.mesh))


def continue_prompts(
  experiment: Experiment, tokenizer: Tokenizer, variables: Any, mesh: Mesh, step: int
) -> list[dict[str, Any]]:
  """Return {'step', 'prompt', 'text'} of the prompts of `evaluation`; all processes take part."""
  config = experiment.evaluation
  if not config.prompts:
    return []
  texts = loading.generate(
    make_model(experiment, tokenizer, variables, mesh), config.prompts,
    max_new_tokens=config.prompt_tokens, temperature=config.temperature, top_p=config.top_p,
    seed=experiment.seed)
  return [{'step': step, 'prompt': prompt, 'text': text}
          for prompt, text in zip(config.prompts, texts, strict=True)]


def score(task: Any, examples: list[Example], predictions: list[Any]) -> Scores:
  """Return all scores of a task by name."""
  found: Scores = {}
  for name, of in TASKS[task.kind].metrics.items():
    found |= scores.score(name, [of(p) for p in predictions], [e.reference for e in examples])
  return found


class Selection(NamedTuple):
  """The measurements that tell the best checkpoint.

  Attributes:
    metric: its name in metrics.jsonl; '': nothing is selected.
    smaller_is_better: whether it measures errors.
    patience: measurements in a row without a better one that end the run; None: it never ends so.
    history: (step, value) pairs, as they came.
  """

  metric: str = ''
  smaller_is_better: bool = False
  patience: int | None = None
  history: tuple[tuple[int, float], ...] = ()

  @property
  def best(self) -> tuple[int, float] | None:
    """(step, value) of the best measurement, the first of equals; None: there is none."""
    sign = 1 if self.smaller_is_better else -1
    return min(self.history, key=lambda pair: sign * pair[1], default=None)

  @property
  def facts(self) -> dict[str, Any]:
    """The metric and value of the best measurement; empty where there is none."""
    return {'metric': self.metric, 'value': self.best[1]} if self.best else {}

  @property
  def exhausted(self) -> bool:
    """Whether the run's patience is at an end."""
    since = [step for step, _ in self.history if self.best and step > self.best[0]]
    return self.patience is not None and len(since) >= self.patience

  def add(self, step: int, scores: Mapping[str, float]) -> 'Selection':
    """Return the selection after the scores of a step, which may lack the metric."""
    value = scores.get(self.metric, math.nan)
    if not math.isfinite(value):
      return self
    return self._replace(history=(*self.history, (step, value)))


def restore_selection(
  experiment: Experiment, workdir: str | os.PathLike[str], step: int
) -> Selection:
  """Return the selection of a run that continues after `step` steps."""
  config = experiment.best
  if config is None:
    return Selection()
  records = metrics.read(storage.path(workdir) / 'metrics.jsonl')
  return Selection(config.metric, experiment.measured[config.metric], config.patience, tuple(
    (record['step'], record[config.metric]) for record in records
    if record['step'] <= step and record.get(config.metric) is not None))
