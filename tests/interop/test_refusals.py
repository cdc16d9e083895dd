"""Damaged and hostile models are refused by name, before anything is allocated or written."""

import json
import pickle
import re
import struct
import time

import jax
import numpy as np
import pytest
import small

from jaxllm import mistakes
from jaxllm.interop import huggingface, tensorfile


@pytest.fixture(autouse=True)
def nothing_is_allocated(monkeypatch):
  def load(*_):
    raise AssertionError('parameters were allocated')

  monkeypatch.setattr(jax, 'make_array_from_callback', load)


@pytest.fixture
def model(tmp_path):
  small.save(tmp_path / 'model')
  return tmp_path / 'model'


def refused(directory, message, **options):
  with pytest.raises(ValueError, match=message):
    small.load(directory, **options)


def edit(path, **changes):
  keys = json.loads(path.read_text())
  path.write_text(json.dumps({**keys, **changes}))


def tensors(directory):
  return {name: np.array(tensor.array()) for name, tensor in
          tensorfile.read_header(directory / 'model.safetensors').items()}


def write(directory, arrays, name='model.safetensors'):
  tensorfile.write(directory / name, arrays)


def rewrite_header(path, change):
  """Change the JSON header of a file, given and returned as text."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], 'little')
  header = change(content[8 : 8 + size].decode()).encode()
  path.write_bytes(len(header).to_bytes(8, 'little') + header + content[8 + size :])


def test_the_second_of_many_keys_is_found_in_linear_time():
  content = '{' + ','.join(f'"k{i}":0' for i in range(200_000)) + ',"k199999":0}'
  start = time.process_time()
  with pytest.raises(ValueError, match="x: the key 'k199999' stands twice in an object"):
    mistakes.parse_json(content.encode(), 'x')
  assert time.process_time() - start < 2


@pytest.mark.parametrize(('content', 'message'), [
  (pickle.dumps({'a': 1}), 'a pickle'),
  (b'PK\x03\x04' + bytes(100), 'zip archive'),
  (b'GGUF' + bytes(100), 'GGUF'),
  (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS'),
  (b'', 'cut off'),
  (bytes(8), 'header'),
  ((10**15).to_bytes(8, 'little') + b'{}', 'header too large'),
  ((200_000).to_bytes(8, 'little') + b'[' * 200_000, 'header'),
  ((2).to_bytes(8, 'little') + b'[]', 'no safetensors file'),
])
def test_files_in_disguise(model, content, message):
  (model / 'model.safetensors').write_bytes(content)
  refused(model, message)


def test_pickles_are_not_looked_for(model):
  (model / 'model.safetensors').rename(model / 'pytorch_model.bin')
  refused(model, 'pytorch_model.bin, a pickle.*only safetensors')
  (model / 'pytorch_model.bin').unlink()
  refused(model, 'holds no model.safetensors')


def test_code_is_not_run(model):
  edit(model / 'config.json', auto_map={'AutoModelForCausalLM': 'evil.Model'})
  refused(model, 'auto_map names code')
  # Told to, it is read as the family that its config.json names.
  huggingface.open_model(model, ignore_auto_map=True)
  edit(model / 'config.json', auto_map=None)
  edit(model / 'tokenizer_config.json', auto_map={'AutoTokenizer': ['evil.Tokenizer', None]})
  refused(model, 'tokenizer_config.json: auto_map')


@pytest.mark.parametrize('name', ['../x.safetensors', '/etc/x.safetensors', 'a/b.safetensors',
                                  'x.bin', '.safetensors', 'x\\..\\y.safetensors'])
def test_index_naming_other_files(model, name):
  text = json.dumps({'weight_map': {'model.norm.weight': name}})
  (model / 'model.safetensors.index.json').write_text(text)
  refused(model, 'only names of .safetensors files in the same directory')


def test_damaged_index(model):
  index = model / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'model.norm.weight': 'gone.safetensors'}}))
  refused(model, "names 'gone.safetensors', which is missing")
  index.write_text('{"weight_map": {"a": 1}}')
  refused(model, 'weight_map')
  index.write_text('{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}')
  refused(model, "'a' stands twice")


def test_duplicate_tensors(model):
  arrays = tensors(model)
  write(model, {'model.norm.weight': arrays['model.norm.weight']}, 'other.safetensors')
  index = {'a': 'model.safetensors', 'b': 'other.safetensors'}
  (model / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  refused(model, "tensor 'model.norm.weight' is also in")
  (model / 'model.safetensors.index.json').unlink()
  entry = r'"model.norm.weight":{.*?}'
  rewrite_header(model / 'model.safetensors', lambda text: re.sub(entry, r'\g<0>,\g<0>', text))
  refused(model, "'model.norm.weight' stands twice")


@pytest.mark.parametrize(('old', 'new', 'message'), [
  ('"shape":[24]', '"shape":[25]', 'invalid shape, data type, or offset'),
  ('"shape":[24]', '"shape":[-24]', 'integer `-24`'),
  ('"shape":[24]', '"shape":[24,0]', 'shape'),
  ('"shape":[24]', '"shape":[1,1,1,1,1,1,1,1,24]', 'shape'),
  ('"shape":[24]', '"shape":[true]', 'boolean `true`'),
  ('"shape":[24]', '"shape":[4611686018427387904,24]', 'overflow'),
  ('"dtype":"F32"', '"dtype":"Q7"', 'unknown variant `Q7`'),
  ('"dtype":"F32","shape":[24]', '"dtype":"I32","shape":[24]', 'I32; F32, F16'),
  ('"data_offsets"', '"offsets"', 'missing field `data_offsets`'),
])
def test_headers_that_lie(model, old, new, message):
  def change(text):
    assert old in text
    return text.replace(old, new, 1)

  rewrite_header(model / 'model.safetensors', change)
  refused(model, message)


def test_ranges_that_overlap_or_leave_holes(model):
  path = model / 'model.safetensors'
  rewrite_header(path, lambda text: text.replace('[0,', '[96,', 1))
  refused(model, 'invalid offset for tensor')

  def shifted(by):
    def change(text):
      header = json.loads(text)
      last = max((name for name in header if name != '__metadata__'),
                 key=lambda name: header[name]['data_offsets'][0])
      header[last]['data_offsets'] = [at + by for at in header[last]['data_offsets']]
      return json.dumps(header)
    return change

  for by in (-4, 4):
    small.save(model.parent / f'shifted{by}')
    rewrite_header(model.parent / f'shifted{by}' / 'model.safetensors', shifted(by))
    refused(model.parent / f'shifted{by}', 'invalid offset for tensor')


def test_truncated_and_lengthened_files(model):
  path = model / 'model.safetensors'
  content = path.read_bytes()
  for size in (4, 50, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:size])
    refused(model, 'cut off')
  path.write_bytes(content + b'x')
  refused(model, 'not fully covered')


def test_missing_unexpected_and_misshapen_tensors(model):
  arrays = tensors(model)
  norm = arrays.pop('model.norm.weight')
  write(model, arrays | {'model.layers.0.evil.weight': norm})
  refused(model, r"(?s)model.norm.weight: missing.*'model.layers.0.evil.weight': belongs to")
  write(model, arrays | {'model.norm.weight': norm.reshape(2, 12)})
  refused(model, r'model.norm.weight: \[2, 12\], expected \[24\]')
  write(model, arrays | {'model.norm.weight': norm})
  edit(model / 'config.json', intermediate_size=21)
  refused(model, r'mlp.gate_proj.weight: \[20, 24\], expected \[21, 24\]')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_numbers_that_are_not_finite(model, dtype, value, monkeypatch):
  import ml_dtypes

  monkeypatch.undo()  # They are looked at where they will lie.
  arrays = tensors(model)
  kind = ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.dtype(dtype)
  changed = arrays['model.layers.1.mlp.up_proj.weight'].astype(kind)
  changed[3, 5] = value
  write(model, arrays | {'model.layers.1.mlp.up_proj.weight': changed})
  refused(model, 'model.layers.1.mlp.up_proj.weight holds NaN or infinite')


@pytest.mark.parametrize(('changes', 'message'), [
  ({'model_type': 'bert'}, "model_type 'bert' is not supported .supported: gemma.*qwen3"),
  ({'model_type': ['llama']}, 'is not supported'),
  ({'model_type': 'mixtral'}, 'num_local_experts=None; a whole number'),
  ({'model_type': 'mixtral', 'num_local_experts': 10**6}, 'num_local_experts=1000000; a whole'),
  ({'model_type': 'qwen3_moe', 'num_experts': 4, 'num_experts_per_tok': 5,
    'moe_intermediate_size': 8}, 'top_k=5 is larger than'),
  ({'model_type': 'qwen3_moe', 'mlp_only_layers': [0]}, 'mlp_only_layers=.0. is not supported'),
  ({'model_type': 'qwen2_moe', 'decoder_sparse_step': 2}, 'decoder_sparse_step=2 is not|shared'),
  ({'model_type': 'olmoe', 'clip_qkv': 8.0}, 'clip_qkv=8.0 is not supported'),
  ({'quantization_config': {'bits': 4}}, 'quantised weights'),
  ({'num_hidden_layers': 10**9}, 'num_hidden_layers=1000000000; a whole number from 1 to 4096'),
  ({'hidden_size': 10**18}, 'hidden_size'),
  ({'vocab_size': -1}, 'vocab_size=-1'),
  ({'vocab_size': True}, 'vocab_size=True'),
  ({'num_attention_heads': '6'}, "num_attention_heads='6'"),
  ({'rms_norm_eps': float('nan')}, 'rms_norm_eps'),
  ({'hidden_act': 'mish'}, "hidden_act='mish' is not supported .supported: silu"),
  ({'rope_scaling': {'rope_type': 'magic'}}, "'magic' is not supported"),
  ({'rope_scaling': [1]}, 'rope_scaling'),
  ({'sliding_window': 5}, 'sliding_window=5'),
  ({'num_key_value_heads': 4}, 'num_kv_heads=4'),
  ({'eos_token_id': 259}, 'eos_token_id.*259.*259 tokens'),
  ({'eos_token_id': [2, 10**6]}, 'eos_token_id'),
])
def test_configs_that_cannot_be(model, changes, message):
  edit(model / 'config.json', **changes)
  refused(model, message)


def test_config_that_is_none(model):
  (model / 'config.json').write_text('[]')
  refused(model, 'list, an object is needed')
  (model / 'config.json').write_text('{"a": ' * 100_000)
  refused(model, 'config.json')
  (model / 'config.json').unlink()
  refused(model, 'no config.json')


@pytest.mark.parametrize(('name', 'change'), [
  ('tokenizer.json', lambda keys: keys['model']['vocab'].update({'zz': 259})),
  ('tokenizer.json', lambda keys: keys['added_tokens'][0].update({'id': 4_000_000_000})),
  ('generation_config.json', lambda keys: keys.update({'eos_token_id': [2, 300]})),
])
def test_ids_beyond_the_vocabulary(model, name, change):
  keys = json.loads((model / name).read_text())
  change(keys)
  (model / name).write_text(json.dumps(keys))
  refused(model, 'but the model has 259 tokens')


def test_a_name_that_is_no_model(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='no such file or directory'):
    small.load(tmp_path / 'nothing')
  (tmp_path / 'text.gguf').write_text('hello, this is no model at all')
  with pytest.raises(ValueError, match='not a GGUF file'):
    small.load(tmp_path / 'text.gguf')


def gguf(keys=0, tensors=0, body=b'', magic=b'GGUF', version=3):
  return magic + struct.pack('<IQQ', version, tensors, keys) + body


def text(value):
  return struct.pack('<Q', len(value)) + value.encode()


def key(name, kind, body):
  return text(name) + struct.pack('<I', kind) + body


@pytest.mark.parametrize(('content', 'message'), [
  (gguf(magic=b'GGML'), 'not a GGUF file'),
  (gguf(version=1), 'version 1'),
  (gguf(version=3 << 24), 'version'),
  (gguf(keys=2**60), 'claims 1152921504606846976 keys'),
  (gguf(tensors=2**60), 'claims 1152921504606846976 tensors'),
  (gguf(keys=1, body=struct.pack('<Q', 2**62) + bytes(40)), 'bytes of a string'),
  (gguf(keys=1, body=key('a', 9, struct.pack('<IQ', 4, 2**61))), "items in 'a'"),
  (gguf(keys=1, body=key('a', 9, struct.pack('<IQ', 8, 2**61))), "items in 'a'"),
  (gguf(keys=1, body=key('a', 9, struct.pack('<IQ', 9, 1) + bytes(20))), 'type 9'),
  (gguf(keys=1, body=key('a', 77, bytes(20))), 'unknown type 77'),
  (gguf(keys=2, body=key('a', 4, bytes(4)) * 2), "'a' stands twice"),
  (gguf(keys=1, body=key('a', 8, text('long'))[:-2]), '4 bytes of a string; 2 bytes follow'),
  (gguf(tensors=1, body=text('t') + struct.pack('<I', 9) + bytes(80)), '9 axes'),
  (gguf(tensors=1, body=text('t') + struct.pack('<IQQQIQ', 3, 2**30, 2**30, 2**30, 0, 0)),
   'claims the shape'),
  (gguf(tensors=1, body=text('t') + struct.pack('<IQIQ', 1, 0, 0, 0)), 'claims the shape'),
  (gguf(keys=1, body=key('general.alignment', 4, struct.pack('<I', 0))), 'general.alignment=0'),
  (b'GGUF', 'cut off'),
])
def test_gguf_headers_that_lie(tmp_path, content, message):
  path = tmp_path / 'model.gguf'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    small.load(path)
