"""The program: a run on its records, any model on texts and tasks, a baseline beside it."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jaxllm.checkpoints import store
from jaxllm.data import preparing, tokenizers
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation import tables
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models import decoder
from jaxllm.optim.optimizers import ScheduleConfig
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.training import loop
from tests.training import tiny_run as tiny

# Several commands in one process, which starts only once.
SCRIPT = """
import json, sys
from jaxllm import config, evaluate
for command in json.loads(sys.argv[1]):
  config.parse_flags(['evaluate', *command], evaluate.FLAGS)
  try:
    evaluate.main(None)
  except ValueError as error:
    print('error:', error)
  print('---')
"""


def tune(base, name):
  """Fine-tune the run a little, on a task whose held-out reviews are those it was trained on."""
  source, copy = base / 'own.jsonl', base / 'copy.jsonl'
  rows = [{'text': f'{word} {i} ' + ' '.join('abcdefghijklmn'), 'label': label} for i in range(10)
          for word, label in (('bad', 'negative'), ('good', 'positive'))]
  for path in (source, copy):  # Rows that one file holds out it does not train on.
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  data = RecordsConfig(sources=(
    RecordSource(location=str(source), split='train'),
    RecordSource(location=str(copy), split='validation'),
  ))
  task = Sentiment(data=data, prompt='{text}:', labels=(('negative', 'n'), ('positive', 'p')))
  experiment = Experiment(
    name=name, records_dir=str(base / 'records'), init_from=str(base / 'run'),
    data=DataConfig(context_length=32), task=task,
    training=TrainingConfig(num_steps=2, batch_size=8), schedule=ScheduleConfig(warmup_steps=1),
  )
  loop.train(experiment, base / name, jax.devices()[:1])


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
  """Return what each command printed, and the folder of their files."""
  base = tmp_path_factory.mktemp('evaluate')
  run, foreign = base / 'run', base / 'foreign'
  # Trained on eight devices and scored on two, and by its records alone: its corpus has moved.
  first = base / 'first'
  loop.train(tiny.experiment(first, evaluation__prompts=(), mesh={'data': 1, 'fsdp': 8}),
             first / 'run')
  # It is moved, with its records.
  for name in ('run', 'records', 'corpus'):
    (first / name).rename(base / name)
  # Another run of this name has other records there.
  other = DataConfig(sources=str(base / 'corpus'), context_length=20, validation=0.5)
  preparing.prepare(other, TokenizerConfig(kind='bytes'), base / 'records' / 'tiny', progress=False)
  (base / 'corpus').rename(base / 'moved')
  tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  store.save_converted(foreign, tiny.MODEL, decoder.init(tiny.MODEL, jax.random.key(9)),
                       tokenizer.files(), {})
  (base / 'reviews.tsv').write_text('text\tlabel\n' + 'good\tpositive\nbad\tnegative\n' * 4)
  tune(base, 'tuned')
  text = next((base / 'moved').glob('*.txt'))
  commands = [
    [f'--model={run}', f'--output={base}/new/held_out.json'],
    [f'--model={foreign}'],
    [f'--model={foreign}', f'--text={text}', '--stride=8'],
    [f'--model={run}', f'--baseline={foreign}', f'--text={text}', '--tasks=sentiment',
     f'--data={base}/reviews.tsv', '--limit=6', f'--output={base}/both.json'],
    [f'--model={run}', f'--baseline={foreign}'],
    [f'--model={base}/tuned', '--split=validation', f'--output={base}/tuned.json'],
    [f'--model={run}', '--quantize=int8', f'--output={base}/held_out_int8.json'],
    [f'--model={run}', '--quantize=int4', f'--text={text}', f'--output={base}/int4.json'],
    [f'--model={foreign}', f'--text={text}', '--limit=3'],
    [f'--model={run}', f'--baseline={foreign}', f'--text={text}', '--tasks=sentiment',
     f'--data={base}/reviews.tsv', '--limit=6', f'--output={base}/mesh.json', '--mesh=tensor=2'],
  ]
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, json.dumps(commands)], capture_output=True, text=True,
    check=False, env=os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('=8', '=2')},
  )
  assert done.returncode == 0, done.stderr
  return base, done.stdout.split('---\n')


def test_a_run_is_scored_on_its_held_out_records(outputs):
  base, (printed, *_) = outputs
  scores = json.loads((base / 'new/held_out.json').read_text())
  summary = json.loads((base / 'run' / 'summary.json').read_text())
  assert scores == pytest.approx(summary['validation'], rel=1e-5)
  assert f'bits per byte  {tables.number(scores["bits_per_byte"])}' in printed
  assert f'tokens  {scores["tokens"]:,.0f}\n' in printed


def test_a_foreign_model_needs_a_text_or_tasks(outputs):
  assert outputs[1][1].startswith('error: model=')
  assert 'give text=FILE or tasks=NAME' in outputs[1][1]
  assert outputs[1][4].startswith('error: baseline=')


def test_any_model_is_measured_on_a_text(outputs):
  lines = outputs[1][2].strip().split('\n')
  # One passage alone has no interval.
  names = [line.split()[-3] for line in lines[1:]]
  assert names == ['loss', 'perplexity', 'bits_per_byte']
  # An untrained model knows nothing of 257 bytes.
  assert 7.5 < float(lines[-1].split()[-2]) < 8.5


def test_a_task_and_a_text_with_a_baseline(outputs):
  base, (_, _, _, printed, *_) = outputs
  assert 'sentiment' in printed and 'accuracy' in printed and 'difference' in printed
  results = json.loads((base / 'both.json').read_text())['tasks']
  sentiment = results['sentiment']
  assert sentiment['examples'] == len(sentiment['predictions']) == 6
  row = sentiment['predictions'][0]
  assert row['record'] == {'text': 'good', 'label': 'positive'} and row['reference'] == 'positive'
  assert {'label', 'score', 'scores'} == {*row['prediction']} == {*row['baseline']}
  right = sum(one['prediction']['label'] == one['reference'] for one in sentiment['predictions'])
  assert sentiment['scores']['accuracy']['value'] == pytest.approx(right / 6)
  assert 0 < sentiment['scores']['accuracy']['comparison']['p_value'] <= 1
  assert sentiment['contamination']['overlapping'] == 0
  assert sentiment['confusion']['labels'] == ['negative', 'positive']
  counts = sentiment['confusion']['counts']
  assert counts[0][0] + counts[1][1] == right and sum(map(sum, counts)) == 6
  assert f'negative{counts[0][0]:>10}{counts[0][1]:>10}' in printed
  text, = (result for name, result in results.items() if name.endswith('.txt'))
  # The run was trained on texts like this one, and the other was not trained.
  assert text['scores']['bits_per_byte']['comparison']['difference'] < 0


def test_a_mesh_changes_no_score(outputs):
  alone, split = (json.loads((outputs[0] / f'{name}.json').read_text())['tasks']
                  for name in ('both', 'mesh'))
  for name, result in alone.items():
    for metric, score in result['scores'].items():
      found = split[name]['scores'][metric]
      assert found['value'] == pytest.approx(score['value'], rel=1e-4), metric
      if 'comparison' in score:
        assert found['comparison']['difference'] == pytest.approx(
          score['comparison']['difference'], rel=1e-3, abs=1e-4), metric


def test_a_fine_tuned_run_is_scored_on_its_own_task(outputs):
  base, (*_, printed, _, _, _, _, _) = outputs
  sentiment = json.loads((base / 'tuned.json').read_text())['tasks']['sentiment']
  assert sentiment['config']['prompt'] == '{text}:' and sentiment['examples'] == 20
  assert sentiment['contamination']['overlapping'] == sentiment['contamination']['texts'] == 20
  assert 'sentiment: 20 of 20 texts share a run of 13 words' in printed


def test_what_smaller_weights_cost_is_said(outputs):
  base, (*_, printed, compared, _, _, _) = outputs
  scores, whole = (json.loads((base / name).read_text())
                   for name in ('held_out_int8.json', 'new/held_out.json'))
  assert scores.pop('baseline') == pytest.approx(whole)
  assert scores['loss'] != whole['loss'] and scores == pytest.approx(whole, rel=0.02)
  assert (f'{tables.number(scores["loss"])}  ({tables.number(whole["loss"])} unless int8)'
          in printed)
  results = json.loads((base / 'int4.json').read_text())
  text, = results['tasks'].values()
  assert results['quantize'] == 'int4' and 'difference' in compared
  assert outputs[1][8].startswith('error: limit=3 is for tasks')
  assert 0 < abs(text['scores']['loss']['comparison']['difference']) < 0.2
