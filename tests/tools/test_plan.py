"""Plans: what a compiled step holds and exchanges, changes that fit, and what cannot be planned."""

import functools
import json
import re

import jax
import numpy as np
import pytest

from jaxllm import config as config_lib
from jaxllm import sharding
from jaxllm.sharding import MeshConfig
from jaxllm.tools import collectives, plan
from jaxllm.training import cost
from tests import programs
from tests.training import tiny_run


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Return the plan of a tiny run, on a chip so small that it does not fit."""
  with pytest.MonkeyPatch.context() as patch:
    find = plan.find_devices
    chip = cost.Chip('TPU v5e', 1e-4, 1.0)
    patch.setattr(plan, 'find_devices', lambda *args: (find(*args)[0], chip))
    experiment = tiny_run.experiment(
      tmp_path_factory.mktemp('plan'), mesh=MeshConfig(data=2, fsdp=4),
      model__dtype='bfloat16', model__remat='full', training__batch_size=8)
    found = plan.plan(experiment, 'local')
    found['proposals'] = plan.ranked(
      experiment, plan.proposals(experiment),
      functools.partial(plan.plan, topology='local', compiles=False))
  return found


def test_a_compiled_step_says_what_it_holds_and_exchanges(made):
  assert {axis for one in made['exchanged'] for axis in one['axes'].split()} == {'data', 'fsdp'}
  gib = made['gib']
  parts = sum(size for name, size in gib.items() if name not in ('total', 'memory'))
  assert parts == pytest.approx(gib['total'])
  assert gib['optimizer'] > 1.9 * gib['parameters'] > 0  # AdamW's two moments.
  seconds = made['seconds']
  assert made['ceiling']['seconds'] == max(seconds.values())
  assert gib['gradients'] == gib['parameters'] and gib['saved activations'] > 0
  json.dumps(made)


def test_what_does_not_fit_comes_with_changes(made):
  assert any('GiB of 0.0' in one for one in made['problems'])
  assert {one['flags'] for one in made['proposals']} == {  # Rows allow no more microbatches.
    '--config.model.remat=offload', '--config.objective.chunk_size=512',
    '--config.mesh.data=1 --config.mesh.fsdp=8'}
  text = plan.page(made)
  assert '--config.mesh.data=1 --config.mesh.fsdp=8' in text and 'needs' in text


@pytest.mark.parametrize('line, axes', [
  ('replica_groups={{0,1,2,3},{4,5,6,7}}', ('fsdp',)),
  ('replica_groups=[4,2]<=[2,4]T(1,0)', ('data',)),
  ('replica_groups=[2,4]<=[8]', ('fsdp',)), ('replica_groups={}', ('data', 'fsdp')),
  ('source_target_pairs={{0,4},{4,0}}', ('data',)),
  ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','b'}, dimensions={0}", ('fsdp',)),
])
def test_groups_are_named_by_mesh_axes(line, axes):
  devices = np.array(jax.devices()).reshape(2, 4)
  assert collectives._axes(line, jax.sharding.Mesh(devices, ('data', 'fsdp'))) == axes


def test_collectives_count_loops_and_channels():
  text = '''HloModule m
%cond (p: s32[]) -> pred[] {
  %c = s32[] constant(5)
}
%body (p: s32[]) -> s32[] {
  %g = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %h = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %s = (bf16[8,2]{1,0}, u32[]{:S(2)}) send(%x), x={_xla_megascale_transfer_type="ALL_REDUCE"}
}
ENTRY %main (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%cond, body=%body
  %r = bf16[16]{0} all-reduce(%y), channel_id=2, replica_groups=[8,1]<=[8]
  %s = s8[9]{0} all-to-all(%y), channel_id=1, replica_groups={}, metadata={op_name="shard_map" s=1}
  %t = s8[9]{0} all-to-all(%y), channel_id=1, replica_groups={}, metadata={op_name="shard_map" s=1}
  %u = s8[9]{0} all-to-all(%y), channel_id=1, replica_groups={}, metadata={op_name="shard_map" s=2}
}
'''
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  assert collectives.sent(text, mesh) == [
    {'kind': 'all-gather', 'axes': 'data', 'per_step': 5, 'bytes': 5 * 128},
    {'kind': 'all-reduce', 'axes': 'between slices', 'per_step': 5, 'bytes': 5 * 32},
    {'kind': 'all-reduce', 'axes': '', 'per_step': 1, 'bytes': 64},
    {'kind': 'all-to-all', 'axes': 'data', 'per_step': 2, 'bytes': 18}]


def run(*flags):
  return programs.run('tools.plan', '--config=experiments/llama.py:llama3_8b', *flags)


@pytest.mark.parametrize('program', ['prefill', 'decode'])
def test_decoding_is_planned_too(tmp_path, program):
  run = tiny_run.experiment(
    tmp_path, mesh=MeshConfig(data=2, tensor=2), model__max_length=512,
    data__context_length=512, model__mlp_dim=256, model__dtype='bfloat16',
    model__remat='full')
  run = plan.decoding_run(run, 4)
  with pytest.MonkeyPatch.context() as patch:
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:4])
    patch.setattr(plan, 'find_devices', lambda *_: (mesh, cost.CHIPS['v5e']))
    estimated, made = (plan.plan(run, 'local', program, compiles) for compiles in (False, True))
  gib = made['gib']
  cache = 2 * 2 * 2 * 512 * 4 * 2  # Keys and values, layers, rows, positions, width, bfloat16.
  assert gib['cache'] == estimated['gib']['cache'] == pytest.approx(cache / 2**30, rel=0.01)
  assert gib['other arguments'] < 0.6 * gib['cache']  # Tokens and their log-probabilities.
  # The compiler of CPUs keeps float32 copies of bfloat16; that of TPUs is within 3%.
  assert 0.4 < estimated['gib']['total'] / gib['total'] < 1.2
  assert made['ceiling']['bound'] and 'days' not in made['ceiling']


def test_a_search_ranks_by_time_within_memory(tmp_path):
  run = tiny_run.experiment(tmp_path, mesh=MeshConfig(data=8), training__batch_size=16)

  def planned(run):
    """A chip of 10 GiB that exchanges the more the more it splits, and recomputes or not."""
    mesh, remat = run.mesh, run.decoder.remat
    gib = 12 / mesh.fsdp / mesh.tensor + {'none': 9, 'dots_no_batch': 6}.get(remat, 3) / (
      run.training.microbatches)
    seconds = 1 + mesh.fsdp / 100 + mesh.tensor / 10 + (remat == 'full') / 3
    return {'devices': 8, 'gib': {'total': gib, 'memory': 10}, 'seconds': {'arithmetic': seconds},
            'problems': ['needs more'] * (gib > 10), 'flops': 1, 'ceiling': None}

  found = plan.search(run, planned, planned)
  assert len(found) == plan.MOST_COMPILED and not any(one['problems'] for one in found)
  best = found[0]['changes']
  # Pure data parallel does not fit, and full remat is not needed.
  assert best['mesh.fsdp'] > 1 == best['mesh.tensor'] and best['model.remat'] != 'full'
  times = [one['seconds']['arithmetic'] for one in found]
  assert times == sorted(times)
  assert planned(config_lib.override(run, best))['gib'] == found[0]['gib']
  assert plan.ranking(found).startswith(f'--config.mesh.data={best["mesh.data"]} --config.mesh')
  assert plan.ranking([]).startswith('nothing fits')


def test_json_of_an_estimate():
  code, out, error = run('--estimate', '--json')
  assert code == 0, error
  made = json.loads(out)
  assert made['devices'] == 64 and made['parameters'] == 8_030_261_248
  # The compiler of TPUs says 71.4 (docs/pods.md).
  assert made['gib']['total'] == pytest.approx(71.4, rel=0.15)


@pytest.mark.parametrize('flag, said', [
  ('--topology=v9:2x2', '--topology=v9:2x2: a generation of'),
  ('--topology=v5p:3x5', '--topology=v5p:3x5: slices of v5p have shapes'),
  ('--topology=v5p:2x2x1', 'config.mesh .*needs a multiple of 64 devices but there are 4'),
  ('--config.model.remat=some', 'config.model.remat=some: '),
  ('--search --program=decode', '--search --program=decode: only train'),
])
def test_what_cannot_be_planned_is_one_sentence(flag, said):
  code, out, error = run('--estimate', *flag.split())
  assert code == 2 and not out and len(error.splitlines()) == 1
  assert re.match(f'error: .*{said}', error)


def test_a_plan_without_the_compiler_of_tpus_is_one_sentence(monkeypatch):
  monkeypatch.setattr(plan.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu, is not installed: pip install 'jaxllm\[plan\]'"):
    plan.find_devices('v5e:2x4', MeshConfig(data=8))


def test_a_better_compiler_is_named():
  assert "pip install 'libtpu==0.0.52.*'" in plan.better_compiler(
    {'jax': '0.12.0.1', 'libtpu': '0.0.50'})
  assert not plan.better_compiler({'jax': '0.12.0.1', 'libtpu': '0.0.52'})
