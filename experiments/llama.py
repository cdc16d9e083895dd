"""Models of the families Llama and Gemma on TPU pods.

Command:  python -m jaxllm.train --config=experiments/llama.py:llama3_8b \
            --workdir=/mnt/shared/runs/llama3_8b --distributed
Hardware: per model below
Time:     not measured; `experiments/benchmarks/plan_table.py` shows that each one compiles for its
          slice and fits its memory
Data:     C4 through TFDS, prepared beforehand; the model's `tokenizer.json` in ./MODEL, such as
          ./llama3_8b/tokenizer.json
Reference: Touvron et al., arXiv 2307.09288; Dubey et al., arXiv 2407.21783; Ben Allal et al.,
          arXiv 2502.02737; Gemma Team, arXiv 2408.00118, 2503.19786. Learning rates and batches
          follow them where they tell; the data does not.
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


class Model(NamedTuple):
  """A published model, of the variant's name; `batch_size` counts records of `context` tokens."""

  topology: str
  context: int
  batch_size: int
  learning_rate: float
  mesh: MeshConfig
  microbatches: int
  remat: str = 'dots_no_batch'
  chunk_size: int | None = None
  preset: str | None = None


VARIANTS = {
  'smollm2_135m': Model('v5e:4x4', 2048, 512, 3e-3, MeshConfig(data=16), 4, chunk_size=512),
  'llama2_7b': Model('v5p:4x4x4', 4096, 1024, 3e-4, MeshConfig(data=4, fsdp=16), 4),
  'llama3_8b': Model(
    'v5p:4x4x4', 8192, 512, 3e-4, MeshConfig(data=4, fsdp=16), 4, chunk_size=4096
  ),
  'llama3_70b': Model(
    'v5p:8x8x8', 8192, 1024, 1.5e-4, MeshConfig(data=8, fsdp=64), 1, 'full', chunk_size=4096
  ),
  # Rows of a whole context, each on eight chips; give it `init_from`.
  'llama3.1_8b_128k': Model(
    'v5p:4x4x4', 131_072, 32, 2e-5, MeshConfig(data=1, fsdp=8, context=8), 4, 'full',
    chunk_size=16_384, preset='llama3.1_8b',
  ),
  'gemma2_9b': Model(
    'v5p:4x4x4', 8192, 512, 3e-4, MeshConfig(data=4, fsdp=16), 4, 'full', chunk_size=1024
  ),
  'gemma3_4b': Model(
    'v5p:4x4x4', 8192, 512, 3e-4, MeshConfig(data=4, fsdp=16), 4, 'full', chunk_size=1024
  ),
}


def get_config(variant: str = 'smollm2_135m') -> Experiment:
  """Return the run of one model of VARIANTS."""
  model = VARIANTS[variant]
  preset = model.preset or variant
  return Experiment(
    name=variant,
    model=PRESETS[preset].replace(
      dtype='bfloat16', attention='splash', remat=model.remat
    ),
    data=DataConfig(
      sources=(SourceConfig(location='tfds:c4/en?split=train'),),
      validation=(SourceConfig(location='tfds:c4/en?split=validation'),),
      context_length=model.context,
    ),
    tokenizer=TokenizerConfig(kind='json', path=f'{preset}/tokenizer.json'),
    training=TrainingConfig(
      num_steps=100_000, batch_size=model.batch_size, microbatches=model.microbatches,
      log_every_steps=20,
    ),
    objective=NextToken(chunk_size=model.chunk_size, z_loss=1e-4),
    optimizer=OptimizerConfig(learning_rate=model.learning_rate),
    schedule=ScheduleConfig(warmup_steps=2000, final_fraction=0.1),
    mesh=model.mesh,
    checkpoint=CheckpointConfig(every_steps=1000, keep_last=3, keep_every=10_000),
    evaluation=EvaluationConfig(
      every_steps=1000, max_batches=8, prompts=('The meaning of life is',)
    ),
  )
