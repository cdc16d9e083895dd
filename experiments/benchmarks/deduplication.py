"""Near-deduplication: jaxllm beside datatrove, on a corpus with planted near duplicates.

  python experiments/benchmarks/deduplication.py --peer_python=VENV/bin/python [--documents=20000]
    [--count=3] [--processes=2]

VENV holds `pip install 'datatrove[io,processing]' spacy`. The corpus is made here: of every ten
texts of 240 random words one is followed, somewhere later, by a copy in which words are changed so
that a stated part (0.95 to 0.5) of all runs of 5 words of either is in both. Both read one JSONL
file and write one with the texts that are kept: jaxllm by the step near_duplicates (similarity
0.8, 16 bands of 8 hashes), datatrove by its four MinHash steps with a local executor (16 buckets
of 8 hashes, runs of 5 words, its own words for English). They take turns, each in processes of its
own, `count` times. Printed are the part of the pairs of each similarity of which one is dropped,
the part of all dropped texts whose similarity is 0.8 or more, and the medians of documents per
second and of the peak memory of all processes together.
"""

import json
import os
import pathlib
import random
import statistics
import sys
import tempfile

import peak
from absl import app, flags

DOCUMENTS = flags.DEFINE_integer('documents', 20_000, 'Texts in all.')
COUNT = flags.DEFINE_integer('count', 3, 'Turns.')
PROCESSES = flags.DEFINE_integer('processes', 2, 'Processes of each.')
PEER_PYTHON = flags.DEFINE_string('peer_python', None, 'The Python that has datatrove.')
OUTPUT = flags.DEFINE_string('output', 'runs/deduplication.json', 'Where the JSON goes.')

SIMILARITIES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
WORDS = 240

THEIRS = """
import sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

source, place, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])


def run(tasks, *pipeline):
  LocalPipelineExecutor([*pipeline], tasks=tasks, workers=min(tasks, workers),
                        logging_dir=f'{place}/logs-{type(pipeline[-1]).__name__}').run()


def read():
  return JsonlReader(source, glob_pattern='*.jsonl')


if __name__ == '__main__':
  config = minhash.MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8)
  run(workers, read(), minhash.MinhashDedupSignature(f'{place}/signatures', config))
  run(16, minhash.MinhashDedupBuckets(f'{place}/signatures', f'{place}/buckets', config=config))
  run(1, minhash.MinhashDedupCluster(f'{place}/buckets', f'{place}/remove', config=config))
  run(workers, read(), minhash.MinhashDedupFilter(f'{place}/remove'),
      JsonlWriter(f'{place}/kept', compression=None))
"""

OURS = """
import json, pathlib, sys
from jaxllm.data import cleaning, documents, parallel

source, place, workers = documents.SourceConfig(location=sys.argv[1]), sys.argv[2], sys.argv[3]
config = cleaning.CleaningConfig(steps=('near_duplicates',))
compare = cleaning.comparer(cleaning.stages(config))
held = []


def chunks():
  for part in documents.parts(source):
    rows = ((text, row.fields['id']) for text, row in part())
    for group in parallel.grouped(rows, lambda row: len(row[0]), 2**20):
      held.append(group)
      yield 0, 0, [text for text, _ in group]


pathlib.Path(f'{place}/kept').mkdir()
with (open(f'{place}/kept/0.jsonl', 'w') as file,
      parallel.processes(cleaning.chunk_passer, config.to_json(), int(workers)) as run):
  for _, _, found in run(chunks()):
    for (_, name), (_, passes) in zip(held.pop(0), found):
      text, _ = compare(passes)
      if text is not None:
        file.write(json.dumps({'text': text, 'id': name}) + '\\n')
"""


