"""Phi-3: Llama with fused projections, a sliding window and LongRoPE.

Reference:
  Abdin et al., "Phi-3 Technical Report", arXiv 2404.14219; the released configurations.
"""

from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama, mistral
from jaxllm.models.positions import LongRopeScaling

PRESETS = {
  'phi3_mini_4k': llama.sized(
    llama.LLAMA2, 3072, 32, 32, 8192, vocab_size=32064, layer_pattern=('local',), window=2047
  ),
}


def _encode(config: DecoderConfig) -> dict[str, Any]:
  keys = hf.rms_config(config, sliding_window=config.window)
  scaling = getattr(config.positions, 'scaling', None)
  if isinstance(scaling, LongRopeScaling):
    keys['original_max_position_embeddings'] = scaling.original_length
  if config.head_size * config.num_heads == config.embed_dim:
    del keys['head_dim']
  return keys


_QKV = hf.qkv_names('model.layers.{}.self_attn.qkv_proj', leaves={'kernel': 'weight'})
_GATE_UP = ('layers/mlp/gate/kernel', 'layers/mlp/up/kernel')
_FUSED = [path for paths in (*_QKV, _GATE_UP) for path in paths]

HUGGINGFACE = hf.Format(
  'phi3', 'Phi3ForCausalLM', encode=_encode,
  decode=lambda keys: mistral.decode(hf.with_defaults(keys, {'rms_norm_eps': 1e-5}), partial=True),
  names={
    **{path: name for path, name in llama.NAMES.items()
       if path not in _FUSED and not path.endswith('/bias')},
    **_QKV,
    _GATE_UP: 'model.layers.{}.mlp.gate_up_proj.weight',
  },
)
