"""Published models as configs: `PRESETS['gpt2_124m']`."""

from jaxllm.models.config import DecoderConfig
from jaxllm.models.families import gpt2, gpt3, llama, smollm

FAMILIES: dict[str, dict[str, DecoderConfig]] = {
  'gpt2': gpt2.PRESETS,
  'gpt3': gpt3.PRESETS,
  'llama': llama.PRESETS,
  'smollm': smollm.PRESETS,
}

PRESETS: dict[str, DecoderConfig] = {
  name: config for presets in FAMILIES.values() for name, config in presets.items()
}
