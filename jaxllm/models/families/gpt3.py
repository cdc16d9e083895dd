"""GPT-3: GPT-2's architecture with a context of 2,048, in the eight sizes of the paper's Table 2.1.

Reference:
  Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165. Where we differ: the
  paper alternates dense and locally banded sparse attention, whose pattern is not published; all
  layers are dense here, which changes no parameter. Two rows of the table contradict themselves
  (heads x head_dim is not the width): 1.3B has 16 heads of 128 here instead of 24, and 13B the
  width 5,120 instead of 5,140; both then meet the published counts.
"""

from jaxllm.models.families.gpt2 import preset

PRESETS = {
  f'gpt3_{name}': preset(*size, max_length=2048) for name, size in {
    '125m': (768, 12, 12),
    '350m': (1024, 24, 16),
    '760m': (1536, 24, 16),
    '1.3b': (2048, 24, 16),
    '2.7b': (2560, 32, 32),
    '6.7b': (4096, 32, 32),
    '13b': (5120, 40, 40),
    '175b': (12288, 96, 96),
  }.items()
}
