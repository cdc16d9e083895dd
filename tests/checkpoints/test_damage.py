"""Damage is found by name, put aside, and never restored in silence."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import fingerprints, reading
from jaxllm.checkpoints import store as store_lib
from jaxllm.checkpoints.bundle import Bundle, DamagedError
from jaxllm.checkpoints.store import CheckpointConfig

BUNDLE = Bundle('{}', {'tokenizer.json': b'{}'}, {'fingerprint': 'abc'})


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, bool])
def test_fingerprints_depend_on_every_bit_and_on_no_mesh(dtype):
  rng = np.random.default_rng(0)
  array = np.asarray(jnp.asarray(rng.integers(0, 2 if dtype is bool else 100, (8, 16)), dtype))
  wanted = fingerprints.fingerprints({'a': jnp.asarray(array)})['a']
  assert wanted.startswith(f'{np.dtype(dtype).name}[8, 16] ') and len(wanted.split()[-1]) == 24
  for shape, spec in (((4, 2), ('x', 'y')), ((2, 4), ('y', 'x')), ((8,), ('x',)),
                      ((2,), (None, 'x')), ((2, 2), (('y', 'x'),)), ((1,), ())):
    mesh = jax.make_mesh(shape, ('x', 'y')[: len(shape)], devices=jax.devices()[: np.prod(shape)])
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert fingerprints.fingerprints({'a': split})['a'] == wanted
    rows = {shard.device: np.asarray(shard.data)
            for shard in fingerprints.device_sums(split).addressable_shards}
    on_devices = np.sum([rows[shard.device] for shard in split.addressable_shards
                         if shard.replica_id == 0], axis=(0, 1), dtype=np.uint32)
    assert wanted.endswith(''.join(f'{one:08x}' for one in on_devices))
  found = {wanted}
  bits = range(1) if dtype is bool else range(8 * array.itemsize)
  places = [0, 77, 127]
  for place in places:
    for bit in bits:
      changed = array.copy()
      words = changed.view(f'u{array.itemsize}').reshape(-1)
      words[place] ^= np.array(1 << bit, words.dtype)
      found.add(fingerprints.fingerprints({'a': jnp.asarray(changed)})['a'])
  assert len(found) == 1 + len(places) * len(bits)


def test_two_changes_do_not_cancel_each_other():
  array = np.arange(64, dtype=np.float32)
  negated = array.copy()
  negated[[3, 9]] *= -1  # Twice the highest bit: no sum of words, weighted or not, sees it.
  swapped = array[::-1].copy()
  leaves = {'a': array, 'b': negated, 'c': swapped}
  prints = {one.split()[-1] for one in fingerprints.fingerprints(leaves).values()}
  assert len(prints) == 3


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Two checkpoints on a mesh, and the state of each by its step."""
  path = tmp_path_factory.mktemp('saved')
  opened = store_lib.open_store(path, CheckpointConfig())
  mesh = jax.make_mesh((4, 2), ('x', 'y'))
  states = {}
  for step in (1, 2):
    kernel = jax.random.normal(jax.random.key(step), (64, 32))
    states[step] = {
      'params': {'kernel': jax.device_put(kernel, NamedSharding(mesh, PartitionSpec('x', 'y')))},
      'step': jnp.int32(step)}
    store_lib.save(opened, step, states[step], BUNDLE)
  store_lib.close(opened)
  return path, states


def abstract(state):
  """Return the shapes of a state, asked for on another mesh than it was saved from."""
  mesh = jax.make_mesh((2, 4), ('x', 'y'))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(
    mesh, PartitionSpec('y', 'x') if a.ndim else PartitionSpec())), state)


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


@pytest.fixture
def copy(saved, tmp_path):
  path, states = saved
  shutil.copytree(path, tmp_path / 'copy')
  return tmp_path / 'copy', states


