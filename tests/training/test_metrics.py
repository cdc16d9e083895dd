"""Metrics survive a resume, name what is unknown, and read well with and without a terminal."""

import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import tempfile

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from jaxllm import sharding
from jaxllm.training import goodput, metrics
from tests.training import tiny_run

EXPERIMENT = tiny_run.experiment(pathlib.Path(tempfile.mkdtemp()))


def records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_record_is_on_disk_when_write_returns(tmp_path):
  with metrics.open_writer(tmp_path, EXPERIMENT) as write:
    write(3, {'train/loss': jnp.float32(0.5), 'train/mfu': None, 'train/x': float('nan')})
    (record,) = records(tmp_path)
  assert record.pop('time') > 1e9
  assert record == {'step': 3, 'train/loss': 0.5, 'train/x': None}


def test_resuming_drops_later_and_torn_records_and_keeps_the_rest(tmp_path):
  with metrics.open_writer(tmp_path, EXPERIMENT) as write:
    for step in (10, 20, 30):
      write(step, {'train/loss': step / 10})
  before = (tmp_path / 'metrics.jsonl').read_text().splitlines()[:2]
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('null\n"x"\n{"step": 5\n{"step": 15}')  # No newline: it may go on.
  with metrics.open_writer(tmp_path, EXPERIMENT, step=20) as write:
    write(30, {'train/loss': 7.0})
  assert (tmp_path / 'metrics.jsonl').read_text().splitlines()[:2] == before
  assert [(r['step'], r['train/loss']) for r in records(tmp_path)] == [(10, 1), (20, 2), (30, 7)]
  assert not list(tmp_path.glob('*.tmp'))


def test_a_crash_while_dropping_leaves_the_old_file(tmp_path, monkeypatch):
  with metrics.open_writer(tmp_path, EXPERIMENT) as write:
    write(10, {'train/loss': 1.0})

  def fail(*_):
    raise OSError('disk')

  monkeypatch.setattr(metrics.os, 'replace', fail)
  with pytest.raises(OSError, match='disk'):
    with metrics.open_writer(tmp_path, EXPERIMENT, step=0):
      pass
  assert [r['step'] for r in records(tmp_path)] == [10]


def read_events(path):
  data, events = path.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], 'little')
    events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def test_tensorboard_holds_the_scalars_and_purges_after_the_resumed_step(tmp_path):
  for step in (0, 20):
    with metrics.open_writer(tmp_path, EXPERIMENT, step) as write:
      write(step + 10, {'train/loss': 1.5})
  files = sorted((tmp_path / 'tensorboard').iterdir(), key=lambda p: p.stat().st_mtime_ns)
  assert len(files) == 2
  for path, step in zip(files, (0, 20), strict=True):
    events = read_events(path)
    assert [e.step for e in events if e.HasField('session_log')] == [step + 1]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values == [(step + 10, 'train/loss', 1.5)]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
def test_a_full_disk_costs_the_log_and_is_told_once(tmp_path, caplog):
  with metrics.open_writer(tmp_path, EXPERIMENT) as write:
    write(1, {'train/loss': 1.0})
    (tmp_path / 'metrics.jsonl').rename(tmp_path / 'before')
    (tmp_path / 'metrics.jsonl').symlink_to('/dev/full')
    events, = (tmp_path / 'tensorboard').iterdir()
    full = os.open('/dev/full', os.O_WRONLY)
    number, = (int(n) for n in os.listdir('/proc/self/fd')
               if os.path.realpath(f'/proc/self/fd/{n}') == str(events))
    os.dup2(full, number)  # From now on the file of events is full too.
    os.close(full)
    for step in (2, 3):
      write(step, {'train/loss': 1.0})
    (tmp_path / 'metrics.jsonl').unlink()
    (tmp_path / 'before').rename(tmp_path / 'metrics.jsonl')  # There is room again.
    write(4, {'train/loss': 1.0})
  assert [record['step'] for record in records(tmp_path)] == [1, 4]
  first, second = (record.getMessage() for record in caplog.records)
  assert first.startswith(f'{tmp_path}/metrics.jsonl cannot be written: [Errno 28] No space left')
  assert second.startswith(f'{tmp_path}/tensorboard cannot be written: [Errno 28]')


