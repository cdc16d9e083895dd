"""Compile a run's train step before a machine is paid for: memory, time, and what to change.

  python -m jaxllm.tools.plan --config=experiments/llama.py:llama3_8b [--topology=v5p:4x4x4]

No TPU is needed for a slice of TPUs, only the package libtpu (extra `plan`); --topology=local
compiles for the devices of this machine. What does not fit comes with changes, each compiled too.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm import config, versions

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
TOPOLOGY = FLAGS.string('topology', None, 'TPU slice, as v5e:4x4, or local; by default that of the '
                        'variant, else local.')
JSON = FLAGS.bool('json', False, 'Print JSON.')

# No TPU is looked for, and none is locked: only the compiler is used.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_STDERR_LOG_LEVEL': '3', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'none',
}
GIB = 2**30
# Kind, GiB of memory, GB/s that a chip sends over all its links (cloud.google.com/tpu/docs).
CHIPS = {'v4': ('TPU v4', 32.0, 300.0), 'v5e': ('TPU v5e', 15.75, 200.0),
         'v5p': ('TPU v5p', 95.0, 600.0), 'v6e': ('TPU v6e', 31.25, 400.0)}
_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


def main(_) -> None:  # noqa: D103
  from jaxllm.tools import launch

  topology = TOPOLOGY.value or launch.topology_of(CONFIG.value) or 'local'
  if topology != 'local':
    os.environ.update(ENVIRONMENT)
  experiment = config.from_flags(CONFIG.value)
  made = plan(experiment, topology)
  if made['problems']:
    made['proposals'] = proposals(experiment, topology)
  print(json.dumps(made, indent=2) if JSON.value else page(made))


def find_devices(topology: str, mesh: Any) -> tuple[Any, tuple[str, float, float]]:
  """Return the mesh of a config over the devices of a slice, or of this machine, and their chip."""
  import jax

  from jaxllm import sharding
  from jaxllm.tools import launch

  if topology == 'local':
    found = sharding.make_mesh(mesh)
    device = found.devices.flat[0]
    limit = (device.memory_stats() or {}).get('bytes_limit')
    if limit is None:  # A CPU: the memory of the machine.
      limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.device_count()
    return found, (device.device_kind, limit / GIB, math.inf)
  sharding.mesh_shape(mesh, launch.parse_slice(topology).chips)
  generation = topology.partition(':')[0]
  if generation not in CHIPS:
    raise ValueError(f'--topology={topology}: chips that can be planned are {", ".join(CHIPS)}')
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(f'--topology={topology}: the compiler for TPUs, libtpu, is not installed: pip '
                     "install 'jaxllm[plan]'")
  if wrong := versions.mismatch():
    raise ValueError(wrong)
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  return sharding.make_mesh(mesh, devices), CHIPS[generation]


def plan(experiment: Any, topology: str) -> dict[str, Any]:
  """Return what the compiler says of the real train step on a slice, or on 'local' devices.

  `seconds` are those at the chip's peak; `ceiling` follows from the longest (None: none is known).
  """
  import jax

  from jaxllm.models import decoder
  from jaxllm.training import dataset, goodput, state, step

  mesh, (kind, capacity, links) = find_devices(topology, experiment.mesh)
  dataset.check_batch(experiment, mesh)
  tx, training = state.make_optimizer(experiment), experiment.training
  before = state.abstract_state(experiment, tx, mesh)
  train_step: Any = step.make_train_step(experiment, tx, mesh)
  lowered = train_step.lower(before, step.abstract_batch(experiment, mesh))
  params, optimizer, known = (_bytes(tree) / GIB for tree in (
    before.params, (before.opt_state, before.ema), before))
  started, exchanged = time.monotonic(), []
  try:
    compiled = lowered.compile()
    exchanged = collectives(compiled.as_text(), mesh)
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes / GIB
    rest = (memory.temp_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes) / GIB
  except jax.errors.JaxRuntimeError as error:  # The compiler of TPUs refuses what does not fit.
    used = re.search(r'Used ([\d.]+)G of ([\d.]+)G hbm', str(error))
    if not used:
      raise
    arguments, rest = known, float(used[1]) - known
    capacity = float(used[2])
  flops = goodput.flops_per_step(experiment)
  peak = goodput.device_peak_flops(kind, experiment.decoder.dtype)
  sent = sum(one['bytes'] for one in exchanged)
  seconds = {'arithmetic': flops / mesh.size / peak, 'exchange': sent / links / 1e9
             } if peak else {}
  longest = max(seconds.values(), default=None)
  tokens = training.batch_size * experiment.data.context_length
  whole = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, leaf in jax.tree_util.tree_leaves_with_path(before.params)
    if mesh.shape['fsdp'] * mesh.shape['tensor'] > 1 and path[-1].key in ('kernel', 'embedding')
    and leaf.sharding.shard_shape(leaf.shape) == leaf.shape
  ]
  total = arguments + rest
  return {
    'name': experiment.name, 'device': kind, 'devices': mesh.size,
    'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')
                 if importlib.util.find_spec(name)},
    'compile_seconds': time.monotonic() - started,
    'parameters': decoder.parameter_count(experiment.decoder), 'tokens_per_step': tokens,
    'gib': {
      'parameters': params, 'optimizer': optimizer,
      'other arguments': arguments - params - optimizer,
      'gradients': min(params, rest), 'activations, other temporaries': max(rest - params, 0.0),
      'total': total, 'memory': capacity,
    },
    'flops': flops, 'exchanged': exchanged, 'seconds': seconds,
    'ceiling': longest and {
      'bound': max(seconds, key=seconds.__getitem__), 'mfu': seconds['arithmetic'] / longest,
      'tokens_per_second': tokens / longest, 'days': training.num_steps * longest / 86400,
      'chip_hours': training.num_steps * longest * mesh.size / 3600,
    },
    'problems': [f'needs {total:.1f} GiB of {capacity:.1f}'] * (total > capacity)
    + [f'{path} is replicated, which the mesh could split' for path in whole],
  }


def _bytes(tree: Any) -> int:
  """Return the bytes that each device holds of a tree of shapes with shardings."""
  import jax

  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


def collectives(text: str, mesh: Any) -> list[dict[str, Any]]:
  """Return what a program's text says that a step exchanges; the bytes are those a device sends.

  The pieces of an operation that is fused with arithmetic share a channel, and count once. Rings
  send about the size of its larger side, all-reduce twice that; fused, it is a reduce-scatter.
  """
  bodies: dict[str, list[str]] = {}
  name = ''
  for line in text.split('\n'):
    if line.endswith('{') and (head := re.match(r'(ENTRY )?%?([\w.-]+)', line)):
      name = 'ENTRY' if head[1] else head[2]
      bodies[name] = []
    elif name:
      bodies[name].append(line)

  def visit(name: str, times: int) -> None:
    for line in bodies[name]:
      if loop := re.search(r' while\(.*condition=%([\w.-]+), body=%([\w.-]+)', line):
        bounds = re.findall(r' [su]32\[\]\S* constant\((\d+)\)', '\n'.join(bodies[loop[1]]))
        visit(loop[2], times * max(map(int, bounds), default=1))
      elif found := re.search(rf'= (.*?) ({"|".join(_KINDS)})(-start)?\(', line):
        channel = re.search(r'channel_id=\d+', line)
        if channel and channel[0] in seen:
          continue
        seen.add(channel and channel[0])
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else found[2]
        where = kind, _axes(line, mesh)
        count, size = totals.get(where, (0, 0.0))
        sizes = [
          int((re.search(r'\d+', dtype) or ['8'])[0]) // 8 * math.prod(
            map(int, filter(None, dims.split(','))))
          for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', found[1])
        ]
        # An asynchronous operation returns operand and result, other tuples are several results.
        sent = (max if found[3] else sum)(sizes) * (2 if kind == 'all-reduce' else 1)
        totals[where] = count + times, size + sent * times
      else:
        for callee in re.findall(r'(?:calls|to_apply)=%([\w.-]+)', line):
          visit(callee, times)

  totals: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
  seen: set[str | None] = set()
  visit('ENTRY', 1)
  return [{'kind': kind, 'axes': ' '.join(axes), 'per_step': count, 'bytes': size}
          for (kind, axes), (count, size) in sorted(totals.items(), key=lambda one: -one[1][1])]


def _axes(line: str, mesh: Any) -> tuple[str, ...]:
  """Return the mesh axes along which the devices of a group, or of a pair, differ."""
  varying: set[int] = set()
  for group in _groups(line, mesh.size):
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)))
  return tuple(mesh.axis_names[axis] for axis in sorted(varying))


def _groups(line: str, size: int) -> Iterator[np.ndarray]:
  """Yield the places of devices that exchange something, as XLA writes them."""
  if made := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    shape, dims, order = ([int(one) for one in (part or '').split(',') if one]
                          for part in made.groups())
    places = np.arange(math.prod(dims)).reshape(dims)
    yield from (places.transpose(order) if order else places).reshape(shape)
  elif named := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', line):
    for group in re.findall(r'\{([\d,]+)\}', named[1]):
      yield np.array([int(one) for one in group.split(',')])
  else:
    yield np.arange(size)


def proposals(experiment: Any, topology: str) -> list[dict[str, Any]]:
  """Return what saves memory, as flags, each compiled: what fits first, then by time and memory."""
  training, mesh, found = experiment.training, experiment.mesh, []
  for is_open, change in (
    (True, {'training.microbatches': 2 * training.microbatches}),
    (experiment.decoder.remat not in ('full', 'offload'), {'model.remat': 'full'}),
    (experiment.decoder.remat != 'offload', {'model.remat': 'offload'}),
    (getattr(experiment.objective, 'chunk_size', 0) is None, {'objective.chunk_size': 512}),
    (mesh.data % 2 == 0, {'mesh.data': mesh.data // 2, 'mesh.fsdp': 2 * mesh.fsdp}),
  ):
    with contextlib.suppress(ValueError):  # Rows do not divide.
      made = plan(config.override(experiment, change), topology) if is_open else None
      found += [made | {'flags': ' '.join(f'--config.{key}={change[key]}' for key in change)}
                ] if made else []
  found.sort(key=lambda one: (
    len(one['problems']), max(one['seconds'].values(), default=0), one['gib']['total']))
  return [{key: one[key] for key in ('flags', 'problems', 'gib', 'seconds')} for one in found]


def better_compiler(found: Mapping[str, str]) -> str:
  """Return a sentence about a libtpu that packs memory better than this one; '': none is known."""
  best = next((known[0] for start, known in versions.LIBTPU.items()
               if found['jax'].startswith(start)), '')
  return '' if found.get('libtpu', best).startswith(best) else (
    f"libtpu {best} needs less memory than {found['libtpu']}: pip install 'libtpu=={best}.*'")


def page(made: Mapping[str, Any]) -> str:
  """Return a plan as a page of text."""
  def text(value: Any) -> str:
    if isinstance(value, dict):
      return ', '.join(f'{key} {text(one)}' for key, one in value.items())
    if isinstance(value, list):
      return ''.join(f'\n    {text(one)}' for one in value)
    return str(value) if isinstance(value, str) else f'{value:,.4g}'

  rows = [f'{name.replace("_", " "):<18}{text(value)}' for name, value in made.items() if value]
  return '\n'.join([*rows, better_compiler(made['versions'])]).rstrip()


if __name__ == '__main__':
  config.run_program(main, FLAGS)
