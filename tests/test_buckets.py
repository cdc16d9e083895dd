"""Runs in buckets: the servers are those of `tests.buckets`, and nobody has credentials."""

import http.server
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import threading

import fsspec
import pytest

from jaxllm import loading, mistakes, storage
from jaxllm.checkpoints import store
from jaxllm.training import loop
from tests import buckets, programs
from tests.training import tiny_run as tiny
from tests.training.test_metrics import read_events


@pytest.fixture(scope='module', params=['gs', 's3'])
def base(request, tmp_path_factory):
  """A server, and the path of a directory in its bucket."""
  with buckets.serving(request.param) as where, pytest.MonkeyPatch.context() as patch:
    home = str(tmp_path_factory.mktemp('home'))
    for name, value in {'HOME': home, **where}.items():
      patch.setenv(name, value)
    for name in ('GOOGLE_APPLICATION_CREDENTIALS', 'AWS_PROFILE', 'AWS_SESSION_TOKEN'):
      patch.delenv(name, raising=False)
    yield f'{request.param}://bucket/some'


@pytest.mark.parametrize(
  'location', ['gs:', 'gs:/bucket/x', 'gs://', 's3:x', 'abfs://a/b', 'hdfs:/'])
def test_another_scheme_is_refused_in_a_sentence(location, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=re.escape(f'--workdir={location}: a path is local, gs://')):
    storage.path(location, '--workdir=')
  quickstart = pathlib.Path(__file__).parent.parent / 'experiments' / 'quickstart.py'
  code, _, said = programs.run('train', f'--config={quickstart}', f'--workdir={location}')
  assert code == 2 and said.startswith('error: --workdir=') and said.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_local_names_may_have_colons():
  assert storage.path('runs/a:b') == pathlib.Path('runs/a:b')
  assert not storage.is_remote('runs/a:b') and storage.is_remote('gs://bucket/a:b')


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r"gcsfs: pip install 'jaxllm\[gcs\]'"):
    storage.path('gs://bucket/x')


def test_files_and_directories_are_whole_objects(base, tmp_path):
  target = f'{base}/files'
  storage.write_file(f'{target}/one.txt', 'first')
  copy = storage.local(f'{target}/one.txt')
  assert copy.read_text() == 'first' and storage.local(f'{target}/one.txt') == copy
  storage.write_file(f'{target}/one.txt', 'other')
  assert storage.local(f'{target}/one.txt').read_text() == 'other'
  with pytest.raises(RuntimeError), storage.replaced(f'{target}/two') as partial:
    (partial / 'deep').mkdir(parents=True)
    raise RuntimeError
  assert not storage.path(f'{target}/two').exists()
  with storage.replaced(f'{target}/two') as partial:
    (partial / 'deep').mkdir(parents=True)
    (partial / 'deep' / 'x.bin').write_bytes(b'x' * 1000)
  there = storage.local(f'{target}/two')
  assert there.name == 'two' and (there / 'deep' / 'x.bin').stat().st_size == 1000
  assert [p.name for p in storage.local(f'{target}/*.txt').iterdir()] == ['one.txt']
  storage.remove(f'{target}/two')
  assert not storage.path(f'{target}/two').exists()


def test_a_marker_is_uploaded_last(base, tmp_path, monkeypatch):
  step = tmp_path / '7'
  for name in ('a', 'b'):
    (step / name).mkdir(parents=True)
    (step / name / 'commit_success.txt').write_text('')
    (step / name / 'zzz').write_text('')
  (step / 'commit_success.txt').write_text('')
  sent = []
  system = fsspec.core.url_to_fs(base)[0]
  monkeypatch.setattr(system, 'put_file', lambda here, there: sent.append(there))
  storage.upload(step, f'{base}/7')
  assert sent[-1].endswith('some/7/commit_success.txt')
  assert [path.endswith('zzz') for path in sent[:2]] == [True, True]


def test_a_bucket_that_is_not_there_is_a_sentence(base):
  missing = base.replace('bucket', 'missing')
  with pytest.raises(ValueError, match='--workdir=.*missing.*no such bucket'):
    storage.make_writable(storage.path(missing), '--workdir=')
  with pytest.raises(OSError, match='no such bucket or object'):
    loading.load(f'{missing}/run')


