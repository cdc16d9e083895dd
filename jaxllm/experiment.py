"""One run, described whole: the configs of all rooms, and the checks that span rooms."""

import functools
import itertools
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import jax
import pydantic
from absl import logging

from jaxllm import storage
from jaxllm.adapters import lora
from jaxllm.adapters.lora import LoraConfig
from jaxllm.adapters.quantization import QuantizationConfig
from jaxllm.adapters.rules import PathRule
from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.config import Config
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import HELD_OUT, EvaluationConfig
from jaxllm.evaluation.scores import METRICS
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.objectives import OBJECTIVES, AnyObjective, Objective
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.objectives.next_token import NextToken
from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig
from jaxllm.optim.privacy import PrivacyConfig
from jaxllm.sharding import MeshConfig
from jaxllm.tasks import TASKS, AnyTask

# Where a classifier lies among the parameters.
HEAD = 'classifier'


class SpikeConfig(Config):
  """When a finite loss still counts as a spike, so that its step is not applied."""

  deviations: float = pydantic.Field(default=6.0, gt=0)
  """Standard deviations above the running mean of the loss."""
  window_steps: int = pydantic.Field(default=100, ge=2)
  """Time constant of the running mean and deviation, and the steps before the check begins."""


Fault = Annotated[str, pydantic.Field(
  pattern=r'^((kill|nan|full_disk)@(\d+|random)|(stall|slow_disk)@(\d+|random):\d+(\.\d+)?)$')]


class TrainingConfig(Config):
  """The shape of the run: how many steps, of how much, guarded how."""

  num_steps: int = pydantic.Field(gt=0)
  """Optimizer steps of the whole run."""
  batch_size: int = pydantic.Field(gt=0)
  """Records in one step, over all devices and microbatches."""
  microbatches: int = pydantic.Field(default=1, gt=0)
  """Parts that a batch is split into to save memory; gradients are added, weighted by tokens."""
  ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
  """Decay per step of an exponential moving average of the parameters; None keeps none."""
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Storage of the trained parameters. What an update adds to bfloat16 is rounded up or down at
  random, right in the mean; moments and `ema_decay`'s average stay float32."""
  spike: SpikeConfig | None = SpikeConfig()
  """Skip steps whose loss spikes; None skips only steps that are not finite."""
  max_skipped_steps: int = pydantic.Field(default=10, ge=0)
  """Skipped steps in a row after which the run goes back."""
  max_rollbacks: int = pydantic.Field(default=2, ge=0)
  """Times that it goes back to its last good checkpoint and passes over the batches of the skipped
  steps and of the one before; then it stops."""
  watchdog_seconds: float | None = pydantic.Field(default=None, gt=0)
  """A step, a batch, a save or an evaluation that takes longer ends the process with the stacks of
  its threads and exit code 124; so does restoring and compiling, ten times as long. None: never."""
  faults: tuple[Fault, ...] = ()
  """Faults on purpose, each once: 'kill@120', 'stall@50:30' (seconds), 'nan@7' (the batch of a
  step), 'slow_disk@100:5' and 'full_disk@100' (at the next save); 'random' may stand for a step."""
  log_every_steps: int = pydantic.Field(default=10, gt=0)
  """Steps between two records in metrics.jsonl."""
  writers: tuple[Literal['tensorboard', 'wandb', 'trackio'], ...] = ('tensorboard',)
  """Where they go besides; wandb and trackio are extras of these names."""


class ScoringConfig(Config):
  """Tasks on which the model is scored while it is trained."""

  tasks: tuple[AnyTask, ...] | None = None
  """Which, each kind once; None: the experiment's own task, where its data have such a split."""
  split: str = 'validation'
  """The split of their data that they are done on."""
  max_examples: int | None = pydantic.Field(default=200, gt=0)
  """Examples of each, always the same, chosen by hash; None takes all."""
  every_steps: int = pydantic.Field(default=500, gt=0)
  """Steps between two times; they are also done after the last step."""
  batch_size: int = pydantic.Field(default=8, gt=0)
  """Rows of one call of the model."""


class BestConfig(Config):
  """How the best checkpoint is chosen, which is kept, and which `jaxllm.load` takes."""

  metric: str = 'validation/loss'
  """'validation/NAME' or 'task/KIND/NAME', as in metrics.jsonl. Whether it should be small or large
  is said beside the metric."""
  patience: int | None = pydantic.Field(default=None, gt=0)
  """The run ends after this many measurements in a row without a better one; None: never."""


