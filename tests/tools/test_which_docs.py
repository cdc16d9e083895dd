"""Each token of a step is led back to the characters of its source, and a text to its steps."""

import json

import numpy as np
import pytest

from jaxllm import storage
from jaxllm.data import preparing, records
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.objectives.preference import Orpo
from jaxllm.tools import which_docs
from jaxllm.training import dataset
from tests import programs
from tests.training import tiny_run

STEPS = 6


def begin(base, **changes):
  """A run as its directory describes it, before its first checkpoint."""
  experiment = tiny_run.experiment(base, **changes)
  manifest = preparing.prepare(
    experiment.data, experiment.tokenizer, experiment.records_path, progress=False)
  run = base / 'run'
  storage.write_file(run / 'config.json', experiment.to_json())
  storage.write_json(run / 'data.json', manifest.model_dump(mode='json'))
  storage.write_file(run / 'metrics.jsonl', json.dumps({'step': STEPS, 'time': 0}) + '\n')
  return run


def everything(run):
  """The spans of all training records."""
  opened = which_docs.open_run(str(run))
  return opened, which_docs.originals(range(len(opened.batches.stored.rows)), opened)


@pytest.mark.parametrize('changes', [
  {}, {'data__packing': 'best_fit'}, {'data__packing': 'concat', 'data__add_eos': False},
  {'tokenizer': {'vocab_size': 300}, 'model__vocab_size': 300},
])
def test_every_token_leads_to_its_characters_and_every_text_to_its_records(tmp_path, changes):
  opened, found = everything(begin(tmp_path, **changes))
  texts = [path.read_text() for path in sorted((tmp_path / 'corpus').iterdir())]
  for row, spans in zip(opened.batches.stored.rows, found, strict=True):
    row = np.frombuffer(row, opened.batches.stored.dtype)[0]
    places = [place for span in spans for place in range(span.start, span.stop)]
    assert places == [*range((row['segment_ids'] > 0).sum())]
    for span in spans:
      assert f'{span.document:03}.txt' in span.where and 'document' in span.where
      assert texts[span.document][slice(*span.characters)] == span.text
  # A text of 60 characters crosses the border of a record of 33 tokens. The token that a record
  # repeats of the one before is not counted as being in it.
  def begins(number, span):
    first = np.frombuffer(opened.batches.stored.rows[number], opened.batches.stored.dtype)[0]
    repeated = len(opened.tokenizer.id_bytes[first['tokens'][0]])
    return span.characters[0] + repeated * (span.start == 0 < span.characters[0])

  for document in {span.document for spans in found for span in spans}:
    text = texts[document][100:160]
    expected = {number for number, spans in enumerate(found) for span in spans
                for other in [texts[span.document].find(text)] if other >= 0
                and begins(number, span) < other + 60 and other < span.characters[1]}
    assert which_docs.records_with(text.encode(), opened) == expected and len(expected) >= 2
  assert not which_docs.records_with(b'no such text', opened)


def test_sources_that_changed_or_are_gone_are_told(tmp_path):
  run = begin(tmp_path)
  _, before = everything(run)
  first, second = (before[0][0].document, before[-1][0].document)
  path = tmp_path / 'corpus' / f'{first:03}.txt'
  path.write_text('x' + path.read_text())
  _, after = everything(run)
  assert 'is not as it was' in after[0][0].where and after[0][0].characters is None
  assert after[0][0].text == before[0][0].text
  assert after[-1] == before[-1] and first != second
  (tmp_path / 'corpus').rename(tmp_path / 'elsewhere')
  _, after = everything(run)
  assert 'cannot be read any more (no such file' in after[-1][0].where
  assert after[-1][0].where.endswith(f'document {second} of source 0')


def which(run, *flags):
  return programs.run('tools.which_docs', f'--workdir={run}', *flags)


def test_the_program_names_the_texts_of_a_step_and_the_steps_of_a_text(tmp_path):
  run = begin(tmp_path)
  code, shown, error = which(run, '--step=2')
  assert code == 0, error
  opened, spans = everything(run)
  for number in opened.batches.numbers(1):
    assert f', record {number}:\n' in shown and spans[number][0].where in shown
  assert shown.count('row ') == 8
  document = spans[opened.batches.numbers(3)[0]][0].document
  text = f'End of scene {document}.'
  code, shown, error = which(run, f'--text={text}')
  found = which_docs.records_with(text.encode(), opened)
  steps = [step + 1 for step in range(STEPS) if found & {*opened.batches.numbers(step)}]
  assert code == 0 and shown == (
    f'{text!r} is in {len(found)} of {len(spans)} training records, read by {len(steps)} of the '
    f'{STEPS} steps: {", ".join(map(str, steps)) or "none"}\n')


