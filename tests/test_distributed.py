"""Several processes: they start together, are of one mind, stop together, and end together."""

import contextlib
import http.server
import re
import threading
import time
import types

import jax
import numpy as np
import pytest

from jaxllm import distributed
from jaxllm.checkpoints import reading, store
from jaxllm.training import loop, stopping
from tests import processes, programs
from tests.training import tiny_run
from tests.training.test_finetune import lines


def make(tmp_path, **changes):
  """Write the config of a run that does not end by itself, and return both."""
  config = tiny_run.experiment(tmp_path, **{
    'evaluation__prompts': (), 'evaluation__every_steps': 10**6, 'checkpoint__every_steps': 10**6,
    'training__num_steps': 10**6, 'schedule__decay_steps': 100, **changes})
  path = tmp_path / 'config.json'
  path.write_text(config.to_json())
  return config, path


def test_a_signal_to_one_stops_all_and_more_processes_go_on(tmp_path):
  config, path = make(tmp_path)
  start = {'config': str(path), 'workdir': str(tmp_path / 'run')}
  flags = ['--config.mesh={"data": 1, "fsdp": 2}', '--config.checkpoint.every_steps=2']
  # The part of an embedding has 18 kB; a slow machine writes the others into files of their own.
  two, four, full = processes.run(
    {**start, 'processes': 2, 'signal': ('SIGTERM', 1, 4)},
    {**start, 'processes': 4, 'signal': ('SIGINT', 0, 4)},
    {**start, 'processes': 2, 'full': {'1': 10_000}, 'own': {'0': flags, '1': flags}})
  assert [code for code, _ in two + four] == [distributed.SAVED_AND_STOPPED] * 6, (two, four)
  steps = store.committed_steps(tmp_path / 'run' / 'checkpoints')
  losses = lines(tmp_path / 'run', 'train/loss')
  assert len(steps) == 2 and steps[-1] < len(losses)
  losses = losses[:steps[-1]]
  one = config.replace(training=config.training.replace(num_steps=len(losses)))
  loop.train(one, tmp_path / 'one', jax.devices()[:1])
  np.testing.assert_allclose(losses, lines(tmp_path / 'one', 'train/loss'), rtol=1e-4)
  params = [reading.restore_params(tmp_path / name)[0] for name in ('run', 'one')]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *params)
  # A disk that is full under one of them ends all, and leaves what had been saved.
  for code, text in full:
    assert code == 1 and re.search(r'error: .*saving step \d+ to \S+ failed: ', text), text
    assert f'checkpoint of step {steps[-1]} is whole' in text
    assert 'timed out' not in text.lower()  # The others need not wait for what will not come.
  # The first one prints; of the others nothing is heard.
  assert not [text for code, text in two[1:] if 'Training' in text or 'step ' in text]


def test_damage_that_one_process_reads_is_damage_for_all(tmp_path):
  _, path = make(
    tmp_path, training__num_steps=4, checkpoint__every_steps=2, mesh='{"data": 1, "fsdp": 4}')
  start = {'config': str(path), 'workdir': str(tmp_path / 'run'), 'processes': 2}
  saved, = processes.run(start, devices=2)
  assert [code for code, _ in saved] == [0, 0], saved
  checkpoints = tmp_path / 'run' / 'checkpoints'
  for file in (checkpoints / '4' / 'state').glob('ocdbt.process_1/d/*'):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
  more = ['--config.training.num_steps=6']
  resumed, = processes.run({**start, 'own': {'0': more, '1': more}}, devices=2)
  assert [code for code, _ in resumed] == [0, 0], resumed
  said = [text.count(f'{checkpoints}/4/state cannot be read: ') for _, text in resumed]
  assert said == [1, 0], resumed
  assert store.committed_steps(checkpoints) == [2, 4, 6]
  assert (checkpoints / '4.damaged').is_dir() and not (checkpoints / '2.damaged').exists()


def test_what_differs_is_named_with_its_process(tmp_path):
  _, path = make(tmp_path)
  start = {'config': str(path), 'workdir': str(tmp_path / 'run'), 'processes': 2}
  rate, steps, failed = processes.run(
    {**start, 'own': {'1': ['--config.optimizer.learning_rate=0.5']}},
    {**start, 'own': {'1': ['--config.training.num_steps=7']}},
    # One that cannot read its config at all.
    {**start, 'own': {'1': ['--config.training.num_step=7']}})
  for found, field, value in ((rate, 'config.optimizer.learning_rate', '0.5'),
                              (steps, 'config.training.num_steps', '7')):
    for code, text in found:
      assert code == 2
      assert re.search(rf'error: .*{field} is \S+ in process 0 \(\S+\) and {value} in process 1 \(',
                       text), text
  assert [code for code, _ in failed] == [2, 2]
  assert 'did you mean config.training.num_steps?' in failed[0][1]
  assert 'error: process 1 (' in failed[0][1]
  assert not (tmp_path / 'run').exists()


