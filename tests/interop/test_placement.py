"""A model that is split over devices says what it says on one, and is never whole on any."""



import jax
import numpy as np
import pytest
import small
import small_gguf

from jaxllm import loading, sharding
from jaxllm.adapters import lora
from jaxllm.adapters.lora import LoraConfig
from jaxllm.checkpoints import fingerprints, store, tree
from jaxllm.checkpoints.bundle import Bundle
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
from jaxllm.generation import beam, decode, scoring, speculation
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.interop import peft
from jaxllm.model import make_placement
from jaxllm.models import decoder
from jaxllm.models.families import HUGGINGFACE
from jaxllm.sharding import MeshConfig

MESHES = {'tensor': {'tensor': 2}, 'fsdp': {'fsdp': 4}, 'both': {'data': 2, 'tensor': 2}}
NAMES = ('huggingface', 'run', 'adapters', 'peft', 'model.gguf')
PROMPTS = [[1, 7, 9], [5] * 11, [8]]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)
RUN = {
  'name': 'run', 'data': DataConfig(sources=(SourceConfig(location='none'),), context_length=32),
  'tokenizer': TokenizerConfig(kind='bytes'),
  'training': TrainingConfig(num_steps=1, batch_size=8), 'mesh': MeshConfig(fsdp=2)}


def save_run(path, params, **fields):
  """Write a checkpoint as a run of some experiment does."""
  base = fingerprints.fingerprint(loading.load(path.with_name('huggingface')).variables['params'])
  bundle = Bundle(Experiment(**RUN, **fields).to_json(), small.files(), {loading.BASE: base})
  opened = store.open_store(path / 'checkpoints', store.CheckpointConfig(asynchronous=False))
  store.save(opened, 1, {'params': params}, bundle)
  store.close(opened)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('models')
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(small_gguf.SIZES, 'num_layers', 2)
    small_gguf.write(path / 'model.gguf', path / 'huggingface', 'llama')
  start = loading.load(path / 'huggingface')
  save_run(path / 'run', start.variables['params'], model=start.config)
  config = LoraConfig(rank=2, targets=('layers/attention/.*', 'layers/mlp/up'))
  added = lora.init(config, start.variables['params'], jax.random.key(0))
  added = jax.tree.map(lambda leaf: leaf + 0.1, added)
  base = str(path / 'huggingface')
  save_run(path / 'adapters', added, model=start.config, init_from=base,
           finetune=FinetuneConfig(lora=config))
  peft.save(path / 'peft', added, HUGGINGFACE['llama'], start.config, base)
  return path


def tokens(model, variables=None, cache_dtype=None):
  pieces = decode.stream(model.decoder, variables or model.unstacked, PROMPTS, GREEDY,
                         steps_per_piece=32, cache_dtype=cache_dtype)
  return [one.tokens for one in decode.collect(pieces, len(PROMPTS))]


def is_split(array):
  return max(shard.data.nbytes for shard in array.addressable_shards) < array.nbytes


@pytest.fixture(scope='module')
def alone(directory):
  """Each model on one device, and what it says."""
  found = {}
  for name in NAMES:
    model = loading.load(directory / name)
    found[name] = model, tokens(model)
  assert found['peft'][1] == found['adapters'][1] != found['run'][1] == found['model.gguf'][1]
  return found


