"""nanoGPT's character-level Shakespeare, in its CPU setting.

Command:  python -m jaxllm.train --config=experiments/shakespeare_char.py:PATH/input.txt \
            --workdir=runs/shakespeare_char
Hardware: 2 CPU cores
Time:     see README.md, "Figures"
Data:     tinyshakespeare, 1.1 MB of text, at a path that you give; the first 90% train
Expected: validation loss 1.62 nats per character by Muon, chosen by that loss. By AdamW with
          nanoGPT's settings,
            --config.optimizer='{"name": "adamw", "learning_rate": 1e-3, "beta2": 0.99}'
          1.88 (nanoGPT itself: 1.886)
Reference: github.com/karpathy/nanoGPT, config/train_shakespeare_char.py and its README
"""

from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models.families import PRESETS
from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig


def get_config(path: str = 'input.txt') -> Experiment:
  """Return the run on the text file at `path`."""
  return Experiment(
    name='shakespeare_char',
    model=PRESETS['gpt2_124m'].replace(
      vocab_size=512, num_layers=4, num_heads=4, embed_dim=128, mlp_dim=512, max_length=64,
      biases=(), dropout_rate=0.0,
      scan_layers=False,  # A third faster on a CPU, in one try.
    ),
    data=DataConfig(
      sources=(SourceConfig(location=path, slice=(0.0, 0.9)),),
      validation=(SourceConfig(location=path, slice=(0.9, 1.0)),),
      context_length=64,
      packing='concat',
      add_bos=False,
      add_eos=False,
    ),
    tokenizer=TokenizerConfig(model_type='char'),
    training=TrainingConfig(num_steps=2000, batch_size=12),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=100, final_fraction=0.1),
    checkpoint=CheckpointConfig(every_steps=1000),
    evaluation=EvaluationConfig(
      every_steps=250, max_batches=20, batch_size=96, prompts=('\n', 'KING:'), prompt_tokens=300,
      temperature=0.8, top_p=0.95,
    ),
  )
