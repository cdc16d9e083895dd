"""What a run says about its records before it trains on them."""

from types import SimpleNamespace

import pytest

from jaxllm.training import dataset
from tests.training import tiny_run as tiny


@pytest.mark.parametrize('num_records, said', [
  (7, '20 steps of 8 records read each of the 7 training records 22 times'),
  (3, 'read each of the 3 training records 53 times'), (8, ''), (1000, ''),
])
def test_little_text_is_said_to_be_read_often(caplog, monkeypatch, tmp_path, num_records, said):
  train = SimpleNamespace(records=num_records, tokens=num_records, source_records=())
  manifest = SimpleNamespace(train=train, vocab_size=1, fingerprint='f')
  monkeypatch.setattr(dataset, '_prepare', lambda *_: '')
  monkeypatch.setattr(dataset, 'prepared', lambda *_: dataset.Dataset(
    manifest, None, 0, None, ()))
  dataset.open_dataset(tiny.experiment(tmp_path, training__num_steps=20))
  assert said in caplog.text and bool(said) == bool(caplog.text)