@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize('name', NAMES)
def test_a_model_on_a_mesh_says_what_it_says_alone(directory, alone, name, mesh, monkeypatch):
  """No part of it is whole on a device where the rules split it, while it is read and after."""
  make, wide = jax.make_array_from_callback, []

  def watch(shape, where, callback, **options):
    array = make(shape, where, callback, **options)
    wide.extend([shape] if where.shard_shape(shape) != shape and not is_split(array) else [])
    return array

  monkeypatch.setattr(jax, 'make_array_from_callback', watch)
  model, (one, expected) = loading.load(directory / name, mesh), alone[name]
  placement = model.placement
  assert not wide and placement.mesh.size == np.prod(list(mesh.values()))
  shapes, axes = decoder.abstract(model.config)
  wanted = tree.flatten(sharding.shardings(
    axes['params'], shapes['params'], placement.mesh, placement.config))
  found = tree.flatten(model.variables['params'])
  for path, where in wanted.items():
    assert found[path].sharding.is_equivalent_to(where, found[path].ndim), path
  for path, leaf in tree.flatten(model.unstacked['params']).items():
    stacked = path.split('/')
    stacked = '/'.join(stacked[:1] + stacked[1 + (stacked[0] == 'layers') :])
    assert is_split(leaf) == is_split(found[stacked]), path
  assert tokens(model) == expected
  if name in ('adapters', 'peft'):
    ids = list(range(3, 20))
    np.testing.assert_allclose(model.logits(ids), one.logits(ids), atol=1e-3)


def test_all_that_a_model_does_is_the_same_on_a_mesh(directory, alone):
  """Quantised weights and cache, beams, guesses with a draft and without, scores, embeddings."""
  one, expected = alone['huggingface']
  model = loading.load(directory / 'huggingface', MESHES['both'])
  # Stacked layers, of which one is compiled.
  for kind, cache_dtype in (('int8', 'int8'), ('int4', None)):
    found, wanted = (
      tokens(each, each.quantized(kind).variables, cache_dtype) for each in (model, one))
    assert found == wanted
  both = [
    [[each.tokens for each in found] for found in beam.beam_search(
      which.decoder, which.variables, PROMPTS, beam.BeamConfig(num_beams=2, num_return=2), GREEDY)]
    for which in (one, model)]
  assert both[0] == both[1]
  for draft in (None, speculation.Draft(model.decoder, model.variables)):
    guessed, per_pass = speculation.generate(
      model.decoder, model.variables, PROMPTS, GREEDY,
      speculation.SpeculationConfig(num_drafted=2), draft)
    assert [each.tokens for each in guessed] == expected
  assert per_pass > 1.5
  (found, wanted), (hidden_TD, wanted_TD) = (
    [take(each) for each in (model, one)] for take in (
      lambda each: scoring.score(each.decoder, each.variables, PROMPTS, num_top=2),
      lambda each: each.hidden(PROMPTS[1])))
  for ours, theirs in zip(found, wanted, strict=True):
    for leaf, want in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(leaf, want, atol=1e-4)
  np.testing.assert_allclose(hidden_TD, wanted_TD, atol=1e-4)


def test_heads_that_the_mesh_does_not_divide_are_replicated_and_the_rest_is_refused(directory):
  placement = make_placement({'tensor': 4}, loading.describe(directory / 'huggingface').config)
  assert dict(placement.config.rules)['kv_heads'] == ()
  model = loading.load(directory / 'huggingface', 'tensor=4')
  assert not is_split(model.variables['params']['layers']['attention']['key']['kernel'])
  assert is_split(model.variables['params']['layers']['attention']['query']['kernel'])
  for mesh, message in (
      ({'tensor': 8}, "axis 'heads' has size 4"), ('tensor', 'sizes of mesh axes'),
      ('tensr=2', "did you mean 'tensor'"), ('fsdp=16', 'needs a multiple of 16 devices')):
    with pytest.raises(ValueError, match=message):
      loading.load(directory / 'huggingface', mesh)
  with pytest.raises(ValueError, match='loaded already'):
    loading.load(model, {'tensor': 2})


def test_the_dtype_of_what_is_loaded(directory):
  for name in ('huggingface', 'run', 'adapters'):
    model = loading.load(directory / name, {'fsdp': 2}, 'bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(model.variables)} == {np.dtype('bfloat16')}
    assert model.config.dtype == 'bfloat16'
    plain = loading.load(directory / name)
    assert {leaf.dtype for leaf in jax.tree.leaves(plain.variables)} == {np.dtype('float32')}
    rounded = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), plain.variables)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32),
                                                            np.asarray(b, np.float32)),
                 model.variables, rounded)
  with pytest.raises(ValueError, match="dtype='float16'"):
    loading.load(directory / 'run', dtype='float16')
