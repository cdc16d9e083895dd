"""PEFT's directories: written and read back, fused matrices included, and as PEFT computes them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters.lora import LoraConfig
from jaxllm.interop import peft
from jaxllm.models import decoder
from jaxllm.models.config import ExpertsConfig
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.families import HUGGINGFACE

MODEL = DecoderConfig(
  vocab_size=30, vocab_multiple=8, embed_dim=8, num_layers=3, num_heads=4, num_kv_heads=2,
  mlp_dim=12, max_length=16,
)
MODELS = {
  'llama': MODEL,
  'gpt2': MODEL.replace(num_kv_heads=None, gated=False, activation='gelu_tanh', tied_head=True),
  'gpt_neox': MODEL.replace(num_kv_heads=None, gated=False, activation='gelu'),
  'phi3': MODEL,
  'mixtral': MODEL.replace(experts=ExpertsConfig(num_experts=3, top_k=2)),
}
LORA = LoraConfig(rank=3, alpha=6, targets=('layers/.*',))


def _random(config, lora_config=LORA, seed=0):
  """Return adapters with nothing plain: b random, a scale of its own for each layer."""
  shapes, _ = decoder.abstract(config)
  adapters = lora_lib.init(lora_config, shapes['params'], jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if path[-1].key == 'a' else jnp.asarray(
      rng.normal(size=leaf.shape) if path[-1].key == 'b' else rng.uniform(1, 2, leaf.shape),
      jnp.float32),
    adapters)


def _load(directory, kind='llama'):
  return peft.collect(*peft.read(directory), HUGGINGFACE[kind], MODELS[kind])


def _deltas(adapters):
  return {path: np.asarray(lora_lib.delta(adapter))
          for path, adapter in lora_lib.adapters(adapters)}


def _assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize('kind', MODELS)
def test_written_and_read_back(kind, tmp_path):
  adapters = _random(MODELS[kind])
  peft.save(tmp_path, adapters, HUGGINGFACE[kind], MODELS[kind])
  _assert_same(_deltas(_load(tmp_path, kind)), _deltas(adapters))
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'adapter_config.json', 'adapter_model.safetensors']


def test_a_head_with_padded_vocabulary(tmp_path):
  adapters = _random(MODEL, LORA.replace(targets=('head', 'layers/mlp/up')))
  adapters['head']['b'] = adapters['head']['b'].at[:, 30:].set(0)
  peft.save(tmp_path, adapters, HUGGINGFACE['llama'], MODEL)
  _assert_same(_deltas(_load(tmp_path)), _deltas(adapters))


def test_names_as_peft_spells_them(tmp_path):
  from safetensors.numpy import load_file

  config = MODELS['gpt2']
  few = LORA.replace(targets=('layers/attention/(query|value|out)',))
  peft.save(tmp_path, _random(config, few), HUGGINGFACE['gpt2'], config, 'org/base')
  shapes = {name: array.shape for name, array in
            load_file(tmp_path / 'adapter_model.safetensors').items()}
  prefix = 'base_model.model.transformer.h'
  assert shapes == {
    f'{prefix}.{layer}.attn.{module}.lora_{side}.weight': shape
    for layer in range(3)
    for module, side, shape in [
      ('c_attn', 'A', (6, 8)), ('c_attn', 'B', (24, 6)),
      ('c_proj', 'A', (3, 8)), ('c_proj', 'B', (8, 3)),
    ]
  }
  keys = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert keys['target_modules'] == ['attn.c_attn', 'attn.c_proj'] and keys['fan_in_fan_out']
  assert keys['r'] == 3 and keys['rank_pattern'] == {r'attn\.c_attn': 6}
  assert keys['base_model_name_or_path'] == 'org/base'


def _edit(directory, **changes):
  path = directory / 'adapter_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'use_dora': True}, 'use_dora=True has no counterpart'),
    ({'modules_to_save': ['lm_head']}, "modules_to_save names 'lm_head', of which"),
    ({'trainable_token_indices': [1]}, 'trainable_token_indices'),
    ({'lora_bias': True}, 'lora_bias'), ({'target_parameters': ['w']}, 'target_parameters'),
    ({'layer_replication': [[0, 2]]}, 'layer_replication'),
    ({'a_key_of_tomorrow': {'x': 1}}, 'a_key_of_tomorrow=.* has no counterpart'),
    ({'bias': 'all'}, "bias='all'"),
    ({'peft_type': 'IA3'}, "peft_type 'IA3'"),
    ({'rank_pattern': {'(': 2}}, r"rank_pattern: '\(' is no regular expression"),
    ({'alpha_pattern': {'(a+)+b': 2}}, r"alpha_pattern: '\(a\+\)\+b' repeats too much"),
    ({'alpha_pattern': {'q_proj': 1e300}}, "a positive number is needed"),
    ({'modules_to_save': 'lm_head'}, "modules_to_save='lm_head'; expected list"),
    ({'r': '8'}, "r='8'"),
    ({'r': 4}, 'has rank 3, but adapter_config.json says 4'),
  ],
)
def test_what_has_no_counterpart_is_refused(changes, message, tmp_path):
  peft.save(tmp_path, _random(MODEL), HUGGINGFACE['llama'], MODEL)
  _edit(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    _load(tmp_path)


@pytest.mark.parametrize('kind', [
  'pissa', 'pissa_niter_16', 'olora', 'OLoRA', 'corda', 'loftq', 'lora_ga', 'unheard_of'])
def test_a_beginning_that_changes_the_base_is_refused(kind, tmp_path):
  peft.save(tmp_path, _random(MODEL), HUGGINGFACE['llama'], MODEL)
  _edit(tmp_path, init_lora_weights=kind)
  with pytest.raises(ValueError, match=f"'{kind}' changes the base .*weight_conversion=INITIAL"):
    _load(tmp_path)


@pytest.mark.parametrize('changes', [
  {'init_lora_weights': 'eva', 'eva_config': {'rho': 2.0}}, {'init_lora_weights': 'Gaussian'},
  {'init_lora_weights': False}, {'exclude_modules': ['k_proj'], 'layers_to_transform': [0]},
  {'runtime_config': {'ephemeral_gpu_offload': False}, 'use_qalora': False, 'revision': 'main'},
])
def test_what_the_weights_say_anyway_is_read_past(changes, tmp_path):
  adapters = _random(MODEL)
  peft.save(tmp_path, adapters, HUGGINGFACE['llama'], MODEL)
  _edit(tmp_path, **changes)
  _assert_same(_deltas(_load(tmp_path)), _deltas(adapters))


def _merged(directory, arrays, config=MODEL, **changes):
  """Return (config, params, the params before) of a model with these arrays as its adapters."""
  from safetensors.numpy import save_file

  peft.save(directory, _random(MODEL), HUGGINGFACE['llama'], MODEL)
  save_file(arrays, directory / 'adapter_model.safetensors')
  _edit(directory, r=2, lora_alpha=6, rank_pattern={}, **changes)
  shapes, _ = decoder.abstract(config)
  params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0, leaf.dtype), shapes['params'])
  made, after = peft.merge(directory, HUGGINGFACE['llama'], config, params)
  return made, after, params


# Of an embedding: A (R, V) and B (D, R); of a head the other way round, transposed.
A = np.arange(60, dtype=np.float32).reshape(2, 30)
B = np.arange(16, dtype=np.float32).reshape(8, 2)
DELTA = 3 * (A.T @ B.T)
WHOLE = np.arange(240, dtype=np.float32).reshape(30, 8)
OF = 'base_model.model.'
EMBEDDING = {OF + 'model.embed_tokens.lora_embedding_A': A,
             OF + 'model.embed_tokens.lora_embedding_B': B}
HEAD = {OF + 'lm_head.lora_A.weight': np.ascontiguousarray(B.T),
        OF + 'lm_head.lora_B.weight': np.ascontiguousarray(A.T)}


@pytest.mark.parametrize(('arrays', 'changes', 'embedding', 'head'), [
  (EMBEDDING, {}, 2 + DELTA, 2.0),
  (HEAD, {}, 2.0, 2 + DELTA),
  (EMBEDDING | HEAD, {}, 2 + DELTA, 2 + DELTA),
  # PEFT writes copies of what lies beneath such an adapter.
  (EMBEDDING | {OF + 'model.embed_tokens.base_layer.weight': WHOLE}, {}, WHOLE + DELTA, 2.0),
  ({OF + 'lm_head.weight': WHOLE}, {'modules_to_save': ['lm_head']}, 2.0, WHOLE),
  ({OF + 'model.embed_tokens.weight': WHOLE, OF + 'lm_head.modules_to_save.weight': WHOLE + 1},
   {'modules_to_save': ['lm_head', 'embed_tokens']}, WHOLE, WHOLE + 1),
])
@pytest.mark.parametrize('tied', [False, True])
def test_embedding_and_head(arrays, changes, embedding, head, tied, tmp_path):
  config, params, before = _merged(tmp_path, arrays, MODEL.replace(tied_head=tied), **changes)
  assert not config.tied_head and ('head' in before) != tied
  np.testing.assert_allclose(
    params['embed']['embedding'][:30], np.broadcast_to(embedding, (30, 8)), rtol=1e-6)
  np.testing.assert_allclose(
    params['head']['kernel'][:, :30].T, np.broadcast_to(head, (30, 8)), rtol=1e-6)
  # The padding of the vocabulary stays as it was.
  assert (np.asarray(params['embed']['embedding'][30:]) == 2).all()
  assert params['layers'] is before['layers']


def test_other_adapters_leave_a_tied_head_tied(tmp_path):
  arrays = {OF + 'model.layers.0.mlp.up_proj.lora_A.weight': np.ones((2, 8), np.float32),
            OF + 'model.layers.0.mlp.up_proj.lora_B.weight': np.ones((12, 2), np.float32)}
  config, params, _ = _merged(tmp_path, arrays, MODEL.replace(tied_head=True))
  assert config.tied_head and params['layers']['mlp']['up']['kernel'][0, 0, 0] == 2 + 3 * 2


def test_another_vocabulary_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'\(31, 8\), but the base model has \(30, 8\); resize'):
    _merged(tmp_path, {OF + 'lm_head.weight': np.ones((31, 8), np.float32)})
  with pytest.raises(ValueError, match='ensure_weight_tying=True has no counterpart'):
    _merged(tmp_path, EMBEDDING, MODEL.replace(tied_head=True), ensure_weight_tying=True)


def test_scale_of_rank_stabilised_adapters(tmp_path):
  peft.save(tmp_path, _random(MODEL), HUGGINGFACE['llama'], MODEL)
  _edit(tmp_path, use_rslora=True, lora_alpha=5)
  found = _load(tmp_path)
  np.testing.assert_allclose(found['layers']['mlp']['up']['scale'], 5 / 3**0.5, rtol=1e-6)


@pytest.mark.parametrize(
  'arrays, message',
  [
    ({'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight': (3, 8)}, 'of one rank'),
    ({'base_model.model.model.embed_tokens.lora_embedding_A': (3, 8)}, 'belongs to no matrix'),
    ({'base_model.model.model.layers.0.mlp.up_proj.lora_B.bias': (12,)}, 'no part of a LoRA'),
    ({'base_model.model.lm_head.weight': (30, 8)}, 'a whole matrix is read of the embedding'),
    ({'base_model.model.model.layers.0.mlp.up_proj.base_layer.weight': (12, 8)}, 'a whole matrix'),
    ({'model.layers.9.mlp.up_proj.lora_A.weight': (3, 8),
      'model.layers.9.mlp.up_proj.lora_B.weight': (12, 3)}, 'belongs to no matrix'),
    ({'model.layers.0.mlp.up_proj.lora_A.weight': (3, 9),
      'model.layers.0.mlp.up_proj.lora_B.weight': (12, 3)}, '9 columns'),
    ({'model.layers.0.mlp.up_proj.lora_A.weight': (3, 8),
      'model.layers.0.mlp.up_proj.lora_B.weight': (13, 3)}, '13 rows'),
  ],
)
def test_weights_that_do_not_fit_are_named(arrays, message, tmp_path):
  from safetensors.numpy import save_file

  peft.save(tmp_path, _random(MODEL), HUGGINGFACE['llama'], MODEL)
  save_file({name: np.ones(shape, np.float32) for name, shape in arrays.items()},
            tmp_path / 'adapter_model.safetensors')
  with pytest.raises(ValueError, match=message):
    _load(tmp_path)


def test_layers_without_an_adapter_have_none(tmp_path):
  from safetensors.numpy import load_file, save_file

  adapters = _random(MODEL)
  peft.save(tmp_path, adapters, HUGGINGFACE['llama'], MODEL)
  file = tmp_path / 'adapter_model.safetensors'
  save_file({k: v for k, v in load_file(file).items() if '.layers.1.' not in k}, file)
  found = _deltas(_load(tmp_path))
  for path, delta in _deltas(adapters).items():
    np.testing.assert_allclose(found[path][[0, 2]], delta[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not found[path][1].any()


LLAMA_SIZES = {'hidden_size': 24, 'intermediate_size': 36, 'num_hidden_layers': 2,
               'num_attention_heads': 4}
THEIRS = {
  'llama': ('LlamaForCausalLM', LLAMA_SIZES | {'num_key_value_heads': 2}, 'all-linear'),
  'gpt2': ('GPT2LMHeadModel', {'n_embd': 24, 'n_layer': 2, 'n_head': 4},
           ['c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']),
  'gpt_neox': ('GPTNeoXForCausalLM',
               LLAMA_SIZES | {'hidden_size': 32, 'tie_word_embeddings': False},
               ['query_key_value', 'dense', 'dense_h_to_4h', 'dense_4h_to_h']),
  'phi3': ('Phi3ForCausalLM', LLAMA_SIZES | {'num_key_value_heads': 2, 'pad_token_id': 0},
           ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj']),
  # PEFT adapts the experts by `target_parameters`, which are refused; it reads ours, one by one.
  'mixtral': ('MixtralForCausalLM', LLAMA_SIZES | {
    'num_key_value_heads': 2, 'num_local_experts': 3}, ['q_proj', 'o_proj']),
}


@pytest.mark.parity
@pytest.mark.parametrize('kind', THEIRS)
def test_peft_computes_the_same(kind, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  theirs = pytest.importorskip('peft')
  from jaxllm.interop import huggingface, weights

  torch.manual_seed(0)
  name, sizes, targets = THEIRS[kind]
  sizes = {'vocab_size': 50, 'bos_token_id': 1, 'eos_token_id': 2, **sizes}
  family = getattr(transformers, name)
  base = family(family.config_class(**sizes)).eval()
  base.save_pretrained(tmp_path / 'base')
  loaded = huggingface.open_model(tmp_path / 'base')
  tokens = np.random.default_rng(0).integers(3, 50, (2, 9))

  def their_logits(model):
    with torch.no_grad():
      return model(torch.tensor(tokens)).logits.numpy()

  def our_logits(adapters):
    variables = {**weights.load(loaded), 'lora': adapters}
    return jax.jit(Decoder(loaded.config).apply)(variables, jnp.asarray(tokens))[..., :50]

  # From PEFT to us, some modules with another rank.
  plain = their_logits(base)
  config = theirs.LoraConfig(
    r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.0, init_lora_weights=False,
    rank_pattern={'down_proj': 2}, alpha_pattern={'down_proj': 7},
    fan_in_fan_out=kind == 'gpt2', task_type='CAUSAL_LM')
  model = theirs.get_peft_model(base, config).eval()
  model.save_pretrained(tmp_path / 'theirs')
  expected = their_logits(model)
  assert np.abs(expected - plain).max() > 1e-2
  form = HUGGINGFACE[kind]
  adapters = peft.collect(*peft.read(tmp_path / 'theirs'), form, loaded.config)
  np.testing.assert_allclose(our_logits(adapters), expected, atol=1e-4)

  # From us to PEFT.
  ours = _random(loaded.config, LORA, seed=5)
  peft.save(tmp_path / 'ours', ours, form, loaded.config)
  again = family.from_pretrained(tmp_path / 'base').eval()
  model = theirs.PeftModel.from_pretrained(again, tmp_path / 'ours').eval()
  np.testing.assert_allclose(our_logits(ours), their_logits(model), atol=2e-4)


@pytest.mark.parity
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('arguments', [
  {'target_modules': ['q_proj', 'embed_tokens']}, {'target_modules': ['lm_head']},
  {'target_modules': ['v_proj'], 'modules_to_save': ['lm_head']},
  {'target_modules': ['v_proj'], 'modules_to_save': ['embed_tokens']},
  {'target_modules': ['v_proj'], 'init_lora_weights': 'eva', 'use_rslora': True},
])
def test_peft_computes_the_same_around_the_layers(arguments, tied, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  theirs = pytest.importorskip('peft')
  import tokenizers

  from jaxllm import loading

  torch.manual_seed(0)
  made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    **LLAMA_SIZES, vocab_size=260, tie_word_embeddings=tied)).eval()
  made.save_pretrained(tmp_path / 'base')
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.save(str(tmp_path / 'base' / 'tokenizer.json'))
  model = theirs.get_peft_model(made, theirs.LoraConfig(r=4, task_type='CAUSAL_LM', **arguments))
  for parameter in model.parameters():
    if parameter.requires_grad:
      parameter.data += torch.randn_like(parameter) * 0.3
  model.save_pretrained(tmp_path / 'adapter')
  _edit(tmp_path / 'adapter', base_model_name_or_path=str(tmp_path / 'base'))
  (tmp_path / 'adapter' / 'tokenizer_config.json').write_text('{"chat_template": "beside"}')
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
  expected = theirs.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
  ids = [3, 1, 4, 1, 5, 9, 2, 6]
  with torch.no_grad():
    logits = expected(torch.tensor([ids])).logits[0].numpy()
    plain = loading.load(tmp_path / 'base').logits(ids)
  loaded = loading.load(tmp_path / 'adapter')
  assert np.abs(logits - plain).max() > 1e-2
  np.testing.assert_allclose(loaded.logits(ids), logits, atol=1e-4)
  assert loaded.chat_format is not None
