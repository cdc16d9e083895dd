"""Kill a run in a bucket again and again, and compare it with one that was left alone.

    python experiments/benchmarks/bucket_resume.py --scheme=gs --kills=10

Servers of both APIs run on this machine (the extra `dev` has them); the environment of the run has
no credentials. Each row is a process that was killed (SIGKILL) at a random time after its first
step; the last one came to the end. The program fails where a step is missing from the metrics or
there twice, or where a loss differs from that of the run which nobody killed.

Measured on 2 cores, each step once and all losses equal: gs, 300 steps, killed at steps 100 to 180
six times; s3, 200 steps, killed once at step 180 (later processes had finished by then).
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests import buckets  # noqa: E402
from tests.training import tiny_run  # noqa: E402

SCHEME = flags.DEFINE_enum('scheme', 'gs', ['gs', 's3'], 'Which bucket.')
KILLS = flags.DEFINE_integer('kills', 10, 'How often the run is killed.')
STEPS = flags.DEFINE_integer('steps', 200, 'Steps of the run.')

_CONFIG = '''
import os, pathlib
from tests.training import tiny_run

def get_config():
  base = os.environ['BASE']
  return tiny_run.experiment(
    pathlib.Path(os.environ['HOME']), records_dir=f'{base}/records', data__sources=f'{base}/text',
    training__num_steps=int(os.environ['STEPS']), checkpoint__every_steps=20,
    checkpoint__every_seconds=5.0, evaluation__every_steps=50, evaluation__prompts=())
'''
_READ = '''
import sys
from jaxllm import storage
sys.stdout.buffer.write(storage.path(sys.argv[1]).read_bytes())
'''


def main(_) -> None:  # noqa: D103
  pick = random.Random(0)
  with buckets.serving(SCHEME.value) as where, tempfile.TemporaryDirectory() as home:
    base = f'{SCHEME.value}://bucket/proof'
    environment = buckets.environment(home, BASE=base, STEPS=str(STEPS.value), **where)
    config = pathlib.Path(home) / 'config.py'
    config.write_text(_CONFIG)

    def start(*arguments):
      return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2])

    def losses(run):
      text = start('-c', _READ, f'{base}/{run}/metrics.jsonl').communicate()[0].decode()
      found = [json.loads(line) for line in text.splitlines()]
      return [(one['step'], one['train/loss']) for one in found if 'train/loss' in one]

    corpus = tiny_run.write_corpus(pathlib.Path(home) / 'corpus')
    start('-c', 'import pathlib, sys\nfrom jaxllm import storage\n'
          f'storage.upload(pathlib.Path({str(corpus)!r}), "{base}/text")').communicate()
    train = ('-m', 'jaxllm.train', f'--config={config}')

    def begin(run):
      process = start(*train, f'--workdir={base}/{run}')
      for line in process.stderr:
        if line.startswith(b'First step'):
          break
      return process

    alone, began = begin('alone'), time.monotonic()
    _, said = alone.communicate()
    if alone.returncode:
      sys.exit(said.decode())
    whole = time.monotonic() - began
    print(f'alone: {whole:.0f} s after the first step')
    print(f'{"kill":>5} {"after":>7} {"steps on record":>16}', flush=True)
    for kill in range(KILLS.value + 1):
      process, after = begin('killed'), None
      if kill < KILLS.value:
        after = pick.uniform(0.2, 1.8) * whole / (KILLS.value + 1)
        try:
          process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
          process.kill()
      _, said = process.communicate()
      if process.returncode not in (0, -9):
        sys.exit(said.decode())
      print(f'{kill + 1:>5} {f"{after:.1f} s" if after else "never":>7} '
            f'{max((step for step, _ in losses("killed")), default=0):>16}', flush=True)
    expected, found = losses('alone'), losses('killed')
  if [step for step, _ in found] != list(range(1, STEPS.value + 1)):
    sys.exit(f'steps are missing or there twice: {[step for step, _ in found]}')
  if found != expected:
    sys.exit('the losses differ from those of the run that nobody killed')
  print(f'{len(found)} steps, each once; all losses equal those of the run that nobody killed')


if __name__ == '__main__':
  app.run(main)
