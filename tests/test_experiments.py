"""Every experiment, in every variant: it loads, survives JSON, and its train step fits its mesh."""

import itertools
import math
import operator
import pathlib

import jax
import pytest

from jaxllm import config, sharding
from jaxllm.experiment import Experiment
from jaxllm.models import decoder
from jaxllm.training import pretrained, state, step

EXPERIMENTS = pathlib.Path(__file__).parent.parent / 'experiments'


def variants():
  """Return (location, TPU slice or None) of every variant of every file."""
  for path in sorted(EXPERIMENTS.glob('*.py')):
    named = getattr(config.load_module(str(path)), 'VARIANTS', None)
    for name, variant in (named or {None: None}).items():
      location = path.name if name is None else f'{path.name}:{name}'
      yield pytest.param(location, getattr(variant, 'topology', None), id=location)


def mesh_of(experiment, topology):
  """Return the mesh without its devices; one device where no slice is named."""
  sizes = topology.partition(':')[2].split('x') if topology else ()
  return sharding.abstract_mesh(experiment.mesh, math.prod(map(int, sizes)))


def describe(leaf):
  return leaf.shape, leaf.dtype, leaf.sharding


@pytest.mark.parametrize(('location', 'topology'), variants())
def test_experiment_loads_and_its_step_fits_its_mesh(location, topology, tmp_path):
  experiment = config.load(f'{EXPERIMENTS}/{location}')
  assert Experiment.from_json(experiment.to_json()) == experiment
  if experiment.model is None:
    if not pathlib.Path(experiment.init_from).exists():
      pytest.skip(f'{experiment.init_from} is not installed')
    experiment = pretrained.resolve(experiment.replace(records_dir=str(tmp_path)))

  mesh = mesh_of(experiment, topology)
  tx = state.make_optimizer(experiment)
  before = state.abstract_state(experiment, tx, mesh)
  batch = step.abstract_batch(experiment, mesh)
  rows = batch['tokens'].sharding.shard_shape(batch['tokens'].shape)[0]
  assert rows % experiment.training.microbatches == 0

  after, metrics = jax.eval_shape(step.make_train_step(experiment, tx, mesh), before, batch)
  assert jax.tree.map(describe, after) == jax.tree.map(describe, before)
  assert {leaf.shape for leaf in metrics.values()} == {()}
  for path, leaf in jax.tree_util.tree_leaves_with_path(before.params):
    if path[-1].key in ('kernel', 'embedding'):
      parts = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
      assert parts >= mesh.shape['fsdp'], f'{jax.tree_util.keystr(path)} is not split'


def test_a_variant_that_does_not_exist_is_refused():
  with pytest.raises(config.ConfigError, match="no variant '9b'; one of 125m, 350m"):
    config.load(f'{EXPERIMENTS}/gpt3.py:9b')


def test_a_run_made_short_warms_up_over_a_tenth_of_it(caplog):
  experiment = config.load(str(EXPERIMENTS / 'quickstart.py'))
  short = config.override(experiment, {'training.num_steps': '20', 'schedule.name': 'linear'})
  assert (short.schedule.warmup_steps, short.schedule.name) == (2, 'linear')
  assert 'config.schedule.warmup_steps=2 instead of 30, a tenth of the 20 steps' in caplog.text
  assert config.override(experiment, {'training.num_steps': '1'}).schedule.warmup_steps == 0
  assert config.override(experiment, {'training.num_steps': '31'}).schedule.warmup_steps == 30
  for named in ({'schedule.warmup_steps': '30'}, {'schedule': '{"warmup_steps": 30}'}):
    with pytest.raises(config.ConfigError, match='warmup_steps=30 leaves no step.*num_steps=20'):
      config.override(experiment, {'training.num_steps': '20', **named})


def test_the_dial_grows_with_its_depth(caplog):
  dial = config.load_module(str(EXPERIMENTS / 'dial.py'))
  caplog.set_level('INFO')
  runs = [dial.get_config(f'd{depth}') for depth in (2, 4, 20)]
  for smaller, larger in itertools.pairwise(runs):
    for field in ('decoder.embed_dim', 'decoder.num_heads', 'decoder.num_layers',
                  'training.batch_size', 'training.num_steps'):
      assert operator.attrgetter(field)(smaller) < operator.attrgetter(field)(larger), field
    assert smaller.optimizer.learning_rate > larger.optimizer.learning_rate
    assert smaller.data == larger.data  # One set of records, one held-out text.
  tokens = runs[1].training.num_steps * runs[1].training.batch_size * dial.CONTEXT
  assert tokens == pytest.approx(8 * decoder.parameter_count(runs[1].decoder), rel=1e-3)
  assert [record.getMessage().split()[1] for record in caplog.records] == ['2.41', '1.98', '1.47']
  bits, low, high = zip(*dial.PREDICTED.values(), strict=True)
  assert [*dial.PREDICTED] == [*dial.DEPTHS] and list(bits) == sorted(bits, reverse=True)
  assert all(a < b < c for a, b, c in zip(low, bits, high, strict=True))


@pytest.mark.parametrize('depth', ['d1', 'd21', '4', 'deep'])
def test_a_depth_that_the_dial_has_not_is_one_sentence(depth):
  with pytest.raises(ValueError, match=f'dial.py:{depth}: a depth from d2 to d20 is needed'):
    config.load(f'{EXPERIMENTS}/dial.py:{depth}')
