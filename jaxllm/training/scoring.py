"""What is measured of a model while it is trained: its held-out loss, and how it does tasks."""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxllm import loading, sharding
from jaxllm.data import batches as batches_lib
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.evaluation import perplexity, scores
from jaxllm.experiment import Experiment
from jaxllm.model import Model
from jaxllm.tasks import TASKS, predict
from jaxllm.tasks.base import Example
from jaxllm.training import objectives
from jaxllm.training.dataset import Dataset

Scores = dict[str, float]
Measure = Callable[[Any], Scores]


class Measurement(NamedTuple):
  """One kind of measurement.

  Attributes:
    group: what its names begin with, 'validation' or 'task'.
    every_steps: steps between two of them.
    measure: variables -> scores.
  """

  group: str
  every_steps: int
  measure: Measure


def make_measurements(
  experiment: Experiment, dataset: Dataset, mesh: Mesh
) -> tuple[Measurement, ...]:
  """Return all that is measured during a run.

  Raises:
    ValueError: as in `make_tasks`.
    ImportError: as in `make_tasks`.
  """
  validate = make_validation(experiment, dataset, mesh, experiment.evaluation.max_batches)
  do_tasks = make_tasks(experiment, dataset, mesh)
  found = (('validation', experiment.evaluation.every_steps, validate),
           ('task', experiment.scoring.every_steps, do_tasks))
  return tuple(Measurement(group, every, measure) for group, every, measure in found if measure)


def take(measurements: Iterable[Measurement], variables: Any) -> Scores:
  """Measure; names are 'validation/NAME' and 'task/KIND/NAME'."""
  return {
    f'{one.group}/{name}': value for one in measurements
    for name, value in one.measure(variables).items()
  }


def make_validation(
  experiment: Experiment, dataset: Dataset, mesh: Mesh, max_batches: int | None
) -> Measure | None:
  """Return `variables -> scores` over the validation records, or None where none are held out."""
  if dataset.manifest.validation is None:
    return None
  return make_held_out(experiment, dataset, mesh, max_batches, 'validation')


def make_held_out(
  experiment: Experiment, dataset: Dataset, mesh: Mesh, max_batches: int | None, split: str
) -> Measure:
  """Return `variables -> scores` over the records of a split.

  Args:
    experiment: the run.
    dataset: its records.
    mesh: its devices.
    max_batches: how many batches at most, of records that are drawn; None takes all.
    split: of the records.

  Raises:
    ValueError: the records have no such split.
  """
  held_out = dataset.manifest.split(split)
  # The first records as they lie may be of one source; in a random order, they are a sample.
  batches = dataset.make_batches(
    split, experiment.evaluation.batch_size or experiment.training.batch_size,
    max_batches is not None, 1
  )
  count = min(batches.num_batches, max_batches or batches.num_batches)
  batch_sharding = sharding.batch_sharding(mesh, experiment.mesh)
  if experiment.objective_record.by_token:
    eval_step = perplexity.make_eval_step(
      experiment.decoder, experiment.chunk_size, mesh, experiment.mesh,
      (dataset.tokenizer.bos_id, dataset.tokenizer.eos_id),
    )
    return lambda variables: perplexity.evaluate(
      eval_step, variables, batches_lib.prefetch(batches, 0, count), batch_sharding,
      held_out.bytes_per_token,
    )
  sums = objectives.make_sums(experiment)

  @jax.jit
  def example_step(variables: Any, batch: Any) -> Any:
    with sharding.activate(mesh, experiment.mesh):
      return sums(variables, {}, batch, None)

  def validate(variables: Any) -> Scores:
    totals: collections.Counter[str] = collections.Counter()
    for batch in batches_lib.prefetch(batches, 0, count):
      found = example_step(variables, sharding.put_batch(batch, batch_sharding))
      totals.update({name: float(value) for name, value in found.items()})
    return {'loss': totals['cross_entropy_sum'] / totals['weight_sum'],
            'accuracy': totals['correct_sum'] / totals['weight_sum'],
            'examples': totals['weight_sum']}

  return validate


def make_tasks(experiment: Experiment, dataset: Dataset, mesh: Mesh) -> Measure | None:
  """Return `variables -> scores` of the tasks, named 'KIND/METRIC', or None where there are none.

  Raises:
    ValueError: the data of a task cannot be read.
    ImportError: what a score needs is not installed.
  """
  config = experiment.scoring
  if not experiment.scored_tasks:
    return None
  examples: list[tuple[Any, list[Example]]] = []
  for task in experiment.scored_tasks:
    chosen = task.data.limit if config.max_examples is None else config.max_examples
    subset = task.replace(data=task.data.replace(limit=chosen))
    examples.append((task, loading.task_examples(subset, config.split, dataset.tokenizer)))
    _check_installed(task)
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


def score(task: Any, examples: list[Example], predictions: list[Any]) -> Scores:
  """Return all scores of a task by name."""
  found: Scores = {}
  for name, of in TASKS[task.kind].metrics.items():
    found |= scores.score(name, [of(p) for p in predictions], [e.reference for e in examples])
  return found


def _check_installed(task: Any) -> None:
  """Score an empty answer now rather than after the first steps."""
  if TASKS[task.kind].kind == 'generate':
    for name in TASKS[task.kind].metrics:
      scores.rows(name, ['a'], ['a'])
