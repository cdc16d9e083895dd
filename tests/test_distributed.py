"""Several processes: they start together, and are of one mind."""

import json
import re

from tests import processes
from tests.training import tiny_run


def make(tmp_path, **changes):
  """Write the config of a run, and return its path."""
  config = tiny_run.experiment(tmp_path, **{'evaluation__prompts': (), **changes})
  path = tmp_path / 'config.json'
  path.write_text(config.to_json())
  return path


def test_two_begin_and_go_on_in_one_directory(tmp_path):
  start = {'config': str(make(tmp_path, training__num_steps=2)), 'processes': 2,
           'workdir': str(tmp_path / 'run')}
  more = ['--config.training.num_steps=4']
  first, second = processes.run(start, {**start, 'own': {'0': more, '1': more}})
  assert [code for code, _ in first + second] == [0] * 4, (first, second)
  assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['step'] == 4
  # The first one prints; of the others nothing is heard.
  assert 'report: ' in first[0][1] and 'report: ' not in first[1][1]


def test_what_differs_is_named_with_its_process(tmp_path):
  start = {'config': str(make(tmp_path)), 'workdir': str(tmp_path / 'run'), 'processes': 2}
  rate, steps = processes.run(
    {**start, 'own': {'1': ['--config.optimizer.learning_rate=0.5']}},
    {**start, 'own': {'1': ['--config.training.num_steps=7']}})
  for found, field, value in ((rate, 'config.optimizer.learning_rate', '0.5'),
                              (steps, 'config.training.num_steps', '7')):
    for code, text in found:
      assert code == 2, text
      assert re.search(rf'error: .*{field} is \S+ in process 0 \(\S+\) and {value} in process 1 \(',
                       text), text
  assert not (tmp_path / 'run').exists()
