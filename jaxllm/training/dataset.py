"""The data set of a run: prepared documents, or the records of a task.

A task's records are made in memory, anew whenever the run starts; the manifest's fingerprint tells
whether they are the same.
"""

import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from jaxllm import distributed, loading
from jaxllm.data import batches as batches_lib
from jaxllm.data import preparing, records, tokenizers
from jaxllm.data.batches import Batches, Mixture, Phase, Stored, place_of, records_before
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import Manifest, Split
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.tasks import predict
from jaxllm.tasks import records as task_records
from jaxllm.tasks.base import Example
from jaxllm.tasks.encoding import Omitted
from jaxllm.training import examples as encoded

_CHANGED = 'the run was trained on other records: a source has changed, or the task'


class Dataset(NamedTuple):
  """The records of a run.

  Attributes:
    manifest: their sources, sizes and fingerprint.
    tokenizer: their tokenizer.
    seed: decides the order of the batches.
    stored: split -> its records.
    sources: where the training records are from.
  """

  manifest: Manifest
  tokenizer: Tokenizer
  seed: int
  stored: Callable[[str], Stored]
  sources: Sequence[SourceConfig]

  @property
  def weights(self) -> tuple[float, ...]:
    """The weights of the sources; () where they are not mixed."""
    counts = self.manifest.train.source_records
    for source, count in zip(self.sources, counts, strict=False):
      if not count:
        raise ValueError(f'data.sources: {source.location!r} gives no training record, so that it '
                         'cannot be mixed; give it more text, or leave it away')
    return tuple(source.weight or (source.epochs or 1) * count
                 for source, count in zip(self.sources, counts, strict=False))

  def read_before(self, phases: Sequence[Phase], place: int) -> list[tuple[int, int, int]]:
    """Return records that are read before a place, records and tokens, of each mixed source."""
    train = self.manifest.train
    if not phases[-1].weights:
      return [(place, train.records, train.tokens)]
    return [*zip(Mixture(phases).counts(place), train.source_records, train.source_tokens,
                 strict=False)]

  def mixture(
    self, phases: Sequence[Phase], num_steps: int, passed: Sequence[tuple[int, int]] = ()
  ) -> Iterator[str]:
    """Say what some steps read of each mixed source; refuse more visits than it allows."""
    place = place_of(records_before(phases, num_steps) - 1, passed) + 1
    for source, (count, size, tokens) in zip(
        self.sources if self.weights else (), self.read_before(phases, place), strict=False):
      epochs = count / size
      if source.weight and source.epochs and epochs > source.epochs:
        raise ValueError(
          f'data.sources: {source.location!r} has epochs={source.epochs:g}, but with weight='
          f'{source.weight:g} {num_steps} steps visit it {epochs:.2f} times; lower its weight or '
          'config.training.num_steps, or raise its epochs')
      yield (f'in {num_steps:,} steps {source.location} gives {count / place:.1%} of what is read, '
             f'{count * tokens / size:,.0f} tokens: its {size:,} records {epochs:.2f} times')

  def make_batches(
    self, split: str, batch_size: int | Sequence[Phase], shuffle: bool, num_epochs: int | None,
    passed: Sequence[tuple[int, int]] = (), alone: bool = False,
  ) -> Batches:
    """Return the batches of a split, this process's rows of them or, `alone`, all rows."""
    index, count = (0, 1) if alone else (jax.process_index(), jax.process_count())
    return batches_lib.make_batches(
      self.stored(split), batch_size, self.seed, index, count, shuffle, num_epochs, passed)


