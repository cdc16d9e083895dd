"""SmolLM2: small Llamas with a tied head.

Reference:
  Ben Allal et al., "SmolLM2", arXiv 2502.02737; the released configurations.
"""

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import llama
from jaxllm.models.positions import RotaryPositions


def _preset(
  embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_dim: int, base: float
) -> DecoderConfig:
  return llama.PRESETS['llama2_7b'].replace(
    vocab_size=49152,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    mlp_dim=mlp_dim,
    max_length=8192,
    positions=RotaryPositions(base=base),
    tied_head=True,
  )


PRESETS = {
  'smollm2_135m': _preset(576, 30, 9, 3, 1536, 100_000.0),
  'smollm2_360m': _preset(960, 32, 15, 5, 2560, 100_000.0),
  'smollm2_1.7b': _preset(2048, 24, 32, 32, 8192, 130_000.0),
}
