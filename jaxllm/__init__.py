"""jaxllm: pure-functional language models in JAX and Flax.

    import jaxllm

    model = jaxllm.load('runs/quickstart')
    print(jaxllm.generate(model, 'To be', max_new_tokens=40))

Training from Python is `jaxllm.training.loop.train(experiment, workdir)`. Names are
loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxllm.experiment import Experiment, TrainingConfig
  from jaxllm.loading import generate, load
  from jaxllm.model import Model
  from jaxllm.models.families import PRESETS
  from jaxllm.pipelines import pipeline

  __version__: str

# public name -> module that defines it
_PUBLIC = {
  'load': 'jaxllm.loading',
  'generate': 'jaxllm.loading',
  'pipeline': 'jaxllm.pipelines',
  'Model': 'jaxllm.model',
  'Experiment': 'jaxllm.experiment',
  'TrainingConfig': 'jaxllm.experiment',
  'PRESETS': 'jaxllm.models.families',
}

__all__ = ['PRESETS', 'Experiment', 'Model', 'TrainingConfig', 'generate', 'load', 'pipeline']


def __getattr__(name: str) -> Any:
  if name == '__version__':
    return importlib.metadata.version('jaxllm')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has '
                         f'{", ".join(_PUBLIC)}')
  value = getattr(importlib.import_module(_PUBLIC[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*_PUBLIC, '__version__', *(name for name in globals() if name.startswith('__'))])
