"""Records of a Beam pipeline are those of one machine, byte for byte.

Apache Beam does not fit into an environment with the versions of the locks, so that `make test`
passes these tests over: `pip install -e '.[beam,clean,s3]' pytest 'moto[s3]' flask flask-cors` into
one of its own, then `python -m pytest tests/data/test_beam.py`, about two minutes.
"""

import functools
import gzip
import json
import logging

import pytest

from jaxllm import storage
from jaxllm.data import preparing, shards
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from tests import buckets, programs
from tests.training import tiny_run

pytest.importorskip('apache_beam')
beam = pytest.importorskip('jaxllm.data.beam')

WORDS = 'the a king queen speaks sleeps tonight home goes and then my lord of house'.split()


def _text(number):
  """Texts of many lengths, some the same, some nearly, some empty, one long."""
  number = number % 41 if number % 5 == 0 else number
  words = [WORDS[(number * 7 + i * (1 + number % 11)) % len(WORDS)]
           for i in range(12 + number % 60)]
  text = ' '.join(words * (25 if number == 13 else 1))
  return '' if number == 29 else f'{text} mail {number}@example.org\n' * (1 + number % 2)


@pytest.fixture
def sources(tmp_path, monkeypatch):
  """Several sources, and blocks and shards that are so small that there are many."""
  texts = [_text(number) for number in range(150)]
  folder = tmp_path / 'texts'
  folder.mkdir()
  for name, some in (('a.jsonl', texts[:50]), ('b.jsonl', []), ('c.jsonl', texts[50:70])):
    (folder / name).write_text(''.join(json.dumps({'text': text}) + '\n' for text in some))
  with gzip.open(folder / 'd.txt.gz', 'wt') as file:
    file.write('\n\n'.join(texts[70:120]))
  (tmp_path / 'e.jsonl').write_text(''.join(
    json.dumps({'text': text}) + '\n' for text in texts[60:]))
  monkeypatch.setattr(shards, 'GROUP_CHARACTERS', 700)
  monkeypatch.setattr(shards, '_SHARD_TOKENS', 32 * 20)
  return (SourceConfig(location=str(folder), separator='\n\n'),
          SourceConfig(location=f'{tmp_path}/e.jsonl', slice=(0.1, 1.0)),
          SourceConfig(location='package:python-help', slice=(0.0, 0.02)))


def _content(root):
  return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*'))
          if path.is_file() and path.name not in ('.lock', '.source_hashes.json')}


def _both(data, tokenizer, tmp_path, *flags, runner='DirectRunner'):
  found = []
  for name, write in (('here', None), ('beam', functools.partial(
      beam.write, options=beam.options(runner, flags)))):
    preparing.prepare(data, tokenizer, tmp_path / name, progress=False, write=write)
    found.append(_content(tmp_path / name))
  return found


STEPS = ('whitespace', 'exact_duplicates', 'redact', 'near_duplicates', 'control')


@pytest.mark.parametrize('packing, tokenizer, changes', [
  ('packed', TokenizerConfig(vocab_size=300, sample_bytes=3000), {}),
  ('best_fit', TokenizerConfig(kind='bytes'), {}),
  ('concat', TokenizerConfig(kind='bytes'), {'add_bos': False, 'add_eos': False}),
  ('one_document', TokenizerConfig(kind='byte_level_bpe', vocab_size=300), {}),
  ('packed', TokenizerConfig(kind='bytes'), {'validation': None, 'cleaning': CleaningConfig()}),
  ('packed', TokenizerConfig(kind='bytes'), {'validation': 'e.jsonl'}),
  ('best_fit', TokenizerConfig(vocab_size=300), {'validation': 'stdlib', 'mixed': True}),
])
def test_records_of_beam_are_those_of_one_machine(
  sources, tmp_path, packing, tokenizer, changes
):
  changes = {'validation': 0.2, 'cleaning': CleaningConfig(steps=STEPS, min_characters=70),
             **changes}
  if changes['validation'] == 'stdlib':
    changes['validation'] = (SourceConfig(location='package:python-help', slice=(0.02, 0.04)),)
  if changes['validation'] == 'e.jsonl':
    changes['validation'] = (sources[1].replace(slice=(0.0, 0.1)),)
  if changes.pop('mixed', False):
    sources = tuple(source.replace(weight=1.0 + i) for i, source in enumerate(sources))
  data = DataConfig(sources=sources, context_length=32, packing=packing, **changes)
  here, there = _both(data, tokenizer, tmp_path)
  assert list(here) == list(there) and len(here) > 8
  assert here == there


@pytest.mark.parametrize('flags', [
  ['--direct_num_workers=2', '--direct_running_mode=multi_processing'],
  ['--direct_num_workers=2', '--direct_running_mode=multi_threading']])
def test_processes_of_their_own_give_the_same(sources, tmp_path, flags, monkeypatch):
  # The names of the module are not changed in processes of their own.
  monkeypatch.undo()
  data = DataConfig(sources=sources, context_length=32, validation=0.2,
                    cleaning=CleaningConfig(steps=STEPS))
  here, there = _both(data, TokenizerConfig(vocab_size=300), tmp_path, *flags)
  assert here == there


