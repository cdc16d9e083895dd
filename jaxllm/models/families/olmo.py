"""OLMo 2: Llama with norms after attention and MLP, and over all queries and keys.

Reference:
  Team OLMo, "2 OLMo 2 Furious", arXiv 2501.00656; the released configurations.
"""

from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import RotaryPositions

_OLMO2 = llama.LLAMA2.replace(
  vocab_size=100352, norm=NormConfig(epsilon=1e-6), norm_placement='post', query_key_norm='width',
  positions=RotaryPositions(base=500_000.0),
)

PRESETS = {
  'olmo2_1b': llama.sized(_OLMO2, 2048, 16, 16, 8192),
  'olmo2_7b': _OLMO2,
  'olmo2_13b': llama.sized(_OLMO2, 5120, 40, 40, 13824),
}


HUGGINGFACE = hf.Format(
  'olmo2', 'Olmo2ForCausalLM',
  decode=lambda keys: hf.rms_decoder(
    hf.with_defaults(keys, {'rms_norm_eps': 1e-5}), norm_placement='post', query_key_norm='width'),
  encode=lambda config: hf.rms_config(config, attention_bias='qkv' in config.biases),
  names={
    **{path: name for path, name in llama.NAMES.items() if not path.endswith('_norm/scale')},
    **llama.QUERY_KEY_NORMS,
    'final_norm/scale': 'model.norm.weight',
    'layers/attention_post_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
    'layers/mlp_post_norm/scale': 'model.layers.{}.post_feedforward_layernorm.weight',
  },
)
