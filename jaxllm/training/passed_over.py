"""Batches that are passed over after a run has gone back, so that a resumed run does so too."""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from jaxllm import distributed, storage
from jaxllm.data import batches as batches_lib
from jaxllm.experiment import Experiment
from jaxllm.training.dataset import Dataset

FILE = 'passed_over.json'
Passed = Sequence[Mapping[str, Any]]
# Of the texts in records, as many are named, by so many of their first tokens.
_TEXTS, _TOKENS = 100, 16


def read(path: pathlib.Path) -> Passed:
  """Return what a run has passed over: `first` and `last` of batches that follow each other."""
  found = storage.read_json(path / FILE, needed=True).get('batches', [])
  try:
    [0 <= one['first'] <= one['last'] for one in found]
  except (TypeError, KeyError) as error:
    raise ValueError(f'{path / FILE} is damaged ({error!r}); put a copy of it back') from error
  return found


def indices(passed: Passed, first: int, last: int) -> Iterator[int]:
  """Yield the index of the batch of each step after `first`, up to `last`."""
  kept = (index for index in itertools.count()
          if not any(one['first'] <= index <= one['last'] for one in passed))
  return itertools.islice(kept, first, last)


def add(
  path: pathlib.Path, experiment: Experiment, dataset: Dataset, steps: tuple[int, int],
  target: int, reason: str,
) -> None:
  """Pass over the batches after the first of `steps`, up to the last, and name what is in them."""
  passed, size = read(path), experiment.training.batch_size
  found = [*indices(passed, *steps)]
  if jax.process_index() == 0:
    records, texts = _contents(experiment, dataset, found)
    logging.warning(
      '%s. Going back to step %d and passing over batches %d to %d, places %d to %d in the order '
      'of the records: records %s, with texts that begin %s.', reason, target, found[0], found[-1],
      found[0] * size, (found[-1] + 1) * size - 1, _some(records), _some(texts))
    storage.write_json(path / FILE, {'batches': [*passed, {
      'first': found[0], 'last': found[-1], 'back_to_step': target, 'reason': reason,
      'records': records, 'texts': texts}]})
  distributed.barrier('what is passed over is written')


def _contents(
  experiment: Experiment, dataset: Dataset, found: Sequence[int]
) -> tuple[list[int], list[str]]:
  """Return the numbers of the records of batches, and how texts in them, or their parts, begin."""
  batches = batches_lib.make_batches(
    dataset.stored('train'), experiment.training.batch_size, dataset.seed,
    shuffle=experiment.data.shuffle)
  texts = []
  for batch in map(batches.batch_at, found):
    for tokens_T, segments_T in zip(batch['tokens'], batch['segment_ids'], strict=True):
      for segment in range(1, segments_T.max(initial=0) + 1):
        texts.append(dataset.tokenizer.decode(tokens_T[segments_T == segment][:_TOKENS].tolist()))
  return [number for index in found for number in batches.numbers(index)], texts[:_TEXTS]


def _some(values: Sequence[Any]) -> str:
  return f'{", ".join(map(repr, values[:8]))}{", ..." if values[8:] else ""}'
