"""Score a model: `python -m jaxllm.evaluate --model=runs/quickstart`.

- A run is scored on its held-out records, or on the task that it was fine-tuned on.
- `--tasks=sentiment,translation` scores any model on tasks, on their default data; a .json file
  gives their configs, `--data` the records of a single one.
- `--text=FILE` scores any model on a text of any kind that training reads: loss and perplexity per
  token, and bits per byte, which tokenizers do not change.
- `--baseline=OTHER` scores another model on the same examples, with a paired significance test.
- `--quantize=int8` scores the model with smaller weights, beside itself as it is: what they cost.

From Python: `jaxllm.evaluate('runs/quickstart', text='play.txt')` returns the scores.
"""

import json

from jaxllm import config, mistakes, storage

FLAGS = config.Flags()
MODEL, MESH, DTYPE = FLAGS.model()
TASKS = FLAGS.string('tasks', None, 'Kinds of tasks, or a .json file of their configs.')
DATA = FLAGS.string(
  'data', None, 'Records of the task: a file, package:NAME, tfds:NAME?split= or hf:NAME?split=.')
TEXT = FLAGS.multi_string('text', [], 'A file to measure; may be repeated.')
SPLIT = FLAGS.string('split', None, "What is scored: 'test' of tasks, else 'validation'.")
LIMIT = FLAGS.integer('limit', None, 'Most records of a task.', 1)
BASELINE = FLAGS.string('baseline', None, 'Another model, to be compared with.')
OUTPUT = FLAGS.string('output', None, 'File for scores and predictions, as JSON.')
JSON = FLAGS.bool('json', False, 'Print JSON.')
FLAGS.section('Windows and batches')
CONTEXT_LENGTH = FLAGS.integer(
  'context_length', None, "Tokens of a window of a text; by default the model's, at most 1024.", 2)
STRIDE = FLAGS.integer(
  'stride', None, 'Tokens that a window of a text predicts; by default half of it.', 1)
BATCH_SIZE = FLAGS.integer('batch_size', 8, 'Records or prompts in one batch.', 1)
FLAGS.section(config.LOADING)
QUANTIZE = FLAGS.enum(
  'quantize', None, ['int8', 'int4'], 'Store the weights smaller; the baseline is then the model.')


def main(_) -> None:  # noqa: D103
  from jaxllm.evaluation import tables
  from jaxllm.training import evaluation

  if OUTPUT.value and storage.is_remote(storage.path(OUTPUT.value, '--output=')):
    storage.make_writable(storage.path(OUTPUT.value).parent, '--output=')
  elif OUTPUT.value:
    mistakes.check_writeable(OUTPUT.value, '--output')
  found = evaluation.evaluate(
    MODEL.value, TASKS.value or '', TEXT.value,
    **{flag.name: flag.value for flag in (
      BASELINE, QUANTIZE, DATA, SPLIT, LIMIT, CONTEXT_LENGTH, STRIDE, BATCH_SIZE, MESH, DTYPE)})
  if 'tasks' in found:
    found = {'model': MODEL.value, 'quantize': QUANTIZE.value, 'baseline': BASELINE.value, **found}
  # Records may hold dates.
  text = json.dumps(found, indent=2, ensure_ascii=False, default=str)
  if OUTPUT.value:
    storage.write_file(OUTPUT.value, text + '\n')
  if JSON.value:
    print(text)
  elif results := found.get('tasks'):
    print(tables.render(results))
    for name, result in results.items():
      if overlap := result['contamination']:
        print(f'{name}: {overlap["overlapping"]} of {overlap["texts"]} texts share a run of '
              f'{overlap["ngram_words"]} words (or are whole) with the training records')
      if confusion := result.get('confusion'):
        print(f'{name}:\n{tables.render_confusion(confusion)}')
  else:
    whole = found.get('baseline', {})
    for name, value in found.items():
      if name != 'baseline':
        number = '{:,.0f}'.format if name == 'tokens' else tables.number
        beside = f'  ({number(whole[name])} unless {QUANTIZE.value})' if whole else ''
        print(f'{name.replace("_", " "):>14}  {number(value)}{beside}')


config.make_callable(__name__, 'jaxllm.training.evaluation:evaluate')

if __name__ == '__main__':
  config.run_program(main, FLAGS)
