"""A directory's special and added tokens, and the cut of its class, whichever files say them."""

import json
import logging

import pytest
import small
from test_tokenizer_files import TEXT

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.interop import (
  sentencepiece_model,
  tokenizer_export,
  tokenizer_files,
)

START, END = '<|im_start|>', '<|im_end|>'


def vocab_and_merges():
  import tokenizers as library

  vocab = {sign: i for i, sign in enumerate(sorted(library.pre_tokenizers.ByteLevel.alphabet()))}
  vocab |= {'12': 256, '(a': 257, 'Ġa': 258}
  return {'vocab.json': json.dumps(vocab).encode(),
          'merges.txt': '#version: 0.2\n1 2\n( a\nĠ a\n'.encode()}


def settings(**said):
  return {'tokenizer_config.json': json.dumps(said).encode()}


def config(rows):
  return small.CONFIGS['llama'].replace(vocab_size=rows)


def opened(files, model_type='qwen2', rows=262, **keys):
  files = tokenizer_files.check(files, rows, 'model')
  files = tokenizer_files.complete(files, {'model_type': model_type, **keys}, rows)
  return tokenizers.from_files(files), files


DECODER = {'259': {'content': '<|endoftext|>', 'special': True},
           '260': {'content': START, 'special': True, 'normalized': False},
           '261': {'content': END, 'special': True}}
ADDED = {'added_tokens.json': json.dumps({'<|endoftext|>': 259, START: 260, END: 261}).encode()}
MAP = {'special_tokens_map.json': json.dumps(
  {'eos_token': {'content': END, 'lstrip': False}, 'additional_special_tokens': [START]}).encode()}


QWEN = settings(tokenizer_class='Qwen2Tokenizer', eos_token=END, added_tokens_decoder=DECODER)


@pytest.mark.parametrize('files, special', [
  (QWEN, [START]),
  (settings(tokenizer_class='Qwen2TokenizerFast') | ADDED | MAP, [START]),
  (settings(tokenizer_class='PreTrainedTokenizerFast', eos_token={'content': END}) | ADDED, []),
  (settings(eos_token=END, added_tokens_decoder=DECODER) | MAP, [START]),
])
def test_added_tokens_and_the_cut_of_qwen2(files, special):
  tokenizer, kept = opened(vocab_and_merges() | files)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 261, 259)
  assert set(tokenizer.special_tokens) == {'<|endoftext|>', END, *special}
  assert tokenizer.library.token_to_id(START) == 260
  vocab = json.loads(kept['vocab.json'])
  # Digits stand alone, and a bracket goes with its word.
  assert tokenizer.encode('12(a') == [vocab['1'], vocab['2'], 257]
  assert tokenizer.encode('e\u0301') == tokenizer.encode('é')
  assert tokenizer.decode([*tokenizer.encode('12'), 261]) == '12'
  assert not tokenizer_settings.add_bos(kept)


def test_the_cut_of_gpt2_and_its_kin():
  for files, model_type in (({}, 'gpt2'), (settings(tokenizer_class='CodeGenTokenizer'), 'llama')):
    tokenizer, kept = opened(vocab_and_merges() | files, model_type)
    vocab = json.loads(kept['vocab.json'])
    assert tokenizer.encode('12(a') == [256, vocab['('], vocab['a']]
    # A special token of the class that has no id gets the next one, if the model has a row for it.
    assert (tokenizer.bos_id, tokenizer.eos_id) == (259, 259)
    assert opened(vocab_and_merges() | files, model_type, rows=259)[0].eos_id is None
  spaced, _ = opened(vocab_and_merges() | settings(add_prefix_space=True), 'gpt2')
  assert spaced.encode('a') == [258]


