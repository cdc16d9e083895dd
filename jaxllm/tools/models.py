"""List the presets, their sizes and where their weights fit: `jaxllm models --like=llama3`.

GiB are those of the weights alone, and of training them with AdamW (parameters, gradients and two
moments in float32). `here` is the most that a device of this machine holds, `v5e` the number of
chips of a TPU v5e that hold the weights in bfloat16.
"""

import json
from typing import Any

from jaxllm import config, mistakes

FLAGS = config.Flags()
LIKE = FLAGS.string('like', '', 'A part of their names.')
JSON = FLAGS.bool('json', False, 'Print JSON.')

# Bytes per parameter, from most to least; the scales of int8 and int4 are in them.
BYTES = {'train': 16, 'float32': 4, 'bfloat16': 2, 'int8': 1.03, 'int4': 0.63}
_ROW = '{:<19}{:>8}{:>8}{:>7}{:>9}{:>10}{:>8}{:>8}  {:<9}{:>5}'


def main(_) -> None:  # noqa: D103
  from jaxllm import sharding
  from jaxllm.models.families import PRESETS
  from jaxllm.training import cost

  names = [name for name in PRESETS if LIKE.value in name]
  if not names:
    raise ValueError(f'--like={LIKE.value}: no preset has this in its name'
                     f'{mistakes.hint(LIKE.value, PRESETS)}')
  memory = cost.local_chip(sharding.make_mesh(sharding.MeshConfig())).memory
  found, shown = [], ('bfloat16', 'int4', 'train')
  if not JSON.value:
    print(_ROW.format('preset', 'size', 'layers', 'width', 'context', *shown, 'here', 'v5e'))
  for name in names:
    one = describe(name, PRESETS[name], memory, cost.CHIPS['v5e'].memory)
    found.append(one)
    if not JSON.value:
      size, gib = one['parameters'], one['gib']
      print(_ROW.format(
        name, f'{size / 1e9:.2f}B' if size >= 1e9 else f'{size / 1e6:.0f}M', one['layers'],
        one['width'], f'{one["context"]:,}', *(f'{gib[kind]:,.1f}' for kind in shown),
        one['here'] or '-', one['v5e_chips']), flush=True)
  if JSON.value:
    print(json.dumps(found, indent=2))


def describe(name: str, preset: Any, memory: float, chip: float) -> dict[str, Any]:
  """Return the sizes of a preset, and what a device with so many GiB of memory holds of it."""
  from jaxllm.models import decoder

  size = decoder.parameter_count(preset)
  gib = {kind: size * number / 2**30 for kind, number in BYTES.items()}
  chips = 1
  while chips * chip < gib['bfloat16']:
    chips *= 2
  return {
    'name': name, 'parameters': size, 'layers': preset.num_layers, 'width': preset.embed_dim,
    'context': preset.max_length, 'gib': gib,
    # The rest is for activations and caches.
    'here': next((kind for kind in BYTES if gib[kind] < 0.8 * memory), None), 'v5e_chips': chips}


if __name__ == '__main__':
  config.run_program(main, FLAGS)
