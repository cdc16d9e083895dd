"""One run, described whole: the configs of all rooms, and the checks that span rooms."""

import pydantic

from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.config import Config
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.objectives.next_token import ObjectiveConfig
from jaxllm.optim.optimizers import OptimizerConfig
from jaxllm.optim.schedules import ScheduleConfig
from jaxllm.sharding import MeshConfig


class SpikeConfig(Config):
  """When a finite loss still counts as a spike, so that its step is not applied."""

  deviations: float = pydantic.Field(default=6.0, gt=0)
  """Standard deviations above the running mean of the loss."""
  window_steps: int = pydantic.Field(default=100, ge=2)
  """Time constant of the running mean and deviation, and the steps before the check begins."""


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
  spike: SpikeConfig | None = SpikeConfig()
  """Skip steps whose loss spikes; None skips only steps that are not finite."""
  max_skipped_steps: int = pydantic.Field(default=10, ge=0)
  """Skipped steps in a row after which the run stops."""
  log_every_steps: int = pydantic.Field(default=10, gt=0)
  """Steps between two records in metrics.jsonl."""


class Experiment(Config):
  """Everything that defines a run; an experiment file returns one from `get_config()`."""

  name: str
  """A short name, for reports."""
  seed: int = pydantic.Field(default=0, ge=0)
  """Seeds initialization, dropout and the order of records."""
  records_dir: str = 'runs/records'
  """Where prepared records are kept, in a folder with the experiment's name."""
  init_from: str | None = None
  """A model to begin with, anything that `jaxllm.load` takes; None begins with random parameters.
  The sizes of `model` must be its own, and the tokenizer too."""
  model: DecoderConfig
  data: DataConfig
  tokenizer: TokenizerConfig
  training: TrainingConfig
  objective: ObjectiveConfig = ObjectiveConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: ScheduleConfig = ScheduleConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluation: EvaluationConfig = EvaluationConfig()

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'Experiment':
    training = self.training
    if self.data.context_length > self.model.max_length:
      raise ValueError(
        f'data.context_length={self.data.context_length} is longer than '
        f'model.max_length={self.model.max_length}; shorten the first or raise the second'
      )
    if training.batch_size % training.microbatches:
      raise ValueError(
        f'training.batch_size={training.batch_size} does not divide into '
        f'training.microbatches={training.microbatches} equal parts'
      )
    if training.ema_decay is not None and self.optimizer.name == 'schedule_free_adamw':
      raise ValueError(
        f'training.ema_decay={training.ema_decay}: schedule_free_adamw keeps its own average; '
        'set ema_decay to None'
      )
    if self.schedule.warmup_steps >= training.num_steps:
      raise ValueError(
        f'schedule.warmup_steps={self.schedule.warmup_steps} leaves no step after the warmup of '
        f'training.num_steps={training.num_steps}'
      )
    return self


# What must not change between two runs into one workdir: the parameters' shape and the records.
FIXED_FIELDS = ('model', 'data', 'tokenizer', 'seed')
