"""Held-out scores are sums over batches, divided once; bits per byte are of the text alone."""

import math

import jax
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.evaluation import perplexity


def score(sums, bytes_per_token=2.0):
  where = sharding.batch_sharding(
    sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]), sharding.MeshConfig())
  batches = [{'tokens': np.full((1, 2), i)} for i in range(len(sums))]
  step = lambda _, batch: sums[int(batch['tokens'][0, 0])]  # noqa: E731
  return perplexity.evaluate(step, {}, batches, where, bytes_per_token)


def test_scores_are_divided_once_over_all_batches():
  found = score([
    {'loss_sum': 6.0, 'weight_sum': 3.0, 'correct_sum': 1.0, 'text_sum': 5.0},
    {'loss_sum': 2.0, 'weight_sum': 1.0, 'correct_sum': 1.0, 'text_sum': 1.0}])
  assert found == {
    'loss': 2.0, 'perplexity': math.exp(2), 'bits_per_byte': 6 / math.log(2) / 8, 'accuracy': 0.5,
    'tokens': 4.0}


def test_no_token_is_an_error():
  for sums in ([], [dict.fromkeys(('loss_sum', 'weight_sum', 'correct_sum', 'text_sum'), 0.0)]):
    with pytest.raises(ValueError, match='no token to predict'):
      score(sums)
