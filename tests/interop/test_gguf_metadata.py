"""What the keys of a GGUF file mean, by llama.cpp: read, known to be harmless, or named."""

import functools
import math
import pathlib

import numpy as np
import pytest
import small_gguf

from jaxllm.interop import conversion, sources, weights
from jaxllm.interop.gguf import ARCHITECTURES, config_keys, unread_keys
from jaxllm.interop.gguf_file import Tensor
from jaxllm.interop.huggingface import Reading
from jaxllm.models.families import HUGGINGFACE
from jaxllm.models.positions import LinearScaling, LongRopeScaling, YarnScaling

gguf = pytest.importorskip('gguf')
BASIC = {
  'embedding_length': 64, 'feed_forward_length': 96, 'block_count': 8, 'context_length': 32,
  'attention.head_count': 4, 'attention.layer_norm_rms_epsilon': 1e-5,
}
FOUND = {'token_embd.weight': Tensor('token_embd.weight', pathlib.Path(), 'F32', (260, 64), 0, 0)}


def read(kind='llama', other=None, **changes):
  """Return (the config, the keys without effect) of metadata: BASIC with changes."""
  changed = {name.replace('__', '.'): value for name, value in changes.items()}
  named = {f'{kind}.{name}': value for name, value in (BASIC | changed).items()
           if value is not None}
  metadata = Reading({'general.architecture': kind, **named, **(other or {})})
  form = HUGGINGFACE[ARCHITECTURES[kind].model_type]
  config = form.decode(config_keys(metadata, FOUND, form.model_type))
  return config, list(unread_keys(metadata))


@pytest.mark.parametrize(('changes', 'scaling', 'length'), [
  ({}, None, 32),
  ({'rope__scaling__factor': 4.0}, LinearScaling(factor=4), 128),
  ({'rope__scale_linear': 4.0}, LinearScaling(factor=4), 128),
  ({'rope__scaling__factor': 2.0, 'rope__scale_linear': 4.0}, LinearScaling(factor=2), 64),
  ({'rope__scaling__type': 'linear'}, None, 32),
  ({'rope__scaling__type': 'none', 'rope__scaling__factor': 4.0}, None, 32),
  ({'rope__scaling__factor': 0.0}, None, 32),
  ({'rope__scaling__factor': 4.0, 'rope__scaling__original_context_length': 8},
   LinearScaling(factor=4), 32),
  ({'rope__scaling__factor': 4.0, 'rope__scaling__attn_factor': 0.5},
   LongRopeScaling(short_factors=(4.0,) * 8, long_factors=(4.0,) * 8, original_length=32,
                   attention_factor=0.5), 32),
  ({'rope__scaling__type': 'yarn', 'rope__scaling__factor': 4.0},
   YarnScaling(factor=4, original_length=32), 128),
  ({'rope__scaling__type': 'yarn', 'rope__scaling__factor': 4.0, 'rope__scaling__attn_factor': 0.5,
    'rope__scaling__original_context_length': 8, 'rope__scaling__yarn_beta_fast': 8.0,
    'rope__scaling__yarn_beta_slow': 2.0, 'rope__scaling__yarn_ext_factor': 1.0},
   YarnScaling(factor=4, original_length=8, fast_turns=8, slow_turns=2,
               attention_factor=0.5 * (0.1 * math.log(4) + 1)), 32),
])
def test_scalings_of_the_rotation(changes, scaling, length):
  config, unread = read(**changes)
  assert config.positions.scaling == scaling and config.max_length == length and not unread


L, G = 'local', 'global'


@pytest.mark.parametrize(('kind', 'changes', 'kinds', 'window'), [
  ('gemma2', {}, [L, G] * 4, 4096),
  ('gemma2', {'attention__sliding_window': 7}, [L, G] * 4, 7),
  ('gemma2', {'attention__sliding_window_pattern': 4}, [L, L, L, G] * 2, 4096),
  ('gemma3', {}, [G] * 8, None),
  ('gemma3', {'attention__sliding_window': 7}, [L] * 5 + [G] + [L] * 2, 7),
  ('gemma3', {'attention__sliding_window': 7, 'attention__sliding_window_pattern': 0}, [L] * 8, 7),
  ('gemma3', {'attention__sliding_window': 7, 'attention__sliding_window_pattern':
              [True, True, False, True] * 2}, [L, L, G, L] * 2, 7),
  ('gemma3', {'attention__sliding_window': 7, 'attention__sliding_window_pattern': 1}, [G] * 8,
   None),
  ('gemma2', {'attention__sliding_window_pattern': 2**32 - 1}, [L] * 8, 4096),
  # Wider than the context.
  ('llama', {'attention__sliding_window': 32}, [G] * 8, None),
])
def test_windows(kind, changes, kinds, window):
  config, unread = read(kind, **changes)
  assert list(config.layer_kinds) == kinds and config.window == window and not unread