@pytest.mark.parametrize('files, model_type, message', [
  (settings(tokenizer_class='BloomTokenizerFast'), 'gpt2', "tokenizer_class='BloomTokenizerFast'"),
  ({}, 'llama', 'none for model_type llama.*put that there'),
  (settings(tokenizer_class='PreTrainedTokenizerFast'), 'olmo2', 'none for model_type olmo2'),
  (settings(eos_token=['a']), 'gpt2', r"eos_token=\['a'\]"),
  (settings(added_tokens_decoder=[1]), 'gpt2', 'no table of tokens and ids'),
  (settings(added_tokens_decoder={'5': {'content': '<x>'}}), 'gpt2', "'<x>' has id 5, which is"),
  (settings(added_tokens_decoder={'260': {'content': '12'}}), 'gpt2', "'12' has id 260, but .*256"),
])
def test_what_cannot_be_built_is_named(files, model_type, message):
  with pytest.raises(ValueError, match=message):
    opened(vocab_and_merges() | files, model_type)


@pytest.mark.parametrize('content', [
  b'{}', b'{"model": []}', b'{"model": {"vocab": [1, [], ["a"]]}}',
  b'{"added_tokens": [{"id": 1}]}'])
def test_a_damaged_tokenizer_json_is_named(content):
  with pytest.raises(ValueError, match='tokenizer.json'):
    opened({'tokenizer.json': content} | settings(eos_token='a'), 'llama')


@pytest.mark.parametrize('name', ['qwen.tiktoken', 'tekken.json', 'tiktoken.model'])
def test_tokenizers_of_tiktoken_are_refused_by_name(tmp_path, name):
  (tmp_path / name).write_text('IQ== 0\nIg== 1\n')
  with pytest.raises(ValueError, match=f'{name}: a tokenizer of tiktoken is not read'):
    tokenizer_files.read(tmp_path)
  (tmp_path / 'tokenizer.model').write_text('IQ== 0\nIg== 1\n')
  with pytest.raises(ValueError, match='it is one of tiktoken; put the tokenizer.json'):
    opened(tokenizer_files.read(tmp_path), 'llama')


def test_what_a_file_says_is_none_is_none():
  content = tokenizer_export.byte_level_bpe({'a': 0, '<end>': 1}, [], special=['<end>'])
  files = {'tokenizer.json': content}
  assert opened(files, bos_token_id=1, eos_token_id=1)[0].bos_id == 1
  said = settings(bos_token=None)
  tokenizer, _ = opened(files | said, bos_token_id=1, eos_token_id=1)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_ids_with_a_gap_are_kept():
  tokenizer, _ = opened(vocab_and_merges() | settings(
    added_tokens_decoder={'261': {'content': END, 'special': True}}, eos_token=END), 'gpt2')
  assert tokenizer.special_tokens[END] == tokenizer.eos_id == 261


def test_tokens_beside_a_tokenizer_json():
  content = tokenizer_export.byte_level_bpe({'a': 0, 'b': 1, '<end>': 2}, [])
  files = {'tokenizer.json': content} | settings(
    eos_token='<end>', added_tokens_decoder={'3': {'content': START, 'special': True},
                                             '4': {'content': 'ab', 'normalized': False}})
  tokenizer, kept = opened(files, 'llama', 5)
  assert tokenizer.special_tokens == {START: 3, '<end>': 2}
  assert (tokenizer.eos_id, tokenizer.encode('aab')) == (2, [0, 4])
  written, _ = tokenizer_export.huggingface_files(kept, config(5))
  alone = tokenizers.from_files({'tokenizer.json': written['tokenizer.json']})
  assert alone.special_tokens == tokenizer.special_tokens
  # A map beside a list of added tokens is older, and not read.
  stale = {'special_tokens_map.json': b'{"eos_token": "a"}'}
  assert opened(files | stale, 'llama', 5)[0].eos_id == 2


