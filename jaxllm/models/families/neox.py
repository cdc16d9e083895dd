"""GPT-NeoX and Pythia: partly rotated heads, attention and MLP side by side, LayerNorm, biases.

Reference:
  Black et al., "GPT-NeoX-20B", arXiv 2204.06745; Biderman et al., "Pythia", arXiv 2304.01373; the
  released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families.huggingface import (
  ACTIVATION_NAMES,
  MAX_LAYERS,
  Format,
  Keys,
  activation,
  context_keys,
  context_length,
  flag,
  number,
  rotary,
  rotary_keys,
  size,
)
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions


def _preset(
  embed_dim: int, num_layers: int, num_heads: int, vocab_size: int = 50304
) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    mlp_dim=4 * embed_dim,
    max_length=2048,
    positions=RotaryPositions(fraction=0.25),
    norm=NormConfig(kind='layernorm', epsilon=1e-5, bias=True),
    residual='parallel',
    activation='gelu',
    gated=False,
    biases=('qkv', 'attention_out', 'mlp'),
  )


PRESETS = {
  'pythia_70m': _preset(512, 6, 8),
  'pythia_160m': _preset(768, 12, 12),
  'pythia_410m': _preset(1024, 24, 16),
  'pythia_1.4b': _preset(2048, 24, 16),
  'pythia_6.9b': _preset(4096, 32, 32, 50432),
  'neox_20b': _preset(6144, 44, 64, 50432),
}


def _decode(keys: Keys) -> DecoderConfig:
  biases = ('qkv', 'attention_out') if flag(keys, 'attention_bias', True) else ()
  positions = rotary(
    keys, base=number(keys, 'rotary_emb_base', 10_000.0),
    fraction=number(keys, 'rotary_pct', 0.25),
  )
  return DecoderConfig(
    vocab_size=size(keys, 'vocab_size'),
    embed_dim=size(keys, 'hidden_size'),
    num_layers=size(keys, 'num_hidden_layers', limit=MAX_LAYERS),
    num_heads=size(keys, 'num_attention_heads'),
    mlp_dim=size(keys, 'intermediate_size'),
    max_length=context_length(keys, positions),
    positions=positions,
    norm=NormConfig(kind='layernorm', epsilon=number(keys, 'layer_norm_eps', 1e-5), bias=True),
    residual='parallel' if flag(keys, 'use_parallel_residual', True) else 'sequential',
    activation=activation(keys, 'hidden_act', 'gelu'),
    gated=False,
    biases=(*biases, 'mlp'),
    tied_head=flag(keys, 'tie_word_embeddings'),
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  rope = rotary_keys(config)
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'intermediate_size': config.mlp_dim,
    'hidden_act': ACTIVATION_NAMES[config.activation],
    **context_keys(config),
    'initializer_range': config.initializer.stddev or 0.02,
    'layer_norm_eps': config.norm.epsilon,
    'attention_dropout': config.attention_dropout_rate,
    'hidden_dropout': config.dropout_rate,
    'use_parallel_residual': config.residual == 'parallel',
    'attention_bias': 'qkv' in config.biases,
    'tie_word_embeddings': config.tied_head,
    'rotary_emb_base': rope.get('rope_theta'),
    'rotary_pct': rope.get('partial_rotary_factor', 1.0),
    'rope_scaling': rope.get('rope_scaling'),
  }


_LAYER = 'gpt_neox.layers.{}.'
_QKV = ('layers/attention/query', 'layers/attention/key', 'layers/attention/value')
_PLAIN = {
  'final_norm': 'gpt_neox.final_layer_norm',
  'layers/attention_norm': _LAYER + 'input_layernorm',
  'layers/mlp_norm': _LAYER + 'post_attention_layernorm',
  'layers/attention/out': _LAYER + 'attention.dense',
  'layers/mlp/up': _LAYER + 'mlp.dense_h_to_4h',
  'layers/mlp/down': _LAYER + 'mlp.dense_4h_to_h',
}

HUGGINGFACE = Format(
  'gpt_neox', 'GPTNeoXForCausalLM', decode=_decode, encode=_encode,
  prefix='gpt_neox.',
  fused='per_head',
  names={
    'embed/embedding': 'gpt_neox.embed_in.weight',
    **{
      f'{path}/{"scale" if "norm" in path else "kernel"}': f'{name}.weight'
      for path, name in _PLAIN.items()
    },
    **{f'{path}/bias': f'{name}.bias' for path, name in _PLAIN.items()},
    tuple(f'{path}/kernel' for path in _QKV): _LAYER + 'attention.query_key_value.weight',
    tuple(f'{path}/bias' for path in _QKV): _LAYER + 'attention.query_key_value.bias',
    'head/kernel': 'embed_out.weight',
  },
  aliases={'lm_head.weight': 'embed_out.weight'},
  ignored={
    r'.*\.attention\.(masked_)?bias': 'causal mask',
    r'.*\.rotary_emb\.inv_freq': 'rotary frequencies, computed',
  },
)
