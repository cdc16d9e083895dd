"""Compile every pod experiment, and decoding with Llama 3, for TPU slices, without a TPU.

  pip install --editable '.[plan]'
  python experiments/benchmarks/tpu_compile.py [--only=gpt3.py:13b,llama3_8b@v5e:2x2]

The train step is the real one: real config, real mesh, donated state. Decoding is that of
`generate`: the prefill of a full batch of prompts, and one decode step, in bfloat16. The compiler
says what each chip holds and exchanges; the table sets that against the chip's memory and
arithmetic. A row fails that does not fit, replicates a matrix which the mesh could split, or makes
the compiler give up on a sharding. Every row is compiled by a process of its own, which takes a
minute or two.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

from absl import app, flags

from jaxllm import versions

ONLY = flags.DEFINE_list('only', None, 'A part of the rows: FILE.py:VARIANT or PRESET@SLICE.')
OUTPUT = flags.DEFINE_string('output', 'runs/tpu_compile.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: the row to compile here.')

EXPERIMENTS = pathlib.Path(__file__).parent.parent
# GiB of memory, and GB/s that a chip sends over all its links (cloud.google.com/tpu/docs/*).
CHIPS = {'v4': (32, 300), 'v5e': (16, 200), 'v5p': (95, 600), 'v6e': (32, 400)}
# Decoding: slice -> (tensor, fsdp, rows of the batch).
DECODED = {
  'llama3_8b@v5e:2x2': (4, 1, 8), 'llama3_8b@v5p:2x2x1': (4, 1, 32),
  'llama3_70b@v5e:4x8': (8, 4, 8), 'llama3_70b@v5p:2x2x1': (4, 1, 16),
}
PROMPT, CONTEXT = 4096, 8192
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
# No TPU is looked for, and none is locked: only the compiler is used.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_STDERR_LOG_LEVEL': '1',
}


def main(_) -> None:
  if WORKER.value:
    compile_row = compile_decoding if WORKER.value in DECODED else compile_step
    print('RESULT ' + json.dumps(compile_row(WORKER.value)))
    return
  if wrong := versions.mismatch():
    print(f'error: {wrong}', file=sys.stderr)
    sys.exit(2)
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = json.loads(path.read_text()) if path.exists() and ONLY.value else {}
  print_header()
  for location in ONLY.value or [*pods(), *DECODED]:
    rows[location] = run_worker(location)
    print_row(location, rows[location])
    path.write_text(json.dumps(rows, indent=2) + '\n')
  bad = [location for location, row in rows.items() if row['problems']]
  print(f'wrote {path}' + (f'; problems: {", ".join(bad)}' if bad else '; all fit'))
  sys.exit(bool(bad))


def pods() -> list[str]:
  """Return FILE.py:VARIANT of every variant that names a TPU slice."""
  from jaxllm import config

  return [
    f'{path.name}:{name}' for path in sorted(EXPERIMENTS.glob('*.py'))
    for name, variant in getattr(config.load_module(str(path)), 'VARIANTS', {}).items()
    if getattr(variant, 'topology', None)
  ]


def run_worker(location: str) -> dict:
  command = [sys.executable, __file__, f'--worker={location}']
  done = subprocess.run(
    command, capture_output=True, text=True, errors='replace', env=os.environ | ENVIRONMENT
  )
  results = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
  if not results:
    lines = [line for line in done.stderr.splitlines() if 'Error' in line or 'exceed' in line]
    return {'problems': [(lines or ['no reason given'])[-1][:300]]}
  row = json.loads(results[0].removeprefix('RESULT '))
  given_up = done.stderr.count('Involuntary full rematerialization')
  if given_up:
    row['problems'].append(f'{given_up} reshardings by full replication')
  return row


def compile_step(location: str) -> dict:
  from jax.experimental import topologies

  from jaxllm import config, sharding
  from jaxllm.models import decoder
  from jaxllm.training import goodput, state, step

  name, _, variant = location.partition(':')
  topology = config.load_module(str(EXPERIMENTS / name)).VARIANTS[variant].topology
  experiment = config.load(str(EXPERIMENTS / location))
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = sharding.make_mesh(experiment.mesh, devices)
  tx = state.make_optimizer(experiment)
  before = state.abstract_state(experiment, tx, mesh)
  train_step = step.make_train_step(experiment, tx, mesh)
  started = time.monotonic()
  compiled = train_step.lower(before, step.abstract_batch(experiment, mesh)).compile()
  seconds = time.monotonic() - started

  memory = compiled.memory_analysis()
  memory_gib, link_gb = CHIPS[topology.partition(':')[0]]
  gib = {
    'arguments': memory.argument_size_in_bytes / 2**30,
    'outputs': (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30,
    'temporaries': memory.temp_size_in_bytes / 2**30,
  }
  context = experiment.data.context_length
  tokens = experiment.training.batch_size * context / len(devices)
  peak = goodput.device_peak_flops(devices[0].device_kind, 'bfloat16')
  compute = 3 * experiment.model.flops_per_token(context) * tokens / peak
  exchanged = collectives(compiled.as_text())
  exchange = sum(size for _, size in exchanged.values()) / (link_gb * 1e9)
  whole = replicated(before.params, compiled.input_shardings[0][0].params, mesh)
  total = sum(gib.values())
  return {
    'topology': topology,
    'chips': len(devices),
    'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
    'parameters': decoder.parameter_count(experiment.model),
    'tokens_per_chip_and_microbatch': tokens / experiment.training.microbatches,
    'gib_per_chip': gib | {'total': total, 'memory': memory_gib},
    'replicated': whole,
    'collectives': {
      kind: {'per_step': count, 'gb': size / 1e9} for kind, (count, size) in exchanged.items()
    },
    'seconds_at_peak': {'compute': compute, 'exchange': exchange},
    'compile_seconds': seconds,
    'problems': [f'needs {total:.1f} GiB of {memory_gib}'] * (total > memory_gib)
    + [f'{path} is replicated' for path in whole],
  }


def compile_decoding(location: str) -> dict:
  import jax
  from jax.experimental import topologies

  from jaxllm import sharding
  from jaxllm.generation import decode_state
  from jaxllm.generation.sampling import Request, SamplingConfig
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS

  preset, _, topology = location.partition('@')
  tensor, fsdp, rows = DECODED[location]
  config = PRESETS[preset].replace(dtype='bfloat16', max_length=CONTEXT)
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh_config = sharding.MeshConfig(tensor=tensor, fsdp=fsdp)
  mesh = sharding.make_mesh(mesh_config, devices)

  shapes, axes = decoder.abstract(config)
  shapes = jax.eval_shape(decoder.unstack, shapes)
  layers = jax.tree.map(lambda names: names[1:], axes['params']['layers'],
                        is_leaf=lambda leaf: isinstance(leaf, tuple))
  axes = {'params': axes['params'] | {'layers': dict.fromkeys(shapes['params']['layers'], layers)}}
  variables = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, 'bfloat16', sharding=where),
    shapes, sharding.shardings(axes, shapes, mesh, mesh_config))
  request = Request((1,) * PROMPT, SamplingConfig(max_new_tokens=CONTEXT - PROMPT), 0)

  def place(leaf):
    names = ('batch', 'kv_heads') if leaf.ndim == 4 else ('batch',)
    spec = sharding.partition_spec(names, mesh_config.rules)
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  state = jax.tree.map(place, jax.eval_shape(
    lambda: decode_state.init_decode_state(config, [request] * rows, stacked=False)))
  model = decoder.Decoder(config)

  def decode_step(variables, state):
    return decode_state.sample_step(*decode_state.next_logits(model, variables, state))

  row = {'topology': topology, 'chips': len(devices), 'rows': rows,
         'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
         'parameters': decoder.parameter_count(config), 'problems': []}
  memory_gib, _ = CHIPS[topology.partition(':')[0]]
  with sharding.active(sharding.Placement(mesh, mesh_config)):
    for name, lowered in (
      ('prefill', lambda: decode_state.prefill.lower(model, variables, state, PROMPT)),
      ('decode step', lambda: jax.jit(decode_step, donate_argnums=1).lower(variables, state)),
    ):
      started = time.monotonic()
      compiled = lowered().compile()
      memory = compiled.memory_analysis()
      arguments, temporaries = (
        size / 2**30 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
      total = arguments + temporaries + (
        memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30
      row[name] = {'arguments': arguments, 'temporaries': temporaries, 'total': total,
                   'memory': memory_gib, 'compile_seconds': time.monotonic() - started}
      if total > memory_gib:
        row['problems'].append(f'{name} needs {total:.1f} GiB of {memory_gib}')
  return row


def replicated(shapes, shardings, mesh) -> list[str]:
  """Return the matrices that the compiled step takes whole though the mesh splits parameters."""
  import jax

  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings), strict=True)
    if mesh.shape['fsdp'] * mesh.shape['tensor'] > 1 and path[-1].key in ('kernel', 'embedding')
    and where.shard_shape(leaf.shape) == leaf.shape
  ]


def collectives(text: str) -> dict[str, tuple[int, float]]:
  """Count what one step exchanges: kind -> (operations, bytes that a chip sends).

  A loop counts as often as its condition says; the pieces of an operation that is fused with
  arithmetic share a channel, and count once. Rings send about the size of the larger side of the
  operation, and all-reduce twice that; fused, it may be one half of a reduce-scatter.
  """
  bodies, name = {}, ''
  for line in text.splitlines():
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
      elif found := re.search(rf'= (.*?) ({"|".join(KINDS)})(-start)?\(', line):
        channel = re.search(r'channel_id=\d+', line)
        if channel and channel[0] in seen:
          continue
        seen.add(channel and channel[0])
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else found[2]
        count, size = totals.get(kind, (0, 0.0))
        sizes = [
          BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(','))))
          for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', found[1])
        ]
        # An asynchronous operation returns operand and result, other tuples are several results.
        sent = (max if found[3] else sum)(sizes) * (2 if kind == 'all-reduce' else 1)
        totals[kind] = count + times, size + sent * times
      else:
        for callee in re.findall(r'(?:calls|to_apply)=%([\w.-]+)', line):
          visit(callee, times)

  totals: dict[str, tuple[int, float]] = {}
  seen: set[str | None] = set()
  visit('ENTRY', 1)
  return totals


def print_header() -> None:
  print('GiB per chip; exchanged GB per chip and step; links: time to exchange them, in percent of '
        'the arithmetic,\nboth at the chip\'s peak')
  print(f'{"experiment":24}{"slice":>12}{"chips":>6}{"params":>8}{"args":>7}{"temp":>7}{"total":>7}'
        f'{"of":>4}{"used":>6}{"GB":>7}{"links":>7}{"compile":>9}  problems')


def print_row(location: str, row: dict) -> None:
  problems = '; '.join(row['problems']) or '-'
  if 'topology' not in row:
    print(f'{location:24}  {problems}', flush=True)
    return
  for name in ('prefill', 'decode step'):
    if gib := row.get(name):
      print(f'{location.partition("@")[0]:12}{name:12}{row["topology"]:>12}{row["chips"]:6}'
            f'{row["parameters"] / 1e9:7.2f}B{gib["arguments"]:7.2f}{gib["temporaries"]:7.2f}'
            f'{gib["total"]:7.2f}{gib["memory"]:4}{gib["total"] / gib["memory"]:6.0%}{"":14}'
            f'{gib["compile_seconds"]:8.0f}s  {problems}', flush=True)
  if 'gib_per_chip' not in row:
    return
  gib, seconds = row['gib_per_chip'], row['seconds_at_peak']
  gb = sum(found['gb'] for found in row['collectives'].values())
  links = seconds['exchange'] / seconds['compute']
  print(f'{location:24}{row["topology"]:>12}{row["chips"]:6}{row["parameters"] / 1e9:7.2f}B'
        f'{gib["arguments"]:7.2f}{gib["temporaries"]:7.2f}{gib["total"]:7.2f}{gib["memory"]:4}'
        f'{gib["total"] / gib["memory"]:6.0%}{gb:7.1f}{links:7.0%}{row["compile_seconds"]:8.0f}s  '
        f'{problems}', flush=True)


if __name__ == '__main__':
  app.run(main)
