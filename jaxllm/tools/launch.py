"""Print how to start a run on many hosts, or rehearse that on this machine.

  python -m jaxllm.tools.launch --config=experiments/gpt3.py:13b --for=gke > gpt3_13b.yaml
  python -m jaxllm.tools.launch --config=experiments/gpt3.py:13b --for=local --processes=4

--for=tpuvm prints a script for Cloud TPU VMs, gke a JobSet, slurm a batch script, and image the
Dockerfile of the image that GKE runs. Numbers of hosts and chips are those of the experiment;
--config.a.b=value becomes a part of the run's command. --for=local runs a tiny stand-in of it in
several processes, stops one of them and kills another, and prints what that has cost.
"""

import json
import math
import os
import pathlib
import re
import shlex
import string
import tempfile
from typing import Any, NamedTuple

from jaxllm import config

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
FOR = FLAGS.enum('for', None, ['tpuvm', 'gke', 'slurm', 'image', 'local'], 'Where.', required=True)
WORKDIR = FLAGS.string('workdir', None, 'Directory of the run, which all hosts see.')
TOPOLOGY = FLAGS.string('topology', None, 'TPU slice, as v5e:4x4; else that of the variant.')
SLICES = FLAGS.integer('slices', None, 'How many of them; by default config.mesh.slices.',
                       lower_bound=1)
NODES = FLAGS.integer('nodes', None, 'Hosts with GPUs; by default as the mesh needs.',
                      lower_bound=1)
GPUS = FLAGS.integer('gpus_per_node', 8, 'GPUs of each.', lower_bound=1)
SPOT = FLAGS.bool('spot', True, 'Ask for machines that may be taken away at any time.')
ZONE = FLAGS.string('zone', 'us-central1-a', 'Zone of the TPU VMs.')
IMAGE = FLAGS.string('image', 'us-docker.pkg.dev/PROJECT/REPOSITORY/jaxllm:latest', 'For GKE.')
PROCESSES = FLAGS.integer('processes', 4, 'For --for=local.', lower_bound=2)
SEED = FLAGS.integer('seed', 0, 'Of the rehearsal: which process, at which step.')

RECIPES = pathlib.Path(__file__).parent / 'recipes'


class Tpu(NamedTuple):
  """A generation of TPUs (cloud.google.com/tpu/docs, cloud.google.com/kubernetes-engine/docs).

  Slices with one of the `one_host` numbers of chips have one host, larger ones hosts of four.
  Accelerator types count chips, or TensorCores where a chip has two.
  """

  dimensions: int
  one_host: tuple[int, ...]
  machine: str
  accelerator: str
  units_per_chip: int
  runtime: str
  node_label: str


