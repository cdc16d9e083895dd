"""Conversions carry their proof, and leave nothing where they fail; exported programs run."""

import dataclasses
import datetime
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small

from jaxllm import loading
from jaxllm.checkpoints import bundle as bundle_lib
from jaxllm.checkpoints import reading
from jaxllm.data import tokenizers
from jaxllm.generation import decode
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.interop import conversion, exported, exported_runner, sources, weights
from jaxllm.models.decoder import Decoder, unstack


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
  path = tmp_path_factory.mktemp('foreign') / 'model'
  small.save(path, 'qwen2')
  return path


def test_there_and_back_again(foreign, tmp_path):
  source = sources.open_model(foreign)
  summary = conversion.from_source(source, tmp_path / 'ours', 'jaxllm')
  params, bundle = reading.restore_params(tmp_path / 'ours')
  assert bundle_lib.model_config(bundle) == source.config
  assert bundle.manifest[bundle_lib.CONVERTED]['model_type'] == 'qwen2'
  assert tokenizers.from_files(bundle.tokenizer_files).vocab_size == 257
  written = json.loads((tmp_path / 'ours' / conversion.NAME).read_text())
  assert written == json.loads(json.dumps(summary))
  model = loading.load(tmp_path / 'ours')
  conversion.from_model(model, tmp_path / 'back', 'huggingface')
  first = (foreign / 'model.safetensors').read_bytes()
  assert (tmp_path / 'back' / 'model.safetensors').read_bytes() == first
  assert sorted(path.name for path in tmp_path.iterdir()) == ['back', 'ours']


def test_the_report(foreign, tmp_path):
  source = sources.open_model(foreign)
  summary = conversion.from_source(source, tmp_path / 'again', 'huggingface', 'bfloat16')
  proof, rows = summary['proof'], summary['tensors']
  assert proof['max_abs_error'] < proof['bound'] and proof['top1_agreement'] == 1
  assert proof['kl_divergence'] < 1e-6
  assert len(rows) == len(source.slots)
  row = next(row for row in rows if row['source'] == 'model.layers.2.self_attn.k_proj.bias')
  assert row['targets'] == ['layers/attention/key/bias'] and row['layer'] == 2
  assert row['shape'] == [16] and len(row['sha256']) == 64
  assert summary['missing'] == [] and summary['not_needed'] == {}
  assert 'initializer_range' in summary['config_keys_without_effect']
  assert weights.load(sources.open_model(tmp_path / 'again'), None)['params']['embed'][
    'embedding'].dtype == 'bfloat16'


def test_stored_dtypes_are_kept_where_they_are_mixed(foreign, tmp_path):
  import ml_dtypes

  from jaxllm.interop import tensorfile

  shutil.copytree(foreign, tmp_path / 'mixed')
  path = tmp_path / 'mixed' / 'model.safetensors'
  arrays = {name: np.array(tensor.array()) for name, tensor in
            tensorfile.read_header(path).items()}
  arrays = {name: array if array.ndim == 1 else array.astype(ml_dtypes.bfloat16)
            for name, array in arrays.items()}
  tensorfile.write(path, arrays)
  for form in ('huggingface', 'jaxllm'):
    conversion.from_source(sources.open_model(tmp_path / 'mixed'), tmp_path / form, form)
  params, _ = reading.restore_params(tmp_path / 'jaxllm')
  assert params['final_norm']['scale'].dtype == 'float32'
  assert params['embed']['embedding'].dtype == 'bfloat16'
  assert (tmp_path / 'huggingface' / 'model.safetensors').read_bytes() == path.read_bytes()


