"""Published models as configs, `PRESETS['gpt2_124m']`, and how they are stored, `HUGGINGFACE`."""

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import gemma, gpt2, llama, mistral, neox, olmo, phi, qwen, smollm
from jaxllm.models.families.huggingface import Format

FAMILIES: dict[str, dict[str, DecoderConfig]] = {
  family.__name__.rpartition('.')[2]: family.PRESETS
  for family in (gpt2, llama, smollm, mistral, qwen, gemma, phi, olmo, neox)
}

PRESETS: dict[str, DecoderConfig] = {
  name: config for presets in FAMILIES.values() for name, config in presets.items()
}

# By the `model_type` of config.json; a model is exported as the first one that can say all of it.
HUGGINGFACE: dict[str, Format] = {
  form.model_type: form
  for form in (
    gpt2.HUGGINGFACE, llama.HUGGINGFACE, smollm.HUGGINGFACE, mistral.HUGGINGFACE, mistral.MIXTRAL,
    qwen.HUGGINGFACE, qwen.QWEN3, gemma.HUGGINGFACE, gemma.GEMMA2, gemma.GEMMA3,
    gemma.GEMMA3_MULTIMODAL, phi.HUGGINGFACE, olmo.HUGGINGFACE, neox.HUGGINGFACE,
  )
}
