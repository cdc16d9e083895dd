"""Examples of a task as records, and records as batches, for each of `ENCODINGS`.

- tokens: examples packed whole, several to a record, prompts without weight.
- pairs: two answers to a prompt in a record; the batch has the other one's arrays with `rejected_`
  before their names, and `reference_log_probs` (B, 2) where the loss compares with a reference.
- labels: one prompt in a record; the batch has `labels` (B, 1), the number of the class.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm import loading, sharding
from jaxllm.data import packing
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.objectives import preference
from jaxllm.tasks import encoding
from jaxllm.tasks.base import Example
from jaxllm.tasks.encoding import Omitted, Tokens
from jaxllm.tasks.preference import rejected

Batch = Mapping[str, np.ndarray]

REFERENCE = 'reference_log_probs'


class Encoding(NamedTuple):
  """How the examples of a task are stored.

  Attributes:
    make: (experiment, examples, tokenizer) -> (records, examples that are left out or cut).
    dtype: experiment -> dtype of a record.
    decode: records -> batch.
    sequences: how many the model reads of each record.
  """

  make: Callable[[Experiment, Sequence[Example], Tokenizer], tuple[np.ndarray, Omitted]]
  dtype: Callable[[Experiment], np.dtype]
  decode: Callable[[np.ndarray], Batch]
  sequences: int = 1


def of(experiment: Experiment) -> Encoding:
  """Return the encoding that the run's objective needs."""
  return ENCODINGS[experiment.objective_record.examples]


def make(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  """Return records, and how many examples are left out or cut; refuse to make none."""
  records, omitted = of(experiment).make(experiment, examples, tokenizer)
  if not len(records):
    raise ValueError(f'none of {len(examples)} examples can be trained on: '
                     f'{reasons(experiment, omitted)}')
  return records, omitted


def reasons(experiment: Experiment, omitted: Omitted) -> str:
  """Say why examples are left out or cut, and by which field."""
  task: Any = experiment.task
  too_long = f'longer than data.context_length={experiment.data.context_length}, '
  parts = (
    (omitted.too_long, f'{too_long}with task.truncation={task.truncation!r}, left out'),
    (omitted.silent, 'in task.data without anything that an assistant says, left out'),
    (omitted.equal, 'in task.data with two equal answers, left out'),
    (omitted.cut, f'{too_long}cut'),
  )
  return '; '.join(f'{count:,} {reason}' for count, reason in parts if count)


def too_long(experiment: Experiment, tokenizer: Tokenizer, example: Example) -> bool:
  """Return whether a conversation must lose turns of its start to fit a record."""
  task: Any = experiment.task
  return task.truncation == 'start' and any(
    len(tokens.ids) > experiment.data.context_length + 1
    for tokens in encoding.sequences(
      example.segments, tokenizer, experiment.data.add_bos))


def _tokens_dtype(experiment: Experiment) -> np.dtype:
  return packing.record_dtype(
    experiment.data.context_length, experiment.decoder.vocab_size, weights=True)


def _pack_alone(experiment: Experiment, sequences: Sequence[Tokens]) -> np.ndarray:
  return packing.pack(sequences, experiment.data.context_length, experiment.decoder.vocab_size,
                      together=False)


def _make_tokens(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  task: Any = experiment.task
  sequences, omitted = encoding.training_sequences(
    examples, tokenizer, experiment.data.context_length, task.truncation,
    experiment.data.add_bos)
  kept = [tokens for tokens in sequences if tokens is not None]
  return packing.pack(kept, experiment.data.context_length, tokenizer.vocab_size), omitted


def _pairs_dtype(experiment: Experiment) -> np.dtype:
  tokens = _tokens_dtype(experiment)
  fields: list[Any] = [('chosen', tokens), ('rejected', tokens)]
  # With adapters, the model without them is asked in each step.
  if experiment.objective_record.reference and experiment.finetune.lora is None:
    fields.append((REFERENCE, '<f4', (2,)))
  return np.dtype(fields)


def _make_pairs(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Omitted]:
  task: Any = experiment.task
  before, after, pairs, equal = [], [], [], 0
  for example in examples:
    both = [encoding.encode(one.segments, tokenizer, experiment.data.add_bos)
            for one in (example, rejected(example))]
    if both[0].ids == both[1].ids:  # Nothing is preferred.
      equal += 1
      continue
    longest = max(len(tokens.ids) for tokens in both)
    # The shorter one is cut as much as the longer, so that both answer the same prompt.
    chosen, other = (
      encoding.truncate(
        tokens, experiment.data.context_length - (longest - len(tokens.ids)),
        task.truncation)
      for tokens in both)
    before.append(both[0])
    after.append(chosen if other else None)
    if chosen and other:
      pairs.append((chosen, other))
  omitted = encoding.omitted(before, after)._replace(equal=equal)
  records = np.zeros(len(pairs), _pairs_dtype(experiment))
  for i, name in enumerate(('chosen', 'rejected')):
    records[name] = _pack_alone(experiment, [pair[i] for pair in pairs])
  return records, omitted


def add_reference(
  experiment: Experiment, splits: Mapping[str, np.ndarray], mesh: Mesh | None
) -> None:
  """Write the log-probabilities of both answers under `init_from`, in nats, into pairs."""
  if not any(REFERENCE in (records.dtype.names or ()) for records in splits.values()):
    return
  placement = mesh and sharding.Placement(mesh, experiment.mesh)
  model = loading.load(experiment.init_from or '', placement, 'float32')
  log_probs = jax.jit(preference.sequence_log_probs, static_argnums=0)
  size = experiment.training.batch_size
  for records in splits.values():
    for start in range(0, len(records), size):
      part = records[start : start + size]
      padded = np.zeros(size, records.dtype)
      padded[: len(part)] = part
      for i, name in enumerate(('chosen', 'rejected')):
        batch: Any = packing.batch_arrays(padded[name])
        if placement:
          split = sharding.batch_sharding(placement.mesh, placement.config)
          batch = jax.device_put(batch, sharding.batch_shardings(batch, split))
        values, *_ = log_probs(model.decoder, model.variables, batch)
        part[REFERENCE][:, i] = sharding.to_host(values)[: len(part)]


def _decode_pairs(records: np.ndarray) -> Batch:
  other = packing.batch_arrays(records['rejected'])
  batch = {**packing.batch_arrays(records['chosen']),
           **{f'rejected_{name}': array for name, array in other.items()}}
  if REFERENCE in (records.dtype.names or ()):
    batch[REFERENCE] = records[REFERENCE].copy()
  return batch


def _labels_dtype(experiment: Experiment) -> np.dtype:
  # Records that fill up a batch are zeros: 0 is no label, the first class is 1.
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
  records = np.zeros(len(pairs), _labels_dtype(experiment))
  records['prompt'] = _pack_alone(experiment, [prompt for prompt, _ in pairs])
  records['label'] = [numbers[label] for _, label in pairs]
  return records, omitted


def _decode_labels(records: np.ndarray) -> Batch:
  return {**packing.batch_arrays(records['prompt']),
          'labels': records['label'][:, None].astype(np.int32) - 1}


ENCODINGS: Mapping[str, Encoding] = {
  'tokens': Encoding(_make_tokens, _tokens_dtype, packing.batch_arrays),
  'pairs': Encoding(_make_pairs, _pairs_dtype, _decode_pairs, sequences=2),
  'labels': Encoding(_make_labels, _labels_dtype, _decode_labels),
}
"""`examples` of an objective -> encoding."""
