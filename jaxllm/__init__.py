"""jaxllm: pure-functional language models in JAX and Flax.

    import jaxllm

    jaxllm.train(experiment, 'runs/mine')      # an Experiment, as files of experiments/ return
    print(jaxllm.evaluate('runs/mine'))
    model = jaxllm.load('runs/mine')
    print(jaxllm.generate(model, 'To be', max_new_tokens=40))

Names are loaded when they are first used, so that importing the package costs nothing.
"""

import ast
import importlib
import importlib.metadata
import pathlib
import typing

if typing.TYPE_CHECKING:
  from jaxllm import inspect
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

# Public name -> the module that defines it, as type checkers see above.
_PUBLIC = {name.name: line.module or ''
           for line in ast.walk(ast.parse(pathlib.Path(__file__).read_text(encoding='utf-8')))
           if isinstance(line, ast.ImportFrom) for name in line.names}

__all__ = [
  'PRESETS', 'BestConfig', 'Chat', 'ChatTemplate', 'CheckpointConfig', 'Classification',
  'ClassifierConfig', 'CleaningConfig', 'DataConfig', 'DecoderConfig', 'Distillation', 'Dpo',
  'EvaluationConfig', 'Experiment', 'ExtractiveQuestionAnswering', 'FinetuneConfig', 'Ipo',
  'LanguageModeling', 'LoraConfig', 'MeshConfig', 'Model', 'MultipleChoice', 'NextToken',
  'OptimizerConfig', 'Orpo', 'PathRule', 'Preference', 'QuantizationConfig', 'QuestionAnswering',
  'RecordSource', 'RecordsConfig', 'SamplingConfig', 'ScheduleConfig', 'ScoringConfig', 'Sentiment',
  'SimPo', 'SourceConfig', 'SpikeConfig', 'Summarization', 'TokenizerConfig', 'TrainingConfig',
  'Translation', 'evaluate', 'generate', 'inspect', 'load', 'pipeline', 'train',
]


def __getattr__(name: str) -> typing.Any:
  if name == '__version__':
    return importlib.metadata.version('jaxllm')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has '
                         f'{", ".join(_PUBLIC)}')
  if name in ('train', 'evaluate', 'inspect'):
    # A module; those of the programs may be called as the functions.
    return importlib.import_module(f'{__name__}.{name}')
  globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
  return globals()[name]


def __dir__() -> list[str]:
  return sorted([*_PUBLIC, '__version__', *(name for name in globals() if name.startswith('__'))])
