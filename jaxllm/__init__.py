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
  from jaxllm.adapters.lora import LoraConfig
  from jaxllm.adapters.quantization import QuantizationConfig
  from jaxllm.checkpoints.store import CheckpointConfig
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.evaluation.perplexity import EvaluationConfig
  from jaxllm.experiment import Experiment, FinetuneConfig, ScoringConfig, TrainingConfig
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.loading import generate, load
  from jaxllm.model import Model
  from jaxllm.models.config import DecoderConfig
  from jaxllm.models.families import PRESETS
  from jaxllm.optim.optimizers import OptimizerConfig
  from jaxllm.optim.schedules import ScheduleConfig
  from jaxllm.pipelines import pipeline
  from jaxllm.sharding import MeshConfig

  __version__: str

# module -> the public names that it defines
_MODULES = {
  'jaxllm.adapters.lora': ['LoraConfig'],
  'jaxllm.adapters.quantization': ['QuantizationConfig'],
  'jaxllm.checkpoints.store': ['CheckpointConfig'],
  'jaxllm.data.documents': ['SourceConfig'],
  'jaxllm.data.records': ['DataConfig'],
  'jaxllm.data.tokenizers': ['TokenizerConfig'],
  'jaxllm.evaluation.perplexity': ['EvaluationConfig'],
  'jaxllm.experiment': ['Experiment', 'FinetuneConfig', 'ScoringConfig', 'TrainingConfig'],
  'jaxllm.generation.sampling': ['SamplingConfig'],
  'jaxllm.loading': ['generate', 'load'],
  'jaxllm.model': ['Model'],
  'jaxllm.models.config': ['DecoderConfig'],
  'jaxllm.models.families': ['PRESETS'],
  'jaxllm.optim.optimizers': ['OptimizerConfig'],
  'jaxllm.optim.schedules': ['ScheduleConfig'],
  'jaxllm.pipelines': ['pipeline'],
  'jaxllm.sharding': ['MeshConfig'],
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
  'PRESETS', 'CheckpointConfig', 'DataConfig', 'DecoderConfig', 'EvaluationConfig', 'Experiment',
  'FinetuneConfig', 'LoraConfig', 'MeshConfig', 'Model', 'OptimizerConfig', 'QuantizationConfig',
  'SamplingConfig', 'ScheduleConfig', 'ScoringConfig', 'SourceConfig', 'TokenizerConfig',
  'TrainingConfig', 'generate', 'load', 'pipeline',
]


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