TPUS = {
  'v4': Tpu(3, (4,), 'ct4p-hightpu', 'v4', 2, 'tpu-ubuntu2204-base', 'tpu-v4-podslice'),
  'v5e': Tpu(2, (1, 4, 8), 'ct5lp-hightpu', 'v5litepod', 1, 'v2-alpha-tpuv5-lite',
             'tpu-v5-lite-podslice'),
  'v5p': Tpu(3, (4,), 'ct5p-hightpu', 'v5p', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice'),
  'v6e': Tpu(2, (1, 4, 8), 'ct6e-standard', 'v6e', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice'),
  'tpu7x': Tpu(3, (4,), 'tpu7x-standard', '', 1, '', 'tpu7x'),  # In GKE alone.
}


class Slice(NamedTuple):
  """A TPU slice: hosts x chips_per_host = chips."""

  tpu: Tpu
  shape: str
  chips: int
  hosts: int
  machine: str


def parse_slice(topology: str) -> Slice:
  """Return the slice that is called GENERATION:AxB or GENERATION:AxBxC.

  Raises:
    ValueError: there is no such generation or shape.
  """
  name, _, shape = topology.partition(':')
  if name not in TPUS:
    raise ValueError(f'--topology={topology}: a generation of {", ".join(TPUS)} and a shape are '
                     'needed, as in v5e:4x4')
  tpu = TPUS[name]
  sizes = [int(size) for size in shape.split('x')] if re.fullmatch(r'\d+(x\d+)*', shape) else []
  chips = math.prod(sizes)
  whole = chips in tpu.one_host or (chips > max(tpu.one_host) and chips % 4 == 0)
  if len(sizes) != tpu.dimensions or not whole:
    example = '2x2x1, 2x2x4 or 4x4x8' if tpu.dimensions == 3 else '2x2, 2x4 or 8x16'
    raise ValueError(f'--topology={topology}: slices of {name} have shapes such as {example}')
  hosts = 1 if chips in tpu.one_host else chips // 4
  return Slice(tpu, shape, chips, hosts, f'{tpu.machine}-{chips // hosts}t')


def main(_) -> None:  # noqa: D103
  os.environ['JAX_PLATFORMS'] = 'cpu'  # What is looked for is not here.
  experiment = config.from_flags(CONFIG.value)
  if FOR.value == 'local':
    from jaxllm.tools import rehearsal

    with tempfile.TemporaryDirectory(prefix='jaxllm-rehearsal-') as directory:
      workdir = WORKDIR.value or f'{directory}/run'
      rehearsal.rehearse(experiment, workdir, directory, PROCESSES.value, SEED.value)
    return
  print(recipe(experiment), end='')


def recipe(experiment: Any) -> str:
  """Return the recipe that the flags ask for; a ValueError says why there is none."""
  from jaxllm import sharding

  target, topology = FOR.value, TOPOLOGY.value or topology_of(CONFIG.value)
  if target == 'image':
    return _fill('Dockerfile', extra='tpu' if topology else 'cuda13')
  root = '/shared' if target == 'slurm' else 'gs://BUCKET'
  workdir = WORKDIR.value or f'{root}/runs/{experiment.name}'
  changes = {'records_dir': f'{workdir.rpartition("/")[0]}/records', **config.overrides()}
  mesh, slices = experiment.mesh, SLICES.value or experiment.mesh.slices
  if topology and slices != mesh.slices:
    mesh = config.override(mesh, {'slices': slices})
    changes['mesh.slices'] = slices
  command = [f'--config={CONFIG.value}', f'--workdir={workdir}', '--distributed',
             *(f'--config.{path}={value}' for path, value in changes.items())]
  values = {
    'config': CONFIG.value, 'name': re.sub(r'[^a-z0-9]+', '-', experiment.name.lower()),
    'image': IMAGE.value, 'workdir': shlex.quote(workdir), 'arguments_json': json.dumps(command),
    'arguments': ' \\\n  '.join(map(shlex.quote, command))}
  if target == 'tpuvm' and not topology:
    raise ValueError(f'--for=tpuvm: {CONFIG.value} names no TPU slice; give --topology=v5e:4x4')
  if target == 'slurm' or not topology:
    nodes = NODES.value or _nodes(experiment)
    sharding.mesh_shape(experiment.mesh, nodes * GPUS.value)
    name = 'slurm.sh' if target == 'slurm' else 'gke_gpu.yaml'
    return _fill(name, **values, hosts=nodes, gpus=GPUS.value)
  part = parse_slice(topology)
  sharding.mesh_shape(mesh, part.chips * slices * (2 if part.tpu is TPUS['tpu7x'] else 1))
  if target == 'tpuvm' and not part.tpu.accelerator:
    raise ValueError('--for=tpuvm: TPU7x is not part of the Cloud TPU API; use --for=gke')
  return _fill(
    'tpuvm.sh' if target == 'tpuvm' else 'gke_tpu.yaml', **values, **part.tpu._asdict(),
    hosts=part.hosts, chips=part.chips, chips_per_host=part.chips // part.hosts, shape=part.shape,
    machine_type=part.machine, slices=slices, zone=ZONE.value,
    accelerator_type=f'{part.tpu.accelerator}-{part.chips * part.tpu.units_per_chip}',
    spot='--spot' if SPOT.value else '',
    spot_selector='cloud.google.com/gke-spot: "true"' if SPOT.value else '# On-demand machines.')


def topology_of(location: str) -> str | None:
  """Return the TPU slice that the variant of an experiment file names."""
  name, _, variant = location.partition(':')
  if not variant or not name.endswith('.py'):
    return None
  variants = getattr(config.load_module(name), 'VARIANTS', {})
  return getattr(variants.get(variant), 'topology', None)


def _nodes(experiment: Any) -> int:
  from jaxllm import sharding

  sizes = [getattr(experiment.mesh, axis) for axis in sharding.MESH_AXES]
  if -1 in sizes:
    raise ValueError(f'--nodes is missing: config.mesh of {CONFIG.value} takes any number')
  return -(-math.prod(sizes) // GPUS.value)


class _Recipe(string.Template):
  delimiter = '@'


def _fill(file: str, /, **values: Any) -> str:
  return _Recipe((RECIPES / file).read_text()).substitute(values)


if __name__ == '__main__':
  config.run_program(main, FLAGS)
