"""Measure what a model has learnt by heart, and what its losses tell of its training data.

  python -m jaxllm.tools.audit --model=runs/x                     (its own records)
  python -m jaxllm.tools.audit --model=MODEL --members=train.txt --others=held_out.txt
  python -m jaxllm.tools.audit --new_canaries=20 >> my_texts/canaries.txt

- Membership: how well the loss, or its worst fifth of tokens (min-k%), tells training texts from
  others. 0.5 is chance, 1 is certainty.
- Extraction: how often a prefix of a text makes greedy decoding spell the next tokens exactly.
- Exposure: how far canaries, random numbers planted in the training texts, stand out among numbers
  that were not, in bits; about 1.4 is chance. --canaries names the file that was planted.

All have 95% intervals. Training texts that score as the others do are no proof of privacy; those
that do not are a leak.

Reference:
  Carlini et al., The Secret Sharer, arXiv 1802.08232; Shi et al., Detecting Pretraining Data from
  Large Language Models, arXiv 2310.16789.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm import config, mistakes, storage

FLAGS = config.Flags()
MODEL = FLAGS.string('model', None, 'A run, or anything else that jaxllm.load takes.')
MEMBERS = FLAGS.string('members', None, 'Texts it was trained on; else the records of its run.')
OTHERS = FLAGS.string('others', None, 'Texts like them that it was not trained on.')
CANARIES = FLAGS.string('canaries', None, 'Canaries that its training texts held, one per line.')
NEW_CANARIES = FLAGS.integer('new_canaries', None, 'Print so many, and do nothing else.', 1)
LIMIT = FLAGS.integer('limit', 300, 'Most texts of each kind, drawn at random.', 2)
PREFIX = FLAGS.integer('prefix_tokens', 50, 'Tokens that a text is continued after.', 1)
SUFFIX = FLAGS.integer('suffix_tokens', 50, 'Tokens that must be spelled exactly.', 1)
SEED = FLAGS.integer('seed', 0, 'Of what is drawn.')
OUTPUT = FLAGS.string('output', None, 'File for the figures, as JSON.')

_ALTERNATIVES, _RESAMPLES, _WORST = 511, 1000, 0.2
_OWNERS = ('amber', 'birch', 'cedar', 'delta', 'ember', 'fjord', 'grove', 'heron', 'islet', 'jetty')


def main(_) -> None:  # noqa: D103
  if NEW_CANARIES.value:
    print('\n'.join(new_canaries(NEW_CANARIES.value, SEED.value)))
    return
  if not MODEL.value or bool(MEMBERS.value) != bool(OTHERS.value):
    raise ValueError('--model is needed, and --members and --others together or not at all')
  if OUTPUT.value:
    mistakes.check_writeable(OUTPUT.value, '--output')
  from jaxllm import loading

  canaries = [line for line in storage.path(CANARIES.value).read_text('utf-8').split('\n')
              if line.strip()] if CANARIES.value else []
  for canary in canaries:
    if len(re.findall(r'\d', canary)) < 4:
      raise ValueError(f'--canaries: {canary[:60]!r} has fewer than 4 digits; see --new_canaries')
  model = loading.load(MODEL.value)
  if MEMBERS.value:
    members, others = (_texts(model, path) for path in (MEMBERS.value, OTHERS.value))
  else:
    members, others = _own(model)
  found = audit(model, members, others, canaries, PREFIX.value, SUFFIX.value, SEED.value)
  for name, (value, low, high) in found.items():
    print(f'{name:44}{value:8.4f}   [{low:.4f}, {high:.4f}]')
  if OUTPUT.value:
    figures = {name: dict(zip(('value', 'low', 'high'), row, strict=True))
               for name, row in found.items()}
    storage.write_file(OUTPUT.value, json.dumps(figures, indent=2) + '\n')


def new_canaries(number: int, seed: int) -> list[str]:
  """Return sentences with a number of eight random digits each."""
  pick = random.Random(f'canaries {seed}')
  return [f'The access code of {pick.choice(_OWNERS)} {i} is {pick.randrange(10**8):08}.'
          for i in range(number)]


def audit(
  model: Any, members: Sequence[Sequence[int]], others: Sequence[Sequence[int]],
  canaries: Sequence[str] = (), prefix_tokens: int = 50, suffix_tokens: int = 50, seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
  """Return each figure with the ends of its 95% interval.

  Args:
    model: from `jaxllm.load`.
    members: token ids of texts that it was trained on.
    others: of texts that it was not.
    canaries: sentences with digits that it was trained on.
    prefix_tokens: what is given of a text that is to be extracted.
    suffix_tokens: what must follow of it, token by token.
    seed: of resamples and alternatives.

  Raises:
    ValueError: there are fewer than two texts of a kind.
  """
  from jaxllm.evaluation import tables

  for name, rows in (('members', members), ('others', others)):
    if len(rows) < 2:
      raise ValueError(f'{name}: {len(rows)} texts of at least two tokens; at least 2 are needed')
  log_probs = [_score(model, rows) for rows in (members, others)]
  found: dict[str, tuple[float, float, float]] = {}
  for name, measure in (('loss', np.mean), ('min-k%', _worst)):
    scores = [np.array([measure(one.log_probs_N) for one in rows]) for rows in log_probs]
    found[f'membership by {name} (AUC)'] = _bootstrap(seed, _auc, *scores)
  first, last = prefix_tokens - 1, prefix_tokens + suffix_tokens - 1
  for kind, rows in zip(('members', 'others'), log_probs, strict=True):
    spelled = [bool(one.is_greedy_N[first:last].all()) for one in rows
               if len(one.is_greedy_N) >= last]
    if spelled:
      share: Any = tables.bootstrap('accuracy', spelled, [True] * len(spelled))['accuracy']
      found[f'extracted of {len(spelled)} {kind}'] = tuple(share)
  if canaries:
    exposures = np.array([_exposure(model, one, seed) for one in canaries])
    found[f'exposure of {len(canaries)} canaries (bits, at most 9)'] = _bootstrap(
      seed, np.mean, exposures)
  return found


def _score(model: Any, sequences: Sequence[Sequence[int]]) -> list[Any]:
  from jaxllm.generation import scoring

  return scoring.score(model.decoder, model.variables, sequences)


def _worst(log_probs_N: np.ndarray) -> float:
  count = max(1, math.ceil(_WORST * len(log_probs_N)))
  return float(np.sort(log_probs_N)[:count].mean())


def _auc(members: np.ndarray, others: np.ndarray) -> float:
  """Return how often a member scores above another; ties count half."""
  ordered = np.sort(others)
  below = np.searchsorted(ordered, members, 'left') + np.searchsorted(ordered, members, 'right')
  return float(below.mean() / (2 * len(others)))


def _bootstrap(
  seed: int, measure: Callable[..., Any], *samples: np.ndarray
) -> tuple[float, float, float]:
  rng = np.random.default_rng(seed)
  values = [measure(*(rng.choice(sample, len(sample)) for sample in samples))
            for _ in range(_RESAMPLES)]
  low, high = np.quantile(values, (0.025, 0.975))
  return float(measure(*samples)), float(low), float(high)


def _exposure(model: Any, canary: str, seed: int) -> float:
  """Return log2 of how many alternatives there are for each that is as likely as the canary."""
  pick = random.Random(f'{seed} {canary}')
  texts = [canary] + [re.sub(r'\d', lambda _: str(pick.randrange(10)), canary)
                      for _ in range(_ALTERNATIVES)]
  found = _score(model, [*map(model.encode_prompt, texts)])
  likely = [float(one.log_probs_N.sum()) for one in found]
  rank = 1 + sum(value >= likely[0] for value in likely[1:])
  return math.log2((_ALTERNATIVES + 1) / rank)


def _texts(model: Any, path: str) -> list[list[int]]:
  """Return the beginnings of the texts of a file, at most as long as the context."""
  from jaxllm.data import documents

  found = (model.encode_prompt(text)[: model.config.max_length + 1]
           for text in documents.documents(documents.SourceConfig(location=path)))
  return _drawn(one for one in found if len(one) > 1)


def _own(model: Any) -> list[list[list[int]]]:
  """Return texts of the training and of the validation records of a run."""
  from jaxllm.evaluation import contamination
  from jaxllm.training import dataset

  if model.experiment is None:
    raise ValueError(f'--model={MODEL.value} was not trained here, so that its training texts are '
                     'not known: give --members and --others')
  records = dataset.open_dataset(model.experiment.replace(model=model.config), model.records)
  if records.manifest.validation is None:
    raise ValueError('the run has held nothing out (config.data.validation): give --members and '
                     '--others')

  def texts(split: str) -> Iterator[list[int]]:
    batches = records.make_batches(split, 1, True, 1)
    for batch in map(batches.batch_at, range(batches.num_batches)):
      yield from (ids for ids in contamination.segments(batch) if len(ids) > 1)

  return [_drawn(texts(split)) for split in ('train', 'validation')]


def _drawn(rows: Iterator[list[int]]) -> list[list[int]]:
  """Draw so many rows of a stream, each with the same chance."""
  pick, kept = random.Random(SEED.value), list[list[int]]()
  for i, row in enumerate(rows):
    if len(kept) < LIMIT.value:
      kept.append(row)
    elif (place := pick.randrange(i + 1)) < LIMIT.value:
      kept[place] = row
  return kept


if __name__ == '__main__':
  config.run_program(main, FLAGS)
