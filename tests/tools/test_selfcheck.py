"""The selfcheck: laws hold on a tiny config and model, and what is broken is found."""

import json

import jax
import pytest

from jaxllm.models import cache, decoder
from jaxllm.objectives.next_token import NextToken
from jaxllm.tools import selfcheck
from tests import programs
from tests.models import tiny as models
from tests.training import tiny_run as tiny


def test_the_laws_of_training_hold(tmp_path):
  experiment = tiny.experiment(tmp_path, objective=NextToken(chunk_size=16))
  found = {law: (error, bound) for law, error, bound in selfcheck.training_laws(
    experiment, 16, jax.devices()[:2])}
  assert [*found] == ['accumulated = one batch', 'sharded = single', 'resumed = never stopped']
  assert all(error <= bound for error, bound in found.values()), found
  assert found['resumed = never stopped'] == (0, 0) and 0 < found['sharded = single'][0]


@pytest.mark.parametrize('broken', [False, True])
def test_the_laws_of_a_model(broken, monkeypatch):
  """A cache of fewer bits is no longer what the full pass computes."""
  if broken:
    whole = cache.init_cache
    monkeypatch.setattr(cache, 'init_cache', lambda *sizes: whole(*sizes, dtype='int8'))
  config = models.CONFIGS['gemma']
  rows = list(selfcheck.model_laws(config, decoder.init(config, jax.random.key(0)), 8))
  assert [law for law, error, bound in rows if error > bound] == ['cached = full'] * broken
  assert {'packed = unpacked', 'batched = alone', 'scan = unrolled', 'drift of bfloat16',
          'drift of int8'} < {law for law, *_ in rows}


@pytest.mark.parametrize('error, code, said', [
  (1e-6, 0, 'holds'), (0.5, 1, 'BROKEN'), (float('nan'), 1, 'BROKEN')])
def test_what_is_printed(error, code, said, monkeypatch):
  monkeypatch.setattr(selfcheck, '_measure', lambda: [('packed = unpacked', error, 1e-3)])
  found = programs.run('tools.selfcheck', '--model=x')
  assert found[0] == code and found[1].split()[-1] == said
  (row,) = json.loads(programs.run('tools.selfcheck', '--model=x', '--json')[1])
  assert row['holds'] == (code == 0)


def test_something_to_check_is_needed():
  for flags in ((), ('--model=x', '--config=y')):
    code, _, err = programs.run('tools.selfcheck', *flags)
    assert code == 2 and 'one of --config and --model is needed' in err
