"""Kill a run at random moments, go on, and certify that it is the run that was left alone.

  python -m jaxllm.tools.verify_resume --config=experiments/quickstart.py --kills=5

Starts may take turns between one process and --processes ('2' or '2,4': 1, 2, 4, 1, ...), on this
machine, each with all devices that JAX shows it; every second one may have another --mesh
('{"data": 1, "tensor": 2}'). On one mesh the losses of all steps and all
arrays of the last checkpoint must be equal bit for bit; over several, losses within --tolerance.
The exit code is 1 where they are not, or a committed step was lost.
"""

import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm import config, mistakes, storage

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
KILLS = FLAGS.integer('kills', 5, 'How often the run is killed.', 1)
MESH = FLAGS.string('mesh', None, 'Mesh of every second start, as the JSON of config.mesh.')
PROCESSES = FLAGS.list('processes', [], 'Numbers of processes of starts, in turn with one process.')
TOLERANCE = FLAGS.float('tolerance', 1e-3, 'Largest difference of losses over several meshes.')
SEED = FLAGS.integer('seed', 0, 'Decides the moments.')


def main(_) -> None:  # noqa: D103
  experiment = config.from_flags(CONFIG.value)
  if not all(one.isdecimal() and int(one) for one in PROCESSES.value):
    raise ValueError(f'--processes={",".join(PROCESSES.value)}: expected numbers from 1 on, as in '
                     '--processes=2,4')
  processes = [1, *map(int, PROCESSES.value)]
  mesh = mistakes.parse_json(
    (MESH.value or experiment.mesh.to_json()).encode(), f'--mesh={MESH.value}')
  with tempfile.TemporaryDirectory(prefix='jaxllm-') as directory:
    at, lost, same, *differences = verify(
      experiment, pathlib.Path(directory), KILLS.value, mesh, processes, SEED.value)
  told = ['equal bit for bit' if one == 0 else f'largest difference {one:.2g}'
          for one in differences]
  turns = ', '.join(str(processes[number % len(processes)]) for number in range(KILLS.value + 1))
  print(f'killed {len(at)} times, at steps {", ".join(map(str, at))}\n'
        f'processes of the starts: {turns}\n'
        f'committed steps lost: {lost}\nrecords: {"the same" if same else "OTHERS"}\n'
        f'losses of all steps: {told[0]}\n'
        f'arrays of the last checkpoint: {told[1]}')
  alike = MESH.value is None and {*processes} == {1}
  good = same and not lost and (
    not any(differences) if alike else differences[0] <= TOLERANCE.value)
  print('The resumed run is the run.' if good else 'THE RESUMED RUN IS ANOTHER ONE.')
  sys.exit(0 if good else 1)


def verify(
  experiment: Any, directory: pathlib.Path, kills: int, mesh: Any, processes: Sequence[int],
  seed: int,
) -> tuple[list[int], int, bool, float, float]:
  """Compare a run in a directory that is killed again and again with one that is not.

  Returns:
    The steps at which it was killed, fewer than `kills` where it was over before; how often a
    committed step was lost; whether both had the same records; how far losses and arrays differ.

  Raises:
    RuntimeError: a process ended by itself.
  """
  from jaxllm.checkpoints import reading, store
  from jaxllm.tools.rehearsal import Job
  from jaxllm.training import metrics

  pick, num_steps = random.Random(seed), experiment.training.num_steps
  whole, killed = directory / 'whole', directory / 'killed'
  logged = experiment.replace(training=experiment.training.replace(log_every_steps=1))
  for name, one in (('0', logged), ('1', config.override(logged, {'mesh': mesh}))):
    (directory / f'{name}.json').write_text(one.to_json())

  def start(path: pathlib.Path, number: int) -> Job:
    return Job(directory / f'{number % 2}.json', str(path), processes[number % len(processes)],
               directory / 'said', {'JAX_COMPILATION_CACHE_DIR': ''})

  def saved() -> int:
    return max(store.committed_steps(killed / store.DIRECTORY), default=0)

  at: list[int] = []
  lost, ends = 0, [start(whole, 0)]
  ends[0].codes()
  for number in range(kills):
    before, job = saved(), start(killed, number)
    last = job.step()
    goal = last + pick.randint(1, max(1, (num_steps - last) // (kills - number + 1)))
    if goal < num_steps:
      job.reach(goal)
      time.sleep(pick.uniform(0, 0.2))
      at.append(job.step())
    job.kill()
    lost += saved() < before
  ends.append(start(killed, kills))
  for job in ends:
    if any(codes := job.codes()):
      raise RuntimeError(f'a run ended with {codes}; its processes said:\n{job.said()}')
  records = [storage.read_json(path / 'data.json').get('fingerprint') for path in (whole, killed)]
  losses = [{record['step']: record['train/loss'] for record in metrics.read(path / 'metrics.jsonl')
             if 'train/loss' in record} for path in (whole, killed)]
  arrays = [reading.restore_leaves(path / store.DIRECTORY / str(num_steps))
            for path in (whole, killed)]
  return at, lost, records[0] == records[1], _difference(*losses), _difference(*arrays)


def _difference(first: dict[Any, Any], second: dict[Any, Any]) -> float:
  """Return the largest absolute difference of values with the same keys."""
  if first.keys() != second.keys():
    return float('inf')
  apart = (np.abs(np.subtract(first[key], second[key], dtype=np.float64))
           for key in first if not np.array_equal(first[key], second[key]))
  return max((float(np.max(np.nan_to_num(one, nan=np.inf))) for one in apart), default=0.0)


if __name__ == '__main__':
  config.run_program(main, FLAGS)
