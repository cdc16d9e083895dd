"""Laws of runs with other objectives: pairs, a classifier, a teacher."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from jaxllm import loading, sharding
from jaxllm.checkpoints import reading
from jaxllm.config import ConfigError
from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
from jaxllm.models.decoder import Decoder
from jaxllm.objectives import preference
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.objectives.distillation import Distillation
from jaxllm.objectives.preference import Dpo, Orpo
from jaxllm.optim.optimizers import OptimizerConfig
from jaxllm.tasks import predict
from jaxllm.tasks.preference import Preference
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.training import dataset, loop, pretrained, scoring, state, step
from jaxllm.training import examples as encoded
from tests.training import test_finetune, tiny_run
from tests.training.test_finetune import LORA, lines, train
from tests.training.watched import whole_parameters

FULL = FinetuneConfig()


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A directory with a base model and with pairs of answers."""
  return make_base(tmp_path_factory.mktemp('objectives'))


def make_base(directory):
  train(tiny_run.experiment(directory, training__num_steps=3, evaluation__prompts=()),
        directory / 'base')
  pairs = [{'prompt': f'{i}', 'chosen': 'yes', 'rejected': 'no, never'} for i in range(40)]
  (directory / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
  return directory


def preferring(directory, objective, finetune):
  data = RecordsConfig(sources=(RecordSource(location=str(directory / 'pairs.jsonl')),))
  return test_finetune.experiment(
    directory, objective=objective, finetune=finetune,
    task=Preference(data=data, prompt='{prompt}:', target='{answer}'),
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.0),
  )


@pytest.mark.parametrize('finetune', [LORA, FULL], ids=['adapters', 'full'])
def test_preferences_begin_at_the_reference_and_leave_it(base, finetune):
  path = base / f'dpo_{finetune.lora is None}'
  train(preferring(base, Dpo(), finetune), path)
  losses = lines(path, 'train/loss')
  assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and losses[-1] < losses[0]
  assert lines(path, 'train/margin')[-1] > lines(path, 'train/margin')[0] == pytest.approx(0)
  assert lines(path, 'validation/accuracy')[-1] == 1
  # The task counts how often the chosen answer is the likelier one.
  assert 0 <= lines(path, 'task/preference/accuracy')[-1] <= 1


def test_the_reference_is_the_same_with_adapters_off_and_computed_before(base):
  configs = [loop.pretrained.resolve(preferring(base, Dpo(), f)) for f in (LORA, FULL)]
  batches = [dataset.open_dataset(c).make_batches('train', 8, True, None) for c in configs]
  start = loading.load(base / 'base').variables
  other = jax.tree.map(lambda leaf: leaf + 0.02, start['params'])  # What is trained by now.
  before = step.make_sums(configs[1])({'params': other}, {}, batches[1].batch_at(0), None)
  first, second = batches[0].batch_at(0), batches[1].batch_at(0)
  assert set(second) - set(first) == {encoded.REFERENCE}
  now = preference.preference_loss(
    Dpo(), Decoder(configs[0].decoder), {'params': other}, first, None, start)[0]
  np.testing.assert_allclose(before['loss_sum'], now, rtol=1e-5)


def test_both_answers_lose_the_same_part_of_a_long_prompt(base):
  config = loop.pretrained.resolve(preferring(base, Orpo(), FULL))
  config = config.replace(data=config.data.replace(context_length=12))
  record = {'prompt': 'abcdefghijklmnop', 'chosen': 'yes', 'rejected': 'no, never'}
  examples = [predict.TASKS['preference'].example(config.task, record)]
  made, omitted = encoded.make(config, examples, dataset.open_dataset(config).tokenizer)
  assert len(made) == 1 and omitted == (0, 0, 1, 0)
  texts = [bytes(t for t in made[name]['tokens'][0] if t and t < 256).decode()
           for name in ('chosen', 'rejected')]
  assert texts == ['p:yes', 'p:no, never']  # 13 tokens with BOS and EOS.


@pytest.mark.parametrize('finetune', [LORA, FULL], ids=['adapters', 'full'])
def test_a_classifier_learns_and_is_loaded_with_its_head(base, finetune):
  path = base / f'classifier_{finetune.lora is None}'
  config = test_finetune.experiment(
    base, finetune=finetune, objective=ClassifierConfig(num_classes=2),
    training=TrainingConfig(num_steps=25, batch_size=16, log_every_steps=1, spike=None),
    optimizer=OptimizerConfig(learning_rate=0.02, weight_decay=0.0),
  )
  summary = train(config, path)
  first, *_, last = lines(path, 'train/loss')
  assert last < 0.3 * first
  assert summary['validation']['accuracy'] == lines(path, 'task/sentiment/accuracy')[-1] == 1.0
  model = loading.load(path)
  assert model.variables['params']['classifier']['kernel'].shape == (16, 2)
  # The score of a run is that of its checkpoint, which the head decides.
  held_out = predict.examples(config.task, 'validation')
  scored = scoring.score(config.task, held_out, predict.predict(config.task, held_out, model))
  assert {name: lines(path, f'task/sentiment/{name}')[-1] for name in scored} == pytest.approx(
    scored, rel=1e-5)
  # Turned round, the head alone makes every score during the run wrong.
  begun = loop.pretrained.resolve(config)
  measure = scoring.make_tasks(
    begun, dataset.open_dataset(begun), sharding.make_mesh(begun.mesh, jax.devices()[:1]))
  params = model.variables['params']
  turned = {**params, 'classifier': jax.tree.map(lambda leaf: -leaf, params['classifier'])}
  assert measure({'params': params})['sentiment/accuracy'] == 1.0
  assert measure({'params': turned})['sentiment/accuracy'] == 0.0
  examples = predict.examples(config.task, 'test')
  found = predict.predict(config.task, examples, model)
  assert [p['label'] for p in found] == [e.reference for e in examples]
  alone = predict.predict(config.task, examples[:1], model)[0]
  assert alone['score'] == pytest.approx(found[0]['score'], rel=1e-5)


