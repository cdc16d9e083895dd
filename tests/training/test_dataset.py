"""What a run says about its records before it trains on them."""

import pytest

from jaxllm.experiment import TrainingConfig
from jaxllm.training import dataset


@pytest.mark.parametrize('num_records, said', [
  (7, '20 steps of 8 records read each of the 7 training records 22 times'),
  (3, 'read each of the 3 training records 53 times'), (8, ''), (1000, ''),
])
def test_little_text_is_said_to_be_read_often(caplog, num_records, said):
  dataset._tell_repeats(TrainingConfig(num_steps=20, batch_size=8), num_records)
  assert said in caplog.text and bool(said) == bool(caplog.text)
