"""OLMo 2: Llama with norms after attention and MLP, and over all queries and keys.

Reference:
  Team OLMo, "2 OLMo 2 Furious", arXiv 2501.00656; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import llama
from jaxllm.models.families.huggingface import Format, Keys, rms_config, rms_decoder, with_defaults
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions

_OLMO2 = llama.PRESETS['llama2_7b'].replace(
  vocab_size=100352,
  norm=NormConfig(kind='rmsnorm', epsilon=1e-6),
  norm_placement='post',
  query_key_norm='width',
  positions=RotaryPositions(base=500_000.0),
)

PRESETS = {
  'olmo2_1b': _OLMO2.replace(embed_dim=2048, num_layers=16, num_heads=16, mlp_dim=8192),
  'olmo2_7b': _OLMO2,
  'olmo2_13b': _OLMO2.replace(embed_dim=5120, num_layers=40, num_heads=40, mlp_dim=13824),
}


def _decode(keys: Keys) -> DecoderConfig:
  return rms_decoder(
    with_defaults(keys, {'rms_norm_eps': 1e-5}), norm_placement='post', query_key_norm='width'
  )


def _encode(config: DecoderConfig) -> dict[str, Any]:
  return rms_config(config, attention_bias='qkv' in config.biases)


HUGGINGFACE = Format(
  'olmo2', 'Olmo2ForCausalLM', decode=_decode, encode=_encode,
  names={
    **{path: name for path, name in llama.NAMES.items() if not path.endswith('_norm/scale')},
    'final_norm/scale': 'model.norm.weight',
    'layers/attention/query_norm/scale': 'model.layers.{}.self_attn.q_norm.weight',
    'layers/attention/key_norm/scale': 'model.layers.{}.self_attn.k_norm.weight',
    'layers/attention_post_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
    'layers/mlp_post_norm/scale': 'model.layers.{}.post_feedforward_layernorm.weight',
  },
)