def test_gemma_3_rotates_its_windows_as_the_file_says():
  config, _ = read('gemma3', attention__sliding_window=7, rope__freq_base_swa=500.0,
                   final_logit_softcapping=20.0)
  assert config.local_positions.base == 500 and config.positions.base == 1e6
  assert config.logit_softcap == 20


@pytest.mark.parametrize('changes', [
  {'vocab_size': 7}, {'attention__causal': True}, {'logit_scale': 1.0}, {'expert_used_count': 0},
  {'rope__scaling__finetuned': True}, {'attention__scale': 0.25}, {'attention__clamp_kqv': 0.0},
  {'rope__dimension_sections': [0, 0, 0, 0]}, {'tensor_data_layout': 'Meta AI original pth'},
  {'attention__value_length': 16}, {'rope__scaling__yarn_beta_fast': 8.0},
  {'rope__scaling__yarn_ext_factor': -1.0},
])
def test_keys_that_change_nothing(changes):
  assert read(**changes) == read()


@pytest.mark.parametrize(('changes', 'message'), [
  ({'attention__causal': False}, 'attention.causal=False changes what the model computes'),
  ({'logit_scale': 0.5}, 'llama.logit_scale=0.5 changes'),
  ({'residual_scale': 2.0}, 'residual_scale'),
  ({'embedding_scale': 12.0}, 'embedding_scale'),
  ({'attention__clamp_kqv': 8.0}, 'clamp_kqv'),
  ({'attention__max_alibi_bias': 8.0}, 'max_alibi_bias'),
  ({'attn_logit_softcapping': 30.0}, 'attn_logit_softcapping'),
  ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping'),
  ({'use_parallel_residual': True}, 'use_parallel_residual'),
  ({'rope__scaling__alpha': 1000.0}, 'rope.scaling.alpha'),
  ({'rope__scaling__yarn_log_multiplier': 0.1}, 'yarn_log_multiplier'),
  ({'rope__dimension_sections': [8, 4, 4, 0]}, 'dimension_sections'),
  ({'rope__some_news': 3}, 'rope.some_news=3 changes'),
  ({'ssm__state_size': 16}, 'ssm.state_size'),
  ({'attention__indexer__top_k': 4}, 'attention.indexer.top_k'),
  ({'attention__scale': 0.3}, r'attention.scale=0.3 is not supported \(only 16'),
  ({'attention__value_length': 8}, 'value_length=8 differs from the head dimension 16'),
  ({'rope__dimension_count': 8}, 'dimension_count=8 differs'),
  ({'attention__sliding_window': 8}, 'sliding_window=8 is not supported'),
  ({'rope__scaling__type': 'longrope'}, "'longrope' is not supported"),
  ({'rope__scaling__yarn_ext_factor': 0.5}, 'yarn_ext_factor=0.5'),
  ({'expert_count': 8, 'expert_weights_norm': False}, 'expert_weights_norm=False'),
  ({'expert_weights_scale': 2.5}, 'expert_weights_scale=2.5 changes'),
  ({'expert_gating_func': 2}, 'expert_gating_func=2 changes'),
  ({'attention__scale': 'wide'}, "attention.scale='wide'; a number is needed"),
  ({'context_length': None}, 'llama.context_length is missing'),
  ({'attention__layer_norm_rms_epsilon': None}, 'layer_norm_rms_epsilon is missing'),
])
def test_what_the_decoder_does_not_have_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    read(**changes)


@pytest.mark.parametrize(('kind', 'changes', 'message'), [
  ('gemma3', {'rope__scaling__type': 'yarn', 'rope__scaling__factor': 4.0}, "gemma3: .*'yarn'"),
  ('gemma3', {'rope__scaling__attn_factor': 0.5}, 'attn_factor=0.5'),
  ('llama', {'rope__freq_base_swa': 500.0}, 'differs from rope.freq_base'),
  ('gemma2', {'rope__freq_base_swa': 500.0}, 'differs from rope.freq_base'),
])
def test_what_one_architecture_does_not_have(kind, changes, message):
  with pytest.raises(ValueError, match=message):
    read(kind, **changes)


