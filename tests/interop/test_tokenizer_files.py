"""Tokenizers of every kind become a tokenizer.json that gives the same ids."""

import json

import pytest
import small

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.interop import (
  sentencepiece_model,
  tokenizer_export,
  tokenizer_files,
)

TEXT = ('The quick brown fox, 31,415 times  over\tthe lazy dogs.\n\n"Don\'t," said she; <s> 0x41\n'
        'naïve Ærøskøbing, Привет, 机器学习 🦜 ') * 20
PROBES = ['The lazy  fox', ' 12 ', '', '\n\t', 'ü机🦜', 'quickly</s>', 'a' * 50, TEXT]
CONFIG = small.CONFIGS['llama'].replace(vocab_size=512)


@pytest.mark.parametrize('model_type', ['bpe', 'unigram', 'char'])
def test_sentencepiece(model_type):
  size = None if model_type == 'char' else 315
  config = TokenizerConfig(kind='sentencepiece', vocab_size=size, model_type=model_type)
  original = tokenizers.train_or_load(config, [TEXT])
  files, ids = tokenizer_export.huggingface_files(original.files(), CONFIG, add_bos=True)
  made = tokenizers.from_files(files)
  assert json.loads(files['tokenizer_config.json'])['bos_token'] == '<s>'
  assert ids == {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
  again = tokenizers.from_files({'tokenizer.json': files['tokenizer.json']})
  for text in PROBES:
    if model_type == 'unigram':
      text = text.replace('<', '').replace('>', '')
    assert again.encode(text) == original.encode(text) == made.encode(text), text
    assert again.decode(again.encode(text)) == text
  assert tokenizer_settings.add_bos({'tokenizer.json': files['tokenizer.json']})


def test_sentencepiece_files_are_read_and_written():
  config = TokenizerConfig(kind='sentencepiece', vocab_size=315)
  original = tokenizers.train_or_load(config, [TEXT])
  model = sentencepiece_model.parse(original.files()['tokenizer.model'])
  trainer = {'algorithm': 2, 'byte_fallback': True, 'pad_id': 0, 'bos_id': 1, 'eos_id': 2,
             'unk_id': 3}
  assert {name: getattr(model.trainer, name) for name in trainer} == trainer
  assert not model.normalizer.dummy_prefix
  built = tokenizers.from_files({'tokenizer.model': sentencepiece_model.build(
    [(entry.piece.decode(), entry.score, entry.kind) for entry in model.pieces], trainer,
    {name: getattr(model.normalizer, name) for name in ('charsmap', 'dummy_prefix', 'squeeze')})})
  for text in PROBES:
    assert built.encode(text) == original.encode(text)
  for damaged in (b'\x08', b'\x0a\xff\xff\xff\xff\xff', b'\xff' * 40, b'\x0a\x02\x08\x01'):
    with pytest.raises(ValueError, match='not a SentencePiece model'):
      sentencepiece_model.parse(damaged)


def test_gpt2_vocabulary():
  import tokenizers as library

  signs = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  vocab = {sign: i for i, sign in enumerate(signs)}
  vocab |= {'th': 256, 'the': 257, 'Ġthe': 258, '<|endoftext|>': 259}
  files = {'vocab.json': json.dumps(vocab).encode(),
           'merges.txt': '#version: 0.2\nt h\nth e\nĠ the\n'.encode()}
  original = tokenizers.from_files(files)
  made, ids = tokenizer_export.huggingface_files(files, CONFIG)
  again = tokenizers.from_files({'tokenizer.json': made['tokenizer.json']})
  assert ids['eos_token_id'] == 259
  for text in [*PROBES, 'the other <|endoftext|>']:
    assert again.encode(text) == original.encode(text)


def test_what_the_files_say(tmp_path):
  files = {'generation_config.json': b'{"eos_token_id": [7, 9], "bos_token_id": 1}'}
  assert tokenizer_settings.eos_token_ids(files) == (7, 9)
  assert tokenizer_settings.eos_token_ids({}) == ()
  assert tokenizer_settings.chat_templates({}).get('default') is None
  named = {'chat_template': [{'name': 'rag', 'template': 'no'},
                             {'name': 'default', 'template': 'yes'}]}
  files = {'tokenizer_config.json': json.dumps(named).encode()}
  assert tokenizer_settings.chat_templates(files).get('default') == 'yes'
  own = {**files, 'chat_template.jinja': b'file'}
  assert tokenizer_settings.chat_templates(own) == {'default': 'file'}
  assert tokenizer_settings.add_bos({'tokenizer_config.json': b'{"add_bos_token": true}'})
  assert not tokenizer_settings.add_bos({'vocab.json': b'{}'})
  (tmp_path / 'encoder.json').write_text('{}')
  (tmp_path / 'vocab.bpe').write_text('')
  (tmp_path / 'secrets.txt').write_text('')
  assert set(tokenizer_files.read(tmp_path)) == {'vocab.json', 'merges.txt'}


def test_what_only_config_json_says():
  content = tokenizer_export.byte_level_bpe({'a': 0, '<end>': 1}, [], special=['<end>'])
  keys = {'bos_token_id': None, 'eos_token_id': 1, 'pad_token_id': -1}
  files = tokenizer_files.complete({'tokenizer.json': content}, keys, 2)
  assert tokenizer_settings.eos_token_ids(files) == (1,)
  assert tokenizers.from_files(files).eos_id == 1
  said = files | {'tokenizer_config.json': b'{"eos_token": "a"}'}
  assert tokenizers.from_files(tokenizer_files.complete(said, keys, 2)).eos_id == 0


def test_a_tokenizer_larger_than_the_model():
  with pytest.raises(ValueError, match='257 ids, the model only 100'):
    tokenizer_export.huggingface_files(small.files(), CONFIG.replace(vocab_size=100))


def test_files_beside_adapters_take_the_place_of_the_base_models():
  base = {'tokenizer.json': b'{"base": 1}', 'special_tokens_map.json': b'{}',
          'generation_config.json': b'{"eos_token_id": 1}', 'chat_template.jinja': b'base'}
  whole = {'tokenizer.json': b'{"own": 1}', 'tokenizer_config.json': b'{"chat_template": "own"}'}
  assert tokenizer_files.overlaid(base, whole) == {
    **whole, 'generation_config.json': b'{"eos_token_id": 1}'}
  template = {'tokenizer_config.json': b'{"chat_template": "own"}'}
  made = tokenizer_files.overlaid(base, template)
  assert made.keys() == {'tokenizer_config.json', *base} - {'chat_template.jinja'}
  assert tokenizer_settings.chat_templates(made).get('default') == 'own'
  silent = {'tokenizer.json': b'{"own": 1}'}
  assert tokenizer_settings.chat_templates(tokenizer_files.overlaid(base, silent)) == {
    'default': 'base'}
  assert tokenizer_files.overlaid(base, {}) == base


def test_words_of_byte_level_bpe_are_found_before_text_is_normalized():
  import tokenizers as library

  vocab = {sign: i for i, sign in enumerate(sorted(library.pre_tokenizers.ByteLevel.alphabet()))}
  content = tokenizer_export.byte_level_bpe(
    vocab | {'e\u0301': 256}, [], words=['e\u0301'], composed=True)
  tokenizer = tokenizers.from_files({'tokenizer.json': content})
  assert tokenizer.encode('ae\u0301') == [vocab['a'], 256]
  assert 256 not in tokenizer.encode('a\u00e9')
