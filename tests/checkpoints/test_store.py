"""Checkpoints: equal bits on any mesh, errors that name paths, and a last good step that stays."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import reading
from jaxllm.checkpoints import store as store_lib
from jaxllm.checkpoints.bundle import Bundle, from_dict, to_dict
from jaxllm.checkpoints.store import CheckpointConfig, CheckpointError

BUNDLE = Bundle('{"a": 1}\n', {'tokenizer.model': bytes(range(256)), 'é.json': b''}, {'tokens': 3})


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  ema: dict | None = None


def make_state(step=3, ema=False, width=16):
  key = jax.random.key(step)
  params = {
    'embed': {'embedding': jax.random.normal(key, (8, width))},
    'layers': {'up': {'kernel': jax.random.normal(key, (2, width, 24)).astype(jnp.bfloat16)}},
  }
  return State(
    step=jnp.int32(step),
    params=params,
    opt_state=optax.adamw(1e-3).init(params),
    ema=jax.tree.map(lambda p: p + 1, params) if ema else None,
  )


def shard(state, shape, names=('x', 'y')):
  """Split every leaf with two axes over a mesh."""
  mesh = jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])
  where = jax.tree.map(
    lambda a: NamedSharding(mesh, PartitionSpec(*names) if a.ndim == 2 else PartitionSpec()), state
  )
  return jax.device_put(state, where)


def abstract(state):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_same_bits(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def same_bundle(found, wanted):
  """Return whether all that a caller gave came back."""
  return found == dataclasses.replace(wanted, leaves=found.leaves, best=found.best)


@pytest.fixture
def store(tmp_path):
  opened = store_lib.open_store(tmp_path / 'checkpoints', CheckpointConfig())
  yield opened
  store_lib.close(opened)


@pytest.mark.parametrize('asynchronous', [True, False])
def test_round_trip_is_exact(tmp_path, asynchronous):
  opened = store_lib.open_store(tmp_path, CheckpointConfig(asynchronous=asynchronous))
  state = make_state()
  assert store_lib.latest_step(opened) is None
  assert store_lib.save(opened, 3, state, BUNDLE)
  store_lib.wait(opened)
  assert store_lib.latest_step(opened) == 3
  assert_same_bits(store_lib.restore(opened, abstract(state)), state)
  assert not store_lib.save(opened, 3, make_state(4), BUNDLE)
  assert_same_bits(store_lib.restore(opened, abstract(state)), state)
  store_lib.close(opened)
  assert same_bundle(reading.read_bundle(tmp_path), BUNDLE)


def test_any_mesh_restores_equal_bits(store):
  state = make_state()
  layouts = [shard(state, (4, 2)), shard(state, (1, 1)), shard(state, (2, 4)), state]
  for step, saved in enumerate(layouts):
    store_lib.save(store, step, saved, BUNDLE)
    for target in layouts:
      restored = store_lib.restore(store, abstract(target), step)
      assert_same_bits(restored, state)
      for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_donated_buffers_are_safe(store):
  state = {'w': jnp.arange(1 << 21, dtype=jnp.float32)}
  want = jax.device_get(jax.tree.map(jnp.copy, state))
  scribble = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
  target = abstract(state)
  store_lib.save(store, 1, state, BUNDLE)
  for _ in range(5):
    state = scribble(state)
  assert_same_bits(store_lib.restore(store, target), want)


def test_every_mismatch_is_named(store):
  state = make_state()
  store_lib.save(store, 1, state, BUNDLE)
  other = dataclasses.replace(
    make_state(ema=True),
    params={
      'embed': {'embedding': jnp.zeros((8, 32))},
      'layers': {'up': {'kernel': state.params['layers']['up']['kernel'].astype(jnp.float32)}},
    },
    opt_state=(),
  )
  with pytest.raises(ValueError) as error:
    store_lib.restore(store, abstract(other))
  for part in (
    'params/embed/embedding: float32[8, 16] in the checkpoint, expected float32[8, 32]',
    'params/layers/up/kernel: bfloat16[2, 16, 24] in the checkpoint, expected float32[2, 16, 24]',
    'ema/embed/embedding: not in the checkpoint, expected float32[8, 16]',
    'opt_state/0/mu/embed/embedding: float32[8, 16] in the checkpoint, not expected',
  ):
    assert part in str(error.value)


def test_missing_step_is_named(store):
  with pytest.raises(ValueError, match='no complete checkpoint'):
    store_lib.restore(store, {})
  store_lib.save(store, 1, make_state(), BUNDLE)
  with pytest.raises(ValueError, match=r'no complete step 7 \(steps: \[1\]\)'):
    store_lib.restore(store, abstract(make_state()), 7)


@pytest.mark.parametrize('keep_last, keep_every, kept', [
  (1, None, [50]), (2, None, [40, 50]), (1, 20, [20, 40, 50]), (9, None, [10, 20, 30, 40, 50]),
])
def test_keep_policies(tmp_path, keep_last, keep_every, kept):
  config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
  opened = store_lib.open_store(tmp_path, config)
  for step in range(10, 60, 10):
    store_lib.save(opened, step, {'a': jnp.zeros(2)}, BUNDLE)
  store_lib.close(opened)
  assert store_lib.committed_steps(tmp_path) == kept
  reopened = store_lib.open_store(tmp_path, config)
  store_lib.save(reopened, 60, {'a': jnp.zeros(2)}, BUNDLE)
  store_lib.close(reopened)
  assert store_lib.committed_steps(tmp_path)[-1] == 60
  # One more may stay: the last one that is known to be good.
  assert len(store_lib.committed_steps(tmp_path)) <= len(kept) + 1


def test_stray_directories_are_ignored(tmp_path):
  state = make_state()
  for step in (1, 2, 3):
    (tmp_path / '999').mkdir(exist_ok=True)
    (tmp_path / 'notes').mkdir(exist_ok=True)
    opened = store_lib.open_store(tmp_path, CheckpointConfig(keep_last=2))
    store_lib.save(opened, step, state, BUNDLE)
    assert_same_bits(store_lib.restore(opened, abstract(state)), state)
    assert store_lib.latest_step(opened) == step
    assert reading.find_steps(tmp_path)[0].name == str(step)
    store_lib.close(opened)
  assert store_lib.committed_steps(tmp_path)[-2:] == [2, 3]
  # What an earlier, killed save left behind does not stand in the way.
  opened = store_lib.open_store(tmp_path, CheckpointConfig(keep_last=1))
  assert store_lib.save(opened, 999, state, BUNDLE)
  store_lib.close(opened)
  assert store_lib.committed_steps(tmp_path)[-1] == 999
  assert (tmp_path / 'notes').is_dir()


@pytest.mark.parametrize('ema', [False, True])
def test_params_alone_from_any_path(tmp_path, ema):
  opened = store_lib.open_store(tmp_path / 'checkpoints', CheckpointConfig())
  state = make_state(ema=ema)
  store_lib.save(opened, 5, shard(state, (4, 2)), BUNDLE)
  store_lib.close(opened)
  want = state.ema if ema else state.params
  for path in (tmp_path, tmp_path / 'checkpoints', tmp_path / 'checkpoints' / '5'):
    params, bundle = reading.restore_params(path)
    assert same_bundle(bundle, BUNDLE)
    assert_same_bits(params, want)
  split = jax.tree.map(lambda a: a.sharding, shard(want, (2, 4)))
  params, _ = reading.restore_params(tmp_path, want, split)
  assert_same_bits(params, want)
  assert len(params['embed']['embedding'].sharding.device_set) == 8
  with pytest.raises(ValueError, match=r'layers/up/kernel: bfloat16.*expected float32'):
    reading.restore_params(tmp_path, jax.tree.map(lambda a: a.astype(jnp.float32), want))


def test_path_without_checkpoint(tmp_path):
  with pytest.raises(ValueError, match='no such file or directory'):
    reading.find_steps(tmp_path / 'nothing')
  (tmp_path / 'checkpoints' / '4' / 'state').mkdir(parents=True)
  for path in (tmp_path, tmp_path / 'checkpoints', tmp_path / 'checkpoints' / '4'):
    with pytest.raises(ValueError, match='holds no complete checkpoint'):
      reading.restore_params(path)


def test_unwritable_directory(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='checkpoints: .*file/checkpoints: cannot write there'):
    store_lib.open_store(tmp_path / 'file' / 'checkpoints', CheckpointConfig())


def test_damaged_files_are_an_error(tmp_path):
  opened = store_lib.open_store(tmp_path, CheckpointConfig())
  state = {'w': jnp.arange(1000)}
  store_lib.save(opened, 1, state, BUNDLE)
  store_lib.close(opened)
  for file in (tmp_path / '1' / 'state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:20])
  with pytest.raises(CheckpointError, match='cannot be read'):
    store_lib.restore(opened, abstract(state))


def test_bundle_round_trip():
  assert from_dict(to_dict(BUNDLE)) == BUNDLE
  old = {name: value for name, value in to_dict(BUNDLE).items()
         if name not in ('sha256', 'best', 'leaves')} | {'format': 1}
  assert from_dict(old) == BUNDLE
  with pytest.raises(CheckpointError, match='has format 99.*use the version that wrote it'):
    from_dict({**old, 'format': 99, 'sha256': bundle_lib._digests({**old, 'format': 99})})
  for changes, message in (
    ({'format': 99}, 'format changed'), ({'manifest': {'tokens': 4}}, 'manifest changed'),
    ({'config_json': '{}'}, 'config_json changed'), ({'leaves': {}}, 'leaves changed'),
    ({'tokenizer_files': {'a': '!'}}, 'tokenizer/a, tokenizer/tokenizer.model, tokenizer/é.json'),
    ({'sha256': None}, 'digests are missing'), ({'manifest': 3}, 'manifest changed'),
  ):
    with pytest.raises(ValueError, match=message):
      from_dict({**to_dict(BUNDLE), **changes})
  with pytest.raises(ValueError, match='missing or of another kind'):
    from_dict({'format': 1})


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp, jax
from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import store as store_lib
from jaxllm.checkpoints.bundle import Bundle

bundle = Bundle('', {}, {})
store = store_lib.open_store(sys.argv[1], store_lib.CheckpointConfig(keep_last=1))
small, large = {'w': jnp.arange(1000)}, {'w': jax.random.normal(jax.random.key(0), (1 << 20,))}
store_lib.save(store, 1, small, bundle)
store_lib.wait(store)
# A write beyond the limit fails as on a full disk, in C++ too.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
try:
  store_lib.save(store, 2, large, bundle)
  while store.pending is not None:
    store_lib.check(store)
except store_lib.CheckpointError as error:
  print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert store_lib.latest_step(store) == 1
target = {'w': jax.ShapeDtypeStruct((1000,), jnp.int32)}
assert (store_lib.restore(store, target)['w'] == small['w']).all()
store_lib.save(store, 3, large, bundle)
store_lib.close(store)
print('steps', store_lib.committed_steps(sys.argv[1]))
"""


