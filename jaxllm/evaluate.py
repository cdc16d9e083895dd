"""Score a model on held-out text: `python -m jaxllm.evaluate --model=runs/quickstart`."""

import json
import pathlib

from absl import flags

from jaxllm import config

MODEL = flags.DEFINE_string('model', None, 'A workdir or a checkpoint.', required=True)
SPLIT = flags.DEFINE_enum('split', 'validation', ['validation', 'train'], 'Records to score on.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Records in one batch.', 1)
OUTPUT = flags.DEFINE_string('output', None, 'File for the scores, as JSON.')


def main(_) -> None:  # noqa: D103
  from jaxllm import loading, sharding
  from jaxllm.data import batches, records
  from jaxllm.evaluation import perplexity

  model = loading.load(MODEL.value)
  experiment = model.experiment
  if experiment is None:
    raise ValueError(f'--model={MODEL.value} was not trained here, so it has no held-out records')
  directory = pathlib.Path(experiment.records_dir) / experiment.name
  manifest = records.prepare(experiment.data, experiment.tokenizer, directory)
  mesh = sharding.make_mesh(experiment.mesh)
  eval_step = perplexity.make_eval_step(
    model.config, experiment.objective, mesh, experiment.mesh
  )
  held_out = batches.make_batches(
    directory, SPLIT.value, BATCH_SIZE.value, seed=0, shuffle=False, num_epochs=1
  )
  scores = perplexity.evaluate(
    eval_step, model.variables, batches.prefetch(held_out, 0, held_out.num_batches),
    sharding.batch_sharding(mesh, experiment.mesh), manifest.split(SPLIT.value).bytes_per_token,
  )
  for name, value in scores.items():
    print(f'{name:>14}  {value:,.4f}')
  if OUTPUT.value:
    pathlib.Path(OUTPUT.value).write_text(json.dumps(scores, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
  config.run_program(main)