def test_a_wrong_conversion_fails_and_leaves_nothing(foreign, tmp_path, monkeypatch):
  load = weights.load

  def swapped(source, *options):
    variables = load(source, *options)
    # Twice wrong is right again: what was written is read back by the same function.
    if source.path == str(foreign):
      mlp = variables['params']['layers']['mlp']
      mlp['gate'], mlp['up'] = mlp['up'], mlp['gate']
    return variables

  monkeypatch.setattr(weights, 'load', swapped)
  source = sources.open_model(foreign)
  for form in ('jaxllm', 'huggingface'):
    with pytest.raises(conversion.ConversionError, match='logits differ'):
      conversion.from_source(source, tmp_path / 'target', form)
  assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be(foreign, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('precious')
  source = sources.open_model(foreign)
  with pytest.raises(ValueError, match='not empty'):
    conversion.from_source(source, tmp_path / 'full', 'jaxllm')
  with pytest.raises(ValueError, match='huggingface, jaxllm, exported'):
    conversion.from_source(source, tmp_path / 'new', 'onnx')
  config = small.CONFIGS['llama']
  model = loading.make_model(config, small.variables(config), tokenizers.from_files(small.files()))
  with pytest.raises(ValueError, match='already'):
    conversion.from_model(model, tmp_path / 'new', 'jaxllm')
  assert (tmp_path / 'full' / 'file').read_text() == 'precious'
  assert not (tmp_path / 'new').exists()


@pytest.fixture(scope='module')
def artefact(tmp_path_factory):
  pytest.importorskip('flatbuffers')
  config = small.CONFIGS['llama3'].replace(max_length=32, num_layers=2)
  variables = small.variables(config)
  path = tmp_path_factory.mktemp('exported') / 'artefact'
  model = dataclasses.replace(
    loading.make_model(config, variables, tokenizers.from_files(small.files())), add_bos=True)
  conversion.from_model(model, path, 'exported', buckets=(16, 2048), origin='/models/small')
  return config, variables, path


# Runs run.py where no module of ours can be imported.
RUN = '''
import json, runpy, sys
sys.modules['jaxllm'] = None
runner = runpy.run_path(sys.argv[1] + '/run.py')
artefact = runner['load'](sys.argv[1])
requests = json.loads(sys.argv[2])
print(json.dumps([runner['generate'](artefact, **request) for request in requests]))
assert not [name for name in sys.modules if name.startswith(('jaxllm.', 'flax'))]
'''


def test_exported_programs_need_no_code_of_ours_and_give_the_same_tokens(artefact):
  config, variables, path = artefact
  manifest = json.loads((path / 'manifest.json').read_text())
  assert manifest['buckets'] == [16, 32] and manifest['platforms'] == ['cpu', 'cuda', 'tpu']
  requests = [
    {'ids': [3, 1, 4, 1, 5], 'max_new_tokens': 40, 'temperature': 0.0},
    {'ids': [2, 7], 'max_new_tokens': 12},
    {'ids': list(range(20)), 'max_new_tokens': 9, 'temperature': 0.7, 'top_p': 0.9, 'seed': 7},
    {'ids': [9], 'max_new_tokens': 12, 'temperature': 1.3, 'top_k': 5, 'min_p': 0.01, 'seed': 3},
  ]
  done = subprocess.run([sys.executable, '-c', RUN, str(path), json.dumps(requests)],
                        capture_output=True, text=True, check=True, cwd=path.parent)
  prompts = [request.pop('ids') for request in requests]
  sampling = [SamplingConfig(**request) for request in requests]
  expected = decode.generate(Decoder(config), unstack(variables), prompts, sampling, (256,))
  assert json.loads(done.stdout) == [generation.tokens for generation in expected]


def test_the_runner_is_small_and_checks_its_files(artefact, tmp_path):
  _, _, path = artefact
  assert len((path / 'run.py').read_text().splitlines()) < 150
  copy = tmp_path / 'copy'
  shutil.copytree(path, copy)
  content = bytearray((copy / 'weights.safetensors').read_bytes())
  content[-1] ^= 1
  (copy / 'weights.safetensors').write_bytes(content)
  with pytest.raises(ValueError, match='weights.safetensors differs'):
    exported_runner.load(copy)
  loaded = exported_runner.load(path)
  text = 'hé<|endoftext|>'
  assert exported_runner.encode(loaded, text) == [256, *text.encode()]
  with pytest.raises(ValueError, match='ids below 259'):
    exported_runner.generate(loaded, [259], 1)
  with pytest.raises(ValueError, match='programs exist for 32'):
    exported_runner.generate(loaded, [1] * 33, 1)


def test_exported_programs_say_until_when_they_are_promised_to_run(artefact, tmp_path, capsys):
  _, _, path = artefact
  manifest = json.loads((path / 'manifest.json').read_text())
  assert {'jax', 'flax', 'jaxllm', 'platforms'} <= manifest.keys()
  days = datetime.date.fromisoformat(manifest['valid_until']) - datetime.date.today()
  assert 180 < days.days < 185
  exported_runner.load(path)
  assert not capsys.readouterr().err
  for name in ('run.py', 'tokenizer.json', 'prefill_16.bin'):
    shutil.copy(path / name, tmp_path / name)
  (tmp_path / 'weights.safetensors').symlink_to(path / 'weights.safetensors')
  old = {'made_on': '2025-11-04', 'valid_until': '2026-05-05', 'jax': '0.8.0', 'sha256': {}}
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest | old))
  loaded = exported_runner.load(tmp_path)
  said = capsys.readouterr().err
  assert said.startswith('warning: made on 2025-11-04 with jax 0.8.0') and said.count('\n') == 1
  fix = 'python -m jaxllm.convert --source=/models/small --target=NEW --format=exported'
  assert 'until 2026-05-05' in said and fix in said
  # They are tried all the same; where JAX no longer reads them, that names the fix too.
  assert len(exported_runner.generate(loaded, [3], 1, temperature=0.0)) == 1
  (tmp_path / 'prefill_16.bin').write_bytes(b'a format of before')
  loaded['programs'].clear()
  with pytest.raises(ValueError, match=f'prefill_16.bin: .*{fix}'):
    exported_runner.generate(loaded, [3], 1)


def test_exported_programs_name_the_source_that_they_are_made_anew_from(artefact, tmp_path):
  _, _, path = artefact
  assert exported.source_of(str(path)) == '/models/small'
  assert exported.source_of('hf:gpt2') == 'hf:gpt2' and exported.source_of('/none') == '/none'
  (tmp_path / 'manifest.json').write_text('{"buckets": [16]}')
  with pytest.raises(ValueError, match='does not say of which model'):
    exported.source_of(str(tmp_path))


def test_the_program(foreign, tmp_path):
  def convert(*flags):
    return subprocess.run([sys.executable, '-m', 'jaxllm.convert', *flags], capture_output=True,
                          text=True, check=False, env={'JAX_PLATFORMS': 'cpu', 'PATH': ''})

  done = convert(f'--source={foreign}', f'--target={tmp_path}/ours', '--format=jaxllm',
                 '--dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  assert 'top-1 agreement 100%' in done.stdout
  params, _ = reading.restore_params(tmp_path / 'ours')
  assert np.dtype(params['embed']['embedding'].dtype).name == 'bfloat16'
  done = convert('--source=/nothing/here', f'--target={tmp_path}/new')
  assert done.returncode == 2 and "no such file or directory: '/nothing/here'" in done.stderr
  assert 'Traceback' not in done.stderr
