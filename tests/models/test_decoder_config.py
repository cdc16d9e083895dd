"""A decoder config refuses what cannot be built, and says what to change."""

import pytest
import tiny

from jaxllm.config import ConfigError
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import LearnedPositions, LongRopeScaling, RotaryPositions

LONG = LongRopeScaling(short_factors=(1, 1), long_factors=(1,), original_length=8)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'num_heads': 3}, ['num_heads=3', 'embed_dim=16', 'head_dim']),
    ({'num_kv_heads': 3}, ['num_kv_heads=3', 'num_heads=4']),
    ({'head_dim': 3}, ['fraction=1.0', 'head_dim=3', 'even']),
    ({'positions': RotaryPositions(fraction=0.25)}, ['positions.fraction=0.25', 'even']),
    ({'positions': RotaryPositions(scaling=LONG)}, ['long_factors', '1 number', '2 pairs']),
    ({'window': 4}, ['window=4', "'global'", 'local layers']),
    ({'layer_pattern': ('local',)}, ['window=None', "'local'"]),
    ({'layer_pattern': ('global',) * 3 + ('local',), 'window': 2}, ['window=2', '3 layers']),
    ({'layer_pattern': ()}, ['layer_pattern=()']),
    ({'layer_pattern': ('dense',)}, ['layer_pattern', 'global_nope']),
    ({'local_positions': RotaryPositions()}, ['local_positions', 'layer_pattern']),
    (
      {
        'local_positions': RotaryPositions(), 'positions': LearnedPositions(),
        'layer_pattern': ('local',), 'window': 2,
      },
      ['local_positions', 'rotary'],
    ),
    ({'biases': ('head',), 'tied_head': True}, ['biases', 'tied_head']),
    ({'attention': 'cudnn'}, ['cudnn', 'bfloat16']),
    (
      {'attention': 'cudnn', 'dtype': 'bfloat16', 'attention_softcap': 2.0},
      ['cudnn', 'attention_softcap=2.0', 'xla'],
    ),
    ({'vocab_size': 0}, ['vocab_size=0']),
    ({'dropout_rate': 1.0}, ['dropout_rate=1.0']),
    ({'num_layer': 3}, ['num_layer', "'num_layers'"]),
    ({'positions': {'kind': 'absolute'}}, ['positions', 'learned']),
  ],
)
def test_errors_name_field_value_and_fix(changes, words):
  with pytest.raises(ConfigError) as error:
    DecoderConfig(**{**tiny.BASE.model_dump(), **changes})
  for word in words:
    assert word in str(error.value)


def test_norm_errors():
  with pytest.raises(ConfigError, match='rmsnorm has no bias'):
    NormConfig(bias=True)


@pytest.mark.parametrize('name', tiny.CONFIGS)
def test_json_round_trip(name):
  config = tiny.CONFIGS[name]
  assert DecoderConfig.from_json(config.to_json()) == config


def test_derived_sizes():
  config = tiny.CONFIGS['gemma']
  assert (config.kv_heads, config.head_size, config.padded_vocab_size) == (1, 6, 64)
  assert config.layer_kinds == ('local', 'local', 'global')
  assert tiny.BASE.layer_kinds == ('global',) * 3 and tiny.BASE.head_size == 4
