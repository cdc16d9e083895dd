"""Save a training state on each of seven meshes, restore it onto each of them, and compare bits.

  python experiments/benchmarks/mesh_pairs.py

The state is that of a small Llama-like model with AdamW, on eight virtual devices. A
pair is equal where every array that is restored has the shards of its mesh and the bits of the one
that was saved, and the stored fingerprints are the same from every mesh.
"""

import json
import os
import pathlib
import tempfile

from absl import app, flags

OUTPUT = flags.DEFINE_string('output', 'runs/mesh_pairs.json', 'Where the JSON goes.')
MESHES = ({'data': 1}, {'data': 8}, {'data': 1, 'fsdp': 8}, {'data': 1, 'tensor': 4},
          {'data': 2, 'fsdp': 2, 'tensor': 2}, {'data': 1, 'fsdp': 4, 'tensor': 2},
          {'data': 2, 'context': 4})


def main(_) -> None:
  os.environ |= {'JAX_PLATFORMS': 'cpu',
                 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  import math

  import jax
  import numpy as np

  from jaxllm import sharding
  from jaxllm.checkpoints import reading, store, tree
  from jaxllm.checkpoints.bundle import Bundle
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.experiment import Experiment, TrainingConfig
  from jaxllm.models.decoder import DecoderConfig
  from jaxllm.training import state as state_lib

  model = DecoderConfig(vocab_size=264, embed_dim=32, num_layers=3, num_heads=8, num_kv_heads=4,
                        mlp_dim=64, max_length=64)
  meshes = []
  for sizes in MESHES:
    experiment = Experiment(
      name='pairs', model=model, mesh=sizes, tokenizer=TokenizerConfig(kind='bytes'),
      data=DataConfig(sources=(SourceConfig(location='none'),), context_length=64),
      training=TrainingConfig(num_steps=1, batch_size=8))
    devices = jax.devices()[:math.prod(sizes.values())]
    meshes.append((experiment, sharding.make_mesh(experiment.mesh, devices)))
  rows, equal, known = {}, 0, None
  with tempfile.TemporaryDirectory() as directory:
    for number, (experiment, mesh) in enumerate(meshes):
      tx = state_lib.make_optimizer(experiment)
      state = state_lib.create_state(experiment, tx, mesh, None, None).replace(frozen={})
      path = pathlib.Path(directory) / str(number)
      opened = store.open_store(path, experiment.checkpoint)
      store.save(opened, 1, state, Bundle(experiment.to_json(), {}, {}))
      store.wait(opened)
      saved = {name: np.asarray(leaf) for name, leaf in tree.flatten(state).items()}
      prints = reading.read_bundle(path / '1').leaves
      known = known or prints
      row = []
      for other, target in meshes:
        abstract = state_lib.abstract_state(other, tx, target).replace(frozen={})
        found = tree.flatten(store.restore(opened, abstract, 1))
        wanted = tree.flatten(abstract)
        row.append(prints == known and all(
          leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim)
          and np.asarray(leaf).tobytes() == saved[name].tobytes()
          for name, leaf in found.items()))
      store.close(opened)
      rows[json.dumps(MESHES[number])] = row
      equal += sum(row)
      print(f'saved on {json.dumps(MESHES[number])}: {sum(row)} of {len(row)} equal', flush=True)
  print(f'{equal} of {len(MESHES) ** 2} pairs equal')
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows, indent=2) + '\n')
  print(f'wrote {path}')


if __name__ == '__main__':
  app.run(main)
