"""GPT-NeoX and Pythia: partly rotated heads, attention and MLP side by side, LayerNorm, biases.

Reference:
  Black et al., "GPT-NeoX-20B", arXiv 2204.06745; Biderman et al., "Pythia", arXiv 2304.01373; the
  released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions

_SMALL = DecoderConfig(
  vocab_size=50304, embed_dim=512, num_layers=6, num_heads=8, mlp_dim=2048, max_length=2048,
  positions=RotaryPositions(fraction=0.25), norm=NormConfig(kind='layernorm', bias=True),
  residual='parallel', activation='gelu', gated=False, biases=('qkv', 'attention_out', 'mlp'))

PRESETS = {
  name: _SMALL.replace(embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
                       mlp_dim=4 * embed_dim, vocab_size=vocab_size)
  for name, (embed_dim, num_layers, num_heads, vocab_size) in {
    'pythia_70m': (512, 6, 8, 50304),
    'pythia_160m': (768, 12, 12, 50304),
    'pythia_410m': (1024, 24, 16, 50304),
    'pythia_1.4b': (2048, 24, 16, 50304),
    'pythia_6.9b': (4096, 32, 32, 50432),
    'neox_20b': (6144, 44, 64, 50432),
  }.items()}


def _decode(keys: hf.Keys) -> DecoderConfig:
  positions = hf.rotary(keys, hf.number(keys, 'rotary_emb_base', 10_000.0),
                     hf.number(keys, 'rotary_pct', 0.25))
  biases = ('qkv', 'attention_out') if hf.flag(keys, 'attention_bias', True) else ()
  return _SMALL.replace(
    **hf.sizes(keys, hf.SIZES),
    max_length=hf.context_length(keys, positions),
    positions=positions,
    norm=_SMALL.norm.replace(epsilon=hf.number(keys, 'layer_norm_eps', 1e-5)),
    residual='parallel' if hf.flag(keys, 'use_parallel_residual', True) else 'sequential',
    activation=hf.activation(keys, 'hidden_act', 'gelu'),
    biases=(*biases, 'mlp'),
    tied_head=hf.flag(keys, 'tie_word_embeddings'),
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  rope = hf.rotary_keys(config)
  return hf.common_keys(config, hf.SIZES) | hf.context_keys(config) | {
    'hidden_act': hf.ACTIVATION_NAMES[config.activation],
    'layer_norm_eps': config.norm.epsilon,
    'attention_dropout': config.attention_dropout_rate,
    'hidden_dropout': config.dropout_rate,
    'use_parallel_residual': config.residual == 'parallel',
    'attention_bias': 'qkv' in config.biases,
    'rotary_emb_base': rope.get('rope_theta'),
    'rotary_pct': rope.get('partial_rotary_factor', 1.0),
    'rope_scaling': rope.get('rope_scaling'),
  }


_LAYER = 'gpt_neox.layers.{}.'

HUGGINGFACE = hf.Format(
  'gpt_neox', 'GPTNeoXForCausalLM', decode=_decode, encode=_encode,
  prefix='gpt_neox.',
  fused='per_head',
  names={
    'embed/embedding': 'gpt_neox.embed_in.weight',
    **hf.affine_names({
      'final_norm': 'gpt_neox.final_layer_norm',
      'layers/attention_norm': _LAYER + 'input_layernorm',
      'layers/mlp_norm': _LAYER + 'post_attention_layernorm',
      'layers/attention/out': _LAYER + 'attention.dense',
      'layers/mlp/up': _LAYER + 'mlp.dense_h_to_4h',
      'layers/mlp/down': _LAYER + 'mlp.dense_4h_to_h',
    }),
    **hf.qkv_names(_LAYER + 'attention.query_key_value'),
    'head/kernel': 'embed_out.weight',
  },
  aliases={'lm_head.weight': 'embed_out.weight'},
  ignored={
    r'.*\.attention\.(masked_)?bias': 'causal mask',
    r'.*\.rotary_emb\.inv_freq': 'rotary frequencies, computed',
  })