@pytest.mark.parametrize('seed', range(12))
def test_a_flipped_bit_is_never_restored(copy, seed):
  path, states = copy
  rng = random.Random(seed)
  files = [file for file in sorted((path / '2').rglob('*')) if file.is_file()
           and file.stat().st_size > (1000 if seed % 2 else 0)]
  flip(rng.choice(files), rng)
  opened = store_lib.open_store(path, CheckpointConfig())
  wanted = np.asarray(states[2]['params']['kernel'])
  try:
    restored = store_lib.restore(opened, abstract(states[2]), 2)
    np.testing.assert_array_equal(restored['params']['kernel'], wanted)
  except DamagedError as error:
    assert str(path / '2') in str(error)
  params, bundle = reading.restore_params(path)
  assert bundle.tokenizer_files == BUNDLE.tokenizer_files and bundle.manifest == BUNDLE.manifest
  assert any((np.asarray(params['kernel']) == np.asarray(one['params']['kernel'])).all()
             for one in states.values())
  store_lib.close(opened)


def lie(path, name='params/kernel', step=2):
  """Let a bundle, its own digests in order, say something else of a leaf."""
  file = path / str(step) / 'bundle' / 'metadata'
  fields = json.loads(file.read_text())
  fields['leaves'][name] = fields['leaves'][name][:-1] + 'x'
  file.write_text(json.dumps({**fields, 'sha256': bundle_lib._digests(fields)}))


def test_a_damaged_leaf_is_named_passed_over_and_put_aside(copy, caplog):
  path, states = copy
  lie(path)
  with pytest.raises(DamagedError, match=f'{path}/2/state .*params/kernel changed after it was'):
    reading.restore_params(path / '2')
  params, _ = reading.restore_params(path / '2', verify='off')
  np.testing.assert_array_equal(params['kernel'], states[2]['params']['kernel'])
  params, _ = reading.restore_params(path, dtype='bfloat16')
  np.testing.assert_array_equal(params['kernel'], states[1]['params']['kernel'].astype('bfloat16'))
  assert 'Step 2 is passed over.' in caplog.text and 'Step 1 is taken.' in caplog.text
  opened = store_lib.open_store(path, CheckpointConfig())
  with pytest.raises(DamagedError) as error:
    store_lib.restore(opened, abstract(states[2]), 2)
  store_lib.quarantine(opened, error.value)
  assert store_lib.committed_steps(path) == [1] and (path / '2.damaged').is_dir()
  lie(path, step=1)
  with pytest.raises(DamagedError) as error:
    store_lib.restore(opened, abstract(states[1]))
  with pytest.raises(DamagedError, match='No other checkpoint is there'):
    store_lib.quarantine(opened, error.value)
  assert store_lib.committed_steps(path) == [1]
  # The number is free again.
  assert store_lib.save(opened, 2, states[2], BUNDLE)
  store_lib.close(opened)
  assert store_lib.committed_steps(path) == [1, 2]


def test_a_sharding_that_is_not_known_is_damage(copy):
  path, states = copy
  file = path / '2' / 'state' / '_sharding'
  known = file.read_text()
  file.write_text(known.replace('NamedSharding', 'namedSharding'))
  assert file.read_text() != known
  params, _ = reading.restore_params(path)
  assert any((np.asarray(params['kernel']) == np.asarray(one['params']['kernel'])).all()
             for one in states.values())
  with pytest.raises(DamagedError, match=str(path / '2')):
    reading.restore_params(path / '2')


def test_links_out_of_a_checkpoint_are_refused(copy):
  path, _ = copy
  state = path / '2' / 'state'
  state.rename(path.parent / 'elsewhere')
  state.symlink_to(path.parent / 'elsewhere')
  with pytest.raises(DamagedError, match='state is a link that leads out of the checkpoint'):
    reading.restore_params(path / '2')
  (path / '2').rename(path.parent / '2')
  (path / '2').symlink_to(path / '1')
  with pytest.raises(DamagedError, match='leads out of the checkpoint'):
    reading._bundle_of(reading.find_steps(path)[0])


@pytest.mark.parametrize('error', [
  OSError(5, 'no answer'), MemoryError(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: memory'),
  ValueError('UNAVAILABLE: the bucket'),
])
def test_what_need_not_be_damage_is_not_called_so(copy, error, monkeypatch):
  path, _ = copy

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(reading.ocp.PyTreeCheckpointHandler, 'restore', fail)
  with pytest.raises(store_lib.CheckpointError) as caught:
    reading.restore_params(path)
  assert not isinstance(caught.value, DamagedError)
