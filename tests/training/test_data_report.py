"""The page about records: exact counts, nothing injected, nothing personal, losses by lineage."""

import json
import re

import jax
import numpy as np
import pytest

from jaxllm import loading, storage
from jaxllm.config import override
from jaxllm.data import batches, records
from jaxllm.models.decoder import Decoder
from jaxllm.training import data_report, report
from tests import programs
from tests.training import tiny_run

HOSTILE = ('<script>alert(1)</script><img src=x onerror=alert(1)> &lt;b&gt; \u202eevil\u202c '
           '{{ 7 * 7 }} jane.doe@example.org </p></html> ')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  base = tmp_path_factory.mktemp('data')
  tiny_run.write_corpus(base / 'corpus', 12)
  for number in range(8):
    (base / 'corpus' / f'hostile{number}.txt').write_text(HOSTILE * 3 + str(number))
  experiment = override(tiny_run.experiment(base), {
    'data.cleaning.steps': ('html', 'bidi', 'redact', 'exact_duplicates')})
  (base / 'config.json').write_text(experiment.to_json())
  code, shown, error = programs.run('prepare', f'--config={base}/config.json', '--report')
  assert code == 0, error
  page = storage.path(re.search('report: (.*)', shown)[1])
  return experiment, page


def test_the_page_injects_nothing_and_shows_no_personal_data(prepared):
  page, figures = prepared[1].read_text(), prepared[1].with_suffix('.json').read_text()
  assert '&lt;script&gt;alert(1)' in page and '<script' not in page and '<img' not in page
  assert '{{ 7 * 7 }}' in page and '\u202e' not in page + figures and '⟨U+202E⟩' in page
  assert 'jane' not in page + figures and 'xxxx.xxx@xxxxxxx.xxx' in page
  assert not re.search(r'<[^>]*(?:src|href|onerror)=', page) and 'http' not in page


def test_its_figures_are_those_of_the_records(prepared):
  experiment, page = prepared
  manifest = records.load_manifest(page.parent)
  found = json.loads(page.with_suffix('.json').read_text())
  assert found['manifest'] == manifest.model_dump(mode='json') and found['looked_at'] == 20
  assert found['cleaning']['redact.email'] == 24 and found['cleaning']['html.changed'] == 8
  assert found['tokenizer']['targets'] == manifest.train.target_tokens
  assert {one['step'] for one in found['samples']} == {'html', 'bidi', 'redact'}
  assert found['tokenizer']['groups']['all']['failures'] == 0 and found['losses'] is None


def test_a_mixture_stands_beside_the_sources(tmp_path):
  experiment = tiny_run.experiment(tmp_path)
  source = experiment.data.sources[0]
  experiment = override(experiment, {'data.sources': [
    {'location': source.location, 'slice': part, 'weight': weight}
    for part, weight in (((0, 0.5), 0.75), ((0.5, 1), 0.25))]})
  (tmp_path / 'config.json').write_text(experiment.to_json())
  code, shown, error = programs.run('prepare', f'--config={tmp_path}/config.json', '--report')
  assert code == 0, error
  page = storage.path(re.search('report: (.*)', shown)[1]).read_text()
  assert '<td class="n">0.75</td>' in page and '<td class="n">0.25</td>' in page
  assert 'Cleaning has changed none of them' in page


def test_a_run_leads_to_the_page(prepared, tmp_path):
  experiment, page = prepared
  run = tmp_path / 'runs' / 'x'
  storage.write_file(run / 'config.json', experiment.to_json())
  storage.write_file(run / 'data.json', (page.parent / 'manifest.json').read_bytes())
  written = report.write_report(run)
  way = re.search('href="([^"]+)"', written.read_text())[1]
  assert (run / way).resolve() == page.resolve()
  found = json.loads(experiment.to_json()) | {'records_dir': str(tmp_path / 'elsewhere')}
  storage.write_json(run / 'config.json', found)
  written = report.write_report(run).read_text()
  assert 'href' not in written and f'jaxllm prepare --config={run} --report' in written


def losses(model, page, monkeypatch):
  monkeypatch.setattr(loading, 'load', lambda location: model)
  return data_report.losses('a run', records.load_manifest(page.parent), page.parent, 10_000)


def test_losses_are_those_of_the_model_and_lead_to_their_documents(prepared, monkeypatch):
  experiment, page = prepared
  module = Decoder(experiment.model)
  variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  model = loading.make_model(
    experiment.model, variables, records.load_tokenizer(page.parent), experiment)
  found = losses(model, page, monkeypatch)
  assert found['records'] == records.load_manifest(page.parent).train.records
  nats = [one['nats'] for one in found['highest']]
  assert nats == sorted(nats, reverse=True) and nats[-1] >= found['median']
  one = next(one for one in found['lowest'] + found['highest'] if '\n' not in one['text'])
  row = np.frombuffer(
    batches.open_records(page.parent, 'train').rows[one['record']], np.dtype([
      ('tokens', '<u2', (33,)), ('segment_ids', '<u2', (33,))]))[0]
  segments = [row['tokens'][row['segment_ids'] == segment].tolist()
              for segment in range(1, row['segment_ids'].max() + 1)]
  segments = [ids for ids in segments if len(ids) == one['tokens'] + 1]
  costs = []
  for ids in segments:
    log_probs = jax.nn.log_softmax(model.logits(ids[:-1]))
    costs.append(-np.mean([log_probs[place, i] for place, i in enumerate(ids[1:])]))
  assert min(abs(cost - one['nats']) for cost in costs) < 1e-4
  place, first = re.search(r'document (\d+), from token (\d+)', one['where']).groups()
  assert 0 <= int(place) < 20 and int(first) >= 0


def test_another_tokenizer_and_a_task_are_refused(prepared, monkeypatch):
  experiment, page = prepared
  from jaxllm.data import tokenizers
  other = tokenizers.train_or_load(
    tokenizers.TokenizerConfig(kind='byte_level_bpe', vocab_size=258), ['to be to be'])
  model = loading.make_model(experiment.model, None, other, experiment)
  with pytest.raises(ValueError, match='--model=a run has another tokenizer'):
    losses(model, page, monkeypatch)