def test_who_does_not_come_or_is_killed_is_named(tmp_path):
  _, path = make(tmp_path)
  start = {'config': str(path), 'workdir': str(tmp_path / 'run')}
  wait = {str(number): ['--connect_seconds=4'] for number in range(3)}
  absent, first, killed, headless = processes.run(
    {**start, 'processes': 3, 'absent': [1], 'own': wait},
    {**start, 'processes': 2, 'absent': [0], 'own': wait},
    {**start, 'processes': 2, 'signal': ('SIGKILL', 1, 2)},
    {**start, 'processes': 2, 'signal': ('SIGKILL', 0, 2)})
  for _, text in absent:
    assert re.search(r'process 1 of 3 did not come to process 0 on \S+ within 4 s', text), text
  assert 'process 0 at localhost:' in first[0][1]
  assert [code for code, _ in [*absent, *first]] == [1, 1, 1]
  assert killed[0][0] == 1 and 'error: process 1 (' in killed[0][1], killed
  assert headless[1][0] == 1 and 'error: process 0 (' in headless[1][1], headless


@pytest.mark.parametrize('flags, said', [
  (['--num_processes=2'], 'all three are needed'),
  (['--coordinator=x', '--num_processes=2', '--process_id=0'], 'HOST:PORT'),
  (['--coordinator=x:1', '--num_processes=2', '--process_id=2'], '--process_id=2 is not below'),
])
def test_flags_that_do_not_fit_are_refused(tmp_path, flags, said):
  code, _, error = programs.run('train', '--config=experiments/quickstart.py',
                                f'--workdir={tmp_path}', *flags)
  assert code == 2 and said in error


def test_where_nothing_tells_of_others_the_fix_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(distributed.ClusterEnv, 'auto_detect_unset_distributed_params',
                      lambda *_: (None, None, None, None))
  code, _, error = programs.run('train', '--config=experiments/quickstart.py',
                                f'--workdir={tmp_path}', '--distributed')
  assert code == 2 and '--coordinator=HOST:PORT' in error


@pytest.mark.parametrize('environment, found', [
  ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'},
   ('a:1', 4, 3, None)),
  ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'JOB_COMPLETION_INDEX': '2'},
   ('a:1', 4, 2, None)),
  # JAX gives each process of SLURM one GPU.
  ({'SLURM_JOB_ID': '4096', 'SLURM_STEP_NODELIST': 'node[07-09]', 'SLURM_NTASKS': '6',
    'SLURM_PROCID': '5', 'SLURM_LOCALID': '1'}, ('node07:61440', 6, 5, [1])),
])
def test_the_environment_tells_where_the_others_are(monkeypatch, environment, found):
  asked = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *given, **_: asked.append(given))
  monkeypatch.setattr(distributed, '_roll_call', lambda *given: asked.append(given[:3]) or {})
  for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID',
               'JOB_COMPLETION_INDEX'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with distributed.connected(True, None, None, None, 5):
    pass
  assert asked == [found[:3], found]


@pytest.mark.parametrize('breaks', ['read', 'write'])
def test_a_thread_that_dies_is_noticed_in_the_loop(monkeypatch, breaks):
  def broken(*_):
    raise jax.errors.JaxRuntimeError('the service is gone')

  state = types.SimpleNamespace(num_processes=2, process_id=0)
  monkeypatch.setattr(distributed, 'STATE', state)
  monkeypatch.setattr(distributed, 'read', lambda prefix: {0: '1'})
  monkeypatch.setattr(distributed, 'write', lambda *_: None)
  monkeypatch.setattr(distributed, breaks, broken)
  with contextlib.closing(stopping.Stopper(0, 10)) as stopper:
    with pytest.raises(jax.errors.JaxRuntimeError, match='the service is gone'):
      for step in range(1, 100):
        assert not stopper.due(step)
        time.sleep(0.02)


class Metadata(http.server.BaseHTTPRequestHandler):
  """Google's metadata server, which says at the second request that the machine is preempted."""

  asked = 0

  def do_GET(self):  # noqa: N802
    good = (self.path == '/computeMetadata/v1/instance/preempted'
            and self.headers['Metadata-Flavor'] == 'Google')
    type(self).asked += 1
    self.send_response(200 if good else 404)
    self.end_headers()
    self.wfile.write(b'TRUE' if self.asked > 1 else b'FALSE')

  def log_message(self, *_):
    pass


def test_a_notice_of_preemption_asks_to_stop(monkeypatch):
  monkeypatch.setattr(stopping, 'NOTICE_SECONDS', 0.05)
  with http.server.ThreadingHTTPServer(('localhost', 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('GCE_METADATA_HOST', f'localhost:{server.server_port}')
    with stopping.stop_requests(0, 10) as stopper:
      assert not stopper.due(1)
      deadline = time.monotonic() + 10
      while not stopper.due(2):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.shutdown()
  assert Metadata.asked == 2
