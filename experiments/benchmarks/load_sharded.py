"""Peak host memory while a model of 1 GB is loaded onto 8 devices.

  python experiments/benchmarks/load_sharded.py [--mesh=fsdp=4,tensor=2]

The model has random float32 weights and is written once into --directory, as shards of Hugging
Face's format and as a checkpoint of jaxllm. Each is loaded by a process of its own on 8 virtual CPU
devices, whose memory is the host's: the size of the model counts once. `peak` is the largest
anonymous memory while it is loaded, less that before; pages of mapped files, which the system takes
back when it needs them, do not count, and stand in the last column. The program fails where the
peak reaches the size of the model plus two of its largest tensors.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading

from absl import app, flags

MESH = flags.DEFINE_string('mesh', 'fsdp=4,tensor=2', 'What the model is split over.')
DIRECTORY = flags.DEFINE_string('directory', 'runs/load_sharded', 'Where the models lie.')
OUTPUT = flags.DEFINE_string('output', 'runs/load_sharded.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: the model to load here.')

FORMS = ('huggingface', 'jaxllm')


def main(_) -> None:
  directory = pathlib.Path(DIRECTORY.value)
  if WORKER.value:
    print('RESULT ' + json.dumps(measure(directory / WORKER.value)))
    return
  make(directory)
  print(f'{"":<12}{"size MB":>9}{"largest MB":>12}{"bound MB":>10}{"peak MB":>9}{"+ files MB":>12}')
  results = {form: run_worker(form) for form in FORMS}
  for form, row in results.items():
    bound = row['size_mb'] + 2 * row['largest_mb']
    print(f'{form:<12}{row["size_mb"]:>9.0f}{row["largest_mb"]:>12.0f}{bound:>10.0f}'
          f'{row["peak_mb"]:>9.0f}{row["with_files_mb"]:>12.0f}')
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=2) + '\n')
  print(f'wrote {path}')
  if any(row['peak_mb'] >= row['size_mb'] + 2 * row['largest_mb'] for row in results.values()):
    sys.exit('the peak is not under the size plus two of the largest tensors')


def make(directory: pathlib.Path) -> None:
  """Write the model in both forms, unless it is there."""
  import jax

  from jaxllm.checkpoints import store
  from jaxllm.data import tokenizers
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.interop import huggingface
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS

  config = PRESETS['llama2_7b'].replace(
    num_layers=16, embed_dim=1024, num_heads=16, num_kv_heads=8, mlp_dim=2816, dtype='float32')
  if directory.exists():
    return
  variables = decoder.init(config, jax.random.key(0))
  files = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), ()).files()
  huggingface.save(directory / FORMS[0], config, variables, files, shard_bytes=200_000_000)
  store.save_converted(directory / FORMS[1], config, variables, files, {'model_type': 'llama'})


def run_worker(form: str) -> dict[str, float]:
  devices = '--xla_force_host_platform_device_count=8'
  done = subprocess.run(
    [sys.executable, __file__, f'--worker={form}', f'--directory={DIRECTORY.value}',
     f'--mesh={MESH.value}'], capture_output=True, text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': devices})
  lines = [line for line in done.stdout.split('\n') if line.startswith('RESULT ')]
  if not lines:
    sys.exit(f'{form} failed:\n{done.stderr}')
  return json.loads(lines[0].removeprefix('RESULT '))


def measure(path: pathlib.Path) -> dict[str, float]:
  import jax

  from jaxllm import loading

  jax.devices()
  before, peak, done = memory_mb('RssAnon'), 0.0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, memory_mb('RssAnon'))

  watcher = threading.Thread(target=watch)
  watcher.start()
  model = loading.load(path, MESH.value)
  leaves = jax.block_until_ready(jax.tree.leaves(model.variables))
  done.set()
  watcher.join()
  sizes = [leaf.nbytes / 1e6 for leaf in leaves]
  return {'size_mb': sum(sizes), 'largest_mb': max(sizes), 'peak_mb': peak - before,
          'with_files_mb': memory_mb('VmHWM') - before}


def memory_mb(name: str) -> float:
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{name}:\s+(\d+) kB', status)[1]) * 1024 / 1e6


if __name__ == '__main__':
  app.run(main)
