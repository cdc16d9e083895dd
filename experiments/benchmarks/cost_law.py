"""How step time and memory grow with layers, width, context and batch.

  python experiments/benchmarks/cost_law.py                       (measured on this machine)
  pip install --editable '.[plan]'
  python experiments/benchmarks/cost_law.py --topology=v5p:2x2x1  (compiled for a slice)

One size at a time is changed, and the real train step is measured: its time, the processor time
that it takes (which other programs on the machine disturb less), and the memory that the compiler
assigns. For a slice nothing runs: the compiler says memory and operations. `off` is how far
the points lie from a straight line, in percent of the largest; `exponent` is the slope between the
two largest sizes on logarithmic axes. With matplotlib installed the points are drawn beside the
JSON, which is written after each point: a run that is cut off goes on where it was.
"""

import json
import os
import pathlib
import statistics
import time

import numpy as np
from absl import app, flags

from jaxllm.tools import plan

TOPOLOGY = flags.DEFINE_string('topology', None, 'A TPU slice to compile for, as v5p:2x2x1.')
STEPS = flags.DEFINE_integer('steps', 7, 'Steps that are timed at each point, in each round.')
ROUNDS = flags.DEFINE_integer('rounds', 1, 'Times that all points are measured, in turns.')
OUTPUT = flags.DEFINE_string('output', None, 'Where the JSON goes; runs/cost_law_...json.')

# Of each size the values, of which the second is that of all other points.
MEASURED = {
  'layers': (1, 2, 3, 4, 6), 'width': (128, 256, 384, 512, 640),
  'context': (64, 128, 256, 512, 1024), 'batch': (2, 4, 8, 16, 32),
}
COMPILED = {
  'layers': (2, 4, 8, 12), 'width': (512, 1024, 2048, 4096),
  'context': (1024, 2048, 4096, 8192), 'batch': (4, 8, 16, 32),
}
# What is drawn and fitted, with its unit.
COSTS = {'seconds': ('ms', 1e3), 'cpu_seconds': ('ms', 1e3), 'flops': ('GFLOP', 1e-9),
         'arguments': ('MiB', 2**-20), 'temporaries': ('MiB', 2**-20)}


def main(_) -> None:
  place = (TOPOLOGY.value or 'local').replace(':', '_')
  path = pathlib.Path(OUTPUT.value or f'runs/cost_law_{place}.json')
  path.parent.mkdir(parents=True, exist_ok=True)
  if TOPOLOGY.value:
    os.environ.update(plan.ENVIRONMENT)
  sizes = COMPILED if TOPOLOGY.value else MEASURED
  rows = json.loads(path.read_text()) if path.exists() else []
  for turn in range(1 if TOPOLOGY.value else ROUNDS.value):
    for point in points(sizes):
      if any(row['point'] == point and row['turn'] == turn for row in rows):
        continue
      rows.append({'point': point, 'turn': turn, **cost(point)})
      path.write_text(json.dumps(rows, indent=1) + '\n')
      print(*(f'{name} {value}' for name, value in rows[-1].items()), flush=True)
  series = {axis: one_axis(rows, sizes, axis) for axis in sizes}
  print_table(series)
  draw(series, path.with_suffix('.png'))


def points(sizes: dict) -> list[dict]:
  """Return all points, each once: those of one axis have the second value of all others."""
  base = {axis: values[1] for axis, values in sizes.items()}
  found = [base | {axis: value} for axis, values in sizes.items() for value in values]
  return [point for index, point in enumerate(found) if point not in found[:index]]


def experiment_of(point: dict):
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.experiment import Experiment, TrainingConfig
  from jaxllm.models.config import DecoderConfig
  from jaxllm.sharding import MeshConfig

  width, sliced = point['width'], TOPOLOGY.value is not None
  return Experiment(
    name='cost_law',
    model=DecoderConfig(
      vocab_size=32000 if sliced else 1024, embed_dim=width, num_layers=point['layers'],
      num_heads=width // (128 if sliced else 64), mlp_dim=3 * width, max_length=point['context'],
      scan_layers=False,  # The compiler counts the operations of a loop's body once.
      **({'dtype': 'bfloat16', 'remat': 'full', 'attention': 'splash'} if sliced else {})),
    data=DataConfig(
      sources=(SourceConfig(location='unused'),), context_length=point['context']),
    tokenizer=TokenizerConfig(kind='bytes'),
    training=TrainingConfig(num_steps=1000, batch_size=point['batch']),
    mesh=MeshConfig(data=1, fsdp=-1 if sliced else 1),
  )


