"""lm-eval gets the same figures over HTTP as from the model in its own process."""

import json

import numpy as np
import pytest
from http_server import NAME, running, shared

harness = pytest.importorskip('jaxllm.interop.harness', exc_type=ImportError)

pytestmark = pytest.mark.parity

ROWS = [
  {'text': 'The king', 'choices': [' speaks', ' sleeps here'], 'label': 1},
  {'text': 'Né à 🙂 “x”', 'choices': ['é', '!', ' <|im_end|>'], 'label': 0},
  {'text': 'x', 'choices': ['a', 'b'], 'label': 1},
]
COMMON = {'test_split': 'test', 'target_delimiter': '', 'metadata': {'version': 1}}
TASKS = {
  'http_choices': {
    'output_type': 'multiple_choice', 'doc_to_text': '{{text}}', 'doc_to_choice': 'choices',
    'doc_to_target': 'label', 'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]},
  'http_rolling': {
    'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': '{{text}}',
    'metric_list': [{'metric': 'bits_per_byte'}]},
  'http_answers': {
    'output_type': 'generate_until', 'doc_to_text': '{{text}}', 'doc_to_target': 'x',
    'generation_kwargs': {'until': ['e', '7'], 'max_gen_toks': 20},
    'metric_list': [{'metric': 'exact_match'}]},
}


def evaluate(model, folder, **options):
  import lm_eval
  from lm_eval.tasks import TaskManager

  (folder / 'rows.json').write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  for name, task in TASKS.items():
    fields = COMMON | task | {'task': name, 'dataset_path': 'json', 'dataset_kwargs': {
      'data_files': {'test': str(folder / 'rows.json')}}}
    (folder / f'{name}.yaml').write_text(json.dumps(fields))  # JSON is YAML.
  found = lm_eval.simple_evaluate(
    model, tasks=[*TASKS], bootstrap_iters=0, log_samples=True, **options,
    task_manager=TaskManager(include_path=str(folder), include_defaults=False))
  return {name: [one['filtered_resps'] for one in found['samples'][name]] for name in TASKS}


@pytest.mark.parametrize('batch_size', [1, 3])
def test_figures_over_http_are_those_of_the_process(tmp_path, monkeypatch, batch_size):
  pytest.importorskip('lm_eval')
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  model, engine = shared()
  inside = evaluate(harness.LanguageModel(model), tmp_path)
  with running(model, engine) as server:
    url = f'{server.url}/v1/completions'
    arguments = {'model': NAME, 'base_url': url, 'tokenizer_backend': 'remote',
                 'max_length': 512, 'max_retries': 1}
    outside = evaluate('local-completions', tmp_path, model_args=arguments, batch_size=batch_size)
  for name in ('http_choices', 'http_rolling'):
    for ours, theirs in zip(inside[name], outside[name], strict=True):
      np.testing.assert_allclose(np.float64(np.asarray(theirs, object).ravel()),
                                 np.float64(np.asarray(ours, object).ravel()), atol=1e-3)
  assert outside['http_answers'] == inside['http_answers']
  assert any(len(answer[0]) > 3 for answer in inside['http_answers'])