def main(_) -> None:
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as name:
    folder = pathlib.Path(name)
    planted = write_corpus(folder / 'corpus')
    commands = {'jaxllm': (sys.executable, OURS)}
    if PEER_PYTHON.value:
      commands['datatrove'] = PEER_PYTHON.value, THEIRS
    for kind, (_, code) in commands.items():
      (folder / f'run_{kind}.py').write_text(code)
    turns = {kind: [] for kind in commands}
    for turn in range(COUNT.value):
      for kind, (python, _) in commands.items():
        place = folder / f'{kind}-{turn}'
        place.mkdir()
        seconds, memory = peak.run(
          [python, str(folder / f'run_{kind}.py'), str(folder / 'corpus'), str(place),
           str(PROCESSES.value)], folder / f'{kind}.txt',
          PYTHONPATH=os.getcwd() if kind == 'jaxllm' else '')
        turns[kind].append({
          'seconds': seconds, 'documents_per_second': DOCUMENTS.value / seconds,
          'peak_megabytes': memory / 1e6, **judged(place / 'kept', planted)})
        print(f'turn {turn + 1}, {kind}: {turns[kind][-1]}', flush=True)
  median = {kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for kind, rows in turns.items()}
  keys = ['seconds', 'documents_per_second', 'peak_megabytes', *map(str, SIMILARITIES), 'precision']
  print(f'\n{"":24}' + ''.join(f'{kind:>12}' for kind in median))
  for key in keys:
    print(f'{key:24}' + ''.join(f'{row[key]:12.4g}' for row in median.values()))
  output = pathlib.Path(OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps({
    'documents': DOCUMENTS.value, 'processes': PROCESSES.value, 'cores': os.cpu_count(),
    'load': os.getloadavg(), 'planted': {str(one): len(planted[one]) for one in planted},
    'turns': turns, 'medians': median}, indent=2) + '\n')


def write_corpus(folder: pathlib.Path) -> dict[float, set[tuple[str, str]]]:
  """Write the texts as JSONL; return the ids of each text and its copy, by their similarity."""
  rng, planted, waiting = random.Random(0), {one: set() for one in SIMILARITIES}, []
  folder.mkdir()
  files = [(folder / f'{i}.jsonl').open('w') for i in range(PROCESSES.value)]
  for number in range(DOCUMENTS.value):
    name = f'{number}'
    if len(waiting) > 100:
      similarity, original, words = waiting.pop(rng.randrange(len(waiting)))
      planted[similarity].add((original, name))
    else:
      words = [word(rng.randrange(20_000)) for _ in range(WORDS)]
      if rng.random() < 0.1:
        similarity = rng.choice(SIMILARITIES)
        waiting.append((similarity, name, changed(rng, words, similarity)))
    files[number * len(files) // DOCUMENTS.value].write(
      json.dumps({'text': ' '.join(words), 'id': name}) + '\n')
  for file in files:
    file.close()
  return planted


def changed(rng: random.Random, words: list[str], similarity: float) -> list[str]:
  """Return words of which so many are changed, far from each other: each changes 5 runs."""
  copy, runs = [*words], len(words) - 4
  for place in rng.sample(range(4, len(words) - 4, 5),
                          round(runs * (1 - similarity) / (1 + similarity) / 5)):
    copy[place] = word(rng.randrange(10**9, 10**10))
  return copy


def word(number: int) -> str:
  """Return a number in letters: datatrove takes all numbers for the same."""
  return ''.join(chr(ord('a') + int(digit)) for digit in str(number))


def judged(folder: pathlib.Path, planted: dict[float, set[tuple[str, str]]]) -> dict[str, float]:
  """Return which part of the pairs of each similarity lost one, and of the dropped is near."""
  kept = {json.loads(line)['id'] for path in folder.iterdir()
          for line in path.open(encoding='utf-8')}
  lost = DOCUMENTS.value - len(kept)
  found = {one: sum(not kept.issuperset(pair) for pair in pairs) for one, pairs in planted.items()}
  near = sum(count for one, count in found.items() if one >= 0.8)
  return {**{str(one): found[one] / max(len(planted[one]), 1) for one in planted},
          'dropped': lost, 'precision': near / max(lost, 1)}


if __name__ == '__main__':
  app.run(main)