def test_a_torn_record_is_taken_back(tmp_path):
  path, limits = tmp_path / 'metrics.jsonl', resource.getrlimit(resource.RLIMIT_FSIZE)
  metrics._append(path, {'step': 1})
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4, limits[1]))
  try:
    with pytest.raises(OSError, match='No space left'):
      metrics._append(path, {'step': 2})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
  metrics._append(path, {'step': 3})
  assert [record['step'] for record in records(tmp_path)] == [1, 3]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with metrics.open_writer(tmp_path, EXPERIMENT) as write:
    write(1, {'train/loss': 1.0})
  assert not list(tmp_path.iterdir())


def test_peaks_are_the_vendors_and_unknown_is_none():
  assert goodput.device_peak_flops('NVIDIA H100 80GB HBM3', 'bfloat16') == 989.5e12
  assert goodput.device_peak_flops('NVIDIA A100-SXM4-80GB', 'float32') == 156e12
  assert goodput.device_peak_flops('TPU v5 lite', 'bfloat16') == 197e12
  assert goodput.device_peak_flops('TPU v5p', 'float32') is None
  assert goodput.device_peak_flops('TPU v5p', 'int8') is None
  assert goodput.device_peak_flops('NVIDIA H100', 'bfloat16') is None
  assert goodput.device_peak_flops(jax.devices()[0].device_kind, 'float32') is None


def test_utilisation_is_that_of_all_devices(tmp_path, monkeypatch):
  monkeypatch.setattr(goodput, 'device_peak_flops', lambda *_: 1e9)
  experiment, records = tiny_run.experiment(tmp_path), []
  mesh = sharding.make_mesh(experiment.mesh)
  log = metrics.MetricLogger(experiment, mesh, lambda step, record: records.append(record),
                             metrics.Progress(9, enabled=False), goodput.Goodput())
  for step in (1, 2):
    log.log_step(step, {'loss': 1.0, 'tokens_read': 8.0, 'applied': 1.0})
  first, second = records
  assert 'train/mfu' not in first  # It compiled.
  assert second['train/mfu'] == pytest.approx(
    log._flops_per_step / second['train/step_seconds'] / (8 * 1e9))


def test_memory_is_that_of_a_living_process():
  assert 2**24 < goodput.device_memory_bytes() < 2**40


class FakeTime:
  def __init__(self):
    self.now = 0.0

  def monotonic(self):
    return self.now


def run_progress(monkeypatch, stream, **options):
  clock = FakeTime()
  monkeypatch.setattr(metrics, 'time', clock)
  monkeypatch.setattr(metrics.sys, 'stderr', stream)
  with contextlib.closing(metrics.Progress(100, step=40, **options)) as progress:
    for step in range(41, 101):
      clock.now += 60.0 if step == 41 else 1.0
      progress.update(step, loss=1.25, tokens_per_second=12345.6)
    progress.message('saved')
  return stream.getvalue()


def test_without_a_terminal_a_line_every_few_seconds_and_the_last(monkeypatch):
  lines = run_progress(monkeypatch, io.StringIO(), line_seconds=25).splitlines()
  assert [line.split('  ')[0] for line in lines] == [
    'step 41/100', 'step 66/100', 'step 91/100', 'step 100/100', 'saved'
  ]
  # Compilation, which the first step paid for, does not count.
  assert lines[1] == 'step 66/100  loss 1.250  12,346 tokens/s  00:34 left'
  assert lines[3].endswith('done')


def test_on_a_terminal_a_bar(monkeypatch):
  stream = io.StringIO()
  stream.isatty = lambda: True
  text = run_progress(monkeypatch, stream)
  assert '\r' in text and '100% |' in text and 'loss 1.250  12,346 tokens/s' in text
  assert text.count('\nsaved') <= 1 and 'saved\n' in text


def test_a_disabled_progress_is_silent(monkeypatch):
  assert run_progress(monkeypatch, io.StringIO(), enabled=False) == ''
