"""Published sizes, by abstract evaluation: nothing is allocated."""

import functools

import jax
import numpy as np
import pytest
import tiny

from jaxllm import sharding
from jaxllm.models.decoder import abstract, init, parameter_count
from jaxllm.models.families import PRESETS

# From the released weights.
EXACT = {
  'gpt2_124m': 124_439_808,
  'gpt2_355m': 354_823_168,
  'gpt2_774m': 774_030_080,
  'gpt2_1.5b': 1_557_611_200,
  'llama1_7b': 6_738_415_616,
  'llama1_13b': 13_015_864_320,
  'llama1_33b': 32_528_943_616,
  'llama1_65b': 65_285_660_672,
  'llama2_7b': 6_738_415_616,
  'llama2_13b': 13_015_864_320,
  'llama2_70b': 68_976_648_192,
  'llama3_8b': 8_030_261_248,
  'llama3_70b': 70_553_706_496,
  'llama3.1_8b': 8_030_261_248,
  'llama3.1_70b': 70_553_706_496,
  'llama3.1_405b': 405_853_388_800,
  'llama3.2_1b': 1_235_814_400,
  'llama3.2_3b': 3_212_749_824,
  'smollm2_135m': 134_515_008,
  'smollm2_360m': 361_821_120,
  'smollm2_1.7b': 1_711_376_384,
  'mixtral_8x7b': 46_702_792_704,
  'mixtral_8x22b': 140_620_634_112,
  'olmoe_1b_7b': 6_919_161_856,
  'qwen1.5_moe_a2.7b': 14_315_784_192,
  'qwen3_30b_a3b': 30_532_122_624,
}

# From Table 2.1, which rounds: agreement to 2%.
ROUNDED = {
  'gpt3_125m': 125e6,
  'gpt3_350m': 350e6,
  'gpt3_760m': 760e6,
  'gpt3_1.3b': 1.3e9,
  'gpt3_2.7b': 2.7e9,
  'gpt3_6.7b': 6.7e9,
  'gpt3_13b': 13e9,
  'gpt3_175b': 175e9,
}


@pytest.mark.parametrize('name', EXACT)
def test_parameter_count_is_the_published_one(name):
  assert parameter_count(PRESETS[name]) == EXACT[name]


@pytest.mark.parametrize('name', ROUNDED)
def test_parameter_count_rounds_to_the_published_one(name):
  assert parameter_count(PRESETS[name]) == pytest.approx(ROUNDED[name], rel=0.02)


def test_every_family_is_counted():
  counted = {name for name in PRESETS if name.startswith(('gpt', 'llama', 'smollm2'))}
  assert set(EXACT) | set(ROUNDED) >= counted


@pytest.mark.parametrize('name', [*PRESETS, *tiny.CONFIGS])
def test_every_dimension_has_an_axis_with_a_rule(name):
  shapes, axes = abstract((PRESETS | tiny.CONFIGS)[name])
  is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True)
  for shape, names in leaves:
    assert len(names) == len(shape.shape) and shape.dtype == np.float32
    sharding.partition_spec(names, sharding.DEFAULT_RULES)


def test_init_has_the_described_form():
  config = tiny.CONFIGS['gemma']
  made = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  shapes, _ = abstract(config)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), shapes
  )


def test_parameter_count_ignores_the_padding():
  padded, plain = (tiny.BASE.replace(vocab_multiple=n) for n in (64, 1))
  assert parameter_count(padded) == parameter_count(plain)
  assert padded.padded_vocab_size == 64 and plain.padded_vocab_size == 50


def test_flops_count_weights_twice_and_visible_keys():
  weights = 3 * (4 * 16 * 16 + 3 * 16 * 24) + 16 * 50
  seen = 3 * (1 + 2 + 3 + 4) / 4
  assert tiny.BASE.flops_per_token(4) == 2 * weights + 4 * 16 * seen
  local = tiny.BASE.replace(layer_pattern=('local',), window=2)
  assert local.flops_per_token(4) == 2 * weights + 4 * 16 * 3 * (1 + 2 + 2 + 2) / 4
