"""Published models as configs, `PRESETS['gpt2_124m']`, and how they are stored, `HUGGINGFACE`."""

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import experts, gemma, gpt2, llama, neox
from jaxllm.models.families.huggingface import Format

PRESETS: dict[str, DecoderConfig] = (
  gpt2.PRESETS | llama.PRESETS | experts.PRESETS | gemma.PRESETS | neox.PRESETS)

# By the `model_type` of config.json; a model is exported as the first one that can say all of it.
HUGGINGFACE: dict[str, Format] = {
  form.model_type: form
  for form in (
    gpt2.HUGGINGFACE, llama.LLAMA, llama.SMOLLM3, llama.MISTRAL, llama.QWEN2, llama.QWEN3,
    gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, gemma.GEMMA3_MULTIMODAL, llama.PHI3, llama.OLMO2,
    neox.HUGGINGFACE, experts.MIXTRAL, experts.OLMOE, experts.QWEN2, experts.QWEN3,
  )}