def cost(point: dict) -> dict[str, float]:
  """Compile the train step of one point, and run it unless it is for a slice."""
  import jax

  from jaxllm import sharding
  from jaxllm.training import goodput, state, step

  experiment = experiment_of(point)
  if TOPOLOGY.value:
    mesh, _ = plan.find_devices(TOPOLOGY.value, experiment.mesh)
  else:
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  tx = state.make_optimizer(experiment)
  train_step = step.make_train_step(experiment, tx, mesh)
  started = time.monotonic()
  compiled = train_step.lower(
    state.abstract_state(experiment, tx, mesh), step.abstract_batch(experiment, mesh)).compile()
  memory = compiled.memory_analysis()
  made = {
    'flops': compiled.cost_analysis()['flops'] * mesh.size,
    'counted_flops': goodput.flops_per_step(experiment),
    'arguments': memory.argument_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
    'compile_seconds': time.monotonic() - started,
  }
  return made if TOPOLOGY.value else made | timed(compiled, experiment, tx, mesh)


def timed(compiled, experiment, tx, mesh) -> dict[str, float]:
  import jax

  from jaxllm import sharding
  from jaxllm.training import state, step

  numbers, vocabulary = np.random.default_rng(0), experiment.decoder.vocab_size
  batch = {
    name: numbers.integers(0, vocabulary, leaf.shape).astype(leaf.dtype)
    if name in ('tokens', 'targets') else np.ones(leaf.shape, leaf.dtype)
    for name, leaf in step.abstract_batch(experiment, mesh).items()}
  batch['positions'] = np.broadcast_to(
    np.arange(batch['tokens'].shape[1], dtype=np.int32), batch['tokens'].shape)
  placed = sharding.put_batch(batch, sharding.batch_sharding(mesh, experiment.mesh))
  holder, wall, processor = state.create_state(experiment, tx, mesh, None), [], []
  for _ in range(STEPS.value + 2):
    started = time.perf_counter(), time.process_time()
    holder, metrics = compiled(holder, placed)
    jax.block_until_ready((holder, metrics))
    wall.append(time.perf_counter() - started[0])
    processor.append(time.process_time() - started[1])
  return {'seconds': statistics.median(wall[2:]), 'cpu_seconds': statistics.median(processor[2:])}


def one_axis(rows: list[dict], sizes: dict, axis: str) -> dict[str, list[float]]:
  """Return the sizes of one axis and each cost at these, the median over rounds."""
  base = {name: values[1] for name, values in sizes.items()}
  at = {value: [row for row in rows if row['point'] == base | {axis: value}]
        for value in sizes[axis]}
  at = {value: same for value, same in at.items() if same}
  return {'size': list(at), **{
    name: [statistics.median(row[name] for row in same) for same in at.values()]
    for name in COSTS if all(name in row for row in rows)}}


def fit(size: list[float], value: list[float]) -> dict[str, float]:
  """Return the straight line through the points, how far they lie from it, and the last slope."""
  slope, start = np.polyfit(size, value, 1)
  off = np.abs(slope * np.array(size) + start - value).max() / max(value)
  return {'per_one': slope, 'at_zero': start, 'off': off,
          'exponent': np.log(value[-1] / value[-2]) / np.log(size[-1] / size[-2])}


def print_table(series: dict) -> None:
  print(f'\n{"axis":9}{"cost":13}{"unit":7}{"at the sizes":48}{"line":>24}{"off":>6}'
        f'{"exponent":>10}')
  for axis, found in series.items():
    for name, (unit, factor) in COSTS.items():
      if name in found:
        made = fit(found['size'], found[name])
        values = ' '.join(f'{one * factor:.4g}' for one in found[name])
        line = f'{made["at_zero"] * factor:.3g} + {made["per_one"] * factor:.3g} x'
        print(f'{axis:9}{name:13}{unit:7}{values:48}{line:>24}{made["off"]:6.1%}'
              f'{made["exponent"]:10.2f}')


def draw(series: dict, path: pathlib.Path) -> None:
  try:
    import matplotlib
  except ImportError:
    print('no plot: matplotlib is not installed')
    return
  matplotlib.use('Agg')
  from matplotlib import pyplot

  names = [name for name in COSTS if name in next(iter(series.values()))]
  figure, axes = pyplot.subplots(len(names), len(series), figsize=(4 * len(series), 3 * len(names)))
  for column, (axis, found) in enumerate(series.items()):
    for row, name in enumerate(names):
      unit, factor = COSTS[name]
      made, values = fit(found['size'], found[name]), np.array(found[name]) * factor
      line = np.array([0, found['size'][-1]])
      axes[row][column].plot(found['size'], values, 'o')
      axes[row][column].plot(
        line, (made['at_zero'] + made['per_one'] * line) * factor, linewidth=0.8)
      axes[row][column].set(
        xlabel=axis, ylabel=f'{name} ({unit})', ylim=(0, 1.1 * values.max()))
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  print(f'wrote {path}')


if __name__ == '__main__':
  app.run(main)
