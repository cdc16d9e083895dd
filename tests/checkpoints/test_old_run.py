"""A checkpoint that was written in November 2026 (jax 0.10.2, orbax-checkpoint 0.12.8) restores."""

import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import loading, sharding
from jaxllm.checkpoints import fingerprints, reading, store
from jaxllm.experiment import Experiment
from jaxllm.models.decoder import Decoder
from jaxllm.training import state

# What the run computed and held when it was written.
LOGITS = [-0.013377, 0.020813, 0.079529, 0.027121]
FINGERPRINT = '861f9e1153757029'


@pytest.fixture(scope='module')
def old_run(tmp_path_factory):
  path = tmp_path_factory.mktemp('old')
  with tarfile.open(pathlib.Path(__file__).with_name('old_run.tar.xz')) as archive:
    archive.extractall(path, filter='data')
  return path


def test_its_model_computes_what_it_did(old_run):
  model = loading.load(old_run)
  logits_BTV = Decoder(model.config).apply(model.variables, jnp.array([[256, 116, 104, 101]]))
  np.testing.assert_allclose(logits_BTV[0, -1, :4], LOGITS, atol=1e-5)
  assert model.tokenizer.decode(model.tokenizer.encode('the king')) == 'the king'


def test_its_state_can_be_trained_on(old_run):
  experiment = Experiment.from_json(reading.read_bundle(old_run).config_json)
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  abstract = state.abstract_state(experiment, state.make_optimizer(experiment), mesh)
  opened = store.open_store(old_run / 'checkpoints', store.CheckpointConfig())
  restored = store.restore(opened, abstract)
  store.close(opened)
  assert int(restored.step) == 2
  assert fingerprints.fingerprint(restored) == FINGERPRINT
