"""Records by Apache Beam's DirectRunner beside those of this machine alone: what Beam costs.

  python experiments/benchmarks/beam_overhead.py [--megabytes=64] [--count=3] [--parts=8]

Needs an environment with the extras beam and clean. All read the same JSONL files (Python's
library, no two documents alike), cut them with the same byte-level BPE and pack records of 1,025
tokens: without cleaning, and with six steps of it, of which two compare documents. They take turns,
each in a process of its own, `count` times: here with one process, here with one a core,
DirectRunner in one process, DirectRunner with two. All must give the same bytes. Printed are the
medians of seconds, of the processors' seconds for each GB of text, of the peak memory of all
processes together, and the ratios to one process here. The start of Python and its imports is in
all of them: the same with --megabytes=1 says how much that is.
"""

import functools
import hashlib
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile

import peak
import prepare_throughput as base
from absl import app, flags

PARTS = flags.DEFINE_integer('parts', 8, 'Files of text, which are read at the same time.')
flags.FLAGS['output'].default = 'runs/beam_overhead.json'

STEPS = ('control', 'nfc', 'whitespace', 'redact', 'exact_duplicates', 'near_duplicates')
FLAGS_OF = {
  'one process': None, 'one a core': None, 'DirectRunner': (),
  'DirectRunner, 2': ('--direct_num_workers=2', '--direct_running_mode=multi_processing')}


def main(_) -> None:
  if base.CHILD.value:
    prepare(base.CHILD.value, pathlib.Path(base.FOLDER.value))
    return
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as name:
    folder = pathlib.Path(name)
    size = base.write_text(folder)
    base.train_tokenizer(folder)
    split(folder)
    kinds = [f'{steps}; {way}' for steps in ('as it is', 'cleaned') for way in FLAGS_OF]
    found, digests = {kind: [] for kind in kinds}, {}
    for turn in range(base.COUNT.value):
      for kind in kinds:
        place = folder / f'{kind}-{turn}'
        place.mkdir()
        row = measured(kind, place)
        row['processor_seconds_per_gigabyte'] = row['processor_seconds'] / size * 1e9
        found[kind].append(row)
        digest = digest_of(place / 'records')
        assert digests.setdefault(kind.partition(';')[0], digest) == digest, kind
        print(f'turn {turn + 1}, {kind}: {row}', flush=True)
  median = {kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for kind, rows in found.items()}
  print(f'\n{"":28}{"seconds":>9}{"ratio":>7}{"core s/GB":>11}{"ratio":>7}{"peak MB":>9}')
  for kind, row in median.items():
    first = median[f'{kind.partition(";")[0]}; one process']
    print(f'{kind:28}{row["seconds"]:9.1f}{row["seconds"] / first["seconds"]:7.2f}'
          f'{row["processor_seconds_per_gigabyte"]:11,.0f}'
          f'{row["processor_seconds"] / first["processor_seconds"]:7.2f}'
          f'{row["peak_megabytes"]:9.0f}')
  output = pathlib.Path(base.OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps({
    'megabytes': size / 1e6, 'cores': os.cpu_count(), 'load': os.getloadavg(), 'turns': found,
  }, indent=2) + '\n')


def split(folder: pathlib.Path) -> None:
  """Cut the file of texts into parts of as many lines each."""
  lines = (folder / 'text.jsonl').read_text(encoding='utf-8').splitlines(keepends=True)
  (folder / 'parts').mkdir()
  each = -(-len(lines) // PARTS.value)
  for part in range(PARTS.value):
    (folder / 'parts' / f'{part:03}.jsonl').write_text(
      ''.join(lines[part * each : (part + 1) * each]), encoding='utf-8')


def measured(kind: str, place: pathlib.Path) -> dict[str, float]:
  """Run one way in a process of its own; return its time, the processors' and its memory."""
  def spent() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

  before = spent()
  seconds, most = peak.run(
    [sys.executable, __file__, f'--child={kind}', f'--folder={place}',
     f'--context={base.CONTEXT.value}'], place / 'log.txt')
  return {'seconds': seconds, 'processor_seconds': spent() - before, 'peak_megabytes': most / 1e6}


def digest_of(directory: pathlib.Path) -> str:
  """Return a digest of all records, lineage and the manifest."""
  digest = hashlib.sha256()
  for path in sorted(directory.glob('*/*')):
    digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b''))
  return digest.hexdigest()


def prepare(kind: str, place: pathlib.Path) -> None:
  from jaxllm.data import beam, cleaning, documents, preparing, records, tokenizers

  cleaned, _, way = kind.partition('; ')
  folder = place.parent
  data = records.DataConfig(
    sources=(documents.SourceConfig(location=str(folder / 'parts')),), validation=0.01,
    cleaning=cleaning.CleaningConfig(steps=STEPS if cleaned == 'cleaned' else ()),
    context_length=base.CONTEXT.value, add_bos=False)
  write = None
  if FLAGS_OF[way] is not None:
    write = functools.partial(beam.write, options=beam.options('DirectRunner', FLAGS_OF[way]))
  preparing.prepare(
    data, tokenizers.TokenizerConfig(kind='json', path=str(folder / 'tokenizer')),
    place / 'records', progress=False, workers=1 if way == 'one process' else None, write=write)


if __name__ == '__main__':
  app.run(main)
