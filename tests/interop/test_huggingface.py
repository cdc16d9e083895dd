"""Hugging Face directories: what is written is what is read, and computes what it should."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small

from jaxllm import sharding
from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.interop import conversion, huggingface, tensorfile
from jaxllm.models.families import HUGGINGFACE, PRESETS
from jaxllm.sharding import MeshConfig


def same_bytes(first, second):
  pairs = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
                       first, second)
  return all(jax.tree.leaves(pairs))


@pytest.mark.parametrize('name', small.CONFIGS)
def test_every_family_comes_back_and_computes_what_the_reference_does(name, tmp_path):
  config, variables = small.save(tmp_path / 'model', name)
  source = huggingface.open_model(tmp_path / 'model')
  loaded = small.read(source)
  assert huggingface.normal(loaded.config) == huggingface.normal(config)
  padded = loaded.config.padded_vocab_size - config.padded_vocab_size
  embedding = np.pad(variables['params']['embed']['embedding'], ((0, padded), (0, 0)))
  assert same_bytes(loaded.variables['params']['embed']['embedding'], embedding)
  assert same_bytes(loaded.variables['params']['layers'], variables['params']['layers'])
  ids = conversion.fixed_prompt(config)
  # The same bound that every conversion is held to.
  conversion.prove(
    functools.partial(source.reference, ids, np.float32), loaded.config, loaded.variables, ids)


def test_a_wrong_model_is_not_proven(tmp_path):
  small.save(tmp_path / 'model')
  source = huggingface.open_model(tmp_path / 'model')
  loaded = small.read(source)
  ids = conversion.fixed_prompt(loaded.config)
  reference = functools.partial(source.reference, ids, np.float32)
  query = loaded.variables['params']['layers']['attention']['query']
  query['kernel'] = query['kernel'].at[1].multiply(1.01)
  with pytest.raises(conversion.ConversionError, match='logits differ'):
    conversion.prove(reference, loaded.config, loaded.variables, ids)


def test_rounding_that_a_model_magnifies_is_measured_and_errors_are_not(tmp_path):
  """Where float32 moves the reference itself, ours may be off as far; else it may not."""
  small.save(tmp_path / 'model')
  loaded = small.read(huggingface.open_model(tmp_path / 'model'))
  ids = conversion.fixed_prompt(loaded.config)
  ours_TV = conversion.logits(loaded.config, loaded.variables, ids).astype(float)
  off_T1 = (np.arange(len(ids)) == 3)[:, None] * 5 * conversion.BOUND * abs(ours_TV).max()

  def prove(exact):
    return conversion.prove(
      lambda dtype: ours_TV + off_T1 * (exact if dtype == np.float64 else 1),
      loaded.config, loaded.variables, ids)

  assert prove(0.8)['bound'] > conversion.BOUND * abs(ours_TV).max()
  for exact in (1, 1.1):
    with pytest.raises(conversion.ConversionError, match='logits differ'):
      prove(exact)


@pytest.mark.parametrize('name', [name for name in PRESETS if not name.startswith('gpt3')])
def test_published_configs_survive_config_json(name):
  form = huggingface.choose_format(PRESETS[name])
  keys = json.loads(json.dumps(form.encode(PRESETS[name])))
  again = form.decode(keys)
  assert huggingface.choose_format(again) is form
  assert form.encode(again) == form.encode(PRESETS[name])


# What their config.json says of the computation, in the words and with the gaps that it has.
PUBLISHED = {
  'gpt2_124m': {
    'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-05,
    'n_ctx': 1024, 'n_embd': 768, 'n_head': 12, 'n_layer': 12, 'n_positions': 1024,
    'vocab_size': 50257},
  'llama3.1_8b': {
    'model_type': 'llama', 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 4096,
    'intermediate_size': 14336, 'max_position_embeddings': 131072, 'mlp_bias': False,
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
    'rms_norm_eps': 1e-05, 'rope_theta': 500000.0, 'tie_word_embeddings': False,
    'vocab_size': 128256, 'rope_scaling': {
      'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192, 'rope_type': 'llama3'}},
  'smollm3_3b': {
    'model_type': 'smollm3', 'hidden_act': 'silu', 'hidden_size': 2048,
    'intermediate_size': 11008, 'max_position_embeddings': 65536, 'num_attention_heads': 16,
    'num_hidden_layers': 36, 'num_key_value_heads': 4, 'no_rope_layer_interval': 4,
    'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 5000000.0,
    'sliding_window': None, 'use_sliding_window': False, 'vocab_size': 128256},
  'qwen2_7b': {
    'model_type': 'qwen2', 'hidden_act': 'silu', 'hidden_size': 3584,
    'intermediate_size': 18944, 'max_position_embeddings': 32768, 'max_window_layers': 28,
    'num_attention_heads': 28, 'num_hidden_layers': 28, 'num_key_value_heads': 4,
    'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 131072,
    'tie_word_embeddings': False, 'use_sliding_window': False, 'vocab_size': 152064},
  'gemma_2b': {
    'model_type': 'gemma', 'head_dim': 256, 'hidden_act': 'gelu', 'hidden_activation': None,
    'hidden_size': 2048, 'intermediate_size': 16384, 'max_position_embeddings': 8192,
    'num_attention_heads': 8, 'num_hidden_layers': 18, 'num_key_value_heads': 1,
    'rms_norm_eps': 1e-06, 'rope_theta': 10000.0, 'vocab_size': 256000},
  'gemma2_2b': {
    'model_type': 'gemma2', 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0,
    'head_dim': 256, 'hidden_act': 'gelu_pytorch_tanh', 'hidden_size': 2304,
    'intermediate_size': 9216, 'max_position_embeddings': 8192, 'num_attention_heads': 8,
    'num_hidden_layers': 26, 'num_key_value_heads': 4, 'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-06, 'rope_theta': 10000.0, 'sliding_window': 4096, 'vocab_size': 256000},
  'gemma3_4b': {
    'model_type': 'gemma3', 'text_config': {
      'hidden_size': 2560, 'intermediate_size': 10240, 'model_type': 'gemma3_text',
      'num_hidden_layers': 34, 'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_window': 1024}},
  'phi3_mini_4k': {
    'model_type': 'phi3', 'hidden_act': 'silu', 'hidden_size': 3072,
    'intermediate_size': 8192, 'max_position_embeddings': 4096, 'num_attention_heads': 32,
    'num_hidden_layers': 32, 'num_key_value_heads': 32,
    'original_max_position_embeddings': 4096, 'rms_norm_eps': 1e-05, 'rope_scaling': None,
    'rope_theta': 10000.0, 'sliding_window': 2047, 'tie_word_embeddings': False,
    'vocab_size': 32064},
  'pythia_160m': {
    'model_type': 'gpt_neox', 'hidden_act': 'gelu', 'hidden_size': 768,
    'intermediate_size': 3072, 'layer_norm_eps': 1e-05, 'max_position_embeddings': 2048,
    'num_attention_heads': 12, 'num_hidden_layers': 12, 'rotary_emb_base': 10000,
    'rotary_pct': 0.25, 'tie_word_embeddings': False, 'use_parallel_residual': True,
    'vocab_size': 50304},
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_config_json_as_it_is_published(name):
  keys = PUBLISHED[name]
  config = HUGGINGFACE[keys['model_type']].decode(keys)
  assert huggingface.normal(config) == huggingface.normal(PRESETS[name])


def test_what_no_family_can_say_is_named():
  config = small.CONFIGS['gpt2'].replace(logit_softcap=5.0)
  with pytest.raises(ValueError, match='gpt2 cannot say: logit_softcap'):
    huggingface.choose_format(config)
  with pytest.raises(ValueError, match='qwen3.*query_key_norm'):
    huggingface.choose_format(small.CONFIGS['llama'], 'qwen3')
  with pytest.raises(ValueError, match='supported: gemma'):
    huggingface.choose_format(config, 'gpt5')


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gpt_neox', 'phi3'])
def test_parameters_are_born_sharded(name, tmp_path):
  config, _ = small.save(tmp_path / 'model', name)
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(mesh_config)
  alone = small.load(tmp_path / 'model')
  split = small.load(tmp_path / 'model', placement=sharding.Placement(mesh, mesh_config))
  assert same_bytes(split.variables, alone.variables)
  kernel = split.variables['params']['layers']['mlp']['up']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  table = split.variables['params']['embed']['embedding']
  assert table.addressable_shards[0].data.shape == (table.shape[0] // 2, config.embed_dim // 2)


def test_a_device_reads_only_its_part(tmp_path, monkeypatch):
  small.save(tmp_path / 'model')
  mesh_config = MeshConfig(data=1, fsdp=1, tensor=2)
  mesh = sharding.make_mesh(mesh_config, jax.devices()[:2])
  asked = []
  make = jax.make_array_from_callback

  def spy(shape, where, callback):
    def read(index):
      part = callback(index)
      asked.append((shape, part.shape))
      return part
    return make(shape, where, read)

  monkeypatch.setattr(jax, 'make_array_from_callback', spy)
  small.load(tmp_path / 'model', placement=sharding.Placement(mesh, mesh_config))
  halves = [part for shape, part in asked if len(shape) == 3 and shape[1:] == (24, 20)]
  assert halves and all(part == (3, 24, 10) for part in halves)


def test_dtypes(tmp_path):
  _, variables = small.save(tmp_path / 'half', dtype='bfloat16')
  kept = small.load(tmp_path / 'half', dtype=None).variables
  wide = small.load(tmp_path / 'half').variables
  assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {'bfloat16'}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {'float32'}
  layers = variables['params']['layers']
  rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), layers)
  assert same_bytes(kept['params']['layers'], rounded)
  assert same_bytes(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kept), wide)
  with pytest.raises(ValueError, match="dtype='float8'.*float32, bfloat16"):
    small.load(tmp_path / 'half', dtype='float8')


def test_shards_the_files_and_the_vocabulary_without_its_padding(tmp_path):
  config, _ = small.save(tmp_path / 'one')
  small.save(tmp_path / 'many', shard_bytes=5000)
  names = sorted(path.name for path in (tmp_path / 'many').glob('*.safetensors'))
  assert names[0] == f'model-00001-of-{len(names):05}.safetensors' and len(names) > 2
  index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
  assert set(index['weight_map'].values()) == set(names)
  one = small.load(tmp_path / 'one')
  assert same_bytes(small.load(tmp_path / 'many').variables, one.variables)
  stored = tensorfile.read_header(tmp_path / 'one' / 'model.safetensors')
  assert stored['model.embed_tokens.weight'].shape == (config.vocab_size, config.embed_dim)
  assert stored['lm_head.weight'].shape == (config.vocab_size, config.embed_dim)
  import safetensors
  with safetensors.safe_open(tmp_path / 'one' / 'model.safetensors', 'np') as file:
    assert file.metadata() == {'format': 'pt'}
    assert set(file.keys()) == set(stored)


def test_the_directory_is_complete_and_its_tokenizer_comes_back(tmp_path):
  config = small.CONFIGS['llama']
  template = '{{ messages[0].content }}'
  huggingface.save(tmp_path / 'model', config, small.variables(config),
                          small.files(template))
  assert {path.name for path in (tmp_path / 'model').iterdir()} == {
    'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
    'tokenizer_config.json', 'special_tokens_map.json',
  }
  loaded = small.load(tmp_path / 'model')
  made, original = tokenizers.from_files(loaded.files), tokenizers.from_files(small.files())
  text = 'Grüße \t\n <|endoftext|> 机器'
  assert made.encode(text) == original.encode(text) and made.decode(made.encode(text)) == text
  assert (made.eos_id, made.vocab_size) == (256, 257)
  assert tokenizer_settings.chat_templates(loaded.files).get('default') == template
  assert tokenizer_settings.eos_token_ids(loaded.files) == (256,)


@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_gpt2_with_and_without_prefix_and_masks(prefix, tmp_path):
  _, variables = small.save(tmp_path / 'model', 'gpt2')
  path = tmp_path / 'model' / 'model.safetensors'
  found = tensorfile.read_header(path)
  arrays = {prefix + name.removeprefix('transformer.'): np.array(tensor.array())
            for name, tensor in found.items()}
  arrays[prefix + 'h.0.attn.bias'] = np.ones((1, 1, 8, 8), np.uint8)
  arrays[prefix + 'h.0.attn.masked_bias'] = np.full((1,), -1e4, np.float32)
  tensorfile.write(path, arrays)
  source = huggingface.open_model(tmp_path / 'model')
  assert set(source.ignored.values()) == {'causal mask'} and len(source.ignored) == 2
  loaded = small.read(source)
  assert same_bytes(loaded.variables['params']['layers'], variables['params']['layers'])


def test_a_stored_head_equal_to_the_tied_embedding_is_not_needed(tmp_path):
  small.save(tmp_path / 'model', 'qwen2')
  add_tensor(tmp_path / 'model', 'lm_head.weight',
             lambda arrays: arrays['model.embed_tokens.weight'])
  source = huggingface.open_model(tmp_path / 'model')
  assert 'tied' in source.ignored['lm_head.weight']
  add_tensor(tmp_path / 'model', 'lm_head.weight',
             lambda arrays: arrays['model.embed_tokens.weight'] + 1)
  with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tokens.weight'):
    huggingface.open_model(tmp_path / 'model')


def test_the_text_model_of_a_multimodal_gemma3(tmp_path):
  _, variables = small.save(tmp_path / 'model', 'gemma3_text')
  path = tmp_path / 'model' / 'config.json'
  text = json.loads(path.read_text())
  path.write_text(json.dumps({'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}))
  weights = tmp_path / 'model' / 'model.safetensors'
  arrays = {f'language_model.{name}': np.array(tensor.array())
            for name, tensor in tensorfile.read_header(weights).items()}
  arrays['vision_tower.patch.weight'] = np.ones((2, 2), np.float32)
  tensorfile.write(weights, arrays)
  source = huggingface.open_model(tmp_path / 'model')
  assert list(source.ignored) == ['vision_tower.patch.weight']
  loaded = small.read(source)
  assert same_bytes(loaded.variables['params']['layers'], variables['params']['layers'])
  ids = conversion.fixed_prompt(loaded.config)
  conversion.prove(
    functools.partial(source.reference, ids, np.float32), loaded.config, loaded.variables, ids)


def test_all_formats_say_their_own_name():
  assert all(form.model_type == name for name, form in HUGGINGFACE.items())


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
  config = small.CONFIGS['llama']

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(tensorfile, 'write', full)
  with pytest.raises(OSError, match='No space'):
    huggingface.save(tmp_path / 'model', config, small.variables(config))
  assert not list(tmp_path.iterdir())


def add_tensor(directory, name, make):
  path = directory / 'model.safetensors'
  arrays = {key: np.array(tensor.array())
            for key, tensor in tensorfile.read_header(path).items()}
  arrays[name] = make(arrays)
  tensorfile.write(path, arrays)
