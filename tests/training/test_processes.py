"""Two real processes train, score and sample what one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import BestConfig, FinetuneConfig, ScoringConfig, TrainingConfig
from jaxllm.objectives.preference import Dpo
from jaxllm.training import loop
from tests.training import test_finetune, test_objectives, tiny_run
from tests.training.test_finetune import lines
from tests.training.watched import whole_parameters

MESH = {'data': 2, 'fsdp': 2}


def tuned(base):
  """Adapters, with a classification that is scored, the best step and a sample."""
  return test_finetune.experiment(
    base, mesh=MESH, scoring=ScoringConfig(every_steps=2, max_examples=4),
    best=BestConfig(metric='task/sentiment/accuracy'),
    training=TrainingConfig(num_steps=3, batch_size=8, log_every_steps=1, spike=None),
    evaluation=EvaluationConfig(every_steps=3, prompts=('good 3:',), prompt_tokens=4))


def preferring(base):
  """Pairs that are compared with a reference before the first step."""
  return test_objectives.preferring(base, Dpo(), FinetuneConfig()).replace(
    mesh=MESH, training=TrainingConfig(num_steps=2, batch_size=8, log_every_steps=1, spike=None))


RUNS = {'tuned': tuned, 'preferring': preferring}
PROGRAM = """
import pathlib, sys
import jax
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
from jaxllm.training import loop
from tests.training import test_processes
base = pathlib.Path(sys.argv[3])
for name, config in test_processes.RUNS.items():
  print('SUMMARY', loop.train(config(base), base / 'two' / name, profile_steps=(2, 2)))
"""


def test_two_processes_train_what_one_does(tmp_path):
  base = test_objectives.make_base(tmp_path)
  configs = {name: config(base) for name, config in RUNS.items()}  # Their data are written.
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  root = str(pathlib.Path(__file__).parents[2])
  environment = os.environ | {
    'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('=8', '=2'), 'PYTHONPATH': root}
  both = [subprocess.Popen(
    [sys.executable, '-c', PROGRAM, str(port), str(number), str(base)], text=True,
    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(2)]
  for name, config in configs.items():
    devices = jax.devices()[:4]
    with whole_parameters(tiny_run.MODEL, config.mesh, devices) as whole:
      loop.train(config, base / 'one' / name, devices)
    assert not whole
  outputs = [process.communicate(timeout=300) for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  said = [[line for line in out.splitlines() if line.startswith('SUMMARY')] for out, _ in outputs]
  assert said[0] == said[1] and len(said[0]) == len(RUNS)
  for name in RUNS:
    one, two = base / 'one' / name, base / 'two' / name
    np.testing.assert_allclose(lines(two, 'train/loss'), lines(one, 'train/loss'), rtol=1e-5)
    traces = [path.name for path in (two / 'profile').rglob('steps_2_to_2/*.xplane.pb')]
    assert sorted(trace[:2] for trace in traces) == ['0-', '1-'], 'each process writes its own'
    summaries = [json.loads((path / 'summary.json').read_text()) for path in (one, two)]
    assert summaries[0].get('best_step') == summaries[1].get('best_step')
    np.testing.assert_allclose(*(list(s['validation'].values()) for s in summaries), rtol=1e-5)
  one, two = base / 'one' / 'tuned', base / 'two' / 'tuned'
  for metric in ('task/sentiment/accuracy', 'task/sentiment/ece'):
    np.testing.assert_allclose(lines(two, metric), lines(one, metric), rtol=1e-4)
  assert (two / 'samples.jsonl').read_text() == (one / 'samples.jsonl').read_text()