def test_a_student_comes_nearer_to_its_teacher(base):
  fast = {'optimizer': OptimizerConfig(learning_rate=0.02), 'training': TrainingConfig(
    num_steps=20, batch_size=8, log_every_steps=1, spike=None)}
  train(test_finetune.experiment(base, finetune=FULL, **fast), base / 'teacher')
  objective = Distillation(teacher=str(base / 'teacher'))
  config = test_finetune.experiment(
    base, init_from=None, model=tiny_run.MODEL.replace(num_layers=1), finetune=FULL,
    tokenizer=tiny_run.TokenizerConfig(kind='bytes'), objective=objective, **fast,
  )
  train(config, base / 'student')
  divergences = lines(base / 'student', 'train/divergence')
  assert 0 < divergences[-1] < 0.5 * divergences[0]
  model = loading.load(base / 'student')
  assert model.experiment.objective.teacher_model == loading.load(base / 'teacher').config
  step = reading.find_steps(base / 'student')[0]
  assert not any(path.startswith('frozen')
                 for path in reading._stored_leaves(step, reading.read_bundle(step)))


@pytest.mark.parametrize('objective', [ClassifierConfig(num_classes=2), Dpo()])
def test_what_is_one_per_row_is_not_split_with_the_sequence(base, objective):
  """The loss on four devices that split the sequence is that of one; so far the step compiles."""
  if objective.kind == 'classifier':
    config = test_finetune.experiment(base, finetune=FULL, objective=objective)
  else:
    config = preferring(base, objective, FULL)
  config = loop.pretrained.resolve(config.replace(
    mesh={'data': 2, 'context': 4}, training=TrainingConfig(num_steps=2, batch_size=8,
                                                            microbatches=2)))
  mesh, tx = sharding.make_mesh(config.mesh), state.make_optimizer(config)
  one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  step.make_train_step(config, tx, mesh).lower(
    state.abstract_state(config, tx, mesh), step.abstract_batch(config, mesh))
  batch = dataset.open_dataset(config).make_batches('train', 8, True, None).batch_at(0)
  params = jax.jit(lambda key: state.init_params(config, key))(jax.random.key(0))
  found = []
  for devices in (mesh, one):
    def loss(params, batch, devices=devices):
      with sharding.active(sharding.Placement(devices, config.mesh)):
        return step.make_sums(config)({'params': params}, {}, batch, None)['loss_sum']

    placed = sharding.put_batch(batch, sharding.batch_sharding(devices, config.mesh))
    found.append(jax.jit(loss)(jax.device_put(params, sharding.replicated(devices)), placed))
  assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-5)


@pytest.mark.parametrize('begun', [False, True])
def test_a_reference_that_is_not_there_is_missed_before_data_are_read(
  base, tmp_path, monkeypatch, begun
):
  config = loop.pretrained.resolve(preferring(base, Dpo(), FULL))
  config = config.replace(init_from=str(base / 'gone'))
  monkeypatch.setattr(loop.workdir, 'has_begun', lambda _: begun)
  monkeypatch.setattr(loop.dataset_lib, 'open_dataset', lambda *_: pytest.fail('data are read'))
  with pytest.raises(ValueError, match='config.init_from: .*gone'):
    train(config, tmp_path / 'run')


@pytest.mark.parametrize('kind', ['reference', 'teacher'])
def test_the_models_that_a_loss_compares_with_cannot_be_exchanged(base, monkeypatch, kind):
  model = loading.load(base / 'base')
  if kind == 'reference':
    field, config = 'init_from', preferring(base, Dpo(), FULL)
  else:
    field, config = 'objective.teacher', test_finetune.experiment(
      base, finetune=FULL, objective=Distillation(teacher=str(base / 'base')))
  config = loop.pretrained.resolve(config.replace(mesh={'data': 1, 'fsdp': 8}))
  mesh = sharding.make_mesh(config.mesh)
  with whole_parameters(model.config, config.mesh) as whole:
    first = pretrained.load(config, model.tokenizer, {}, False, mesh)
  assert not whole
  again = pretrained.load(config, model.tokenizer, first[2], True, mesh)
  assert again[2] == first[2] and len(first[2]) == 1
  params = {**model.variables['params'], 'final_norm': {'scale': np.full(16, 1.001, np.float32)}}
  other = dataclasses.replace(model, variables={'params': params})
  monkeypatch.setattr(loading, 'load', lambda *_: other)
  with pytest.raises(ValueError, match=f'config.{field}=.* is not the model that the run began'):
    pretrained.load(config, model.tokenizer, first[2], True, mesh)
  # What is only begun with may go.
  plain = test_finetune.experiment(base, finetune=FULL)
  assert pretrained.load(plain, model.tokenizer, {}, True, mesh) == (None, None, {})


def test_objectives_refuse_what_they_cannot_use(base):
  with pytest.raises(ConfigError, match="'dpo' and task='sentiment': it needs a task of the kind"):
    test_finetune.experiment(base, objective=Dpo())
  with pytest.raises(ConfigError, match='num_classes=3: the task has 2 labels'):
    test_finetune.experiment(base, objective=ClassifierConfig(num_classes=3))
  old = json.loads(test_finetune.experiment(base).to_json())
  del old['objective']['kind']
  assert Experiment(**old) == test_finetune.experiment(base)
