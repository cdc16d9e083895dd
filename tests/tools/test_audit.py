"""The audit tells a model that has learnt its texts by heart from one that has not."""

import json

import numpy as np
import pytest

from jaxllm.models.log_probs import TokenScores
from jaxllm.tools import audit
from jaxllm.training import loop
from tests import programs
from tests.training import tiny_run


def test_auc_counts_pairs():
  members, others = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0, 3.0])
  pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
  assert audit._auc(members, others) == pytest.approx(np.mean(pairs))


class Memory:
  """A model that knows some sequences, and gives all tokens of others the same probability."""

  tokenizer = config = decoder = variables = None

  def __init__(self, known):
    self.known = {tuple(self.encode_prompt(one) if isinstance(one, str) else one) for one in known}

  def encode_prompt(self, text):
    return list(text.encode())

  def score(self, decoder, variables, sequences):
    rows = []
    for sequence in sequences:
      knows = tuple(sequence) in self.known
      rows.append(TokenScores(np.full(len(sequence) - 1, -0.01 if knows else -5.0),
                              np.full(len(sequence) - 1, knows), None, None))
    return rows


def test_what_is_known_by_heart_is_found(monkeypatch):
  rng = np.random.default_rng(0)
  members, others = (rng.integers(0, 99, (20, 40)).tolist() for _ in range(2))
  canaries = audit.new_canaries(5, 0)
  assert len(set(canaries)) == 5 and canaries == audit.new_canaries(5, 0)
  assert canaries != audit.new_canaries(5, 1)
  for known, auc, extracted, exposure in ((members + canaries, 1.0, 1.0, 9.0),
                                          ([], 0.5, 0.0, 0.0)):
    model = Memory(known)
    monkeypatch.setattr('jaxllm.generation.scoring.score', model.score)
    found = audit.audit(model, members, others, canaries, 20, 20)
    assert found['membership by loss (AUC)'][0] == found['membership by min-k% (AUC)'][0] == auc
    assert found['extracted of 20 members'][0] == extracted
    assert found['extracted of 20 others'][0] == 0.0
    assert found['exposure of 5 canaries (bits, at most 9)'][0] == exposure
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, low, high in found.values())


def test_the_program_reads_the_records_of_a_run(tmp_path):
  loop.train(tiny_run.experiment(tmp_path, evaluation__prompts=()), tmp_path / 'run')
  (tmp_path / 'canaries.txt').write_text('The code is 31415926.\nIt is 2718281.\n')
  code, out, error = programs.run(
    'tools.audit', f'--model={tmp_path}/run', f'--canaries={tmp_path}/canaries.txt',
    '--prefix_tokens=4', '--suffix_tokens=4', f'--output={tmp_path}/audit.json')
  assert code == 0, error
  found = json.loads((tmp_path / 'audit.json').read_text())
  assert [name.split(' ')[0] for name in found] == [
    'membership', 'membership', 'extracted', 'extracted', 'exposure']
  assert all(row['low'] - 1e-9 <= row['value'] <= row['high'] + 1e-9 for row in found.values())
  assert 'AUC' in out


@pytest.mark.parametrize('flags, said', [
  ([], '--model is needed'), (['--model=x', '--members=y'], 'together'),
])
def test_flags_that_do_not_fit_are_refused(flags, said):
  code, _, error = programs.run('tools.audit', *flags)
  assert code == 2 and said in error
