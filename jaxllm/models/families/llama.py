"""Llama 1, 2 and 3: rotary positions, RMSNorm, SwiGLU, no biases, grouped heads in later sizes.

Reference:
  Touvron et al., arXiv 2302.13971 (Llama 1) and 2307.09288 (Llama 2); Dubey et al., arXiv
  2407.21783 (Llama 3 and 3.1); the released configurations (Llama 3.2).
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families.huggingface import Format, Keys, refuse, rms_config, rms_decoder
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import Llama3Scaling, RotaryPositions


def _preset(
  embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int, max_length: int,
  epsilon: float = 1e-5, **fields,
) -> DecoderConfig:
  return DecoderConfig(
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    max_length=max_length,
    norm=NormConfig(kind='rmsnorm', epsilon=epsilon),
    initializer=InitializerConfig(stddev=0.02, scale_residual=False),
    **fields,
  )


def _llama3(
  embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int, factor: float | None = None,
  tied_head: bool = False,
) -> DecoderConfig:
  """Llama 3 with 8 key/value heads; 3.1 and 3.2 stretch its 8,192 tokens by `factor`."""
  scaling = None if factor is None else Llama3Scaling(factor=factor)
  return _preset(
    embed_dim, num_layers, num_heads, mlp_dim, 8192 if factor is None else 131072,
    vocab_size=128256, num_kv_heads=8, tied_head=tied_head,
    positions=RotaryPositions(base=500_000.0, scaling=scaling),
  )


PRESETS = {
  'llama1_7b': _preset(4096, 32, 32, 11008, 2048, 1e-6, vocab_size=32000),
  'llama1_13b': _preset(5120, 40, 40, 13824, 2048, 1e-6, vocab_size=32000),
  'llama1_33b': _preset(6656, 60, 52, 17920, 2048, 1e-6, vocab_size=32000),
  'llama1_65b': _preset(8192, 80, 64, 22016, 2048, 1e-5, vocab_size=32000),
  'llama2_7b': _preset(4096, 32, 32, 11008, 4096, vocab_size=32000),
  'llama2_13b': _preset(5120, 40, 40, 13824, 4096, vocab_size=32000),
  'llama2_70b': _preset(8192, 80, 64, 28672, 4096, vocab_size=32000, num_kv_heads=8),
  'llama3_8b': _llama3(4096, 32, 32, 14336),
  'llama3_70b': _llama3(8192, 80, 64, 28672),
  'llama3.1_8b': _llama3(4096, 32, 32, 14336, factor=8.0),
  'llama3.1_70b': _llama3(8192, 80, 64, 28672, factor=8.0),
  'llama3.1_405b': _llama3(16384, 126, 128, 53248, factor=8.0),
  'llama3.2_1b': _llama3(2048, 16, 32, 8192, factor=32.0, tied_head=True),
  'llama3.2_3b': _llama3(3072, 28, 24, 8192, factor=32.0, tied_head=True),
}


def _decode(keys: Keys) -> DecoderConfig:
  refuse(keys, 'sliding_window')
  refuse(keys, 'rope_interleaved', False)
  return rms_decoder(keys)


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return rms_config(
    config, attention_bias='qkv' in config.biases, mlp_bias='mlp' in config.biases
  )


# The names that most families have taken over.
NAMES = {
  'embed/embedding': 'model.embed_tokens.weight',
  'layers/attention_norm/scale': 'model.layers.{}.input_layernorm.weight',
  **{
    f'layers/attention/{ours}/{leaf}': f'model.layers.{{}}.self_attn.{theirs}_proj.{kind}'
    for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o'))
    for leaf, kind in (('kernel', 'weight'), ('bias', 'bias'))
  },
  'layers/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  **{
    f'layers/mlp/{name}/{leaf}': f'model.layers.{{}}.mlp.{name}_proj.{kind}'
    for name in ('gate', 'up', 'down') for leaf, kind in (('kernel', 'weight'), ('bias', 'bias'))
  },
  'final_norm/scale': 'model.norm.weight',
  'head/kernel': 'lm_head.weight',
}

HUGGINGFACE = Format('llama', 'LlamaForCausalLM', NAMES, _decode, _encode)
