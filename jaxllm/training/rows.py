"""Examples of a task as rows of a structured array, and rows as batches, for each objective.

- Tokens: examples packed whole, several to a row, prompts without weight.
- Pairs: two answers to a prompt in a row; the batch has the other one's arrays with `rejected_`
  before their names, and `reference_log_probs` (B, 2) where the loss compares with a reference.
- Labels: one prompt in a row; the batch has `labels` (B, 1), the number of the class.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm import loading
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.models.decoder import Decoder
from jaxllm.objectives import completion, preference
from jaxllm.objectives.completion import Tokens
from jaxllm.tasks import encoding
from jaxllm.tasks.base import Example
from jaxllm.tasks.encoding import Omitted
from jaxllm.tasks.preference import rejected

Batch = Mapping[str, np.ndarray]

REFERENCE = 'reference_log_probs'


class Form(NamedTuple):
  """How an objective's examples are stored.

  Attributes:
    make: (experiment, examples, tokenizer) -> (rows, examples that are not in them, or in part).
    dtype: experiment -> dtype of a row.
    decode: rows -> batch.
  """

  make: Callable[[Experiment, Sequence[Example], Tokenizer], tuple[np.ndarray, Omitted]]
  dtype: Callable[[Experiment], np.dtype]
  decode: Callable[[np.ndarray], Batch]


def make(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  """Return rows, and how many of the examples are not in them, or in part.

  Raises:
    ValueError: nothing is left of any example, or one is too long and may not be cut.
  """
  rows, omitted = FORMS[experiment.objective.kind].make(experiment, examples, tokenizer)
  if not len(rows):
    raise ValueError(f'none of {len(examples)} examples can be trained on: '
                     f'{reasons(experiment, omitted)}')
  return rows, omitted


def reasons(experiment: Experiment, omitted: Omitted) -> str:
  """Say why examples are left out or cut, and by which field."""
  task: Any = experiment.task
  parts = (
    (omitted.too_long, f'longer than data.context_length={experiment.data.context_length}, with '
                       f'task.truncation={task.truncation!r}, left out'),
    (omitted.silent, 'in task.data without anything that an assistant says, left out'),
    (omitted.cut, f'longer than data.context_length={experiment.data.context_length}, cut'),
  )
  return '; '.join(f'{count:,} {reason}' for count, reason in parts if count)


def dtype(experiment: Experiment) -> np.dtype:
  """Return the dtype of a row."""
  return FORMS[experiment.objective.kind].dtype(experiment)


def decode(experiment: Experiment) -> Callable[[np.ndarray], Batch]:
  """Return the function from rows to a batch."""
  return FORMS[experiment.objective.kind].decode


def too_long(experiment: Experiment, tokenizer: Tokenizer, example: Example) -> bool:
  """Return whether a conversation must lose turns of its start to fit a row."""
  task: Any = experiment.task
  return task.truncation == 'start' and any(
    len(tokens.ids) > experiment.data.context_length + 1
    for tokens in encoding.sequences(
      example.segments, tokenizer, experiment.data.add_bos))


def _tokens_dtype(experiment: Experiment) -> np.dtype:
  return completion.record_dtype(experiment.data.context_length, experiment.decoder.vocab_size)


def _make_tokens(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  task: Any = experiment.task
  sequences, omitted = encoding.training_sequences(
    examples, tokenizer, experiment.data.context_length, task.truncation,
    experiment.data.add_bos,
  )
  kept = [tokens for tokens in sequences if tokens is not None]
  rows = completion.pack(kept, experiment.data.context_length, tokenizer.vocab_size)
  return rows, omitted


def _pairs_dtype(experiment: Experiment) -> np.dtype:
  tokens = _tokens_dtype(experiment)
  fields: list[Any] = [('chosen', tokens), ('rejected', tokens)]
  if _needs_log_probs(experiment):
    fields.append((REFERENCE, '<f4', (2,)))
  return np.dtype(fields)


def _needs_log_probs(experiment: Experiment) -> bool:
  # With adapters, the model without them is asked in each step.
  return (experiment.objective.kind in preference.NEED_REFERENCE
          and experiment.finetune.lora is None)


def _make_pairs(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  task: Any = experiment.task
  add_bos = experiment.data.add_bos
  before, after, pairs = [], [], []
  for example in examples:
    both = [encoding.encode(one.segments, tokenizer, add_bos)
            for one in (example, rejected(example))]
    longest = max(len(tokens.ids) for tokens in both)
    # The shorter one is cut as much as the longer, so that both answer the same prompt.
    cut = [
      completion.truncate(
        tokens, experiment.data.context_length - (longest - len(tokens.ids)), task.truncation)
      for tokens in both
    ]
    before.append(both[0])
    after.append(cut[0] if cut[1] else None)
    if cut[0] is not None and cut[1] is not None:
      pairs.append((cut[0], cut[1]))
  omitted = encoding.omitted(before, after)
  if not pairs:
    return np.zeros(0, _pairs_dtype(experiment)), omitted
  rows = np.zeros(len(pairs), _pairs_dtype(experiment))
  for name, side in zip(('chosen', 'rejected'), zip(*pairs, strict=True), strict=True):
    rows[name] = completion.pack(
      side, experiment.data.context_length, experiment.decoder.vocab_size, together=False)
  if _needs_log_probs(experiment):
    rows[REFERENCE] = reference_log_probs(experiment, rows)
  return rows, omitted


def reference_log_probs(experiment: Experiment, rows: np.ndarray) -> np.ndarray:
  """Return (rows, 2): log-probabilities of both answers under `init_from`, in nats."""
  model = loading.load(experiment.init_from or '', dtype='float32')
  log_probs = jax.jit(preference.sequence_log_probs, static_argnums=0)
  size = experiment.training.batch_size
  found = np.zeros((len(rows), 2), np.float32)
  for start in range(0, len(rows), size):
    padded = np.zeros(size, rows.dtype)
    part = rows[start : start + size]
    padded[: len(part)] = part
    for i, name in enumerate(('chosen', 'rejected')):
      batch = completion.batch_arrays(padded[name])
      values, *_ = log_probs(Decoder(model.config), model.variables, batch)
      found[start : start + size, i] = np.asarray(values)[: len(part)]
  return found


def _decode_pairs(rows: np.ndarray) -> Batch:
  other = completion.batch_arrays(rows['rejected'])
  batch = {**completion.batch_arrays(rows['chosen']),
           **{f'rejected_{name}': array for name, array in other.items()}}
  if REFERENCE in (rows.dtype.names or ()):
    batch[REFERENCE] = rows[REFERENCE].copy()
  return batch


def _labels_dtype(experiment: Experiment) -> np.dtype:
  # Rows that fill up a batch are zeros: 0 is no label, the first class is 1.
  return np.dtype([('prompt', _tokens_dtype(experiment)), ('label', '<i4')])


def _make_labels(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  task: Any = experiment.task
  numbers = {label: i for i, (label, _) in enumerate(task.labels, start=1)}
  whole, prompts = (encoding.prompts(examples, tokenizer, length, task.truncation,
                                     experiment.data.add_bos)
                    for length in (sys.maxsize, experiment.data.context_length))
  # A prompt has no weights, but its label is learnt.
  omitted = encoding.omitted(
    [Tokens(prompt.ids, [1.0] * 2) for prompt in whole if prompt], prompts)
  pairs = [(p, e.reference) for p, e in zip(prompts, examples, strict=True) if p is not None]
  rows = np.zeros(len(pairs), _labels_dtype(experiment))
  rows['prompt'] = completion.pack(
    [prompt for prompt, _ in pairs], experiment.data.context_length, experiment.decoder.vocab_size,
    together=False)
  rows['label'] = [numbers[label] for _, label in pairs]
  return rows, omitted


def _decode_labels(rows: np.ndarray) -> Batch:
  return {**completion.batch_arrays(rows['prompt']),
          'labels': rows['label'][:, None].astype(np.int32) - 1}


_TOKENS = Form(_make_tokens, _tokens_dtype, completion.batch_arrays)
FORMS: Mapping[str, Form] = {
  'next_token': _TOKENS,
  **dict.fromkeys(preference.PREFERENCES, Form(_make_pairs, _pairs_dtype, _decode_pairs)),
  'classifier': Form(_make_labels, _labels_dtype, _decode_labels),
  'distillation': _TOKENS,
}
"""`kind` of the objective -> form."""
