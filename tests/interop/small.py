"""Small models of every family as our configs, in sizes that no two axes share by accident."""

import json
import types

import jax
import numpy as np

from jaxllm.data import tokenizers
from jaxllm.interop import huggingface, sources, weights
from jaxllm.models import decoder
from jaxllm.models.config import ExpertsConfig, SharedExpertConfig
from jaxllm.models.families import PRESETS
from jaxllm.models.positions import (
  Llama3Scaling,
  LongRopeScaling,
  RotaryPositions,
  YarnScaling,
)

SIZES = {'vocab_size': 259, 'embed_dim': 24, 'num_layers': 3, 'num_heads': 6, 'num_kv_heads': 2,
         'head_dim': 8, 'mlp_dim': 20, 'max_length': 64, 'vocab_multiple': 16}
FULL = SIZES | {'num_kv_heads': None, 'head_dim': None}
ROTARY = RotaryPositions(base=5000.0)


def _of(preset, sizes=SIZES, **fields):
  return PRESETS[preset].replace(**sizes | fields)


CONFIGS = {
  'gpt2': _of('gpt2_124m', FULL),
  'llama': _of('llama2_7b', positions=ROTARY),
  'llama3': _of('llama3.1_8b', positions=ROTARY.replace(
    scaling=Llama3Scaling(factor=8.0, original_length=16))),
  'llama_yarn': _of('llama2_7b', positions=ROTARY.replace(
    scaling=YarnScaling(factor=4.0, original_length=16))),
  'smollm3': _of('smollm3_3b', num_layers=5),
  'mistral': _of('mistral_7b_v0.1', window=5),
  'qwen2': _of('qwen2_0.5b'),
  'qwen3': _of('qwen3_0.6b'),
  'gemma': _of('gemma_2b', embedding_scale=24**0.5),
  'gemma2': _of('gemma2_2b', window=5, embedding_scale=24**0.5, attention_scale=20**-0.5),
  'gemma3_text': _of('gemma3_4b', window=5, num_layers=7, embedding_scale=24**0.5),
  'phi3': _of('phi3_mini_4k', window=7, positions=RotaryPositions(
    fraction=0.5,
    scaling=LongRopeScaling(short_factors=(1.0, 2.0), long_factors=(3.0, 5.0), original_length=16,
                            attention_factor=1.2))),
  'olmo2': _of('olmo2_7b'),
  'mixtral': _of('mixtral_8x7b', experts=ExpertsConfig(num_experts=5, top_k=2)),
  'olmoe': _of('olmoe_1b_7b', experts=ExpertsConfig(num_experts=5, top_k=3, normalized=False)),
  'qwen2_moe': _of('qwen1.5_moe_a2.7b', experts=ExpertsConfig(
    num_experts=5, top_k=2, normalized=False, shared=SharedExpertConfig(mlp_dim=28, gated=True))),
  'qwen3_moe': _of('qwen3_30b_a3b', experts=ExpertsConfig(num_experts=5, top_k=2)),
  'gpt_neox': _of('pythia_70m', FULL, positions=RotaryPositions(fraction=0.5)),
}
# Which family a config belongs to, where its name does not say it.
MODEL_TYPES = {'llama3': 'llama', 'llama_yarn': 'llama'}


def load(path, dtype='float32', ignore_auto_map=False, **options):
  """Return (config, variables, files, model_type) of a directory or file as a namespace."""
  return read(sources.open_model(path, ignore_auto_map=ignore_auto_map), dtype, **options)


def read(source, dtype='float32', **options):
  """Do the same with an open source."""
  return types.SimpleNamespace(
    config=source.config, variables=weights.load(source, dtype, **options), files=source.files,
    model_type=source.form.model_type)


def variables(config, seed=0):
  """Return variables without a number left as it was initialised."""
  leaves, form = jax.tree.flatten(decoder.abstract(config)[0])
  draw = np.random.default_rng(seed)
  made = [
    np.asarray(draw.normal(size=leaf.shape) * 0.4 + (0.6 if leaf.ndim < 3 else 0.0), np.float32)
    for leaf in leaves
  ]
  made = jax.tree.unflatten(form, made)
  # The padding of the vocabulary is zero, as an import leaves it.
  params = made['params']
  params['embed']['embedding'][config.vocab_size :] = 0
  if 'head' in params:
    params['head']['kernel'][:, config.vocab_size :] = 0
  return made


def files(template=None):
  """Return the files of a small tokenizer: bytes."""
  made = tokenizers.from_files({'bytes.txt': b''}).files()
  if template:
    made['tokenizer_config.json'] = json.dumps({'chat_template': template}).encode()
  return made


def save(directory, name='llama', **options):
  """Write a small model of a family; return its config and variables."""
  config = CONFIGS[name]
  made = variables(config)
  options.setdefault('model_type', MODEL_TYPES.get(name, name))
  huggingface.save(directory, config, made, files(), **options)
  return config, made