@pytest.mark.parametrize('lines, changes, message', [
  ('{"text": "a"}\nno', {}, 'bad.jsonl, line 2: not JSON'),
  ('{"txt": "a"}', {}, 'bad.jsonl, line 1: field'),
  ('{"text": "a"}', {'context_length': 99}, 'config.data.context_length=99 is longer than'),
  ('{"text": ""}', {}, 'no text to train the tokenizer on'),
])
def test_what_is_refused_is_one_sentence_and_nothing_is_left(tmp_path, lines, changes, message):
  (tmp_path / 'bad.jsonl').write_text(lines)
  data = DataConfig(**{'sources': str(tmp_path / 'bad.jsonl'), 'context_length': 2,
                       'validation': None} | changes)
  for write in (None, functools.partial(beam.write, options=beam.options('DirectRunner', ()))):
    with pytest.raises(ValueError) as refused:
      preparing.prepare(data, TokenizerConfig(model_type='char'), tmp_path / 'out', write=write)
    assert message in str(refused.value) and 'while running' not in str(refused.value)
    assert type(refused.value) is ValueError
    assert {path.name for path in (tmp_path / 'out').iterdir()} <= {'.lock'}


def test_the_ends_of_few_documents_are_held_out(tmp_path, caplog):
  (tmp_path / 'few.jsonl').write_text(json.dumps({'text': 'A line.\n' * 40}))
  data = DataConfig(sources=str(tmp_path / 'few.jsonl'), context_length=8, validation=0.1)
  here, there = _both(data, TokenizerConfig(kind='bytes'), tmp_path)
  assert here == there
  assert caplog.text.count('the end of the document is held out') == 2


@pytest.mark.parametrize('runner, flags, message', [
  ('DirectRunner', ['--num_wokers=2'], "--num_wokers: neither .* did you mean '--num_workers'"),
  ('DirectRunner', ['--inspekt'], "--inspekt: neither .* did you mean '--inspect'"),
  ('DirectRunner', ['--num_workers=two'], "invalid int value: 'two'"),
])
def test_unknown_runners_and_flags_are_named(runner, flags, message):
  with pytest.raises(ValueError, match=message):
    beam.options(runner, flags, ['--inspect'])


def test_the_program_passes_flags_of_beam_on(tmp_path):
  experiment = tiny_run.experiment(tmp_path)
  (tmp_path / 'config.json').write_text(experiment.to_json())
  code, shown, error = programs.run(
    'prepare', f'--config={tmp_path}/config.json', '--runner=DirectRunner', '--num_workers', '2',
    '--job_name=x', '--config.data.context_length=16')
  assert code == 0 and 'context 16\n  train: 31 documents' in shown, error


def test_a_mistake_is_one_sentence_of_the_program(tmp_path):
  (tmp_path / 'bad.jsonl').write_text('{"text": 3}')
  experiment = tiny_run.experiment(tmp_path, data__sources=str(tmp_path / 'bad.jsonl'))
  (tmp_path / 'config.json').write_text(experiment.to_json())
  handlers = logging.getLogger().handlers
  try:
    code, _, error = programs.run(
      'prepare', f'--config={tmp_path}/config.json', '--runner=DirectRunner')
  finally:
    logging.getLogger().handlers = handlers
  assert code == 2 and error.startswith('error: ') and error.count('\n') == 1
  assert "bad.jsonl, line 1: field 'text' is int, expected text" in error


def test_other_runners_take_the_pipeline_by_their_job_servers(sources, tmp_path):
  from apache_beam.runners.portability import local_job_service

  server = local_job_service.LocalJobServicer(str(tmp_path / 'staging'))
  port = server.start_grpc_server()
  try:
    data = DataConfig(sources=sources, context_length=32, validation=0.2,
                      cleaning=CleaningConfig(steps=STEPS))
    here, there = _both(
      data, TokenizerConfig(vocab_size=300), tmp_path, f'--job_endpoint=localhost:{port}',
      '--environment_type=LOOPBACK', runner='PortableRunner')
  finally:
    server.stop()
  assert here == there


def test_workers_write_into_a_bucket(sources, tmp_path, monkeypatch):
  pytest.importorskip('moto')
  with buckets.serving('s3') as where:
    for name, value in {'HOME': str(tmp_path), **where}.items():
      monkeypatch.setenv(name, value)
    data = DataConfig(sources=sources, context_length=32, validation=0.2)
    tokenizer = TokenizerConfig(vocab_size=300)
    preparing.prepare(data, tokenizer, tmp_path / 'here', progress=False)
    folder = 's3://bucket/some/records'
    manifest = preparing.prepare(data, tokenizer, folder, progress=False, write=functools.partial(
      beam.write, options=beam.options('DirectRunner', ())))
    there = _content(storage.local(f'{folder}/{manifest.folder}'))
  assert there == _content(tmp_path / 'here' / manifest.folder) and len(there) > 8