def test_other_keys_are_named():
  ggml = 'tokenizer.ggml.'
  harmless = {ggml + 'mask_token_id': 3, ggml + 'add_eos_token': False, ggml + 'merges': ['a b'],
              'tokenizer.chat_template.tool_use': 'x', 'general.name': 'x', 'split.no': 1,
              ggml + 'precompiled_charsmap': []}
  named = {'llama.invented': 'yes', ggml + 'add_eos_token': True, ggml + 'suppress_tokens': [1]}
  assert read(other=harmless)[1] == []
  assert read(other=named)[1] == list(named)
  for name, value in (('remove_extra_whitespaces', True), ('precompiled_charsmap', [1, 2]),
                      ('normalizer.lowercase', True)):
    with pytest.raises(ValueError, match=f'{name}=.* changes how text is cut'):
      read(other={ggml + name: value})


@pytest.mark.parametrize(('kind', 'extra'), [
  ('llama', {'rope.scale_linear': 3.0, 'rope.scaling.attn_factor': 0.7}),
  ('llama', {'rope.scaling.type': 'yarn', 'rope.scaling.factor': 4.0,
             'rope.scaling.attn_factor': 0.7, 'rope.scaling.original_context_length': 16,
             'rope.scaling.yarn_beta_fast': 3.0, 'rope.scaling.yarn_beta_slow': 0.5}),
  ('gemma3', {'attention.sliding_window_pattern': 3, 'rope.freq_base_swa': 500.0,
              'final_logit_softcapping': 20.0}),
])
def test_the_reference_reads_the_same(kind, extra, tmp_path, caplog):
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', kind,
                   extra={**extra, 'invented': 7})
  source = sources.open_model(tmp_path / 'model.gguf')
  assert source.unread == (f'{kind}.invented',) and f'{kind}.invented' in caplog.text
  ids = conversion.fixed_prompt(source.config)
  reference = functools.partial(source.reference, ids, np.float32)
  conversion.prove(reference, source.config, weights.load(source), ids)


def test_a_llama_with_biases_of_queries_keys_and_values_alone(tmp_path, monkeypatch):
  add = gguf.GGUFWriter.write_header_to_file

  def with_biases(writer):
    for layer in range(3):
      for name, size in (('q', 64), ('k', 32), ('v', 32)):
        writer.add_tensor(f'blk.{layer}.attn_{name}.bias', np.ones(size, np.float32))
    add(writer)

  monkeypatch.setattr(gguf.GGUFWriter, 'write_header_to_file', with_biases)
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', 'llama')
  source = sources.open_model(tmp_path / 'model.gguf')
  assert source.config.biases == ('qkv',) and source.form.model_type == 'qwen2'


def test_models_in_several_files(tmp_path):
  directory = tmp_path / 'parts'
  directory.mkdir()
  small_gguf.write(directory / 'm.gguf', tmp_path / 'model', 'llama', parts_of=8)
  first, second, *_, last = paths = sorted(directory.iterdir())
  assert len(paths) > 2 and first.name.startswith('m-00001-of-')
  small_gguf.write(tmp_path / 'whole.gguf', tmp_path / 'model2', 'llama')
  whole = sources.open_model(tmp_path / 'whole.gguf')
  for path in (first, last, directory):
    assert sources.is_foreign(path)
    source = sources.open_model(path)
    assert source.config == whole.config and source.files == whole.files
    for name, tensor in whole.tensors.items():
      np.testing.assert_array_equal(source.tensors[name].array(), tensor.array())
  (directory / 'other.gguf').touch()
  with pytest.raises(ValueError, match='holds 2 GGUF models; name the file of one: m-00001-of'):
    sources.open_model(directory)
  content = second.read_bytes()
  second.unlink()
  with pytest.raises(ValueError, match=f'fetch the missing ones too: {second.name}'):
    sources.open_model(first)
  second.write_bytes(first.read_bytes())
  with pytest.raises(ValueError, match=r'are not of one model \(split.no and'):
    sources.open_model(first)
  second.write_bytes(content)
  first.rename(directory / 'renamed.gguf')
  with pytest.raises(ValueError, match='its name has to end like -00001-of-0000'):
    sources.open_model(directory / 'renamed.gguf')
