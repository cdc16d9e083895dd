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
import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from jaxllm import versions
from jaxllm.tools import plan

ONLY = flags.DEFINE_list('only', None, 'A part of the rows: FILE.py:VARIANT or PRESET@SLICE.')
OUTPUT = flags.DEFINE_string('output', 'runs/tpu_compile.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: the row to compile here.')

EXPERIMENTS = pathlib.Path(__file__).parent.parent
# Decoding: slice -> (tensor, fsdp, rows of the batch).
DECODED = {
  'llama3_8b@v5e:2x2': (4, 1, 8), 'llama3_8b@v5p:2x2x1': (4, 1, 32),
  'llama3_70b@v5e:4x8': (8, 4, 8), 'llama3_70b@v5p:2x2x1': (4, 1, 16),
}
PROMPT, CONTEXT = 4096, 8192


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
    command, capture_output=True, text=True, errors='replace', env=os.environ | plan.ENVIRONMENT
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
  from jaxllm import config

  name, _, variant = location.partition(':')
  topology = config.load_module(str(EXPERIMENTS / name)).VARIANTS[variant].topology
  made = plan.plan(config.load(str(EXPERIMENTS / location)), topology)
  return {'topology': topology, **made, 'problems': made['problems'] + [
    one for one in made['replicated'] if ' is replicated' in one]}


def compile_decoding(location: str) -> dict:
  import jax
  from jax.experimental import topologies

  from jaxllm import sharding
  from jaxllm.generation import decode_state
  from jaxllm.generation.sampling import Request, SamplingConfig
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS
  from jaxllm.training import cost

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
  memory_gib = cost.CHIPS[topology.partition(':')[0]].memory
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
            f'{gib["total"]:7.2f}{gib["memory"]:4.0f}{gib["total"] / gib["memory"]:6.0%}{"":14}'
            f'{gib["compile_seconds"]:8.0f}s  {problems}', flush=True)
  if 'gib' not in row:
    return
  gib, seconds = row['gib'], row['seconds']
  temporaries = sum(gib[name] for name in ('gradients', 'saved activations', 'temporaries'))
  gb = sum(one['bytes'] for one in row['exchanged']) / 1e9
  links = seconds['exchange'] / seconds['arithmetic']
  print(f'{location:24}{row["topology"]:>12}{row["devices"]:6}{row["parameters"] / 1e9:7.2f}B'
        f'{gib["total"] - temporaries:7.2f}{temporaries:7.2f}{gib["total"]:7.2f}'
        f'{gib["memory"]:4.0f}{gib["total"] / gib["memory"]:6.0%}{gb:7.1f}{links:7.0%}'
        f'{row["compile_seconds"]:8.0f}s  {problems}', flush=True)


if __name__ == '__main__':
  app.run(main)
