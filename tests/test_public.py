"""The public face: small, typed, and one default of everything."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import pathlib
import subprocess
import sys
import types

import jax
import pytest

import jaxllm
from jaxllm import config, loading
from jaxllm.checkpoints import store
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.interop import exported_runner
from jaxllm.models import decoder
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.question_answering import QuestionAnswering
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.training import evaluation, loop
from tests import programs
from tests.training import tiny_run as tiny


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('public') / 'model'
  tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  store.save_converted(
    path, tiny.MODEL, decoder.init(tiny.MODEL, jax.random.key(0)), tokenizer.files(), {})
  return path


def test_a_model_says_what_it_is_in_a_line(path):
  model = jaxllm.load(path)
  count = decoder.parameter_count(tiny.MODEL)
  assert repr(model).startswith(f'<Model: {count:,} parameters') and len(repr(model)) < 100
  assert len(repr(model.tokenizer)) < 100


def test_what_takes_a_path_takes_a_model_and_the_other_way_round(path):
  model = jaxllm.load(path)
  assert jaxllm.load(model) is model
  found = jaxllm.generate(str(path), 'ab', max_new_tokens=3, temperature=0.0)
  assert found == jaxllm.generate(model, 'ab', max_new_tokens=3, temperature=0.0)
  with pytest.raises(ValueError, match=r'did you mean .*/model\?'):
    jaxllm.generate(path.with_name('modell'), 'ab')


def test_what_the_package_has():
  public = [name for name in dir(jaxllm) if not name.startswith('__')]
  assert public == sorted(jaxllm.__all__)
  assert jaxllm.__version__ == importlib.metadata.version('jaxllm')
  assert '__version__' in dir(jaxllm)
  with pytest.raises(AttributeError, match='it has .*load'):
    jaxllm.lod  # noqa: B018


def test_type_checkers_see_what_is_imported_lazily():
  tree = ast.parse(pathlib.Path(jaxllm.__file__).read_text())
  guarded = next(node for node in tree.body if isinstance(node, ast.If))
  seen = {alias.name: line.module for line in guarded.body if isinstance(line, ast.ImportFrom)
          for alias in line.names}
  assert guarded.test.attr == 'TYPE_CHECKING' and seen == jaxllm._PUBLIC
  assert set(jaxllm.__all__) == set(seen)
  for name, module in seen.items():
    assert hasattr(importlib.import_module(module), name)


def test_a_run_is_a_config(tmp_path):
  """--config=RUN and --config=RUN/config.json repeat the run, and take overrides."""
  experiment = tiny.experiment(tmp_path)
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text(experiment.to_json())
  for location in (tmp_path / 'run', tmp_path / 'run' / 'config.json'):
    assert config.load(str(location)) == experiment
  changed = config.override(config.load(str(tmp_path / 'run')), {'training.num_steps': '99'})
  assert changed.training.num_steps == 99 and changed.model == experiment.model
  with pytest.raises(config.ConfigError, match='no such file'):
    config.load(str(tmp_path))


def test_one_default_of_sampling_everywhere():
  """The terminal, the server, the report of a run, exported programs: all as SamplingConfig."""
  from jaxllm.serving import protocol

  sampling = SamplingConfig()
  served = protocol.GenerationRequest.model_fields
  assert (sampling.temperature, sampling.top_p) == (1.0, 1.0)
  runner = inspect.signature(exported_runner.generate).parameters
  for name in ('temperature', 'top_p', 'top_k', 'min_p'):
    assert runner[name].default == getattr(sampling, name)
    assert getattr(EvaluationConfig(), name, getattr(sampling, name)) == getattr(sampling, name)
    assert served[name].default == getattr(sampling, name)
  sample = programs.load('sample')
  given = [sample.MAX_NEW_TOKENS, sample.TEMPERATURE, sample.TOP_K, sample.TOP_P, sample.MIN_P,
           sample.REPETITION_PENALTY, sample.NO_REPEAT_NGRAM_SIZE, sample.SEED]
  assert all(flag.default is None and hasattr(sampling, flag.name) for flag in given)


@pytest.mark.parametrize('lines', [
  'import jaxllm; train, evaluate = jaxllm.train, jaxllm.evaluate; import jaxllm.train',
  'import jaxllm.evaluate; from jaxllm.train import main; from jaxllm import train, evaluate',
], ids=['function first', 'program first'])
def test_functions_and_programs_share_their_names(lines):
  """Whatever is imported first, both are there under the one name."""
  check = ('\nassert jaxllm.train is train and jaxllm.evaluate is evaluate'
           '\nassert callable(train) and train.main and callable(evaluate) and evaluate.FLAGS')
  subprocess.run([sys.executable, '-c', lines + check], check=True)


def test_a_run_needs_one_import(path, tmp_path):
  assert inspect.signature(jaxllm.train) == inspect.signature(loop.train)
  assert inspect.signature(jaxllm.evaluate) == inspect.signature(evaluation.evaluate)
  with pytest.raises(ValueError, match='config.training.batch_size'):
    jaxllm.train(tiny.experiment(tmp_path, training__batch_size=7), tmp_path / 'run')
  with pytest.raises(ValueError, match='give text=FILE or tasks=NAME'):
    jaxllm.evaluate(path)
  with pytest.raises(ValueError, match='stride=3 is for text, which was not given'):
    jaxllm.evaluate(path, stride=3)
  with pytest.raises(ValueError, match="did you mean 'sentiment'"):
    jaxllm.evaluate(path, 'sentimen')
  (tmp_path / 'play.txt').write_text('HAMLET. To be, or not to be.')
  (tmp_path / 'reviews.tsv').write_text('text\tlabel\ngood\tpositive\nbad\tnegative\n')
  task = Sentiment(data=RecordsConfig(
    sources=(RecordSource(location=str(tmp_path / 'reviews.tsv'), split='test'),)))
  (tmp_path / 'questions.jsonl').write_text(json.dumps(
    {'context': 'A cat sat.', 'question': 'Who?', 'answers': ['cat', 'a cat']}) + '\n')
  asked = QuestionAnswering(max_new_tokens=2, data=RecordsConfig(
    sources=(RecordSource(location=str(tmp_path / 'questions.jsonl'), split='test'),)))
  model, text = jaxllm.load(path), str(tmp_path / 'play.txt')
  found = jaxllm.evaluate(model, [task, asked], text)['tasks']
  assert [*found] == ['sentiment', 'question_answering', text]
  assert found['sentiment']['examples'] == 2
  assert found['question_answering']['predictions'][0]['reference'] == ['cat', 'a cat']
  assert found[text]['scores']['bits_per_byte']['value'] > 7


@pytest.mark.parametrize('device, dtype', [
  ({'platform': 'cpu'}, 'float32'), ({'platform': 'tpu'}, 'bfloat16'),
  ({'platform': 'gpu', 'compute_capability': '7.5'}, 'float32'),
  ({'platform': 'gpu', 'compute_capability': '8.0'}, 'bfloat16'),
  ({'platform': 'gpu', 'compute_capability': '10.0'}, 'bfloat16'),
  ({'platform': 'gpu', 'compute_capability': 'gfx942'}, 'bfloat16'),
])
def test_models_from_outside_get_the_dtype_of_the_chip(device, dtype):
  assert loading._default_dtype(types.SimpleNamespace(**device)) == dtype
