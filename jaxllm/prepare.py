"""Prepare data: `python -m jaxllm.prepare --config=experiments/quickstart.py`.

Cleans, tokenises and packs the text of an experiment into records, and prints what came out.
Training does the same by itself where it is needed.
"""

from jaxllm import config

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
DRY_RUN = FLAGS.bool('dry_run', False, config.DRY_RUN_HELP)


def main(_) -> None:  # noqa: D103
  if DRY_RUN.value:
    from jaxllm.tools import plan

    plan.dry_run(CONFIG.value)
    return
  from jaxllm.data import records

  experiment = config.from_flags(CONFIG.value)
  directory = experiment.records_path
  manifest = records.prepare(experiment.data, experiment.tokenizer, directory)
  print(f'{directory / manifest.folder}: vocabulary {manifest.vocab_size}, '
        f'context {manifest.context_length}')
  for name in manifest.data.splits:
    split = manifest.split(name)
    print(f'  {name}: {split.documents:,} documents, {split.text_bytes:,} bytes, '
          f'{split.tokens:,} tokens ({split.bytes_per_token:.2f} bytes each), '
          f'{split.records:,} records')


if __name__ == '__main__':
  config.run_program(main, FLAGS)
