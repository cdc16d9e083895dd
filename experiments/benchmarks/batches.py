"""Batches per second: records at random beside a PyTorch DataLoader over a memory map.

  python experiments/benchmarks/batches.py [--megatokens=32] [--context=1024] [--batch_size=16]
    [--seconds=5] [--count=3] [--run=runs/quickstart]

Both read the same tokens in a random order. PyTorch: a dataset over `numpy.memmap` of 16-bit
tokens gives inputs and targets as int64 tensors, and a DataLoader shuffles and stacks them, in the
process itself and in 2 workers. jaxllm: `batch_at` alone, as the training loop reads ahead (2
threads), and the same of a mixture of two sources; its batches have weights, segments and positions
besides, and token ids are checked. All take turns, `count` times, `seconds` each, after 5 batches
that do not count; printed are medians, and the seconds to the first batch, opening included
(jaxllm verifies the SHA-256 of its files). Needs the package torch.

--run: a run whose metrics.jsonl then says how long its steps waited for data, as a share of them.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from absl import app, flags

MEGATOKENS = flags.DEFINE_integer('megatokens', 32, 'Size of the text, in millions of tokens.')
CONTEXT = flags.DEFINE_integer('context', 1024, 'Tokens that are predicted in a record.')
BATCH = flags.DEFINE_integer('batch_size', 16, 'Records of a batch.')
SECONDS = flags.DEFINE_float('seconds', 5, 'How long each is measured.')
COUNT = flags.DEFINE_integer('count', 3, 'Turns.')
RUN = flags.DEFINE_string('run', None, 'A run, for the share of its steps that waits for data.')
OUTPUT = flags.DEFINE_string('output', 'runs/batches.json', 'Where the JSON goes.')

WARM = 5


def main(_) -> None:
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as name:
    folder = pathlib.Path(name)
    write(folder)
    kinds = {
      'DataLoader, 0 workers': lambda: theirs(folder, 0),
      'DataLoader, 2 workers': lambda: theirs(folder, 2),
      'jaxllm, batch_at': lambda: ours(folder, 'records', False),
      'jaxllm, read ahead': lambda: ours(folder, 'records', True),
      'jaxllm, mixture read ahead': lambda: ours(folder, 'mixture', True),
    }
    found = {kind: [] for kind in kinds}
    for _ in range(COUNT.value):
      for kind, batches in kinds.items():
        found[kind].append(measured(batches))
  median = {kind: [statistics.median(values) for values in zip(*rows, strict=True)]
            for kind, rows in found.items()}
  print(f'{"":28}{"batches/s":>12}{"first after s":>16}')
  for kind, (rate, first) in median.items():
    print(f'{kind:28}{rate:12,.0f}{first:16.2f}')
  best = max(median[kind][0] for kind in kinds if kind.startswith('DataLoader'))
  ratio = median['jaxllm, read ahead'][0] / best
  print(f'{"ratio, to the faster one":28}{ratio:12.2f}')
  told = {'megatokens': MEGATOKENS.value, 'context': CONTEXT.value, 'batch_size': BATCH.value,
          'cores': os.cpu_count(), 'load': os.getloadavg(), 'turns': found, 'ratio': ratio}
  if RUN.value:
    told['data_wait'] = share = waited(pathlib.Path(RUN.value))
    print(f'{RUN.value}: steps wait {share:.2%} of their time for data')
  output = pathlib.Path(OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps(told, indent=2) + '\n')


def write(folder: pathlib.Path) -> None:
  """Write random letters as a token file and, in two texts, as records."""
  from jaxllm.data import preparing, records
  from jaxllm.data.tokenizers import TokenizerConfig

  ids = np.random.default_rng(0).integers(97, 123, MEGATOKENS.value * 10**6, np.uint8)
  ids.astype(np.uint16).tofile(folder / 'tokens.bin')
  half = len(ids) // 2
  sources = []
  for name, part in (('one', ids[:half]), ('two', ids[half:])):
    (folder / f'{name}.txt').write_bytes(part.tobytes())
    sources.append({'location': str(folder / f'{name}.txt')})
  mixed = [{**source, 'weight': weight} for source, weight in zip(sources, (0.7, 0.3), strict=True)]
  for name, some in (('records', sources), ('mixture', mixed)):
    preparing.prepare(
      records.DataConfig(sources=some, packing='concat', validation=None, add_bos=False,
                         add_eos=False, context_length=CONTEXT.value),
      TokenizerConfig(kind='bytes'), folder / name, progress=False)


def ours(folder: pathlib.Path, name: str, ahead: bool):
  from jaxllm.data import batches, parallel

  stored = batches.open_records(folder / name, 'train')
  weights = (0.7, 0.3) if name == 'mixture' else ()
  found = batches.make_batches(stored, [batches.Phase(0, 0, BATCH.value, 0, weights)], seed=0)
  steps = range(10**9)
  return parallel.map_ahead(found.batch_at, steps) if ahead else map(found.batch_at, steps)


def theirs(folder: pathlib.Path, workers: int):
  import torch

  class Tokens(torch.utils.data.Dataset):
    """Records of a token file; each overlaps the next by a token, as those of jaxllm do."""

    def __init__(self):
      self.tokens = np.memmap(folder / 'tokens.bin', np.uint16, 'r')

    def __len__(self):
      return (len(self.tokens) - 1) // CONTEXT.value

    def __getitem__(self, number):
      start = number * CONTEXT.value
      row = torch.from_numpy(self.tokens[start : start + CONTEXT.value + 1].astype(np.int64))
      return row[:-1], row[1:]

  loader = torch.utils.data.DataLoader(
    Tokens(), batch_size=BATCH.value, shuffle=True, num_workers=workers, drop_last=True,
    generator=torch.Generator().manual_seed(0), persistent_workers=workers > 0)
  while True:
    yield from loader


def measured(make) -> tuple[float, float]:
  """Return batches per second, and seconds to the first batch."""
  begin = time.perf_counter()
  batches = iter(make())
  next(batches)
  first = time.perf_counter() - begin
  for _ in range(WARM):
    next(batches)
  begin, count = time.perf_counter(), 0
  while (now := time.perf_counter()) - begin < SECONDS.value:
    next(batches)
    count += 1
  if hasattr(batches, 'close'):
    batches.close()
  return count / (now - begin), first


def waited(run: pathlib.Path) -> float:
  """Return the share of its steps' time that a run has waited for data."""
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if 'train/data_wait_seconds' in row]
  wait, total = (sum(row[name] for row in rows) for name in (
    'train/data_wait_seconds', 'train/step_seconds'))
  return wait / total


if __name__ == '__main__':
  app.run(main)
