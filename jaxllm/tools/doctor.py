"""Look whether this machine can run jaxllm: `jaxllm doctor`.

Versions, devices, memory, disk, the cache of compiled programs, and a run of seconds that trains a
model, saves it, loads it and samples. Green is good, yellow works with a loss that is told, red
does not work; each comes with what mends it. The exit code is 1 where something is red.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

from packaging import requirements

from jaxllm import config, mistakes, versions

FLAGS = config.Flags()
JSON = FLAGS.bool('json', False, 'Print JSON.')

Finding = tuple[str, str]


def main(_) -> None:  # noqa: D103
  found = []
  for check in (packages, devices, room, cache, self_test):
    name = check.__name__.replace('_', '-')
    try:
      findings = list(check())
    except Exception as error:
      findings = [('red', mistakes.sentence(error) or repr(error))]
    for colour, said in findings:
      found.append({'check': name, 'colour': colour, 'said': said})
      if not JSON.value:
        print(f'{mistakes.paint(f"{colour:<8}", colour)}{name:<11}{said}', flush=True)
  if JSON.value:
    print(json.dumps(found, indent=2))
  sys.exit(any(one['colour'] == 'red' for one in found))


def packages() -> Iterator[Finding]:
  """Compare what is installed with what was tested, and with each other."""
  for line in importlib.metadata.requires('jaxllm') or ():
    need = requirements.Requirement(line)
    if need.marker is None and (version := versions.installed(need.name)) not in need.specifier:
      yield ('yellow' if version else 'red',
             f"{need.name} {version or 'is missing'}, tested: pip install '{line}'")
  if wrong := versions.mismatch():
    yield 'red', wrong
  tested = versions.installed('jax').startswith(tuple(versions.LIBTPU))
  text = ', '.join(f'{name} {versions.installed(name)}' for name in ('jaxllm', 'jax', 'flax'))
  yield ('green', f'{text}: tested') if tested else (
    'yellow', f'{text}: tested with jax {", ".join(versions.LIBTPU)}')


def devices() -> Iterator[Finding]:
  """Start JAX, and look whether there is an accelerator that it does not use."""
  import jax

  from jaxllm import sharding
  from jaxllm.training import cost

  chip = cost.local_chip(sharding.make_mesh(sharding.MeshConfig()))
  for kind, files, extra in (('gpu', ('nvidia0',), 'cuda13'), ('tpu', ('accel0', 'vfio/0'), 'tpu')):
    if any(os.path.exists(f'/dev/{file}') for file in files) and jax.default_backend() != kind:
      yield 'yellow', f"there is a {kind.upper()}, unused: pip install 'jaxllm[{extra}]'"
  yield 'green', f'{jax.device_count()} x {chip.kind}, {chip.memory:.1f} GiB each'


def room() -> Iterator[Finding]:
  """Look for memory and disk."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES') / 2**30
  yield 'yellow' if memory < 1 else 'green', f'{memory:.1f} GiB of memory are free'
  for path in ('.', tempfile.gettempdir()):
    free = shutil.disk_usage(path).free / 2**30
    colour = 'red' if free < 0.1 else 'yellow' if free < 5 else 'green'
    yield colour, f'{free:.1f} GiB of disk are free at {os.path.abspath(path)}'


def cache() -> Iterator[Finding]:
  """Look whether compiled programs are kept."""
  place = os.environ['JAX_COMPILATION_CACHE_DIR']
  if not place:
    yield 'yellow', 'JAX_COMPILATION_CACHE_DIR is empty: every start compiles everything again'
    return
  mistakes.check_writeable(f'{place}/x', 'JAX_COMPILATION_CACHE_DIR')
  sizes = [file.stat().st_size for file in pathlib.Path(place).glob('*') if file.is_file()]
  yield 'green', f'{len(sizes):,} files of {sum(sizes) / 2**20:,.0f} MiB in {place}'


def self_test() -> Iterator[Finding]:
  """Train a tiny model on this file, save it, load it, and sample."""
  import jax

  import jaxllm
  from jaxllm.training import metrics

  started = time.monotonic()
  model = jaxllm.DecoderConfig(
    vocab_size=257, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_length=64)
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
    jaxllm.train(jaxllm.Experiment(
      name='doctor', records_dir=folder, tokenizer=jaxllm.TokenizerConfig(kind='bytes'),
      data=jaxllm.DataConfig(sources=__file__, context_length=64, validation=None), model=model,
      training=jaxllm.TrainingConfig(
        num_steps=40, batch_size=8 * jax.device_count(), log_every_steps=1, writers=()),
    ), f'{folder}/run')
    losses = [one['train/loss'] for one in metrics.read(f'{folder}/run/metrics.jsonl')
              if 'train/loss' in one]
    text = jaxllm.generate(f'{folder}/run', 'def ', max_new_tokens=8)
  yield ('green' if losses[-1] < losses[0] and text else 'red',
         f'trained, saved, loaded and sampled in {time.monotonic() - started:.1f} s; the loss fell '
         f'from {losses[0]:.2f} to {losses[-1]:.2f}')


if __name__ == '__main__':
  config.run_program(main, FLAGS)
