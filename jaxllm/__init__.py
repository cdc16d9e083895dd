"""jaxllm: pure-functional language models in JAX and Flax.

    import jaxllm

    jaxllm.train(experiment, 'runs/mine')      # an Experiment, as files of experiments/ return
    print(jaxllm.evaluate('runs/mine'))
    model = jaxllm.load('runs/mine')
    print(jaxllm.generate(model, 'To be', max_new_tokens=40))

Names are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxllm.adapters.lora import LoraConfig
  from jaxllm.adapters.quantization import QuantizationConfig
  from jaxllm.adapters.rules import PathRule
  from jaxllm.checkpoints.store import CheckpointConfig
  from jaxllm.data.cleaning import CleaningConfig
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.evaluation.perplexity import EvaluationConfig
  from jaxllm.experiment import (
    BestConfig,
    Experiment,
    FinetuneConfig,
    ScoringConfig,
    SpikeConfig,
    TrainingConfig,
  )
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.loading import generate, load
  from jaxllm.model import Model
  from jaxllm.models.config import DecoderConfig
  from jaxllm.models.families import PRESETS
  from jaxllm.objectives.classification import ClassifierConfig
  from jaxllm.objectives.distillation import Distillation
  from jaxllm.objectives.next_token import NextToken
  from jaxllm.objectives.preference import Dpo, Ipo, Orpo, SimPo
  from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig
  from jaxllm.pipelines import pipeline
  from jaxllm.sharding import MeshConfig
  from jaxllm.tasks.chat import Chat, ChatTemplate
  from jaxllm.tasks.classification import Classification, Sentiment
  from jaxllm.tasks.language_modeling import LanguageModeling
  from jaxllm.tasks.multiple_choice import MultipleChoice
  from jaxllm.tasks.preference import Preference
  from jaxllm.tasks.question_answering import ExtractiveQuestionAnswering, QuestionAnswering
  from jaxllm.tasks.records import RecordsConfig, RecordSource
  from jaxllm.tasks.summarization import Summarization
  from jaxllm.tasks.translation import Translation
  from jaxllm.training.evaluation import evaluate
  from jaxllm.training.loop import train

  __version__: str

# module -> the public names that it defines
_MODULES = {
  'adapters.lora': 'LoraConfig', 'adapters.quantization': 'QuantizationConfig',
  'adapters.rules': 'PathRule', 'checkpoints.store': 'CheckpointConfig',
  'data.cleaning': 'CleaningConfig', 'data.documents': 'SourceConfig', 'data.records': 'DataConfig',
  'data.tokenizers': 'TokenizerConfig', 'evaluation.perplexity': 'EvaluationConfig',
  'experiment': 'BestConfig Experiment FinetuneConfig ScoringConfig SpikeConfig TrainingConfig',
  'generation.sampling': 'SamplingConfig', 'loading': 'generate load', 'model': 'Model',
  'models.config': 'DecoderConfig', 'models.families': 'PRESETS',
  'objectives.classification': 'ClassifierConfig', 'objectives.distillation': 'Distillation',
  'objectives.next_token': 'NextToken', 'objectives.preference': 'Dpo Ipo Orpo SimPo',
  'optim.optimizers': 'OptimizerConfig ScheduleConfig',
  'pipelines': 'pipeline', 'sharding': 'MeshConfig', 'tasks.chat': 'Chat ChatTemplate',
  'tasks.classification': 'Classification Sentiment', 'tasks.language_modeling': 'LanguageModeling',
  'tasks.multiple_choice': 'MultipleChoice', 'tasks.preference': 'Preference',
  'tasks.question_answering': 'ExtractiveQuestionAnswering QuestionAnswering',
  'tasks.records': 'RecordSource RecordsConfig', 'tasks.summarization': 'Summarization',
  'tasks.translation': 'Translation', 'training.evaluation': 'evaluate', 'training.loop': 'train',
}
_PUBLIC = {name: f'jaxllm.{module}' for module, names in _MODULES.items() for name in names.split()}

__all__ = [
  'PRESETS', 'BestConfig', 'Chat', 'ChatTemplate', 'CheckpointConfig', 'Classification',
  'ClassifierConfig', 'CleaningConfig', 'DataConfig', 'DecoderConfig', 'Distillation', 'Dpo',
  'EvaluationConfig', 'Experiment', 'ExtractiveQuestionAnswering', 'FinetuneConfig', 'Ipo',
  'LanguageModeling', 'LoraConfig', 'MeshConfig', 'Model', 'MultipleChoice', 'NextToken',
  'OptimizerConfig', 'Orpo', 'PathRule', 'Preference', 'QuantizationConfig', 'QuestionAnswering',
  'RecordSource', 'RecordsConfig', 'SamplingConfig', 'ScheduleConfig', 'ScoringConfig', 'Sentiment',
  'SimPo', 'SourceConfig', 'SpikeConfig', 'Summarization', 'TokenizerConfig', 'TrainingConfig',
  'Translation', 'evaluate', 'generate', 'load', 'pipeline', 'train',
]


def __getattr__(name: str) -> Any:
  if name == '__version__':
    return importlib.metadata.version('jaxllm')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has '
                         f'{", ".join(_PUBLIC)}')
  if name in ('train', 'evaluate'):
    # The modules of the programs have these names too, and may be called as the functions.
    return importlib.import_module(f'{__name__}.{name}')
  value = getattr(importlib.import_module(_PUBLIC[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*_PUBLIC, '__version__', *(name for name in globals() if name.startswith('__'))])
