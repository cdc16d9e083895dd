"""GPT-2 124M on OpenWebText.

Commands: python -m jaxllm.train --config=experiments/gpt2_124m.py:h100 --workdir=runs/gpt2_124m
          python -m jaxllm.train --config=experiments/gpt2_124m.py:v5e16 \
            --workdir=/mnt/shared/runs/gpt2_124m --distributed
Hardware: one H100 (80 GB), or a TPU v5e slice of 16 chips (4 hosts)
Time:     not measured here; about 3e20 operations in all, a day and a half on one H100 at 35% of
          its peak
Data:     OpenWebText as Parquet files with a column `text` in ./openwebtext (Skylion007/openwebtext
          on the Hugging Face hub); GPT-2's `vocab.json` and `merges.txt` in ./gpt2
Expected: validation loss near 2.9 nats per token after 100,000 steps of half a million tokens
          (nanoGPT reports 2.85 after 600,000)
"""

from typing import NamedTuple

from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models.families import PRESETS
from jaxllm.objectives.next_token import NextToken
from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig
from jaxllm.sharding import MeshConfig


class Hardware(NamedTuple):
  """What a device makes of 512 rows of 1,024 tokens."""

  topology: str | None
  microbatches: int
  remat: str
  attention: str


VARIANTS = {
  'h100': Hardware(None, 16, 'none', 'cudnn'),
  # One microbatch, so that gradients are added over the chips once a step.
  'v5e16': Hardware('v5e:4x4', 1, 'dots_no_batch', 'splash'),
}


def get_config(variant: str = 'h100') -> Experiment:
  """Return the run for one of VARIANTS."""
  hardware = VARIANTS[variant]
  return Experiment(
    name='gpt2_124m',
    model=PRESETS['gpt2_124m'].replace(
      dtype='bfloat16', dropout_rate=0.0, attention_dropout_rate=0.0, biases=(),
      remat=hardware.remat, attention=hardware.attention,
    ),
    data=DataConfig(
      sources=(SourceConfig(location='openwebtext/*.parquet'),), validation=0.0005,
      context_length=1024, packing='concat', add_bos=False,
    ),
    tokenizer=TokenizerConfig(kind='gpt2', path='gpt2'),
    training=TrainingConfig(
      num_steps=100_000, batch_size=512, microbatches=hardware.microbatches, log_every_steps=20
    ),
    objective=NextToken(chunk_size=256),
    optimizer=OptimizerConfig(learning_rate=6e-4),
    schedule=ScheduleConfig(warmup_steps=2000, final_fraction=0.1),
    mesh=MeshConfig(data=-1),
    checkpoint=CheckpointConfig(every_steps=2000, keep_last=3, keep_every=20_000),
    evaluation=EvaluationConfig(
      every_steps=1000, max_batches=16, batch_size=128, prompts=('The meaning of life is',)
    ),
  )
