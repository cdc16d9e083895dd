"""Text to packed tokens: jaxllm beside `datasets.map` with the same tokenizer and grouping.

  python experiments/benchmarks/prepare_throughput.py [--megabytes=64] [--count=3] [--processes=2]
    [--cleaning]

Both read one JSONL file, cut it with the same byte-level BPE (trained here on a part of it), lay
the documents end to end with an end-of-text token between, and write records of 1,025 tokens:
jaxllm ArrayRecord with lineage, digests and a manifest, `datasets` Arrow (`map` in batches of
1,000, first to tokens, then to groups, `num_proc` processes). They take turns, each in a process of
its own, `count` times. Printed are the medians of seconds, of MB of text per second and of the peak
memory of all processes together (proportional set size, asked 20 times a second), and the ratios of
medians. Needs the package datasets. Caches lie in a temporary directory.

--cleaning lets jaxllm clean by a chain of steps before that, with 1 and with 2 processes by turns,
in the place of `datasets`; the ratio is that of 2 processes to 1.
"""

import json
import os
import pathlib
import statistics
import sys
import tempfile

import peak
from absl import app, flags

MEGABYTES = flags.DEFINE_integer('megabytes', 64, 'Size of the text.')
COUNT = flags.DEFINE_integer('count', 3, 'Turns.')
PROCESSES = flags.DEFINE_integer('processes', 2, 'num_proc of datasets.')
CONTEXT = flags.DEFINE_integer('context', 1024, 'Tokens that are predicted in a record.')
CLEANING = flags.DEFINE_bool('cleaning', False, 'Compare 2 processes that clean with 1.')
OUTPUT = flags.DEFINE_string('output', 'runs/prepare_throughput.json', 'Where the JSON goes.')
CHILD = flags.DEFINE_string('child', None, 'For its own use: which of the two runs.')
FOLDER = flags.DEFINE_string('folder', None, 'For its own use: where.')

END = '<|endoftext|>'
STEPS = ('mojibake', 'control', 'nfc', 'whitespace', 'boilerplate', 'gopher_repetition', 'redact',
         'exact_duplicates', 'near_duplicates')


def main(_) -> None:
  if CHILD.value:
    if CHILD.value == 'datasets':
      theirs(pathlib.Path(FOLDER.value))
    else:
      ours(pathlib.Path(FOLDER.value), CHILD.value)
    return
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as name:
    folder = pathlib.Path(name)
    size = write_text(folder)
    train_tokenizer(folder)
    kinds = ('2 processes', '1 process') if CLEANING.value else ('jaxllm', 'datasets')
    found = {kind: [] for kind in kinds}
    for turn in range(COUNT.value):
      for kind in found:
        place = folder / f'{kind}-{turn}'
        place.mkdir()
        seconds, memory = measured(kind, folder, place)
        found[kind].append({'seconds': seconds, 'megabytes_per_second': size / 1e6 / seconds,
                            'peak_megabytes': memory / 1e6, **json.loads(
                              (folder / f'{kind}.json').read_text())})
        print(f'turn {turn + 1}, {kind}: {found[kind][-1]}', flush=True)
  median = {kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for kind, rows in found.items()}
  print(f'\n{"":12}{"seconds":>10}{"MB/s":>10}{"peak MB":>10}{"records":>10}')
  for kind, row in median.items():
    print(f'{kind:12}{row["seconds"]:10.1f}{row["megabytes_per_second"]:10.2f}'
          f'{row["peak_megabytes"]:10.0f}{row["records"]:10,.0f}')
  ratios = {key: median[kinds[0]][key] / median[kinds[1]][key]
            for key in ('megabytes_per_second', 'peak_megabytes')}
  print(f'{"ratio":12}{"":10}{ratios["megabytes_per_second"]:10.2f}'
        f'{ratios["peak_megabytes"]:10.2f}')
  output = pathlib.Path(OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps({
    'megabytes': size / 1e6, 'cores': os.cpu_count(), 'load': os.getloadavg(), 'turns': found,
    'ratios': ratios}, indent=2) + '\n')