def run(code, *arguments):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, arguments)], env=env, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )


def test_full_disk_is_reported_and_older_step_stays(tmp_path):
  out, err = run(FULL_DISK, tmp_path).communicate(timeout=120)
  assert f'saving step 2 to {tmp_path} failed' in out, out + err
  assert 'the checkpoint of step 1 is whole' in out
  assert 'steps [3]' in out, out + err
  assert not (tmp_path / '2').exists()


KILLED = """
import sys
import jax, jax.numpy as jnp
from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import store as store_lib
from jaxllm.checkpoints.bundle import Bundle

store = store_lib.open_store(sys.argv[1], store_lib.CheckpointConfig(keep_last=2))
state = {'step': jnp.int32(0), 'w': jnp.arange(1 << 22) * jnp.float32(1.5)}
for step in range(1, 1000):
  state = {**state, 'step': jnp.int32(step)}
  store_lib.save(store, step, state, Bundle('', {}, {}))
  print(step, flush=True)
"""


def test_kill_in_mid_save_leaves_the_last_step(tmp_path):
  process = run(KILLED, tmp_path)
  for line in process.stdout:
    if int(line) == 3:
      break
  while not (tmp_path / '3').exists():
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate(timeout=30)
  opened = store_lib.open_store(tmp_path, CheckpointConfig())
  target = {'step': jax.ShapeDtypeStruct((), jnp.int32),
            'w': jax.ShapeDtypeStruct((1 << 22,), jnp.float32)}
  last = store_lib.latest_step(opened)
  assert last in (2, 3)
  state = store_lib.restore(opened, target)
  assert int(state['step']) == last
  want = jnp.arange(1 << 22) * jnp.float32(1.5)
  assert_same_bits(state['w'], want)
  store_lib.save(opened, 4, state, BUNDLE)
  store_lib.close(opened)
  assert store_lib.committed_steps(pathlib.Path(tmp_path))[-1] == 4


def test_a_directory_that_is_gone_is_still_a_sentence(tmp_path, monkeypatch):
  opened = store_lib.open_store(tmp_path / 'gone', CheckpointConfig())
  store_lib.save(opened, 1, {'params': {'a': jnp.zeros(4)}}, BUNDLE)
  monkeypatch.setattr(store_lib, 'committed_steps', mock.Mock(side_effect=OSError(5, 'no answer')))
  with pytest.raises(CheckpointError, match='step 1 .*no answer\n.*cannot be seen either'):
    store_lib.wait(opened)
  opened.manager.close()
