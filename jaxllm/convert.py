"""Convert a model: `python -m jaxllm.convert --source=hf:gpt2 --target=runs/gpt2 --format=jaxllm`.

Both ways: from a Hugging Face directory, `hf:NAME` of its hub or a GGUF file to a checkpoint of
jaxllm, and from any of these to a Hugging Face directory or to exported programs. Each result holds
`conversion_report.json`, its proof. `--format=peft` writes only the adapters of a run.
"""

import os

from jaxllm import config, storage

FLAGS = config.Flags()
SOURCE = FLAGS.string(
  'source', None, 'A workdir, a Hugging Face directory, a .gguf file, hf:NAME of the hub, or '
  'exported programs, which are made anew.',
  required=True)
TARGET = FLAGS.string('target', None, 'The new directory.', required=True)
FORMAT = FLAGS.enum(
  'format', 'jaxllm', ['jaxllm', 'huggingface', 'exported', 'peft'], 'What to write.')
FLAGS.section('Details')
DTYPE = FLAGS.enum(
  'dtype', None, ['float32', 'bfloat16'], 'Of the written parameters; by default as they are.')
REVISION = FLAGS.string('revision', None, 'Commit, tag or branch of a name of the hub.')
IGNORE_AUTO_MAP = FLAGS.bool(
  'ignore_auto_map', False, 'Read a model whose config.json names code, which is not run.')
MESH = FLAGS.string(
  'mesh', None, 'Devices to split it over meanwhile, as in fsdp=4,tensor=2; by default one.')
BUCKETS = FLAGS.list(
  'buckets', ['128', '512', '2048'], 'Lengths in tokens of exported programs.')


def main(_) -> None:  # noqa: D103
  from jaxllm.interop import conversion, exported, sources

  if FORMAT.value == 'peft':
    _write_adapters()
    return
  if not all(length.isdecimal() for length in BUCKETS.value):
    raise ValueError(f'--buckets={",".join(BUCKETS.value)}: numbers with commas between are needed')
  buckets = [int(length) for length in BUCKETS.value]
  conversion.check_target(TARGET.value, FORMAT.value)
  origin = exported.source_of(str(sources.at_hand(SOURCE.value)))
  sources.check_exists(origin, REVISION.value)
  if sources.is_foreign(origin):
    source = sources.open_model(origin, REVISION.value, IGNORE_AUTO_MAP.value)
    report = conversion.from_source(
      source, TARGET.value, FORMAT.value, DTYPE.value, buckets, MESH.value)
  else:
    from jaxllm import loading
    from jaxllm.interop import peft

    loading.describe(origin)
    if FORMAT.value == 'jaxllm':
      raise ValueError(f'--source={SOURCE.value} is a checkpoint of jaxllm already; choose another '
                       '--format')
    stored = 'float32' if peft.base_model(origin) else None
    loaded = loading.load(origin, MESH.value, stored)
    where = origin if storage.is_remote(origin) else os.path.abspath(origin)
    report = conversion.from_model(
      loaded, TARGET.value, FORMAT.value, DTYPE.value, buckets, where)
  proof = report['proof']
  print(f'{TARGET.value}: {FORMAT.value}, proven on {len(proof["prompt_ids"])} tokens')
  if 'max_abs_error' in proof:
    print(f'largest difference of logits {proof["max_abs_error"]:.2e} (bound '
          f'{proof["bound"]:.2e}), KL {proof["kl_divergence"]:.1e}, top-1 agreement '
          f'{100 * proof["top1_agreement"]:.0f}%')


def _write_adapters() -> None:
  """Write the adapters of a run as PEFT does."""
  from jaxllm import loading
  from jaxllm.interop import conversion, peft, sources

  target = conversion.check_target(TARGET.value, 'jaxllm')
  experiment, adapters = loading.adapters(SOURCE.value)
  base = sources.named(experiment.init_from or '')
  if not sources.is_foreign(base):
    raise ValueError(f'--source={SOURCE.value} has adapters to {base!r}, a model of jaxllm, which '
                     'PEFT cannot read: convert the whole run with --format=huggingface')
  form = sources.open_model(base).form
  peft.save(target, adapters, form, experiment.decoder, base.removeprefix(sources.HUB))
  print(f'{target}: adapters to {base}')


if __name__ == '__main__':
  config.run_program(main, FLAGS)