@pytest.mark.parametrize('flags, said', [
  ([], 'give one of --step and --text'), (['--text='], 'give one of'),
  (['--text=a', '--step=1'], 'give one of'), (['--step=7'], 'the run has taken 6 steps'),
])
def test_flags_that_do_not_fit_are_refused(tmp_path, flags, said):
  code, _, error = which(begin(tmp_path), *flags)
  assert code == 2 and said in error


def of_task(base, kind, **sources):
  """A run of a task as its directory describes it, and its rows."""
  rows = [{'prompt': f'question {i}', 'chosen': f'yes {i}', 'rejected': 'no, never',
           'text': f'a text {i}', 'label': 'good' if i % 2 else 'bad'} for i in range(30)]
  parts = []
  for name, some in (('one', rows[:20]), ('two', rows[20:])):
    (base / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, some)))
    parts.append({'location': str(base / f'{name}.jsonl'), **sources.get(name, {})})
  task = {'kind': kind, 'data': {'sources': parts}}
  changes = {'preference': {'objective': Orpo()}, 'sentiment': {}, 'classifier': {
    'objective': ClassifierConfig(num_classes=2)}}[kind]
  task |= ({'prompt': '{prompt}:', 'target': '{answer}'} if kind == 'preference' else
           {'kind': 'sentiment', 'prompt': '{text}:', 'labels': (('bad', 'n'), ('good', 'p'))})
  experiment = tiny_run.experiment(base).replace(
    data=records.DataConfig(context_length=32), task=task, evaluation=EvaluationConfig(), **changes)
  manifest = dataset.of_task(experiment, None).manifest
  run = base / 'run'
  storage.write_file(run / 'config.json', experiment.to_json())
  storage.write_json(run / 'data.json', manifest.model_dump(mode='json'))
  storage.write_file(run / 'metrics.jsonl', json.dumps({'step': STEPS, 'time': 0}) + '\n')
  return run, experiment, manifest, rows


@pytest.mark.parametrize('kind', ['sentiment', 'classifier', 'preference'])
@pytest.mark.parametrize('weights', [(), (1.0, 2.0)])
def test_each_token_of_a_task_leads_to_the_row_of_its_example(tmp_path, kind, weights):
  mixed = {name: {'weight': weight} for name, weight in zip(('one', 'two'), weights, strict=False)}
  run, _, manifest, rows = of_task(tmp_path, kind, **mixed)
  opened, found = everything(run)
  assert len(found) == manifest.train.records
  seen = set()
  for number, spans in enumerate(found):
    for span in spans:
      name, _, line = span.where.partition('.jsonl, line ')
      index = int(line.split(',')[0]) - 1 + 20 * name.endswith('two')
      row = rows[index]
      seen.add(index)
      expected = ([f'{row["prompt"]}:{row["chosen"]}', f'{row["prompt"]}:no, never']
                  if kind == 'preference' else
                  [f'{row["text"]}:' + ('' if kind == 'classifier' else
                                        {'good': 'p', 'bad': 'n'}[row['label']])])
      assert span.text.replace(': ', ':') in expected
      if weights:
        assert name.endswith('two') == (number >= manifest.train.source_records[0])
  assert len(seen) == manifest.train.documents == 24
  if weights:
    assert len(manifest.train.source_records) == 2
    # Of each three records that are read, two are of the second source.
    read = [number for step in range(3) for number in opened.batches.numbers(step)]
    assert sum(number >= manifest.train.source_records[0] for number in read) == 16
  code, shown, error = which(run, '--step=1')
  assert code == 0 and '.jsonl, line ' in shown and ', example ' in shown, error
  text = rows[min(seen)]['prompt' if kind == 'preference' else 'text'] + ':'
  holding = which_docs.records_with(text.encode(), opened)
  assert holding == {number for number, spans in enumerate(found)
                     if any(text in span.text for span in spans)} and holding


def test_a_task_whose_data_changed_is_told(tmp_path):
  run, *_ = of_task(tmp_path, 'sentiment')
  path = tmp_path / 'two.jsonl'
  path.write_text(path.read_text().replace('a text', 'another text'))
  code, _, error = which(run, '--step=1')
  assert code == 2 and 'the data of the task are not what they were' in error


def test_what_cannot_be_known_is_told(tmp_path):
  run = begin(tmp_path)
  manifest, = (tmp_path / 'records').glob('*/*/manifest.json')
  fields = storage.read_json(manifest)
  del fields['train']['lineage_sha256']
  storage.write_json(manifest, fields)
  code, _, error = which(run, '--step=1')
  assert code == 2 and 'of a version that did not write down where their tokens' in error
  manifest.unlink()
  code, _, error = which(run, '--step=1')
  assert code == 2 and 'python -m jaxllm.prepare --config=' in error
  code, _, error = which(tmp_path / 'other', '--step=1')
  assert code == 2 and 'there is no run' in error
