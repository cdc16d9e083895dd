"""Several processes: they start together, are of one mind, and stop at the same step."""

import http.server
import re
import signal
import threading

from jaxllm import distributed, train
from jaxllm.checkpoints import store
from tests import processes
from tests.training import tiny_run
from tests.training.test_finetune import lines


def make(tmp_path, **changes):
  """Write the config of a run, and return its path."""
  config = tiny_run.experiment(tmp_path, **{'evaluation__prompts': (), **changes})
  path = tmp_path / 'config.json'
  path.write_text(config.to_json())
  return path


def test_what_differs_is_named_with_its_process(tmp_path):
  start = {'config': str(make(tmp_path)), 'workdir': str(tmp_path / 'run'), 'processes': 2}
  rate, steps = processes.run(
    {**start, 'own': {'1': ['--config.optimizer.learning_rate=0.5']}},
    {**start, 'own': {'1': ['--config.training.num_steps=7']}})
  for found, field, value in ((rate, 'config.optimizer.learning_rate', '0.5'),
                              (steps, 'config.training.num_steps', '7')):
    for code, text in found:
      assert code == 2, text
      assert re.search(rf'error: .*{field} is \S+ in process 0 \(\S+\) and {value} in process 1 \(',
                       text), text
  assert not (tmp_path / 'run').exists()


def test_a_signal_to_one_stops_all_and_more_processes_go_on(tmp_path):
  path = make(tmp_path, evaluation__every_steps=10**6, checkpoint__every_steps=10**6,
              training__num_steps=10**6, schedule__decay_steps=100)
  start = {'config': str(path), 'workdir': str(tmp_path / 'run')}
  two, four = processes.run({**start, 'processes': 2, 'signal': ('SIGTERM', 1, 4)},
                            {**start, 'processes': 4, 'signal': ('SIGINT', 0, 4)})
  assert [code for code, _ in two + four] == [train.SAVED_AND_STOPPED] * 6, (two, four)
  losses = lines(tmp_path / 'run', 'train/loss')
  steps = store.committed_steps(tmp_path / 'run' / 'checkpoints')
  assert len(steps) == 2 and steps[-1] == len(losses)


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


def test_a_notice_of_preemption_is_a_signal(monkeypatch):
  monkeypatch.setattr(distributed, '_NOTICE_SECONDS', 0.05)
  told = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: told.set())
  try:
    with http.server.ThreadingHTTPServer(('localhost', 0), Metadata) as server:
      threading.Thread(target=server.serve_forever, daemon=True).start()
      monkeypatch.setenv('GCE_METADATA_HOST', f'localhost:{server.server_port}')
      with distributed.preemption_notice():
        assert told.wait(10)
      server.shutdown()
  finally:
    signal.signal(signal.SIGTERM, before)
  assert Metadata.asked == 2
