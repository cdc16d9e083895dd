"""GPT-3, in the sizes of the paper's Table 2.1, on TPU pods.

Command:  python -m jaxllm.train --config=experiments/gpt3.py:13b \
            --workdir=/mnt/shared/runs/gpt3_13b --distributed
Hardware: per size below; batches and learning rates are those of the paper
Time:     not measured; `experiments/benchmarks/plan_table.py` shows that each one compiles for its
          slice and fits its memory
Data:     C4 through TFDS, prepared beforehand; GPT-2's `vocab.json` and `merges.txt` in ./gpt2
Reference: Brown et al., arXiv 2005.14165, Table 2.1 and appendix B
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


class Size(NamedTuple):
  """Tokens per step and learning rate are the paper's; the rest is how the slice runs them."""

  topology: str
  tokens: int
  learning_rate: float
  mesh: MeshConfig
  microbatches: int
  chunk_size: int | None = 512


VARIANTS = {
  '125m': Size('v5e:4x4', 2**19, 6.0e-4, MeshConfig(data=16), 1, 256),
  '350m': Size('v5e:4x4', 2**19, 3.0e-4, MeshConfig(data=1, fsdp=16), 2),
  '760m': Size('v5e:4x8', 2**19, 2.5e-4, MeshConfig(data=1, fsdp=32), 2),
  '1.3b': Size('v5e:8x8', 2**20, 2.0e-4, MeshConfig(data=2, fsdp=32), 2),
  '2.7b': Size('v5e:8x16', 2**20, 1.6e-4, MeshConfig(data=2, fsdp=64), 2),
  '6.7b': Size('v5p:4x4x4', 2**21, 1.2e-4, MeshConfig(data=4, fsdp=16), 2, None),
  '13b': Size('v5p:4x4x8', 2**21, 1.0e-4, MeshConfig(data=4, fsdp=32), 2, None),
  '175b': Size('v5p:8x8x16', 3 * 2**20, 0.6e-4, MeshConfig(data=1, fsdp=128, tensor=8), 3, None),
}
CONTEXT = 2048


def get_config(variant: str = '125m') -> Experiment:
  """Return the run of one size of VARIANTS."""
  size = VARIANTS[variant]
  num_steps = 300 * 10**9 // size.tokens
  return Experiment(
    name=f'gpt3_{variant}',
    model=PRESETS[f'gpt3_{variant}'].replace(
      dtype='bfloat16', attention='splash', remat='dots_no_batch', dropout_rate=0.0,
      attention_dropout_rate=0.0,
    ),
    data=DataConfig(
      sources=(SourceConfig(location='tfds:c4/en?split=train'),),
      validation=(SourceConfig(location='tfds:c4/en?split=validation'),),
      context_length=CONTEXT, add_bos=False,
    ),
    tokenizer=TokenizerConfig(kind='gpt2', path='gpt2'),
    training=TrainingConfig(
      num_steps=num_steps, batch_size=size.tokens // CONTEXT, microbatches=size.microbatches,
      log_every_steps=20,
    ),
    objective=NextToken(chunk_size=size.chunk_size),
    optimizer=OptimizerConfig(learning_rate=size.learning_rate),
    schedule=ScheduleConfig(
      warmup_steps=375 * 10**6 // size.tokens, decay_steps=260 * 10**9 // size.tokens,
      final_fraction=0.1,
    ),
    mesh=size.mesh,
    checkpoint=CheckpointConfig(every_steps=1000, keep_last=3, keep_every=10_000),
    evaluation=EvaluationConfig(
      every_steps=1000, max_batches=8, prompts=('The meaning of life is',)
    ),
  )
