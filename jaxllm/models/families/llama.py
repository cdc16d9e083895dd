"""Llama 1, 2 and 3: rotary positions, RMSNorm, SwiGLU, no biases, grouped heads in later sizes.

Reference:
  Touvron et al., arXiv 2302.13971 (Llama 1) and 2307.09288 (Llama 2); Dubey et al., arXiv
  2407.21783 (Llama 3 and 3.1); the released configurations (Llama 3.2).
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import Llama3Scaling, RotaryPositions

LLAMA2 = DecoderConfig(
  vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32, mlp_dim=11008, max_length=4096,
  initializer=InitializerConfig(stddev=0.02, scale_residual=False),
)
_LLAMA1 = LLAMA2.replace(max_length=2048, norm=NormConfig(epsilon=1e-6))
LLAMA3 = LLAMA2.replace(
  vocab_size=128256, num_kv_heads=8, mlp_dim=14336, max_length=8192,
  positions=RotaryPositions(base=500_000.0),
)


def sized(
  config: DecoderConfig, embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int,
  **fields: Any,
) -> DecoderConfig:
  """Return a model of the same kind and another size."""
  return config.replace(embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
                        mlp_dim=mlp_dim, **fields)


def _stretched(factor: float, **fields: Any) -> DecoderConfig:
  """Llama 3.1 and 3.2 stretch the 8,192 tokens of Llama 3."""
  positions = RotaryPositions(base=500_000.0, scaling=Llama3Scaling(factor=factor))
  return LLAMA3.replace(max_length=131072, positions=positions, **fields)


PRESETS = {
  'llama1_7b': _LLAMA1,
  'llama1_13b': sized(_LLAMA1, 5120, 40, 40, 13824),
  'llama1_33b': sized(_LLAMA1, 6656, 60, 52, 17920),
  'llama1_65b': sized(_LLAMA1, 8192, 80, 64, 22016, norm=NormConfig()),
  'llama2_7b': LLAMA2,
  'llama2_13b': sized(LLAMA2, 5120, 40, 40, 13824),
  'llama2_70b': sized(LLAMA2, 8192, 80, 64, 28672, num_kv_heads=8),
  'llama3_8b': LLAMA3,
  'llama3_70b': sized(LLAMA3, 8192, 80, 64, 28672),
  'llama3.1_8b': _stretched(8.0),
  'llama3.1_70b': sized(_stretched(8.0), 8192, 80, 64, 28672),
  'llama3.1_405b': sized(_stretched(8.0), 16384, 126, 128, 53248),
  'llama3.2_1b': sized(_stretched(32.0, tied_head=True), 2048, 16, 32, 8192),
  'llama3.2_3b': sized(_stretched(32.0, tied_head=True), 3072, 28, 24, 8192),
}


def _decode(keys: hf.Keys) -> DecoderConfig:
  hf.refuse(keys, 'sliding_window')
  hf.refuse(keys, 'rope_interleaved', False)
  return hf.rms_decoder(keys)


def encode(config: DecoderConfig) -> dict[str, Any]:
  """Return the keys of config.json."""
  return hf.rms_config(
    config, attention_bias='qkv' in config.biases, mlp_bias='mlp' in config.biases
  )


# The names that most families have taken over.
_LAYER = 'model.layers.{}.'
NAMES = {
  'embed/embedding': 'model.embed_tokens.weight',
  'layers/attention_norm/scale': _LAYER + 'input_layernorm.weight',
  'layers/mlp_norm/scale': _LAYER + 'post_attention_layernorm.weight',
  'final_norm/scale': 'model.norm.weight',
  'head/kernel': 'lm_head.weight',
  **{
    f'layers/{ours}/{leaf}': f'{_LAYER}{theirs}_proj.{kind}'
    for ours, theirs in {
      'attention/query': 'self_attn.q', 'attention/key': 'self_attn.k',
      'attention/value': 'self_attn.v', 'attention/out': 'self_attn.o',
      'mlp/gate': 'mlp.gate', 'mlp/up': 'mlp.up', 'mlp/down': 'mlp.down',
    }.items()
    for leaf, kind in (('kernel', 'weight'), ('bias', 'bias'))
  },
}
QUERY_KEY_NORMS = {
  'layers/attention/query_norm/scale': _LAYER + 'self_attn.q_norm.weight',
  'layers/attention/key_norm/scale': _LAYER + 'self_attn.k_norm.weight',
}

HUGGINGFACE = hf.Format('llama', 'LlamaForCausalLM', NAMES, _decode, encode)
