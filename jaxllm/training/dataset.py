"""What a run trains and validates on: prepared documents, or the records of a task.

A task's records are made in memory, anew whenever the run starts; the manifest's fingerprint tells
whether they are the same.
"""

import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.data import batches as batches_lib
from jaxllm.data import records, tokenizers
from jaxllm.data.batches import Batches
from jaxllm.data.records import Manifest, Split
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.interop import chat as chat_templates
from jaxllm.objectives import completion
from jaxllm.tasks import predict
from jaxllm.tasks.base import Example
from jaxllm.tasks.encoding import training_sequences


class Dataset(NamedTuple):
  """The records of a run.

  Attributes:
    manifest: what they are.
    tokenizer: what they are written in.
    make_batches: (split, batch_size, shuffle, num_epochs) -> this process's batches.
  """

  manifest: Manifest
  tokenizer: Tokenizer
  make_batches: Callable[[str, int, bool, int | None], Batches]


def open_dataset(experiment: Experiment) -> Dataset:
  """Prepare the records of a run, or find that they are there.

  Raises:
    ValueError: the data cannot be read, or does not fit the model.
  """
  dataset = _documents(experiment) if experiment.task is None else _task(experiment)
  vocab_size = dataset.manifest.vocab_size
  if vocab_size > experiment.decoder.vocab_size:
    raise ValueError(
      f'the tokenizer has {vocab_size} tokens but config.model.vocab_size='
      f'{experiment.decoder.vocab_size}; raise it to {vocab_size}'
    )
  return dataset


def _documents(experiment: Experiment) -> Dataset:
  directory = pathlib.Path(experiment.records_dir) / experiment.name
  if jax.process_index() == 0:
    records.prepare(experiment.data, experiment.tokenizer, directory)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('records are prepared')

  def make_batches(split: str, batch_size: int, shuffle: bool, num_epochs: int | None) -> Batches:
    return batches_lib.make_batches(
      directory, split, batch_size, experiment.seed, jax.process_index(), jax.process_count(),
      shuffle, num_epochs,
    )

  return Dataset(
    records.load_manifest(directory), records.load_tokenizer(directory), make_batches
  )


def _task(experiment: Experiment) -> Dataset:
  task: Any = experiment.task
  if experiment.tokenizer is None:
    raise ValueError('config.tokenizer=None: it is read from config.init_from when training starts')
  examples = {
    name: predict.examples(task, name)
    for name in ('train', 'validation') if name == 'train' or name in task.data.splits
  }
  tokenizer = tokenizers.train_or_load(experiment.tokenizer, _texts(examples['train']))
  rows, splits = {}, {}
  for name, some in examples.items():
    rows[name], splits[name] = completion_rows(experiment, some, tokenizer)
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  for name, array in rows.items():
    digest.update(f'{name}\0{array.dtype}\0'.encode() + array.tobytes())
  manifest = Manifest(
    version=records.VERSION, fingerprint=digest.hexdigest(), data=experiment.data,
    tokenizer=experiment.tokenizer, tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size, sources=(), train=splits['train'],
    validation=splits.get('validation'),
  )

  def make_batches(split: str, batch_size: int, shuffle: bool, num_epochs: int | None) -> Batches:
    return batches_lib.from_records(
      rows[split], completion.batch_arrays, tokenizer.vocab_size, batch_size, experiment.seed,
      jax.process_index(), jax.process_count(), shuffle, num_epochs,
    )

  return Dataset(manifest, tokenizer, make_batches)


def _texts(examples: Sequence[Example]) -> Iterator[str]:
  return (part.text for example in examples for part in example.segments if not part.control)


def completion_rows(
  experiment: Experiment, examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[np.ndarray, Split]:
  """Pack examples whole, several to a record, and count what the records hold."""
  task: Any = experiment.task
  sequences = training_sequences(
    examples, tokenizer, experiment.data.context_length, task.truncation,
    chat_templates.special_tokens(tokenizer), experiment.data.add_bos,
  )
  kept = [tokens for tokens in sequences if tokens is not None]
  rows = completion.pack(kept, experiment.data.context_length, tokenizer.vocab_size)
  return rows, _count(rows, len(kept), tokenizer)


def _count(rows: np.ndarray, num_examples: int, tokenizer: Tokenizer) -> Split:
  """Describe packed examples as `data.records` describes documents."""
  batch = completion.batch_arrays(rows)
  bytes_V = np.array([len(content) for content in tokenizer.id_bytes])
  real = rows['segment_ids'] > 0
  return Split(
    documents=num_examples,
    records=len(rows),
    tokens=int(real.sum()),
    target_tokens=int((batch['weights'] > 0).sum()),
    text_bytes=int(bytes_V[rows['tokens'][real]].sum()),
    target_bytes=int(bytes_V[batch['targets'][batch['weights'] > 0]].sum()),
    shards=(len(rows),),
  )
