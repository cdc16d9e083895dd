"""Which records the steps of a run read: all in their order, but for what is passed over.

Batches are passed over after a run has gone back, and by a resumed run too.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from jaxllm import distributed, storage
from jaxllm.checkpoints import store
from jaxllm.data.batches import Batches, Phase, records_before
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.training.dataset import Dataset

FILE = 'passed_over.json'
Passed = Sequence[Mapping[str, Any]]
# Of the texts in records, as many are named, by so many of their first tokens.
_TEXTS, _TOKENS = 100, 16


def read(path: pathlib.Path) -> Passed:
  """Return what a run has passed over: `first` and `last` batch of some, and their `places`."""
  found = storage.read_json(path / FILE, needed=True).get('batches', [])
  try:
    [0 <= one['first'] <= one['last'] for one in found]
  except (TypeError, KeyError) as error:
    raise ValueError(f'{path / FILE} is damaged ({error!r}); put a copy of it back') from error
  return found


def phases(
  checkpoints: str | os.PathLike[str], step: int, experiment: Experiment
) -> list[Phase]:
  """Return the batch sizes of a run up to the checkpoint of a step, and that of what follows it.

  Args:
    checkpoints: the directory of the run's checkpoints.
    step: one of them; 0: the run begins.
    experiment: how the run goes on.
  """
  found, size = list[Phase](), experiment.training.batch_size
  if step:
    bundle = store.read_bundle(storage.path(checkpoints) / str(step))
    before = json.loads(bundle.config_json)['training']['batch_size']
    found = [Phase(*row) for row in bundle.position.get('phases', [(0, 0, before)])]
  if not found or found[-1].batch_size != size:
    found.append(Phase(step, records_before(found, step) if step else 0, size))
  return found


def places(passed: Passed, phases: Sequence[Phase]) -> list[tuple[int, int]]:
  """Return the first and last places in the order of the records that are passed over, in order."""
  size = phases[0].batch_size  # That of entries of a time when it could not change.
  merged: list[tuple[int, int]] = []
  for first, last in sorted(
      tuple(one.get('places') or (one['first'] * size, (one['last'] + 1) * size - 1))
      for one in passed):
    if merged and first <= merged[-1][1] + 1:
      merged[-1] = merged[-1][0], max(merged[-1][1], last)
    else:
      merged.append((first, last))
  return merged


def add(
  path: pathlib.Path, experiment: Experiment, dataset: Dataset, phases: Sequence[Phase],
  steps: range, target: int, reason: str,
) -> None:
  """Pass over the batches of steps, counted from 0, and name what is in them."""
  passed, size = read(path), experiment.training.batch_size
  if jax.process_index() == 0:
    batches = dataset.make_batches('train', phases, experiment.data.shuffle, None,
                                   places(passed, phases), alone=True)
    first, last = batches.places(steps[0])[0], batches.places(steps[-1])[-1]
    records, texts = _contents(batches, steps, dataset.tokenizer)
    logging.warning(
      '%s. Going back to step %d and passing over batches %d to %d, places %d to %d in the order '
      'of the records: records %s, with texts that begin %s.', reason, target, first // size,
      last // size, first, last, _some(records), _some(texts))
    storage.write_json(path / FILE, {'batches': [*passed, {
      'first': first // size, 'last': last // size, 'places': (first, last),
      'back_to_step': target, 'reason': reason, 'records': records, 'texts': texts}]})
  distributed.barrier('what is passed over is written')


def _contents(
  batches: Batches, steps: range, tokenizer: Tokenizer
) -> tuple[list[int], list[str]]:
  """Return the numbers of the records of steps, and how texts in them, or their parts, begin."""
  texts = []
  for batch in map(batches.batch_at, steps):
    for tokens_T, segments_T in zip(batch['tokens'], batch['segment_ids'], strict=True):
      for segment in range(1, segments_T.max(initial=0) + 1):
        texts.append(tokenizer.decode(tokens_T[segments_T == segment][:_TOKENS].tolist()))
  return [number for step in steps for number in batches.numbers(step)], texts[:_TEXTS]


def _some(values: Sequence[Any]) -> str:
  return f'{", ".join(map(repr, values[:8]))}{", ..." if values[8:] else ""}'
