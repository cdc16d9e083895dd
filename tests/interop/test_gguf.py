"""GGUF models: what the converter did is undone, and the logits are those of the file."""

import functools

import jax
import numpy as np
import pytest
import small
import small_gguf

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.interop import chat, conversion, gguf_vocabulary, sources
from jaxllm.models.positions import LinearScaling, RotaryPositions, YarnScaling

gguf = pytest.importorskip('gguf')
KINDS = ['llama', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3', 'mixtral', 'olmoe', 'qwen2moe',
         'qwen3moe']


@pytest.mark.parametrize('kind', KINDS)
def test_every_architecture_is_what_it_was_made_from(kind, tmp_path):
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', kind)
  loaded = small.load(tmp_path / 'model.gguf')
  original = small.load(tmp_path / 'model')
  plain = {'initializer': original.config.initializer}
  assert loaded.config.replace(**plain) == original.config.replace(**plain)
  layers, expected = (m.variables['params']['layers'] for m in (loaded, original))
  for part in ('query', 'key', 'value', 'out'):
    ours, theirs = (np.asarray(tree['attention'][part]['kernel']) for tree in (layers, expected))
    assert (ours == theirs).all()
  jax.tree.map(np.testing.assert_array_equal, layers['mlp'], expected['mlp'])
  norm = np.asarray(layers['attention_norm']['scale'])
  # 1 was added to it and taken away, in float32.
  assert np.abs(norm - np.asarray(expected['attention_norm']['scale'])).max() < 3e-7
  prove(sources.open_model(tmp_path / 'model.gguf'), loaded)


def prove(source, loaded):
  ids = conversion.fixed_prompt(loaded.config)
  reference = functools.partial(source.reference, ids, np.float32)
  return conversion.prove(reference, loaded.config, loaded.variables, ids)


@pytest.mark.parametrize('quantization', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_1'])
def test_quantised_files(quantization, tmp_path):
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', 'llama', quantization)
  source = sources.open_model(tmp_path / 'model.gguf')
  kinds = {tensor.kind for tensor in source.tensors.values()}
  assert kinds == {quantization, 'F32'}
  loaded = small.read(source)
  prove(source, loaded)


def test_divisors_of_the_rotation(tmp_path, monkeypatch):
  add, first = gguf.GGUFWriter.write_header_to_file, 1

  def with_divisors(writer):
    writer.add_tensor('rope_freqs.weight', np.linspace(first, 9, 8, dtype=np.float32))
    add(writer)

  monkeypatch.setattr(gguf.GGUFWriter, 'write_header_to_file', with_divisors)
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', 'llama')
  source = sources.open_model(tmp_path / 'model.gguf')
  assert source.config.positions.scaling.short_factors[-1] == 9
  prove(source, small.read(source))
  first = 0
  small_gguf.write(tmp_path / 'zero.gguf', tmp_path / 'zero', 'llama')
  with pytest.raises(ValueError, match='finite numbers above 0'):
    sources.open_model(tmp_path / 'zero.gguf')


@pytest.mark.parametrize('scaling', [
  LinearScaling(factor=4.0), YarnScaling(factor=4.0, original_length=64),
])
def test_scaled_rotations(scaling, tmp_path, monkeypatch):
  rotary = RotaryPositions(base=5000.0, scaling=scaling)
  monkeypatch.setitem(small_gguf.CHANGES, 'llama', {'positions': rotary})
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', 'llama')
  source = sources.open_model(tmp_path / 'model.gguf')
  assert source.config.positions == rotary
  prove(source, small.read(source))


def test_the_tokenizer(tmp_path):
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', 'llama')
  files = sources.open_model(tmp_path / 'model.gguf').files
  tokenizer = tokenizers.from_files(files)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (259, 258, 260)
  assert tokenizer.encode('the12')[0] == 257 and len(tokenizer.encode('the12')) == 3
  assert tokenizer_settings.add_bos(files) and tokenizer_settings.eos_token_ids(files) == (258,)
  text = 'naïve <|end|> 机器\n'
  assert tokenizer.decode(tokenizer.encode(text)) == text
  template = tokenizer_settings.chat_templates(files).get('default')
  ids, = chat.encode_all(tokenizer, template, [[{'role': 'user', 'content': 'a<|end|>'}]])
  assert ids == [*tokenizer.encode('a<|end|>'), 258]


def test_pieces_with_scores():
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), 'a', 'b', '▁', 'ab',
            '▁ab']
  metadata = {f'tokenizer.ggml.{key}': value for key, value in {
    'model': 'llama', 'tokens': pieces, 'scores': [0.0] * 259 + [-5.0, -6.0, -7.0, -1.0, -2.0],
    'token_type': [2, 3, 3] + [6] * 256 + [1] * 5, 'bos_token_id': 1, 'eos_token_id': 2,
    'unknown_token_id': 0,
  }.items()}
  files = gguf_vocabulary.tokenizer_files(metadata)
  tokenizer = tokenizers.from_files(files)
  # A space is put before the text, as these models expect.
  assert tokenizer.encode('ab ab') == [263, 263]
  assert tokenizer.encode('c') == [261, 3 + ord('c')]
  assert tokenizer.decode([263, 263]) == 'ab ab'
  assert tokenizer_settings.add_bos(files)


@pytest.mark.parametrize(('changes', 'message'), [
  ({'model': 'rwkv'}, "'rwkv' is not supported"),
  ({'tokens': ['a', 'a']}, "'a' stands twice"),
  ({'tokens': 5}, 'no list of strings'),
  ({'pre': 'magic'}, "'magic' is not supported"),
  ({'merges': ['a c']}, "'a c' does not join"),
  ({'merges': ['a b c']}, 'does not join'),
  ({'eos_token_id': 9}, 'eos_token_id=9, but there are 3 tokens'),
  ({'token_type': [1]}, 'token_type'),
])
def test_damaged_vocabularies(changes, message):
  metadata = {'model': 'gpt2', 'tokens': ['a', 'b', 'ab'], 'merges': ['a b']} | changes
  with pytest.raises(ValueError, match=message):
    gguf_vocabulary.tokenizer_files({f'tokenizer.ggml.{k}': v for k, v in metadata.items()})


def test_damaged_files(tmp_path):
  small_gguf.write(tmp_path / 'model.gguf', tmp_path / 'model', 'llama')
  content = (tmp_path / 'model.gguf').read_bytes()
  path = tmp_path / 'damaged.gguf'

  def refused(changed, message):
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=message):
      small.load(path)

  for size in (10, 100, 3000, len(content) - 1000):
    refused(content[:size], 'cut off|are read')
  refused(content.replace(b'llama', b'blama'), "general.architecture 'blama' is not supported")
  refused(content.replace(b'blk.1.attn_q', b'blk.1.attn_k'), "'blk.1.attn_k.weight' stands twice")
  refused(content.replace(b'blk.1.attn_q', b'blk.1.attn_x'), r'self_attn.q_proj.weight: missing')
  nan = np.frombuffer(content[-4096:], np.float32).copy()
  nan[100] = np.nan
  refused(content[:-4096] + nan.tobytes(), 'holds NaN or infinite')
