"""Runs that experiment files share: a small model learns a task, or adapters to a model do."""

from typing import Any

from jaxllm.adapters.lora import LoraConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
from jaxllm.interop import sources
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.families import PRESETS
from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig


def from_scratch(
  name: str, task: Any, context_length: int, num_steps: int, **fields: Any
) -> Experiment:
  """Return a run of minutes on a CPU: a model of bytes learns a task.

  Args:
    name: of the run.
    task: config of the task.
    context_length: of model and records.
    num_steps: of the run.
    **fields: other fields of `Experiment`.
  """
  return Experiment(
    name=name, task=task, tokenizer=TokenizerConfig(kind='bytes'),
    model=DecoderConfig(
      vocab_size=257, embed_dim=128, num_layers=3, num_heads=4, mlp_dim=256,
      max_length=context_length, tied_head=True, dropout_rate=0.1,
      scan_layers=False,  # Faster on a CPU.
    ),
    data=DataConfig(context_length=context_length),
    training=TrainingConfig(num_steps=num_steps, batch_size=8),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=min(20, num_steps // 10), final_fraction=0.05),
    evaluation=EvaluationConfig(every_steps=min(100, num_steps // 2), max_batches=16),
    **fields)


def adapt_smollm2(
  name: str, task: Any, context_length: int, learning_rate: float = 5e-4, **fields: Any
) -> Experiment:
  """Return a run that trains adapters to SmolLM2-135M-Instruct; arguments as in `from_scratch`."""
  return Experiment(
    name=name, task=task, init_from=sources.find_installed('smollm2'),
    model=PRESETS['smollm2_135m'],
    finetune=FinetuneConfig(lora=LoraConfig(rank=8, alpha=16.0)),
    data=DataConfig(context_length=context_length),
    training=TrainingConfig(num_steps=60, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=learning_rate),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.1),
    evaluation=EvaluationConfig(every_steps=30, max_batches=8),
    **fields)
