"""Seconds and peak memory to load 0.5 GB of float32 safetensors, against transformers.

  python experiments/benchmarks/load_time.py [--rounds=5] [--models=gpt2_124m,smollm2_135m]

Needs the extra `parity` (torch, transformers). The models have random weights and are written once
into --directory. Every measurement is a process of its own, and the candidates take turns; files
are in the page cache, which the first round, not counted, sees to. `load` is the call that loads,
with one number of every page read afterwards, `process` the whole program with its imports, `peak`
the largest resident memory, mapped files included. jaxllm also checks every number for NaN.
"""

import json
import pathlib
import re
import statistics
import subprocess
import sys
import time

from absl import app, flags

ROUNDS = flags.DEFINE_integer('rounds', 5, 'Times that each candidate is measured.')
MODELS = flags.DEFINE_list('models', ['gpt2_124m', 'smollm2_135m'], 'Presets to load.')
DIRECTORY = flags.DEFINE_string('directory', 'runs/load_time', 'Where the models lie.')
OUTPUT = flags.DEFINE_string('output', 'runs/load_time.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: model/candidate to measure here.')

CANDIDATES = ('jaxllm', 'transformers')
PAGE = 4096


def main(_) -> None:
  if WORKER.value:
    model, name = WORKER.value.split('/')
    print('RESULT ' + json.dumps(measure(str(pathlib.Path(DIRECTORY.value) / model), name)))
    return
  results = {}
  for model in MODELS.value:
    make(model)
    runs = {name: [] for name in CANDIDATES}
    for number in range(ROUNDS.value + 1):
      for name in CANDIDATES:
        result = run_worker(model, name)
        if number:
          runs[name].append(result)
    results[model] = {name: summary(found) for name, found in runs.items()}
    print_table(model, results[model])
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=2) + '\n')
  print(f'wrote {path}')


def make(model: str) -> None:
  """Write a model with random weights, unless it is there."""
  import jax

  from jaxllm.interop import huggingface
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS

  path = pathlib.Path(DIRECTORY.value) / model
  if not path.exists():
    variables = decoder.init(PRESETS[model], jax.random.key(0))
    huggingface.save(path, PRESETS[model], variables)


def run_worker(model: str, name: str) -> dict[str, float]:
  command = [sys.executable, __file__, f'--worker={model}/{name}',
             f'--directory={DIRECTORY.value}']
  begin = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True)
  seconds = time.perf_counter() - begin
  lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
  if not lines:
    sys.exit(f'{name} failed:\n{done.stderr}')
  return json.loads(lines[0].removeprefix('RESULT ')) | {'process_seconds': seconds}


def measure(path: str, name: str) -> dict[str, float]:
  load = {'jaxllm': load_jaxllm, 'transformers': load_transformers}[name]()
  before = peak_mb()
  begin = time.perf_counter()
  arrays = load(path)
  total = sum(float(array.reshape(-1)[:: PAGE // array.itemsize].sum()) for array in arrays)
  return {
    'load_seconds': time.perf_counter() - begin,
    'peak_mb': peak_mb(),
    'imported_mb': before,
    'checksum': total,
  }


def peak_mb() -> float:
  """Largest resident memory of this process so far (`ru_maxrss` would count its parent's)."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 1024


def load_jaxllm():
  import jax
  import numpy as np

  from jaxllm.interop import huggingface, weights

  jax.devices()

  def load(path: str) -> list:
    source = huggingface.open_model(path)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(weights.load(source))]

  return load


def load_transformers():
  import torch
  import transformers

  def load(path: str) -> list:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return [parameter.detach().numpy() for parameter in model.parameters()]

  return load


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
  return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def print_table(model: str, results: dict[str, dict[str, float]]) -> None:
  print(f'\n{model}\n{"":<14}{"load s":>9}{"process s":>11}{"peak MB":>9}{"imports MB":>12}')
  for name, row in results.items():
    print(f'{name:<14}{row["load_seconds"]:>9.2f}{row["process_seconds"]:>11.2f}'
          f'{row["peak_mb"]:>9.0f}{row["imported_mb"]:>12.0f}')
  ours, theirs = (results[name] for name in CANDIDATES)
  ratios = [ours[key] / theirs[key] for key in
            ('load_seconds', 'process_seconds', 'peak_mb', 'imported_mb')]
  print(f'{"ratio":<14}{ratios[0]:>9.2f}{ratios[1]:>11.2f}{ratios[2]:>9.2f}{ratios[3]:>12.2f}')


if __name__ == '__main__':
  app.run(main)
