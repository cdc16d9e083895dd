"""GPT-2: learned positions, LayerNorm, biases everywhere, tanh GELU, tied head.

Reference:
  Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. The sizes are those
  of the released weights (the paper's counts are wrong, as its authors note). Dropout is 0 here;
  the original trained with 0.1.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families.huggingface import (
  ACTIVATION_NAMES,
  MAX_LAYERS,
  Format,
  Keys,
  activation,
  flag,
  number,
  refuse,
  size,
)
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import LearnedPositions


def _preset(embed_dim: int, num_layers: int, num_heads: int) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=50257,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    mlp_dim=4 * embed_dim,
    max_length=1024,
    positions=LearnedPositions(),
    norm=NormConfig(kind='layernorm', epsilon=1e-5, bias=True),
    activation='gelu_tanh',
    gated=False,
    biases=('qkv', 'attention_out', 'mlp'),
    tied_head=True,
  )


PRESETS = {
  'gpt2_124m': _preset(768, 12, 12),
  'gpt2_355m': _preset(1024, 24, 16),
  'gpt2_774m': _preset(1280, 36, 20),
  'gpt2_1.5b': _preset(1600, 48, 25),
}


def _decode(keys: Keys) -> DecoderConfig:
  refuse(keys, 'scale_attn_by_inverse_layer_idx', False)
  refuse(keys, 'add_cross_attention', False)
  width = size(keys, 'n_embd')
  return DecoderConfig(
    vocab_size=size(keys, 'vocab_size'),
    embed_dim=width,
    num_layers=size(keys, 'n_layer', limit=MAX_LAYERS),
    num_heads=size(keys, 'n_head'),
    mlp_dim=size(keys, 'n_inner', 4 * width),
    max_length=size(keys, 'n_positions'),
    positions=LearnedPositions(),
    norm=NormConfig(
      kind='layernorm', epsilon=number(keys, 'layer_norm_epsilon', 1e-5), bias=True
    ),
    activation=activation(keys, 'activation_function', 'gelu_new'),
    gated=False,
    biases=('qkv', 'attention_out', 'mlp'),
    tied_head=flag(keys, 'tie_word_embeddings', True),
    attention_scale=None if flag(keys, 'scale_attn_weights', True) else 1.0,
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': config.vocab_size,
    'n_positions': config.max_length,
    'n_embd': config.embed_dim,
    'n_layer': config.num_layers,
    'n_head': config.num_heads,
    'n_inner': config.mlp_dim,
    'activation_function': (
      'gelu_new' if config.activation == 'gelu_tanh' else ACTIVATION_NAMES[config.activation]
    ),
    'layer_norm_epsilon': config.norm.epsilon,
    'initializer_range': config.initializer.stddev or 0.02,
    'embd_pdrop': config.dropout_rate,
    'resid_pdrop': config.dropout_rate,
    'attn_pdrop': config.attention_dropout_rate,
    'scale_attn_weights': config.query_scale == config.head_size**-0.5,
    'tie_word_embeddings': config.tied_head,
  }


_QKV = ('layers/attention/query', 'layers/attention/key', 'layers/attention/value')

HUGGINGFACE = Format(
  model_type='gpt2',
  architecture='GPT2LMHeadModel',
  decode=_decode,
  encode=_encode,
  prefix='transformer.',
  kernels='in_out',
  names={
    'embed/embedding': 'transformer.wte.weight',
    'positions/embedding': 'transformer.wpe.weight',
    'layers/attention_norm/scale': 'transformer.h.{}.ln_1.weight',
    'layers/attention_norm/bias': 'transformer.h.{}.ln_1.bias',
    tuple(f'{path}/kernel' for path in _QKV): 'transformer.h.{}.attn.c_attn.weight',
    tuple(f'{path}/bias' for path in _QKV): 'transformer.h.{}.attn.c_attn.bias',
    'layers/attention/out/kernel': 'transformer.h.{}.attn.c_proj.weight',
    'layers/attention/out/bias': 'transformer.h.{}.attn.c_proj.bias',
    'layers/mlp_norm/scale': 'transformer.h.{}.ln_2.weight',
    'layers/mlp_norm/bias': 'transformer.h.{}.ln_2.bias',
    'layers/mlp/up/kernel': 'transformer.h.{}.mlp.c_fc.weight',
    'layers/mlp/up/bias': 'transformer.h.{}.mlp.c_fc.bias',
    'layers/mlp/down/kernel': 'transformer.h.{}.mlp.c_proj.weight',
    'layers/mlp/down/bias': 'transformer.h.{}.mlp.c_proj.bias',
    'final_norm/scale': 'transformer.ln_f.weight',
    'final_norm/bias': 'transformer.ln_f.bias',
    'head/kernel': 'lm_head.weight',
  },
  ignored={r'.*\.attn\.(masked_)?bias': 'causal mask'},
)