class FinetuneConfig(Config):
  """Which parameters are trained; by default all of them."""

  lora: LoraConfig | None = None
  """Train adapters beside the parameters of `init_from`, which stay as they are; None trains the
  parameters themselves."""
  base: QuantizationConfig | None = None
  """How these parameters are stored meanwhile; None: float32."""
  rules: tuple[PathRule, ...] = ()
  """Parameters that are frozen or learn at another rate, by their paths (those of adapters, with
  `lora`); each must match something."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'FinetuneConfig':
    if self.base is not None and self.lora is None:
      raise ValueError('base: only parameters that are not trained can be quantised; set lora')
    return self


class Experiment(Config):
  """Everything that defines a run; an experiment file returns one from `get_config()`."""

  name: str = pydantic.Field(pattern=r'^\w[\w. -]*$')
  """A short name, for reports and the folder of the records."""
  seed: int = pydantic.Field(default=0, ge=0, le=2**32 - 1)
  """Seeds initialization, dropout and the order of records."""
  records_dir: str = 'runs/records'
  """Where prepared records are kept, in a folder with the experiment's name."""
  init_from: str | None = None
  """A model to begin with, anything that `jaxllm.load` takes; None begins with random parameters.
  The sizes of `model` must be its own, and the tokenizer too."""
  model: DecoderConfig | None = None
  """The decoder; None: that of `init_from`."""
  data: DataConfig
  tokenizer: TokenizerConfig | None = None
  """The tokenizer; None: that of `init_from`, and texts begin with BOS if they do there."""
  task: AnyTask | None = None
  """Train to do a task, on its records and on the answers alone; None trains on `data.sources`."""
  finetune: FinetuneConfig = FinetuneConfig()
  training: TrainingConfig
  objective: AnyObjective = NextToken()
  """The loss that is minimised: that of the next tokens, of answers where there is a task; of
  'preference' pairs ('dpo', 'ipo', 'orpo', 'simpo'); of a 'classifier' on top of the model; or the
  divergence from a teacher ('distillation')."""
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: ScheduleConfig = ScheduleConfig()
  privacy: PrivacyConfig | None = None
  """Train with differential privacy (DP-SGD), whatever the objective; None: without."""
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  scoring: ScoringConfig = ScoringConfig()
  best: BestConfig | None = None
  """Keep the best checkpoint besides the newest, maybe stop early; None: the newest is the best."""

  @pydantic.field_validator('objective', mode='before')
  @classmethod
  def _default_kind(cls, value: Any) -> Any:
    """Read configs of a time when there was one objective."""
    return {'kind': 'next_token', **value} if isinstance(value, Mapping) else value

  def follow(self, updates: dict[str, Any], changed: Collection[str]) -> dict[str, Any]:
    """Warm up over a tenth of a run that is made shorter than its warmup, which is not named."""
    schedule = updates.get('schedule', self.schedule)
    steps = updates.get('training', self.training).num_steps
    if {'schedule', 'schedule.warmup_steps'} & set(changed) or schedule.warmup_steps < steps:
      return updates
    logging.warning('config.schedule.warmup_steps=%s instead of %s, a tenth of the %s steps',
                    steps // 10, schedule.warmup_steps, steps)
    return {**updates, 'schedule': schedule.replace(warmup_steps=steps // 10)}

  @property
  def records_path(self) -> pathlib.Path:
    """Where the records of this run are kept."""
    return storage.path(self.records_dir, 'config.records_dir=') / self.name

  @property
  def objective_record(self) -> Objective:
    """The entry of `OBJECTIVES` for the objective."""
    return OBJECTIVES[self.objective.kind]

  @property
  def chunk_size(self) -> int | None:
    """Positions of each sequence whose logits exist at once, where the objective says so."""
    return getattr(self.objective, 'chunk_size', None)

  @property
  def classifier(self) -> ClassifierConfig | None:
    """The head that is trained on top of the model, if there is one."""
    return self.objective if self.objective_record.head else None

  @property
  def reads_models(self) -> bool:
    """Whether the run begins with another model or learns from one."""
    return self.init_from is not None or self.objective_record.teacher

  @property
  def reads_base(self) -> bool:
    """Whether every step depends on `init_from`, not only the first."""
    return self.finetune.lora is not None or self.objective_record.reference

  @property
  def scored_tasks(self) -> tuple[AnyTask, ...]:
    """The tasks of `scoring`."""
    if self.scoring.tasks is not None:
      return self.scoring.tasks
    own = self.task is not None and self.scoring.split in self.task.data.splits
    return (self.task,) if own else ()

  @property
  def measured(self) -> dict[str, bool]:
    """Name of each score that can tell the best checkpoint -> whether smaller is better."""
    names: dict[str, bool] = {}
    if self.data.validation if self.task is None else 'validation' in self.task.data.splits:
      by_token = self.objective_record.by_token
      names |= {f'validation/{name}': smaller for name, smaller in HELD_OUT.items()
                if by_token or name in ('loss', 'accuracy')}
    for task in self.scored_tasks:
      for metric in map(METRICS.__getitem__, TASKS[task.kind].metrics):
        names |= {f'task/{task.kind}/{name}': metric.smaller_is_better for name in metric.names}
    return names

  @property
  def decoder(self) -> DecoderConfig:
    """The decoder; a ValueError while it is still to be read from `init_from`."""
    if self.model is None:
      raise ValueError('config.model=None: it is read from config.init_from when training starts')
    return self.model

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'Experiment':
    for problem in itertools.chain(_problems(self), _problems_of_objective(self)):
      raise ValueError(problem)
    return self


def _problems(experiment: Experiment) -> Iterator[str]:
  """Yield conflicts between fields; each check may rely on those before it."""
  data, model, tokenizer = experiment.data, experiment.model, experiment.tokenizer
  training = experiment.training
  if bool(data.sources) == (experiment.task is not None):
    yield (f'data.sources={data.sources} and task={experiment.task and experiment.task.kind!r}: '
           'set one of them; a task has records of its own, in task.data')
  if model is not None and data.context_length > model.max_length:
    yield (f'data.context_length={data.context_length} is longer than '
           f'model.max_length={model.max_length}; shorten the first or raise the second')
  if model and tokenizer and (tokenizer.vocab_size or 0) > model.vocab_size:
    yield (f'tokenizer.vocab_size={tokenizer.vocab_size} is larger than model.vocab_size='
           f'{model.vocab_size}; lower the first or raise the second')
  if experiment.init_from is None:
    wanting = [name for name in ('model', 'tokenizer') if getattr(experiment, name) is None]
    wanting += ['finetune.lora'] if experiment.finetune.lora else []
    if wanting:
      yield f'init_from=None: {", ".join(wanting)} cannot do without; name a model'
  if experiment.privacy is not None and training.spike is not None:
    yield (f'training.spike={training.spike}: whether a step is taken would tell of its records; '
           'with privacy set it to None')
  if experiment.privacy is not None and (experiment.task or experiment).data.mixed:
    yield ('data.sources with weights or epochs: with privacy each record is read equally often; '
           'leave them away')
  if training.batch_size % training.microbatches:
    yield (f'training.batch_size={training.batch_size} does not divide into '
           f'training.microbatches={training.microbatches} equal parts')
  if experiment.schedule.warmup_steps >= training.num_steps:
    yield (f'schedule.warmup_steps={experiment.schedule.warmup_steps} leaves no step after the '
           f'warmup of training.num_steps={training.num_steps}; shorten the first or raise the '
           'second')


def _problems_of_objective(experiment: Experiment) -> Iterator[str]:
  objective, record, task = experiment.objective, experiment.objective_record, experiment.task
  if record.examples == 'pairs' and (task is None or task.kind != 'preference'):
    yield (f'objective.kind={objective.kind!r} and task={task and task.kind!r}: it needs a task of '
           "the kind 'preference'")
  if record.reference and experiment.init_from is None:
    yield f'objective.kind={objective.kind!r} compares with init_from, which is None'
  labels = getattr(task, 'labels', ())
  if record.examples == 'labels' and objective.num_classes != len(labels):
    yield (f'objective.num_classes={objective.num_classes}: the task has {len(labels)} labels; a '
           'classifier needs a task with labels')
  kinds = [task.kind for task in experiment.scored_tasks]
  if len(set(kinds)) < len(kinds):
    yield f'scoring.tasks: {", ".join(kinds)}: each kind may stand once'
  if experiment.best is not None and experiment.best.metric not in experiment.measured:
    yield (f'best.metric={experiment.best.metric!r} is not measured; one of '
           f'{", ".join(experiment.measured) or "none: nothing is held out"}')


def abstract_params(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return the shapes and the logical axes of the parameters that a run trains, with the dtype of
  those that it is evaluated with.
  """
  full, full_axes = decoder.abstract(experiment.decoder)
  shapes, axes = full['params'], full_axes['params']
  if experiment.finetune.lora is not None:
    shapes, axes = lora.abstract(experiment.finetune.lora, shapes, axes)
  if head := experiment.objective_record.head:
    shapes = {**shapes, HEAD: jax.eval_shape(
      functools.partial(head.init, experiment.objective, experiment.decoder), jax.random.key(0))}
    axes = {**axes, HEAD: head.axes}
  training = experiment.training
  dtype = training.param_dtype if training.ema_decay is None else 'float32'
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes), axes
