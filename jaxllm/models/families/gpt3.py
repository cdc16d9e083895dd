"""GPT-3: GPT-2's architecture with a context of 2,048, in the eight sizes of the paper's Table 2.1.

Reference:
  Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165. Where we differ: the
  paper alternates dense and locally banded sparse attention, whose pattern is not published; all
  layers are dense here, which changes no parameter. Two rows of the table contradict themselves
  (heads x head_dim is not the width): 1.3B has 16 heads of 128 here instead of 24, and 13B the
  width 5,120 instead of 5,140; both then meet the published counts.
"""

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import gpt2


def _preset(embed_dim: int, num_layers: int, num_heads: int) -> DecoderConfig:
  return gpt2.PRESETS['gpt2_124m'].replace(
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    mlp_dim=4 * embed_dim,
    max_length=2048,
  )


PRESETS = {
  'gpt3_125m': _preset(768, 12, 12),
  'gpt3_350m': _preset(1024, 24, 16),
  'gpt3_760m': _preset(1536, 24, 16),
  'gpt3_1.3b': _preset(2048, 24, 16),
  'gpt3_2.7b': _preset(2560, 32, 32),
  'gpt3_6.7b': _preset(4096, 32, 32),
  'gpt3_13b': _preset(5120, 40, 40),
  'gpt3_175b': _preset(12288, 96, 96),
}
