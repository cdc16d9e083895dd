"""GPT-2 and GPT-3: learned positions, LayerNorm, biases everywhere, tanh GELU, tied head.

Reference:
  Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. The sizes are those
  of the released weights (the paper's counts are wrong, as its authors note). Dropout is 0 here;
  the original trained with 0.1.
  Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, Table 2.1. The paper
  alternates dense and locally banded sparse attention, whose pattern is not published; all layers
  are dense here, which changes no parameter. Two of its rows contradict themselves (heads x
  head_dim is not the width): 1.3B has 16 heads of 128 here instead of 24, and 13B the width 5,120
  instead of 5,140; both then meet the published counts.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import LearnedPositions

_SMALL = DecoderConfig(
  vocab_size=50257, embed_dim=768, num_layers=12, num_heads=12, mlp_dim=3072, max_length=1024,
  positions=LearnedPositions(), norm=NormConfig(kind='layernorm', bias=True),
  activation='gelu_tanh', gated=False, biases=('qkv', 'attention_out', 'mlp'), tied_head=True)


def _sized(embed_dim: int, num_layers: int, num_heads: int, **fields: Any) -> DecoderConfig:
  return _SMALL.replace(embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
                        mlp_dim=4 * embed_dim, **fields)


PRESETS = {
  'gpt2_124m': _SMALL,
  'gpt2_355m': _sized(1024, 24, 16),
  'gpt2_774m': _sized(1280, 36, 20),
  'gpt2_1.5b': _sized(1600, 48, 25),
  **{f'gpt3_{name}': _sized(*size, max_length=2048) for name, size in {
    '125m': (768, 12, 12),
    '350m': (1024, 24, 16),
    '760m': (1536, 24, 16),
    '1.3b': (2048, 24, 16),
    '2.7b': (2560, 32, 32),
    '6.7b': (4096, 32, 32),
    '13b': (5120, 40, 40),
    '175b': (12288, 96, 96),
  }.items()},
}

_SIZES = {'vocab_size': 'vocab_size', 'embed_dim': 'n_embd', 'num_layers': 'n_layer',
          'num_heads': 'n_head', 'mlp_dim': 'n_inner', 'max_length': 'n_positions'}


def _decode(keys: hf.Keys) -> DecoderConfig:
  hf.refuse(keys, 'scale_attn_by_inverse_layer_idx', False)
  hf.refuse(keys, 'add_cross_attention', False)
  if isinstance(width := keys.get('n_embd'), int):
    keys = hf.with_defaults(keys, {'n_inner': 4 * width})
  return _SMALL.replace(
    **hf.sizes(keys, _SIZES),
    norm=_SMALL.norm.replace(epsilon=hf.number(keys, 'layer_norm_epsilon', 1e-5)),
    activation=hf.activation(keys, 'activation_function', 'gelu_new'),
    tied_head=hf.flag(keys, 'tie_word_embeddings', True),
    attention_scale=None if hf.flag(keys, 'scale_attn_weights', True) else 1.0,
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return hf.common_keys(config, _SIZES) | {
    'activation_function': (
      'gelu_new' if config.activation == 'gelu_tanh' else hf.ACTIVATION_NAMES[config.activation]),
    'layer_norm_epsilon': config.norm.epsilon,
    'embd_pdrop': config.dropout_rate,
    'resid_pdrop': config.dropout_rate,
    'attn_pdrop': config.attention_dropout_rate,
    'scale_attn_weights': config.query_scale == config.head_size**-0.5,
  }


_LAYER = 'transformer.h.{}.'

HUGGINGFACE = hf.Format(
  'gpt2', 'GPT2LMHeadModel', decode=_decode, encode=_encode,
  prefix='transformer.',
  kernels='in_out',
  names={
    'embed/embedding': 'transformer.wte.weight',
    'positions/embedding': 'transformer.wpe.weight',
    **hf.qkv_names(_LAYER + 'attn.c_attn'),
    **hf.affine_names({
      'layers/attention_norm': _LAYER + 'ln_1',
      'layers/attention/out': _LAYER + 'attn.c_proj',
      'layers/mlp_norm': _LAYER + 'ln_2',
      'layers/mlp/up': _LAYER + 'mlp.c_fc',
      'layers/mlp/down': _LAYER + 'mlp.c_proj',
      'final_norm': 'transformer.ln_f',
    }),
    'head/kernel': 'lm_head.weight',
  },
  ignored={r'.*\.attn\.(masked_)?bias': 'causal mask'})