def write_text(folder: pathlib.Path) -> int:
  """Write the sources of Python's library and of this project as JSONL; return bytes of text."""
  from jaxllm.data import documents

  texts = [text for text in documents.documents(documents.SourceConfig(location='stdlib')) if text]
  size, number = 0, 0
  with (folder / 'text.jsonl').open('w', encoding='utf-8') as file:
    while size < MEGABYTES.value * 1e6:
      # No two documents are alike, so that no one gains by having seen one.
      text = f'# {number}\n{texts[number % len(texts)]}'
      file.write(json.dumps({'text': text}) + '\n')
      size += len(text.encode())
      number += 1
  return size


def train_tokenizer(folder: pathlib.Path) -> None:
  import tokenizers

  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=8000, special_tokens=[END], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  with (folder / 'text.jsonl').open(encoding='utf-8') as file:
    lines = (json.loads(line)['text'] for _, line in zip(range(300), file, strict=False))
    trained.train_from_iterator(lines, trainer)
  (folder / 'tokenizer').mkdir()
  trained.save(str(folder / 'tokenizer' / 'tokenizer.json'))
  (folder / 'tokenizer' / 'tokenizer_config.json').write_text(json.dumps({'eos_token': END}))


def measured(kind: str, folder: pathlib.Path, place: pathlib.Path) -> tuple[float, int]:
  """Run one of the two; return its seconds and the peak of its processes' memory, in bytes."""
  return peak.run(
    [sys.executable, __file__, f'--child={kind}', f'--folder={place}',
     f'--processes={PROCESSES.value}', f'--context={CONTEXT.value}',
     f'--cleaning={CLEANING.value}'], folder / f'{kind}.txt', HF_HOME=str(place),
    HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM=str(kind != 'datasets').lower())


def ours(place: pathlib.Path, kind: str) -> None:
  from jaxllm.data import preparing, records
  from jaxllm.data.cleaning import CleaningConfig
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.tokenizers import TokenizerConfig

  base = place.parent
  manifest = preparing.prepare(
    records.DataConfig(sources=(SourceConfig(location=str(base / 'text.jsonl')),), packing='concat',
                       cleaning=CleaningConfig(steps=STEPS if CLEANING.value else ()),
                       validation=None, context_length=CONTEXT.value, add_bos=False),
    TokenizerConfig(kind='json', path=str(base / 'tokenizer')), place / 'records', progress=False,
    workers={'1 process': 1, '2 processes': 2}.get(kind))
  told = {'records': manifest.train.records, 'tokens': manifest.train.tokens}
  (base / f'{kind}.json').write_text(json.dumps(told))


def theirs(place: pathlib.Path) -> None:
  import datasets
  import tokenizers

  base, size = place.parent, CONTEXT.value
  tokenizer = tokenizers.Tokenizer.from_file(str(base / 'tokenizer' / 'tokenizer.json'))
  end = tokenizer.token_to_id(END)

  def tokenize(batch):
    done = tokenizer.encode_batch_fast(batch['text'], add_special_tokens=False)
    return {'ids': [[*one.ids, end] for one in done]}

  def group(batch):
    ids = [token for one in batch['ids'] for token in one]
    # Records overlap by one token, as ours do: the last target is the next one's first input.
    return {'tokens': [ids[i : i + size + 1] for i in range(0, len(ids) - size, size)]}

  data = datasets.load_dataset('json', data_files=str(base / 'text.jsonl'), split='train',
                               cache_dir=str(place / 'cache'))
  tokens = data.map(tokenize, batched=True, num_proc=PROCESSES.value, remove_columns=['text'])
  grouped = tokens.map(group, batched=True, num_proc=PROCESSES.value, remove_columns=['ids'])
  told = {'records': len(grouped), 'tokens': len(grouped) * size}
  (base / 'datasets.json').write_text(json.dumps(told))


if __name__ == '__main__':
  app.run(main)
