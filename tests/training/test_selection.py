"""Laws of measuring while training: the best checkpoint is kept and used, and patience ends."""

import json

import jax
import numpy as np
import pytest

from jaxllm import loading
from jaxllm.checkpoints import reading, store
from jaxllm.checkpoints.store import CheckpointConfig
from jaxllm.config import ConfigError
from jaxllm.experiment import BestConfig, ScoringConfig, TrainingConfig
from jaxllm.tasks import predict
from jaxllm.training import loop, report, scoring
from jaxllm.training.scoring import Selection
from tests.training import test_finetune, tiny_run
from tests.training.test_finetune import lines, train

ACCURACY = BestConfig(metric='task/sentiment/accuracy', patience=2)


def test_the_best_is_the_first_extreme_and_patience_counts_since_then():
  chosen = Selection(ACCURACY.metric, patience=2)
  for step, value in ((1, 0.5), (2, 0.75), (3, 0.75), (4, float('nan'))):
    chosen = chosen.add(step, {'task/sentiment/accuracy': value, 'validation/loss': 1})
  assert chosen.best == (2, 0.75) and not chosen.exhausted
  chosen = chosen.add(5, {'task/sentiment/accuracy': 0.7})
  assert chosen.exhausted
  loss = Selection('validation/loss', True, history=((1, 2.0), (2, 1.0), (3, 1.5)))
  assert loss.best == (2, 1.0) and not loss.exhausted
  assert chosen.add(6, {'validation/loss': 1.0}) == chosen


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A run that is told that it gets worse from step 4 on, and has patience for two of those."""
  directory = tmp_path_factory.mktemp('selection')
  train(tiny_run.experiment(directory, training__num_steps=3, evaluation__prompts=()),
        directory / 'base')
  config = test_finetune.experiment(
    directory, best=BestConfig(metric='task/sentiment/accuracy', patience=2),
    training=TrainingConfig(num_steps=20, batch_size=8, spike=None),
    scoring=ScoringConfig(every_steps=2, max_examples=4),
    checkpoint=CheckpointConfig(every_steps=3, keep_last=1),
  )
  accuracies = iter([0.1, 0.2, 0.2, 0.1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring, 'score', lambda *_: {'accuracy': next(accuracies)})
    summary = train(config, directory / 'run')
  return directory, config, summary


def test_patience_ends_the_run_and_the_best_checkpoint_is_kept(stopped):
  directory, config, summary = stopped
  assert lines(directory / 'run', 'task/sentiment/accuracy') == [0.1, 0.2, 0.2, 0.1]
  assert summary['complete'] and (summary['step'], summary['best_step']) == (8, 4)
  assert store.committed_steps(directory / 'run' / 'checkpoints') == [4, 6, 8]
  marked = reading.read_bundle(directory / 'run' / 'checkpoints' / '8').best
  assert marked == {'step': 4, 'metric': 'task/sentiment/accuracy', 'value': 0.2}
  best, at_four, last = (
    loading.load(directory / 'run' / path).variables['params']
    for path in ('', 'checkpoints/4', 'checkpoints/8')
  )
  jax.tree.map(np.testing.assert_array_equal, best, at_four)
  kernels = [params['layers']['attention']['query']['kernel'] for params in (best, last)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0
  page = report.write_report(directory / 'run').read_text()
  assert 'sentiment: accuracy' in page
  again = train(config, directory / 'run')
  assert again == summary


def test_more_patience_goes_on_where_the_run_ended(stopped):
  directory, config, _ = stopped
  longer = config.replace(best=ACCURACY.replace(patience=3))
  accuracies = iter([0.3, 0.1, 0.1, 0.1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring, 'score', lambda *_: {'accuracy': next(accuracies)})
    summary = train(longer, directory / 'run')
  assert (summary['step'], summary['best_step']) == (16, 10)
  assert store.committed_steps(directory / 'run' / 'checkpoints') == [10, 15, 16]


def test_scores_are_those_of_the_model_on_the_same_examples(stopped):
  directory, config, _ = stopped
  config = loop.pretrained.resolve(config.replace(scoring=ScoringConfig(max_examples=None)))
  dataset = loop.dataset_lib.open_dataset(config)
  model = loading.load(directory / 'base')
  mesh = loop.sharding.make_mesh(config.mesh, jax.devices()[:1])
  found = scoring.make_tasks(config, dataset, mesh)(model.variables)
  examples = predict.examples(config.task, 'validation')
  predictions = predict.predict(config.task, examples, model)
  right = [p['label'] == e.reference for p, e in zip(predictions, examples, strict=True)]
  assert len(examples) == 8 and found['sentiment/accuracy'] == np.mean(right)
  assert 0 <= found['sentiment/ece'] <= 1


@pytest.mark.parametrize('metric', [
  'loss', 'validation', 'validation/los', 'validation/tokens', 'validation/examples', 'train/loss',
  'task/translation/bleu', 'task/sentiment', 'task/sentiment/f1', 'task/sentiment/accuracy/x'])
def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(stopped, metric):
  _, config, _ = stopped
  with pytest.raises(ConfigError, match='best.metric=.* is not measured; one of validation/loss.*'
                     'task/sentiment/accuracy, .*task/sentiment/ece'):
    config.replace(best=BestConfig(metric=metric))


def test_all_that_is_measured_and_nothing_else_can_tell_the_best(stopped, tmp_path):
  directory, config, _ = stopped
  logged = {name for record in map(json.loads, (directory / 'run' / 'metrics.jsonl').open())
            for name in record if name.startswith('validation/')}
  measured = {name for name in config.measured if name.startswith('validation/')}
  assert measured == logged - {'validation/tokens'}
  assert {name.rpartition('/')[2] for name in config.measured if name.startswith('task/')} == {
    *scoring.score(config.task, *answers(config.task))}
  judged = config.replace(objective={'kind': 'classifier', 'num_classes': 2}, best=None)
  assert list(judged.measured)[:2] == ['validation/loss', 'validation/accuracy']
  assert {name for name, smaller in config.measured.items() if smaller} == {
    'validation/loss', 'validation/perplexity', 'validation/bits_per_byte', 'task/sentiment/ece'}
  nothing = tiny_run.experiment(tmp_path, data__validation=None)
  with pytest.raises(ConfigError, match='is not measured; one of none: nothing is held out'):
    nothing.replace(best=BestConfig())


def answers(task):
  example, = predict.examples(task.replace(data=task.data.replace(limit=1)), 'validation')
  return [example], [{'label': 'positive', 'score': 0.5}]


def test_validation_during_training_is_a_sample_of_all_records(tmp_path):
  """Not the first records: documents may be sorted, and here get worse and worse."""
  (tmp_path / 'corpus').mkdir()
  for i in range(100):
    (tmp_path / 'corpus' / f'{i:03}.txt').write_text(chr(97 + i // 20) * 200 + str(i))
  config = tiny_run.experiment(tmp_path, data__validation=0.5, evaluation__batch_size=8)
  records = loop.dataset_lib.open_dataset(config)
  seen = []

  def evaluate(_, variables, batches, *rest):
    seen.append([batch['tokens'] for batch in batches])
    return {}

  mesh = loop.sharding.make_mesh(config.mesh)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring.perplexity, 'evaluate', evaluate)
    for most in (3, 3, None):
      scoring.make_held_out(config, records, mesh, most)({})
  some, again, everything = seen
  np.testing.assert_array_equal(some, again)
  assert len(some) == 3 < len(everything)
  for part in (some, everything):
    # The byte tokenizer gives each byte its value.
    assert {*range(97, 102)} <= set(np.unique(np.concatenate(part)).tolist())
