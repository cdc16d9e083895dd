"""Phi-3: Llama with fused projections, a sliding window and LongRoPE.

Reference:
  Abdin et al., "Phi-3 Technical Report", arXiv 2404.14219; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import llama
from jaxllm.models.families.huggingface import Format, Keys, rms_config, rms_decoder, with_defaults
from jaxllm.models.families.mistral import window_in_all_layers
from jaxllm.models.positions import LongRopeScaling

PRESETS = {
  'phi3_mini_4k': llama.PRESETS['llama2_7b'].replace(
    vocab_size=32064, embed_dim=3072, num_layers=32, num_heads=32, mlp_dim=8192, max_length=4096,
    layer_pattern=('local',), window=2047,
  ),
}


def _decode(keys: Keys) -> DecoderConfig:
  keys = with_defaults(keys, {'rms_norm_eps': 1e-5})
  return rms_decoder(keys, partial=True, **window_in_all_layers(keys))


def _encode(config: DecoderConfig) -> dict[str, Any]:
  keys = rms_config(config, sliding_window=config.window)
  scaling = getattr(config.positions, 'scaling', None)
  if isinstance(scaling, LongRopeScaling):
    keys['original_max_position_embeddings'] = scaling.original_length
  if config.head_size * config.num_heads == config.embed_dim:
    del keys['head_dim']
  return keys


_FUSED = ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj')

HUGGINGFACE = Format(
  'phi3', 'Phi3ForCausalLM', decode=_decode, encode=_encode,
  names={
    **{
      path: name for path, name in llama.NAMES.items()
      if not name.endswith('.bias') and not any(part in name for part in _FUSED)
    },
    tuple(f'layers/attention/{part}/kernel' for part in ('query', 'key', 'value')):
      'model.layers.{}.self_attn.qkv_proj.weight',
    ('layers/mlp/gate/kernel', 'layers/mlp/up/kernel'): 'model.layers.{}.mlp.gate_up_proj.weight',
  },
)
