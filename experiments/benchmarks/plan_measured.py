"""Compare the memory that a plan predicts with what a step takes.

  python experiments/benchmarks/plan_measured.py

Each row is a process of its own on one device. On a GPU or TPU the allocator's peak is read. A CPU
has no such counter: there it is how far the memory of the process grows in its first step, which
also counts what libraries take outside of the compiler's plan.
"""

import json
import pathlib
import re
import subprocess
import sys
from unittest import mock

from absl import app, flags

WORKER = flags.DEFINE_string('worker', None, 'Internal: the row to measure here.')
ROWS = {
  'plain': {},
  'remat=full': {'model.remat': 'full', 'training.batch_size': 48},
  'microbatches=2, wider': {
    'training.microbatches': 2, 'training.batch_size': 32, 'model.embed_dim': 128},
  'layers unrolled': {'model.scan_layers': False},
}


def main(_) -> None:
  if WORKER.value:
    print('RESULT ' + json.dumps(measure(ROWS[WORKER.value])))
    return
  print(f'{"GiB":24}{"estimated":>10}{"compiled":>10}{"measured":>10}{"compiled / measured":>21}')
  for name in ROWS:
    done = subprocess.run([sys.executable, __file__, f'--worker={name}'], capture_output=True,
                          text=True, check=True)
    found = json.loads(done.stdout.partition('RESULT ')[2])
    print(f'{name:24}' + ''.join(f'{size:10.3f}' for size in found)
          + f'{found[1] / found[2]:21.2f}', flush=True)


def measure(changes: dict) -> list[float]:
  """Return what a step is estimated, compiled and measured to take, with its state, in GiB."""
  import jax

  from jaxllm import config, sharding
  from jaxllm.tools import plan
  from jaxllm.training import cost, state, step

  experiment = config.override(config.load('experiments/quickstart.py'), {
    'model.vocab_size': 4096, 'model.embed_dim': 64, 'model.mlp_dim': 256, 'model.num_layers': 3,
    'model.num_heads': 4, 'model.num_kv_heads': 4, 'model.max_length': 512,
    'model.scan_layers': True, 'data.context_length': 512, 'training.batch_size': 16,
    'optimizer.name': 'adamw', 'objective.chunk_size': 64, **changes})
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  with mock.patch.object(plan, 'find_devices', return_value=(mesh, cost.local_chip(mesh))):
    estimated, compiled = (plan.plan(experiment, 'local', compiles=compiles)['gib']['total']
                           for compiles in (False, True))
  tx = state.make_optimizer(experiment)
  before = state.create_state(experiment, tx, mesh)
  batch = {name: jax.numpy.zeros(leaf.shape, leaf.dtype)
           for name, leaf in step.abstract_batch(experiment, mesh).items()}
  run = step.make_train_step(experiment, tx, mesh).lower(before, batch).compile()
  held = sum(leaf.nbytes for leaf in jax.tree.leaves((before, batch))) / cost.GIB
  jax.block_until_ready((before, batch))
  stats = jax.devices()[0].memory_stats() or {}
  if stats:
    jax.block_until_ready(run(before, batch))
    peak = jax.devices()[0].memory_stats()['peak_bytes_in_use'] / cost.GIB
    return [estimated, compiled, peak]
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak begins anew.
  resident = _resident('VmRSS')
  jax.block_until_ready(run(before, batch))
  return [estimated, compiled, held + _resident('VmHWM') - resident]


def _resident(name: str) -> float:
  text = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{name}:\s+(\d+)', text)[1]) / 2**20


if __name__ == '__main__':
  app.run(main)
