"""`prepare` shows records as the model reads them, and says beforehand what cleaning will do."""

import re
import sys

import pytest

from jaxllm import prepare
from jaxllm.config import override
from jaxllm.data import documents
from jaxllm.training import dataset
from tests import programs
from tests.training import tiny_run


@pytest.mark.parametrize('packing', ['packed', 'best_fit', 'concat'])
def test_the_records_that_are_shown_are_those_of_the_batches(tmp_path, packing):
  experiment = tiny_run.experiment(tmp_path, data__packing=packing)
  lines = [*prepare.inspected(experiment, False)]
  found = dataset.open_dataset(experiment)
  batch = found.make_batches('train', 2, False, 1, alone=True).batch_at(0)
  assert lines[0] == 'train, record 0:' and sum('record' in line for line in lines) == 4
  shown = [line for line in lines[: lines.index('validation, record 0:')] if 'segment' in line]
  assert len(shown) == batch['segment_ids'].max(axis=1).sum()
  with_loss = sum(int(re.search(r'(\d+) with loss', line)[1]) for line in shown)
  # The last target of a record is no token of it.
  assert with_loss == (batch['weights'][:, :-1] > 0).sum()
  first = shown[0].partition(': ')[2].split('|')
  assert first[0] == '[<256>]' or not first[0].startswith('[')
  text = ''.join(first[1:])
  assert text.encode().decode('unicode_escape') in next(
    iter(documents.documents(experiment.data.sources[0])))
  coloured = [*prepare.inspected(experiment, True)]
  assert re.sub(r'\x1b\[\d+m', '', coloured[1]).replace('|', '') == (
    lines[1].replace('[', '').replace(']', '').replace('|', ''))
  assert '\x1b[32m' in coloured[1] and '\x1b[2m' in coloured[1]


def test_the_program_inspects_and_says_what_cleaning_would_do(tmp_path):
  experiment = override(tiny_run.experiment(tmp_path), {
    'data.cleaning.steps': ('whitespace',), 'data.cleaning.min_characters': 50})
  (tmp_path / 'corpus' / 'short.txt').write_text('Too short.')
  (tmp_path / 'config.json').write_text(experiment.to_json())
  code, shown, error = programs.run('prepare', f'--config={tmp_path}/config.json', '--dry_run')
  assert code == 0, error
  assert 'of the first 41 documents cleaning drops 1; ' in error
  assert '  min_characters.dropped: 1\n' in error and '  whitespace.changed: 40\n' in error
  assert not (tmp_path / 'records').exists()
  code, shown, error = programs.run('prepare', f'--config={tmp_path}/config.json', '--inspect')
  assert code == 0 and 'validation, record 1:' in shown, error


def test_a_runner_is_named_where_beam_is_not_installed_and_other_flags_stay_refused(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  (tmp_path / 'config.json').write_text(tiny_run.experiment(tmp_path).to_json())
  for flags, message in (
    (['--runner=DirectRunner', '--region=x'], "pip install 'jaxllm[beam]' in an environment of"),
    (['--runner=Sparkrunner'], "did you mean 'SparkRunner'?"),
    (['--region=x'], '--region: there is no such flag'),
    (['region'], "unexpected argument 'region'"),
  ):
    code, _, error = programs.run('prepare', f'--config={tmp_path}/config.json', *flags)
    assert code and message in error


@pytest.mark.parametrize('flags', [
  ('--model=x',), ('--report', '--inspect'), ('--inspect', '--dry_run'),
  ('--runner=DirectRunner', '--inspect'), ('--runner=DirectRunner', '--dry_run', '--other=1')])
def test_flags_that_would_do_nothing_are_refused(tmp_path, flags):
  (tmp_path / 'config.json').write_text(tiny_run.experiment(tmp_path).to_json())
  code, _, error = programs.run('prepare', f'--config={tmp_path}/config.json', *flags)
  assert code == 2 and '--inspect and --dry_run go alone, and --model only with' in error


def test_a_task_has_nothing_to_prepare():
  code, _, error = programs.run('prepare', '--config=experiments/sentiment.py')
  assert code == 2 and 'config.task: its records are made when training starts' in error