def check_batch(experiment: Experiment, mesh: Mesh) -> None:
  """Check before any array exists that batches divide over devices, microbatches and processes."""
  training, evaluation = experiment.training, experiment.evaluation
  sizes = (
    ('training.batch_size / training.microbatches', 'batch', 'rows',
     training.batch_size // training.microbatches),
    ('evaluation.batch_size', 'batch', 'rows', evaluation.batch_size or training.batch_size),
    ('data.context_length', 'length', 'tokens', experiment.data.context_length),
  )
  for name, axis, what, size in sizes:
    axes = dict(experiment.mesh.rules)[axis]
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
      raise ValueError(
        f'config.{name} is {size} {what}, which do not divide over {parts} devices (mesh axes '
        f'{", ".join(axes)}); make it a multiple of {parts}'
      )


def open_dataset(
  experiment: Experiment, begun: str | None = None, mesh: Mesh | None = None
) -> Dataset:
  """Prepare the records of a run, or find that they are there.

  Args:
    experiment: the run.
    begun: fingerprint of the records that it has begun with. Where these are there, sources that
      cannot be read any more do not matter, and changed ones do not replace them.
    mesh: the devices of the run, for the log-probabilities of a reference model; None: one device.

  Raises:
    ValueError: the data cannot be read, has changed, or does not fit the model.
  """
  config = experiment.tokenizer
  if config is not None and not config.trained:
    _check_vocabulary(experiment, tokenizers.train_or_load(config, ()).vocab_size)
  if experiment.task is not None:
    dataset = of_task(experiment, mesh)
  else:
    folder = _prepare(experiment, begun) if jax.process_index() == 0 else ''
    dataset = prepared(experiment, distributed.from_first(str(folder)))
  _check_vocabulary(experiment, dataset.manifest.vocab_size)
  if begun not in (None, dataset.manifest.fingerprint):
    raise ValueError(f'{_CHANGED} (fingerprint {str(begun)[:12]}, now '
                     f'{dataset.manifest.fingerprint[:12]}); choose another --workdir')
  steps, size = experiment.training.num_steps, experiment.training.batch_size
  phases = [Phase(0, 0, size, 0, dataset.weights)]
  for read, count, _ in dataset.read_before(phases, steps * size):
    times = read // count
    if count * steps < read or times > 40:
      logging.warning('%s steps of %s records read each of the %s training records %s times: so '
                      'little text is learnt by heart', steps, size, count, times)
  return dataset


def _check_vocabulary(experiment: Experiment, vocab_size: int) -> None:
  if vocab_size > experiment.decoder.vocab_size:
    raise ValueError(f'the tokenizer has {vocab_size} tokens but config.model.vocab_size='
                     f'{experiment.decoder.vocab_size}; raise config.model.vocab_size to '
                     f'{vocab_size}, or choose a smaller config.tokenizer')


def _prepare(experiment: Experiment, begun: str | None) -> pathlib.Path:
  """Return the folder of the run's records, prepared where they are not there."""
  directory = experiment.records_path
  folder = records.find(directory, begun)
  if folder is not None:
    try:
      now = preparing.fingerprint(experiment.data, experiment.tokenizer, directory)
    except (OSError, ValueError, ImportError) as error:
      logging.warning('A source cannot be read any more (%s); the records in %s suffice.',
                      error, folder)
      return folder
    if now != begun:
      raise ValueError(f'config.data: {_CHANGED}; choose another --workdir')
  return directory / preparing.prepare(experiment.data, experiment.tokenizer, directory).folder


def prepared(experiment: Experiment, folder: str | os.PathLike[str]) -> Dataset:
  """Return the documents of a run, which are prepared already in a folder."""
  manifest = records.load_manifest(folder).replace(data=experiment.data)
  return Dataset(manifest, records.load_tokenizer(folder), experiment.seed,
                 functools.partial(batches_lib.open_records, folder), experiment.data.sources)


def of_task(experiment: Experiment, mesh: Mesh | None, reference: bool = True) -> Dataset:
  """Return the records of a task, with log-probabilities of a `reference` model or without."""
  task: Any = experiment.task
  if experiment.tokenizer is None:
    raise ValueError('config.tokenizer=None: it is read from config.init_from when training starts')
  tokenizer = tokenizers.train_or_load(experiment.tokenizer, (
    part.text for example in predict.examples(task, 'train') for part in example.segments
    if not part.control) if experiment.tokenizer.trained else ())
  arrays, splits = {}, {}
  for name in ('train', *(['validation'] if 'validation' in task.data.splits else [])):
    shortened: set[int] = set()

    def too_long(example: Example, shortened: set[int] = shortened) -> bool:
      found = encoded.too_long(experiment, tokenizer, example)
      learnt = any(segment.weight for segment in example.segments)
      shortened |= {id(example.record)} if found and learnt else set()
      return found

    examples = loading.task_examples(task, name, tokenizer, too_long)
    groups = [examples]
    if mixed := task.data.mixed and name == 'train':
      rows = task_records.rows(task.data, name)
      groups = [[example for example, row in zip(examples, rows, strict=True) if row.number == i]
                for i, _ in enumerate(task.data.training)]
    made = [encoded.make(experiment, group, tokenizer) for group in groups]
    arrays[name] = np.concatenate([array for array, _ in made])
    omitted = Omitted(*map(sum, zip(*(own for _, own in made), strict=True)))
    if shortened:
      omitted = omitted._replace(cut=len(shortened) - omitted.too_long)
    splits[name] = _count(experiment, arrays[name], len(examples), omitted, tokenizer)
    if mixed:
      splits[name] = splits[name].replace(
        source_records=tuple(len(array) for array, _ in made),
        source_tokens=tuple(_count(experiment, array, 0, omitted, tokenizer).tokens
                            for array, _ in made))
    if any(omitted):
      logging.warning('%s: of %d examples %s', name, len(examples),
                      encoded.reasons(experiment, omitted))
  if reference:
    encoded.add_reference(experiment, arrays, mesh)
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  for name, array in arrays.items():
    digest.update(f'{name}\0{array.dtype}\0'.encode())
    for field in array.dtype.names or ():
      if field != encoded.REFERENCE:  # Computed from the rest, and not to the last bit everywhere.
        digest.update(array[field].tobytes())
  manifest = Manifest(
    version=records.VERSION, fingerprint=digest.hexdigest(), data=experiment.data,
    tokenizer=experiment.tokenizer, tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size, sources=(), train=splits['train'],
    validation=splits.get('validation'),
  )

  def stored(split: str) -> Stored:
    return Stored([row.tobytes() for row in arrays[split]], arrays[split].dtype,
                  tokenizer.vocab_size, encoded.of(experiment).decode,
                  splits[split].source_records)

  return Dataset(manifest, tokenizer, experiment.seed, stored, task.data.training)


def _count(
  experiment: Experiment, array: np.ndarray, num_examples: int, omitted: Omitted,
  tokenizer: Tokenizer,
) -> Split:
  """Describe the records of examples as `data.records` describes documents."""
  batch = encoded.of(experiment).decode(array)
  bytes_V = np.array([len(content) for content in tokenizer.id_bytes])
  read, targets = (
    [batch[f'{prefix}{name}'][batch[f'{prefix}{weights}'] > 0] for prefix in ('', 'rejected_')
     if f'{prefix}{name}' in batch]
    for name, weights in (('tokens', 'segment_ids'), ('targets', 'weights'))
  )
  return Split(
    documents=num_examples - omitted.dropped,
    dropped=omitted.dropped,
    cut=omitted.cut,
    records=len(array),
    tokens=sum(map(len, read)),
    target_tokens=sum(map(len, targets)),
    text_bytes=sum(int(bytes_V[ids].sum()) for ids in read),
    target_bytes=sum(int(bytes_V[ids].sum()) for ids in targets),
    shards=(len(array),),
  )