def experiment(base, here):
  return tiny.experiment(
    here, records_dir=f'{base}/records', data__sources=f'{base}/text/*.txt',
    training__num_steps=6, checkpoint__every_steps=3, evaluation__every_steps=100,
    evaluation__prompts=())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The scores of the same run where nothing is lost, in a local directory."""
  here = tmp_path_factory.mktemp('whole')
  tiny.write_corpus(here / 'text', 12)
  return loop.train(experiment(here, here), here / 'run')['validation']


def test_a_lost_run_goes_on_without_gap_or_double(base, whole, tmp_path, monkeypatch):
  for file in sorted(tiny.write_corpus(tmp_path / 'corpus', 12).iterdir()):
    storage.write_file(f'{base}/text/{file.name}', file.read_bytes())
  directory = storage.path(f'{base}/run')

  # A machine that is lost in mid-run: it uploads nothing any more.
  def lost(*_):
    raise KeyboardInterrupt

  save = store.save
  with monkeypatch.context() as patch:
    def save_or_die(opened, step, *rest):
      if step == 6:
        store.wait(opened)
        patch.setattr(storage, 'upload', lost)
        lost()
      return save(opened, step, *rest)

    patch.setattr(store, 'save', save_or_die)
    with pytest.raises(KeyboardInterrupt):
      loop.train(experiment(base, tmp_path), directory)
  assert store.committed_steps(directory / 'checkpoints') == [3]
  summary = loop.train(experiment(base, tmp_path), directory)
  assert summary['complete'] and store.committed_steps(directory / 'checkpoints') == [3, 6]
  metrics = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
  assert [one['step'] for one in metrics if 'train/loss' in one] == list(range(1, 7))
  assert summary['validation'] == whole

  events, seen = [], {}
  for file in sorted(storage.local(directory / 'tensorboard').iterdir()):
    events += read_events(file)
  for event in sorted(events, key=lambda event: event.wall_time):
    if event.HasField('session_log'):  # What TensorBoard drops.
      seen = {step: tags for step, tags in seen.items() if step < event.step}
    for value in event.summary.value:
      seen.setdefault(event.step, []).append(value.tag)
  losses = {step: tags.count('train/loss') for step, tags in seen.items() if 'train/loss' in tags}
  assert losses == dict.fromkeys(range(1, 7), 1)


def test_the_programs_read_and_write_there(base, tmp_path):
  run = f'{base}/run'
  code, text, _ = programs.run('sample', f'--model={run}', '--prompt=the', '--max_new_tokens=3')
  assert code == 0 and text.startswith('the')
  code, text, _ = programs.run('evaluate', f'--model={run}', f'--output={base}/scores/held.json')
  assert code == 0 and 'bits per byte' in text
  assert storage.read_json(storage.path(f'{base}/scores/held.json'))['loss'] > 0
  (storage.path(base) / 'tasks.json').write_text('[{"kind": "none"}]')
  code, _, said = programs.run('evaluate', f'--model={run}', f'--tasks={base}/tasks.json')
  assert code == 2 and "kind 'none' is no task" in said
  target = f'{base}/converted'
  code, text, said = programs.run(
    'convert', f'--source={run}', f'--target={target}', '--format=huggingface')
  assert code == 0, said
  assert loading.describe(target).config.embed_dim == tiny.MODEL.embed_dim
  code, _, said = programs.run(
    'convert', f'--source={run}', f'--target={target}', '--format=huggingface')
  assert code == 2 and 'is not empty' in said


def test_errors_of_the_clients_of_buckets_are_sentences():
  from botocore.exceptions import NoCredentialsError
  from google.auth.exceptions import RefreshError
  for error in (NoCredentialsError(), RefreshError('expired\n')):
    said = mistakes.sentence(error)
    assert said.startswith('the bucket cannot be used: ') and '\n' not in said


@pytest.mark.parametrize('status', [403, 404])
@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_bucket_without_rights_or_none_at_all_is_one_sentence(monkeypatch, status, scheme):
  class Refusing(http.server.BaseHTTPRequestHandler):
    def answer(self):
      self.rfile.read(int(self.headers.get('content-length') or 0))
      self.send_response(status)
      self.send_header('content-length', '0')
      self.end_headers()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer  # noqa: N815

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Refusing)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}'
  for name in ('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL', 'AWS_ENDPOINT_URL'):
    monkeypatch.setenv(name, url)
  for name in ('NO_GCE_CHECK', 'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
    monkeypatch.setenv(name, 'true')
  command = [sys.executable, '-m', 'jaxllm.train', '--config=experiments/quickstart.py']
  done = subprocess.run([*command, f'--workdir={scheme}://bucket/run'], capture_output=True,
                        text=True, check=False)
  server.shutdown()
  said = done.stderr.strip().split('\n')[-1]
  assert done.returncode == 2 and f'{scheme}://bucket/run: ' in said, done.stderr
  assert 'the bucket cannot be used: ' in said or 'cannot write there' in said
