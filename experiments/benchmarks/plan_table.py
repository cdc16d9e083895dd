"""Plan every preset on its slice, decoding, and four runs beside MaxText, without a TPU.

  pip install --editable '.[plan]'
  python experiments/benchmarks/plan_table.py [--estimate] [--only=gpt3.py:13b,maxtext:7b]

The rows are every variant of an experiment that names a TPU slice (FILE.py:VARIANT), the published
presets without one on the smallest slice that holds them (preset:NAME), decoding with Llama 3
(prefill:NAME@SLICE, decode:NAME@SLICE), and MaxText's four (maxtext:NAME). Each is compiled by a
process of its own, which takes a minute or two, and written to --output as it comes; --estimate
traces them, which takes a second each. A row fails that does not fit, or replicates a matrix that
the mesh could split, or makes the compiler give up on a sharding.
"""

import json
import os
import pathlib
import subprocess
import sys

from absl import app, flags

from jaxllm import config, versions
from jaxllm.tools import plan

ONLY = flags.DEFINE_list('only', None, 'A part of the rows.')
ESTIMATE = flags.DEFINE_bool('estimate', False, 'Trace instead of compiling.')
OUTPUT = flags.DEFINE_string('output', 'runs/plan_table.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: the row to plan here.')

EXPERIMENTS = pathlib.Path(__file__).parent.parent
# Decoding: preset@slice -> (tensor, fsdp, rows); prompts of 4096 tokens in a cache of 8192.
DECODED = {
  'llama3_8b@v5e:2x2': (4, 1, 8), 'llama3_8b@v5p:2x2x1': (4, 1, 32),
  'llama3_70b@v5e:4x8': (8, 4, 8), 'llama3_70b@v5p:2x2x1': (4, 1, 16),
}
# Name -> preset, slice, rows of a chip, length, chunk size, and MaxText 0.2.5's GiB of a chip:
# arguments, temporaries (jax 0.12.0.1, libtpu 0.0.52, full remat, its splash attention).
MAXTEXT = {
  '7b': ('llama2_7b', 'v5p:2x2x1', 4, 4096, 512, 18.83, 15.85),
  '70b': ('llama2_70b', 'v5p:4x8x8', 2, 4096, 512, 3.01, 16.36),
  '175b': ('gpt3_175b', 'v5p:4x8x8', 1, 2048, 256, 7.78, 13.75),
  '8b': ('llama3.1_8b', 'v5e:16x16', 2, 8192, 512, 0.35, 10.34),
}
# For presets without a variant: the first slice that they fit by estimate.
SLICES = ('v5e:2x2', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16', 'v5p:4x4x4', 'v5p:8x8x8', 'v5p:8x8x16')


def main(_) -> None:
  os.environ |= plan.ENVIRONMENT
  if WORKER.value:
    print('RESULT ' + json.dumps(plan_row(WORKER.value, compiles=True)))
    return
  if not ESTIMATE.value and (wrong := versions.mismatch()):
    print(f'error: {wrong}', file=sys.stderr)
    sys.exit(2)
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = json.loads(path.read_text()) if path.exists() and ONLY.value else {}
  print('GiB per chip; ceiling at the chip\'s peak. Right: temporaries of MaxText, and our part.')
  print(f'{"row":32}{"slice":>11}{"chips":>6}{"params":>9}{"held":>7}{"temp":>7}{"total":>7}{"of":>4}'
        f'{"used":>6}{"tokens/s":>12}{"MFU":>5} {"bound":11}{"compile":>8}  problems')
  for name in ONLY.value or names():
    rows[name] = plan_row(name, compiles=False) if ESTIMATE.value else run_worker(name)
    print_row(name, rows[name])
    path.write_text(json.dumps(rows, indent=2) + '\n')
  bad = [name for name, row in rows.items() if row['problems']]
  print(f'wrote {path}' + (f'; problems: {", ".join(bad)}' if bad else '; all fit'))
  sys.exit(bool(bad))


def names() -> list[str]:
  """Return the names of all rows."""
  from jaxllm.models.families import PRESETS

  pods = [
    f'{path.name}:{name}' for path in sorted(EXPERIMENTS.glob('*.py'))
    for name, variant in getattr(config.load_module(str(path)), 'VARIANTS', {}).items()
    if getattr(variant, 'topology', None)]
  there = {name.partition(':')[2] for name in pods} | {
    f'gpt3_{name.partition(":")[2]}' for name in pods if name.startswith('gpt3')}
  return [*(f'maxtext:{name}' for name in MAXTEXT), *pods,
          *(f'{program}:{name}' for name in DECODED for program in ('prefill', 'decode')),
          *(f'preset:{name}' for name in PRESETS if name not in there)]


def run_worker(name: str) -> dict:
  done = subprocess.run([sys.executable, __file__, f'--worker={name}'], capture_output=True,
                        text=True, errors='replace', env=os.environ | plan.ENVIRONMENT)
  results = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
  if not results:
    lines = [line for line in done.stderr.splitlines() if 'Error' in line or 'exceed' in line]
    return {'problems': [(lines or ['no reason given'])[-1][:300]]}
  row = json.loads(results[0].removeprefix('RESULT '))
  if given_up := done.stderr.count('Involuntary full rematerialization'):
    row['problems'].append(f'{given_up} reshardings by full replication')
  return row


def plan_row(name: str, compiles: bool) -> dict:
  """Return the plan of a row, with `topology`; what it replicates in vain is a problem, too."""
  group, _, variant = name.partition(':')
  if group.endswith('.py'):
    topology = config.load_module(str(EXPERIMENTS / group)).VARIANTS[variant].topology
    run, program = config.load(str(EXPERIMENTS / name)), 'train'
  elif group == 'maxtext':
    preset, topology, rows, length, chunk, *_ = MAXTEXT[variant]
    run, program = sized(preset, topology, rows, length, chunk), 'train'
  elif group == 'preset':
    topology, run = smallest(variant)
    program = 'train'
  else:
    preset, _, topology = variant.partition('@')
    tensor, fsdp, rows = DECODED[variant]
    run, program = plan.decoding_run(sized(preset, topology, 1, 8192, 512), rows), group
    run = config.override(run, {'mesh.data': 1, 'mesh.fsdp': fsdp, 'mesh.tensor': tensor})
  made = plan.plan(run, topology, program, compiles)
  made['problems'] += [one for one in made['replicated'] if ' is replicated' in one]
  return {'topology': topology, **made}


def sized(preset: str, topology: str, rows: int, length: int, chunk: int, fsdp: int = 0):
  """Return a run of a preset over all chips of a slice, with so many rows on each."""
  from jaxllm.models.families import PRESETS
  from jaxllm.tools import launch

  chips = launch.parse_slice(topology).chips
  fsdp = fsdp or chips
  base = config.load(str(EXPERIMENTS / 'llama.py:llama2_7b'))
  return base.replace(
    name=preset, mesh=base.mesh.replace(data=chips // fsdp, fsdp=fsdp, tensor=1),
    model=PRESETS[preset].replace(
      dtype='bfloat16', remat='full', attention='splash', max_length=length),
    data=base.data.replace(context_length=length),
    training=base.training.replace(batch_size=rows * chips, microbatches=1),
    objective=base.objective.replace(chunk_size=chunk))


def smallest(preset: str):
  """Return the first of SLICES that a preset fits by estimate, with a run on it."""
  from jaxllm.models.families import PRESETS
  from jaxllm.tools import launch

  length = min(4096, PRESETS[preset].max_length)
  for topology in SLICES:
    chips = launch.parse_slice(topology).chips
    for fsdp in (chips, 64, 16, 1):
      try:
        run = sized(preset, topology, max(1, 8192 // length), length, 512, min(fsdp, chips))
        made = plan.plan(run, topology, compiles=False)
      except ValueError:  # The width does not divide.
        continue
      if made['gib']['total'] < 0.8 * made['gib']['memory']:
        return topology, run
  raise ValueError(f'{preset} fits none of {SLICES}')


def print_row(name: str, row: dict) -> None:
  problems = '; '.join(row['problems']) or '-'
  if 'gib' not in row:
    print(f'{name:32}  {problems}', flush=True)
    return
  gib, ceiling = row['gib'], row['ceiling']
  temporaries = sum(gib.get(one, 0.0) for one in ('gradients', 'saved activations', 'temporaries'))
  took = f'{row["compile_seconds"]:.0f}s' if row['compile_seconds'] else 'estimate'
  if name.startswith('maxtext:'):
    theirs = MAXTEXT[name.partition(':')[2]][-1]
    problems += f'  MaxText {theirs:.2f}, {temporaries / theirs:.2f}'
  print(f'{name:32}{row["topology"]:>11}{row["devices"]:6}{row["parameters"] / 1e9:8.2f}B'
        f'{gib["total"] - temporaries:7.2f}{temporaries:7.2f}{gib["total"]:7.2f}'
        f'{gib["memory"]:4.0f}{gib["total"] / gib["memory"]:6.0%}'
        f'{ceiling["tokens_per_second"]:12,.0f}{ceiling["mfu"]:5.0%} {ceiling["bound"]:11}'
        f'{took:>8}  {problems}', flush=True)


if __name__ == '__main__':
  app.run(main)