def test_an_unused_special_token_past_the_rows_is_left_out(caplog):
  content = json.loads(tokenizer_export.byte_level_bpe(
    {'a': 0, '<end>': 1, '<image>': 2}, [], special=['<end>', '<image>']))
  def files(**said):
    return {'tokenizer.json': json.dumps(content).encode()} | settings(
      **{'eos_token': '<end>', 'image_token': '<image>', **said})

  with caplog.at_level(logging.WARNING):
    tokenizer, kept = opened(files(), 'gemma3_text', 2)
  assert "left out: {'<image>': 2}" in caplog.text
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (2, 1) and '<image>' not in str(kept)
  with pytest.raises(ValueError, match="'<image>' has id 2, but the model has 2 tokens"):
    opened(files(eos_token='<image>'), 'gemma3_text', 2)
  content['added_tokens'][1]['special'] = False
  with pytest.raises(ValueError, match="'<image>' has id 2, but the model has 2 tokens"):
    opened(files(), 'gemma3_text', 2)
  pad = settings(pad_token='<pad>', added_tokens_decoder={
    '259': {'content': '<pad>', 'special': True}, '258': {'content': 'Ġa'}})
  tokenizer, _ = opened(vocab_and_merges() | pad, 'gpt2', 259)
  assert (tokenizer.vocab_size, tokenizer.pad_id) == (259, 0)


@pytest.fixture(scope='module')
def pieces():
  """A SentencePiece model that puts a space before texts, with pieces that text always gives."""
  wanted = TokenizerConfig(kind='sentencepiece', vocab_size=315)
  content = tokenizers.train_or_load(wanted, [TEXT]).files()['tokenizer.model']
  model = sentencepiece_model.parse(content)
  pieces = [(entry.piece.decode(), entry.score, entry.kind) for entry in model.pieces]
  pieces += [(word, 0.0, sentencepiece_model.USER_DEFINED)
             for word in ('<table>', '\u2581\u2581\u2581', 'brown', '\n\n')]
  return sentencepiece_model.build(
    pieces, {'algorithm': sentencepiece_model.BPE, 'byte_fallback': True, 'bos_id': 1, 'eos_id': 2,
             'pad_id': 0, 'unk_id': 3}, {'dummy_prefix': True, 'squeeze': False})


def test_pieces_that_text_always_gives_are_exported(pieces):
  files = {'tokenizer.model': pieces}
  original = tokenizers.from_files(files)
  written, _ = tokenizer_export.huggingface_files(files, config(319))
  made = tokenizers.from_files({'tokenizer.json': written['tokenizer.json']})
  for text in ('<table>', 'a<table>b', ' <table> x', 'x    y', 'the brownish\n\n\nfox', '   ',
               '<table></s><table>', '<table><0x41><table>'):
    assert made.encode(text) == original.encode(text), text
    assert made.decode(made.encode(text)) == text
  assert 2 not in made.encode('<table></s><table>')


def test_added_tokens_of_a_sentencepiece_model(pieces):
  files = {'tokenizer.model': pieces}
  assert opened(files, 'llama', 319)[1].keys() == files.keys()
  said = {'added_tokens_decoder': {'319': {'content': END, 'special': True, 'normalized': False}},
          'eos_token': END}
  encoded = {}
  for name, others in (('exact', {}), ('first', {'legacy': False}),
                       ('never', {'tokenizer_class': 'LlamaTokenizer', 'add_prefix_space': False})):
    tokenizer, kept = opened(files | settings(**said, **others), 'llama', 320)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 319) and tokenizer_settings.add_bos(kept)
    tokenizer.library.encode_special_tokens = False
    encoded[name] = tokenizer.library.encode(f'fox{END}fox', add_special_tokens=False).tokens
  space = '\u2581'
  after = [tokens[tokens.index(END) + 1].startswith(space) for tokens in encoded.values()]
  assert after == [True, False, False]
  assert [tokens[0].startswith(space) for tokens in encoded.values()] == [True, True, False]


def test_added_tokens_without_flags_are_found_anywhere(pieces):
  added = json.dumps({START: 319, END: 320}).encode()
  tokenizer, _ = opened(
    {'tokenizer.model': pieces, 'added_tokens.json': added,
     **settings(eos_token=END)}, 'mistral', 321)
  assert tokenizer.special_tokens[END] == tokenizer.eos_id == 320
  assert tokenizer.encode_parts([320, f'\n{START}x']).count(319) == 1
