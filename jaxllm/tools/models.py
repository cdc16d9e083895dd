"""List the presets, their sizes and where their weights fit: `jaxllm models --like=llama3`.

GiB are those of the weights, and of training with AdamW in float32. `here` is the most that a
device of this machine holds, `v5e` the chips of a TPU v5e that hold the weights in bfloat16.
"""

import json

from jaxllm import config, mistakes

FLAGS = config.Flags()
LIKE = FLAGS.string('like', '', 'A part of their names.')
JSON = FLAGS.bool('json', False, 'Print JSON.')

# Bytes per parameter, from most to least; the scales of int8 and int4 are in them.
BYTES = {'train': 16, 'float32': 4, 'bfloat16': 2, 'int8': 1.03, 'int4': 0.63}
_ROW = '{:<17}{:>8}{:>7}{:>8}{:>9}{:>7}{:>8}  {:<9}{:>3}'


def main(_) -> None:  # noqa: D103
  from jaxllm import sharding
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS
  from jaxllm.training import cost

  if not any(LIKE.value in name for name in PRESETS):
    raise ValueError(f'--like={LIKE.value}: no preset has this in its name'
                     f'{mistakes.hint(LIKE.value, PRESETS)}')
  memory = cost.local_chip(sharding.make_mesh(sharding.MeshConfig())).memory
  v5e, found = cost.CHIPS['v5e'].memory, []
  if not JSON.value:
    print(_ROW.format('preset', 'size', 'layers', 'context', 'bfloat16', 'int4', 'train',
                      'here', 'v5e'))
  for name in (name for name in PRESETS if LIKE.value in name):
    one, size = PRESETS[name], decoder.parameter_count(PRESETS[name])
    gib = {kind: size * number / 2**30 for kind, number in BYTES.items()}
    # The rest is for activations and caches.
    here = next((kind for kind in BYTES if gib[kind] < 0.8 * memory), None)
    chips = next(2**i for i in range(20) if 0.8 * 2**i * v5e > gib['bfloat16'])
    found.append({
      'name': name, 'parameters': size, 'layers': one.num_layers, 'width': one.embed_dim,
      'context': one.max_length, 'gib': gib, 'here': here, 'v5e_chips': chips})
    if not JSON.value:
      print(_ROW.format(
        name, f'{size / 1e9:.2f}B' if size >= 1e9 else f'{size / 1e6:.0f}M', one.num_layers,
        f'{one.max_length:,}', *(f'{gib[kind]:,.1f}' for kind in ('bfloat16', 'int4', 'train')),
        here or '-', chips), flush=True)
  if JSON.value:
    print(json.dumps(found, indent=2))


if __name__ == '__main__':
  config.run_program(main, FLAGS)
