"""lm-eval's figures of our model are those of its own `hf` model on the same weights and tasks."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import small

from jaxllm import loading
from jaxllm.data import tokenizers
from jaxllm.interop import huggingface

pytestmark = pytest.mark.parity
harness = pytest.importorskip('jaxllm.interop.harness', exc_type=ImportError)

TEXTS = ['The king speaks of the sea. ' * 9, 'A queen sleeps tonight, and a river runs home.', 'x']
CHOICES = [
  {'question': 'The king', 'choices': ['speaks of home', 'sleeps'], 'label': 1},
  {'question': 'A river runs to the ', 'choices': ['sea', 'old mountain', 'king'], 'label': 0},
  {'question': 'word ' * 30, 'choices': ['sleeps tonight', 'of the sea'], 'label': 1},
]
COMMON = {'test_split': 'test', 'num_fewshot': 0, 'doc_to_target': '', 'metadata': {'version': 1}}
TASKS = {
  'choices': {
    'output_type': 'multiple_choice', 'doc_to_text': '{{question}}', 'doc_to_choice': 'choices',
    'doc_to_target': 'label', 'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]},
  'rolling': {
    'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': '{{question}}',
    'metric_list': [{'metric': 'bits_per_byte'}, {'metric': 'word_perplexity'}]},
  'answers': {
    'output_type': 'generate_until', 'doc_to_text': '{{question}}', 'doc_to_target': 'x',
    'generation_kwargs': {'until': ['e'], 'max_gen_toks': 20},
    'metric_list': [{'metric': 'exact_match'}]},
}


@pytest.fixture(scope='module', params=['gpt2', 'llama'])
def directory(request, tmp_path_factory):
  """A model with a tokenizer that merges, and with BOS where its family has it."""
  path = tmp_path_factory.mktemp(request.param)
  config = small.CONFIGS[request.param].replace(vocab_size=320)
  tokenizer = tokenizers.train_or_load(
    tokenizers.TokenizerConfig(kind='sentencepiece', vocab_size=305), [' '.join(TEXTS)])
  huggingface.save(path, config, small.variables(config), tokenizer.files(),
                          model_type=request.param, add_bos=request.param == 'llama')
  return path


def evaluate(model, folder):
  import lm_eval
  from lm_eval.tasks import TaskManager

  rows = [*CHOICES, *({'question': text, 'choices': ['a', 'b'], 'label': 0} for text in TEXTS)]
  (folder / 'rows.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, task in TASKS.items():
    fields = COMMON | task | {'task': name, 'dataset_path': 'json', 'dataset_kwargs': {
      'data_files': {'test': str(folder / 'rows.json')}}}
    (folder / f'{name}.yaml').write_text(json.dumps(fields))  # JSON is YAML.
  found = lm_eval.simple_evaluate(
    model, tasks=[*TASKS], bootstrap_iters=0, log_samples=True,
    task_manager=TaskManager(include_path=str(folder), include_defaults=False))
  samples = {name: [one['filtered_resps'] for one in found['samples'][name]] for name in TASKS}
  return {name: found['results'][name] for name in TASKS}, samples


def test_figures_equal_those_of_the_hf_model(directory, tmp_path, monkeypatch):
  from lm_eval.models.huggingface import HFLM

  monkeypatch.setenv('HF_HOME', str(tmp_path))
  theirs = HFLM(pretrained=str(directory), device='cpu', dtype='float32', batch_size=2)
  ours = harness.LanguageModel(loading.load(directory), batch_size=2)
  assert ours.max_length == theirs.max_length == 64
  for name in ('eot_token_id', 'prefix_token_id'):
    assert getattr(ours, name) == getattr(theirs, name)
  for text in TEXTS:
    for special in (None, True, False):
      assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
  (expected, expected_samples), (found, samples) = (
    evaluate(model, tmp_path) for model in (theirs, ours))
  assert found.keys() == expected.keys()
  for name in TASKS:
    numbers = {key: value for key, value in expected[name].items() if isinstance(value, float)}
    assert len(numbers) > 0
    assert {key: found[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4), name
  assert samples['answers'] == expected_samples['answers']
  for ours_one, theirs_one in zip(samples['choices'], expected_samples['choices'], strict=True):
    for (value, is_greedy), (their_value, their_greedy) in zip(ours_one, theirs_one, strict=True):
      assert float(value) == pytest.approx(float(their_value), rel=1e-4)
      assert str(is_greedy) == str(their_greedy)
  rolling = np.array(samples['rolling'], float).ravel()
  np.testing.assert_allclose(rolling, np.array(expected_samples['rolling'], float).ravel(),
                             rtol=1e-4)


def test_likelihoods_are_those_of_whole_passes(directory):
  loaded = loading.load(directory)
  model = harness.LanguageModel(loaded, max_length=32)
  rng = np.random.default_rng(0)
  pairs = [(rng.integers(4, 300, n).tolist(), rng.integers(4, 300, k).tolist())
           for n, k in ((1, 3), (40, 3), (9, 3), (9, 1))]
  pairs.append((pairs[2][0], [5]))
  found = model._loglikelihood_tokens([(None, *pair) for pair in pairs])
  for (value, is_greedy), (context, target) in zip(found, pairs, strict=True):
    ids = [*context, *target][-33:]
    log_probs_TV = np.asarray(jax.nn.log_softmax(loaded.logits(ids[:-1])))[-len(target) :]
    assert value == pytest.approx(float(log_probs_TV[range(len(target)), target].sum()), rel=1e-5)
    assert is_greedy == (log_probs_TV.argmax(-1).tolist() == target)
  with pytest.raises(ValueError, match='a continuation has 33 tokens, but the context 32'):
    model._loglikelihood_tokens([(None, [1], [2] * 33)])
  with pytest.raises(ValueError, match='max_length=65: between 2 and'):
    harness.LanguageModel(loaded, max_length=65)
  request = types.SimpleNamespace(args=('The king', {'max_gen_toks': 32}))
  with pytest.raises(ValueError, match='max_gen_toks=32 leaves nothing'):
    model.generate_until([request])


def test_chats_are_written_by_the_template_of_the_model(directory):
  template = ('{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}'
              '{% if add_generation_prompt %}[assistant]{% endif %}')
  messages = [{'role': 'user', 'content': 'Hi'}]
  loaded = loading.load(directory)
  chat = dataclasses.replace(loaded, tokenizer=tokenizers.from_files(small.files(template)))
  model = harness.LanguageModel(chat)
  assert model.apply_chat_template(messages) == '[user] Hi[assistant]'
  assert model.apply_chat_template(messages, False) == '[user] Hi'
  assert model.chat_template(True) == template and model.chat_template() is None
  with pytest.raises(ValueError, match='has no chat template'):
    harness.LanguageModel(loaded).apply_chat_template(messages)
