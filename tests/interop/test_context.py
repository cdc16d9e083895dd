"""How long the context is that a config.json names, scalings of the rotation included."""

import functools
import json
import math

import numpy as np
import pytest
import small

from jaxllm.interop import conversion, huggingface, weights
from jaxllm.models.families import HUGGINGFACE
from jaxllm.models.positions import LinearScaling, RotaryPositions, YarnScaling

SIZES = {
  'vocab_size': 64, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
  'num_attention_heads': 4, 'rotary_pct': 1.0, 'max_position_embeddings': 32,
}


@pytest.mark.parametrize(('rope', 'length'), [
  ({'rope_type': 'default'}, 32),
  ({'rope_type': 'linear', 'factor': 4.0}, 128),
  ({'type': 'linear', 'factor': 2.5}, 80),
  ({'rope_type': 'yarn', 'factor': 4.0}, 128),
  ({'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}, 128),
  # The longest context already.
  ({'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8}, 32),
  ({'rope_type': 'yarn', 'factor': 2.0, 'original_max_position_embeddings': 8}, 32),
  ({'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8}, 32),
])
@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'gpt_neox'])
@pytest.mark.parametrize('writing', ['rope_scaling', 'rope_parameters'])
def test_a_scaling_lengthens_the_context(kind, writing, rope, length):
  assert HUGGINGFACE[kind].decode({**SIZES, writing: rope}).max_length == length


def test_gemma_3_names_the_length_that_its_scaling_reaches():
  keys = {**SIZES, 'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}}
  assert HUGGINGFACE['gemma3_text'].decode(keys).max_length == 32


def test_a_length_out_of_reach_is_refused():
  with pytest.raises(ValueError, match='context length=320000000000'):
    HUGGINGFACE['llama'].decode({**SIZES, 'rope_scaling': {'type': 'linear', 'factor': 1e10}})


@pytest.mark.parametrize('scaling', [
  LinearScaling(factor=4.0), LinearScaling(factor=3.0), YarnScaling(factor=4.0, original_length=16),
  YarnScaling(factor=2.0, original_length=16),
])
@pytest.mark.parametrize('name', ['llama', 'gpt_neox', 'gemma3_text'])
def test_the_length_survives_writing(name, scaling):
  config = small.CONFIGS[name].replace(positions=RotaryPositions(scaling=scaling))
  form = huggingface.choose_format(config, name)
  assert form.decode(form.encode(config)).max_length == config.max_length == 64


def test_a_context_cut_short_is_written_as_long_as_its_scaling_reaches():
  scaling = YarnScaling(factor=8.0, original_length=16)
  config = small.CONFIGS['llama'].replace(positions=RotaryPositions(scaling=scaling))
  form = huggingface.choose_format(config)
  assert form.decode(form.encode(config)).max_length == 128


@pytest.mark.parametrize(('rope', 'sharpness'), [
  ({'mscale': 0.7, 'mscale_all_dim': 1.0, 'factor': 4.0},
   (0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
  ({'mscale': 0.7, 'factor': None}, None),
  ({'attention_factor': 0.5, 'factor': 4.0}, 0.5),
])
def test_the_sharpness_of_yarn_is_proven(rope, sharpness, tmp_path):
  small.save(tmp_path / 'model', 'llama_yarn')
  path = tmp_path / 'model' / 'config.json'
  keys = json.loads(path.read_text())
  keys['rope_scaling'] |= rope
  path.write_text(json.dumps(keys))
  source = huggingface.open_model(tmp_path / 'model')
  scaling = source.config.positions.scaling
  assert scaling.factor == 4
  if sharpness is None:
    assert scaling.attention_factor is None
  else:
    assert scaling.attention_factor == pytest.approx(sharpness)
  ids = conversion.fixed_prompt(source.config)
  reference = functools.partial(source.reference, ids, np.float32)
  conversion.prove(reference, source.config, weights.load(source), ids)
