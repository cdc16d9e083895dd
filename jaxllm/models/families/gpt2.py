"""GPT-2: learned positions, LayerNorm, biases everywhere, tanh GELU, tied head.

Reference:
  Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. The sizes are those
  of the released weights (the paper's counts are wrong, as its authors note). Dropout is 0 here;
  the original trained with 0.1.
"""

from jaxllm.models.config import DecoderConfig
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
