"""Prepare data: `python -m jaxllm.prepare --config=experiments/quickstart.py`.

Cleans, tokenises and packs the text of an experiment into records, and prints what came out.
Training does the same by itself where it is needed. A call that was killed goes on where it was.

- --inspect shows the first records of each split, of a task too: tokens between bars, with the
  segment that they are in, green where they have loss (without colours those without in brackets).
- --dry_run cleans 1,000 documents and says what cleaning did, besides what it says elsewhere.
- --report writes a page beside the records: what was read, samples before and after each step of
  cleaning, how the tokenizer does. With --model a trained run reads a sample of the records: of the
  texts with the lowest loss some are repeated boilerplate, of those with the highest garbage.
- --runner makes the same records on Apache Beam (the extra beam); flags that are not of this
  program are Beam's, as in --runner=DataflowRunner --region=europe-west4 --num_workers=100.
"""

import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm import config

FLAGS = config.Flags(passed_on='runner')
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
INSPECT = FLAGS.bool('inspect', False, 'Show records as the model reads them.')
DRY_RUN = FLAGS.bool('dry_run', False, config.DRY_RUN_HELP)
REPORT = FLAGS.bool('report', False, 'Write a page about the records: data_report.html.')
MODEL = FLAGS.string('model', None, 'A run that tells the losses of texts for --report.')
RUNNER = FLAGS.enum(
  'runner', None, ['DirectRunner', 'PrismRunner', 'DataflowRunner', 'FlinkRunner', 'SparkRunner',
                   'PortableRunner'], 'What runs Apache Beam; by default this process does it all.')


def main(argv: Sequence[str]) -> None:  # noqa: D103
  if MODEL.value and not REPORT.value or INSPECT.value + DRY_RUN.value + bool(
      REPORT.value or RUNNER.value) > 1:
    raise ValueError('--inspect and --dry_run go alone, and --model only with --report')
  if DRY_RUN.value:
    from jaxllm.tools import plan

    plan.dry_run(CONFIG.value)
    for line in rehearsed(config.from_flags(CONFIG.value)):
      print(line, file=sys.stderr)
    return
  from jaxllm.data import preparing
  from jaxllm.data.batches import Phase

  experiment = config.from_flags(CONFIG.value)
  if INSPECT.value:
    for line in inspected(experiment, sys.stdout.isatty() and 'NO_COLOR' not in os.environ):
      print(line)
    return
  if experiment.task is not None:
    raise ValueError('config.task: its records are made when training starts; --inspect shows them')
  if MODEL.value:
    from jaxllm.interop import sources
    sources.check_exists(MODEL.value, field='--model=')
  directory, write = experiment.records_path, None
  if RUNNER.value:
    from jaxllm.data import beam

    options = beam.options(RUNNER.value, argv[1:], (f'--{name}' for name in FLAGS.values))
    write = functools.partial(beam.write, options=options)
  manifest = preparing.prepare(experiment.data, experiment.tokenizer, directory, write=write)
  print(f'{directory / manifest.folder}: vocabulary {manifest.vocab_size}, '
        f'context {manifest.context_length}')
  for name in manifest.data.splits:
    split = manifest.split(name)
    print(f'  {name}: {split.documents:,} documents, {split.text_bytes:,} bytes, '
          f'{split.tokens:,} tokens ({split.bytes_per_token:.2f} bytes each), '
          f'{split.records:,} records, '
          f'{split.target_tokens / (split.records * manifest.context_length):.1%} full')
  if manifest.data.mixed:
    from jaxllm.training import dataset

    found = dataset.prepared(experiment, directory / manifest.folder)
    phases = [Phase(0, 0, experiment.training.batch_size, 0, found.weights)]
    for line in found.mixture(phases, experiment.training.num_steps):
      print(f'  {line}')
  if REPORT.value:
    from jaxllm.training import data_report

    print(f'report: {data_report.write(experiment.name, directory / manifest.folder, MODEL.value)}')


def rehearsed(experiment: Any) -> Iterator[str]:
  """Yield what cleaning does to the first documents of each source, 1,000 of all of them."""
  from jaxllm.data import samples

  data, training = experiment.data, experiment.training
  for source, counts, seconds, _ in samples.rehearse(
      (*data.sources, *data.own_validation), data.cleaning)[0]:
    yield (f'{source.location}: of the first {counts["documents"]:,} documents cleaning drops '
           f'{counts["dropped"]:,}; {counts["after"]:,} of {counts["before"]:,} characters are '
           f'left ({counts["before"] / 1e6 / seconds:.1f} million characters/s)')
    if source.weight:
      share = source.weight / sum(one.weight for one in data.sources)
      yield (f'  weight={source.weight:g}: {share:.1%} of what is read, '
             f'{share * training.num_steps * training.batch_size:,.0f} records')
    yield from (f'  {name}: {number:,}' for name, number in sorted(counts.items()) if '.' in name)


def inspected(experiment: Any, coloured: bool, count: int = 2) -> Iterator[str]:
  """Yield lines that show the first `count` records of each split of an experiment."""
  from jaxllm.training import dataset as dataset_lib
  from jaxllm.training import pretrained

  if experiment.reads_models:
    experiment = pretrained.resolve(experiment, None)
  dataset = dataset_lib.open_dataset(experiment)
  for name in ('train', *(['validation'] if dataset.manifest.validation else [])):
    batch = dataset.make_batches(name, count, False, 1, alone=True).batch_at(0)
    for row in range(min(count, dataset.manifest.split(name).records)):
      for kind in ('', 'rejected_'):
        if f'{kind}tokens' in batch:
          yield f'{name}, record {row}{kind and ", rejected"}:'
          yield from _segments({key.removeprefix(kind): array[row] for key, array in batch.items()
                                if key.startswith(kind)}, dataset.tokenizer.id_bytes, coloured)


def _segments(row: Mapping[str, np.ndarray], id_bytes: Any, coloured: bool) -> Iterator[str]:
  """Yield a line for each segment of a record; a token has the loss that it has as a target."""
  segments, positions = row['segment_ids'], row['positions']
  # The last target is no token; the first token is no target.
  learnt = np.concatenate([[0], np.broadcast_to(row.get('weights', 0), segments.shape)[:-1]])
  learnt *= positions > 0
  for segment in range(1, segments.max(initial=0) + 1):
    at = np.flatnonzero(segments == segment)
    shown = []
    for token, weight in zip(row['tokens'][at], learnt[at], strict=True):
      text = repr(id_bytes[token].decode(errors='backslashreplace') or f'<{token}>')[1:-1]
      times = '' if weight in (0, 1) else f'*{weight:.2g}'
      colour = '32' if weight else '2'
      shown.append(f'\x1b[{colour}m{text}\x1b[0m{times}' if coloured else
                   f'{text}{times}' if weight else f'[{text}]')
    yield (f'  segment {segment}, {len(at)} tokens, {np.count_nonzero(learnt[at])} with loss, '
           f'positions {positions[at[0]]}-{positions[at[-1]]}: {"|".join(shown)}')
  if padding := int((segments == 0).sum()):
    yield f'  {padding} tokens of padding'


if __name__ == '__main__':
  config.run_program(main, FLAGS)
