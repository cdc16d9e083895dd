"""What a save costs: how long the loop is blocked, by what, and how long the whole save takes.

  python experiments/benchmarks/save_cost.py [--megabytes=1360] [--count=3]

A state of stacked layers is saved asynchronously by jaxllm, with a fingerprint of every array, and
by Orbax's manager alone. Printed are the medians of `count` saves: seconds until the call returns
(the loop is blocked so long), seconds until the step is on disk, the fingerprints by themselves.
"""

import json
import pathlib
import statistics
import tempfile
import time

from absl import app, flags

MEGABYTES = flags.DEFINE_integer('megabytes', 1360, 'Size of the state.')
COUNT = flags.DEFINE_integer('count', 3, 'Saves of each kind.')
DIRECTORY = flags.DEFINE_string('directory', None, 'Where it is saved, for a while.')
OUTPUT = flags.DEFINE_string('output', 'runs/save_cost.json', 'Where the JSON goes.')


def main(_) -> None:
  import jax
  import jax.numpy as jnp
  import orbax.checkpoint as ocp

  from jaxllm.checkpoints import fingerprints, store, tree
  from jaxllm.checkpoints.bundle import Bundle

  width = 256
  layers = max(1, MEGABYTES.value * 250_000 // (3 * 12 * width * width))
  keys = jax.random.split(jax.random.key(0), 9)
  sizes = {'attention': (layers, width, 4 * width), 'up': (layers, width, 4 * width),
           'down': (layers, 4 * width, width)}
  state = jax.block_until_ready({
    name: {part: jax.random.normal(keys[3 * i + j], shape, jnp.float32)
           for j, (part, shape) in enumerate(sizes.items())}
    for i, name in enumerate(('params', 'mu', 'nu'))})
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9

  def timed(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin

  rows = {name: [] for name in (
    'fingerprints', 'jaxllm', 'jaxllm, on disk', 'Orbax', 'Orbax, on disk')}
  with tempfile.TemporaryDirectory(prefix='jaxllm-', dir=DIRECTORY.value) as folder:
    ours = store.open_store(pathlib.Path(folder) / 'ours', store.CheckpointConfig(keep_last=1))
    plain = ocp.CheckpointManager(
      pathlib.Path(folder) / 'plain', options=ocp.CheckpointManagerOptions(max_to_keep=1))
    for step in range(COUNT.value + 1):  # The first one compiles and opens.
      found = {'fingerprints': [timed(lambda: fingerprints.fingerprints(tree.flatten(state)))]}
      begin = time.perf_counter()
      blocked = timed(lambda step=step: store.save(ours, step, state, Bundle('{}', {}, {})))
      store.wait(ours)
      found |= {'jaxllm': [blocked], 'jaxllm, on disk': [time.perf_counter() - begin]}
      begin = time.perf_counter()
      blocked = timed(lambda step=step: plain.save(step, args=ocp.args.StandardSave(state)))
      plain.wait_until_finished()
      found |= {'Orbax': [blocked], 'Orbax, on disk': [time.perf_counter() - begin]}
      if step:
        rows = {name: [*old, *found[name]] for name, old in rows.items()}
    store.close(ours)
    plain.close()
  medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
  print(f'{size:.2f} GB on {jax.devices()[0].device_kind}')
  for name, seconds in medians.items():
    share = seconds / medians['jaxllm, on disk']
    print(f'{name:16}{1000 * seconds:10.1f} ms{share:8.1%} of a save')
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({'gigabytes': size, 'seconds': rows}, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
