"""Train a model: `python -m jaxllm.train --config=experiments/quickstart.py --workdir=runs/demo`.

The same command goes on where an interrupted run stopped. `--config.a.b=value` changes a field.
"""

import pathlib
import sys

import jax
from absl import flags, logging

from jaxllm import config

CONFIG = config.define_flag()
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
CACHE = flags.DEFINE_string(
  'compilation_cache', '~/.cache/jaxllm/compiled',
  'Directory that keeps compiled programs between runs; empty: none.',
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Connect the processes of a TPU pod or a multi-host GPU job first.'
)


def main(_) -> None:  # noqa: D103
  logging.set_stderrthreshold('info')
  if CACHE.value:
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(CACHE.value).expanduser()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  if DISTRIBUTED.value:
    jax.distributed.initialize()
  experiment = config.from_flags(CONFIG.value)
  from jaxllm.checkpoints import store
  from jaxllm.training import loop

  try:
    summary = loop.train(experiment, WORKDIR.value)
  except (loop.TrainingStopped, store.CheckpointError) as error:
    sys.exit(f'error: {error}')
  if not summary['complete']:
    return
  print(f'{summary["step"]:,} steps, {summary["parameters"]:,} parameters')
  if 'validation' in summary:
    scores = summary['validation']
    told = {'loss': 'held-out loss', 'perplexity': 'perplexity', 'bits_per_byte': 'bits per byte',
            'accuracy': 'accuracy'}
    print(', '.join(f'{text} {scores[name]:.4f}' for name, text in told.items() if name in scores))
  samples = pathlib.Path(WORKDIR.value) / 'samples.jsonl'
  if samples.exists():
    import json

    for line in samples.read_text(encoding='utf-8').splitlines():
      sample = json.loads(line)
      print(f'--- {sample["prompt"]!r}\n{sample["prompt"]}{sample["text"]}')
  print(f'report: {pathlib.Path(WORKDIR.value) / "report.html"}')


if __name__ == '__main__':
  config.run_program(main)
