"""Every tokenizer gives every text back; damage and impossible wishes are named."""

import base64
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest

from jaxllm.config import ConfigError
from jaxllm.data import byte_level_words, tokenizer_kinds, tokenizer_settings, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig

_WORDS = (
  'To be or not that is the question whether nobler in mind suffer slings arrows of outrageous '
  'fortune take arms against sea troubles by opposing end them 1603 1604 Ein schöner Tag grüßt '
  '“sie” — 你好 世界 。 Dänemark faul König Königin Prinz, Prinzessin; gone. Going! suffering?'
).split()


def _corpus(seed):
  draw = random.Random(seed)
  gaps = [' ', ' ', ' ', '\n', '\n\n', '\t', '  ', '\r\n']
  return ''.join(draw.choice(_WORDS) + draw.choice(gaps) for _ in range(1500))


CORPUS = [_corpus(1), _corpus(2)]

TEXTS = [
  '', ' ', '  ', '\n', '\t', '\r\n', ' a', 'a ', '  two  spaces  ', 'line\n\n\nline\n', 'tab\tbed',
  '你好，世界', 'emoji 😀👨\u200d👩\u200d👧🏽', '\u2581', 'a\u2581 b\u2581\u2581', '\u2581 \u2581',
  'nul\x00\x01\x7f', '<s></s><unk><pad>', '<|endoftext|>', '<0x0A><0xE2>', '1234567890',
  'e\u0301é', '\ufeffmark', '\u2028\u2029\x85\x0b\x0c', '\ufffd\uffff\U0010ffff\U000e0001',
  'Ａ①ﬁ', '\xa0\u3000', 'Ġ Ċ Ā ĠĠ', 'x' * 5000, 'word ' * 1000,
]


def _signs():
  return {value: sign for sign, value in tokenizer_kinds.BYTE_SIGNS.items()}


def _gpt2_files():
  sign = _signs()
  vocab = {sign[value]: value for value in range(256)}
  merges = [('t', 'o'), (sign[32], 'b'), (sign[32] + 'b', 'e'), ('to', sign[32] + 'be')]
  for left, right in merges:
    vocab[left + right] = len(vocab)
  vocab['<|endoftext|>'] = len(vocab)
  lines = ['#version: 0.2', *(f'{left} {right}' for left, right in merges), '']
  return {'vocab.json': json.dumps(vocab).encode(), 'merges.txt': '\n'.join(lines).encode()}


def _byte_level_json():
  import tokenizers as library
  inner = library.Tokenizer(library.models.BPE())
  inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = library.decoders.ByteLevel()
  inner.post_processor = library.processors.ByteLevel(trim_offsets=True)
  inner.enable_truncation(4)
  inner.enable_padding(length=8)
  inner.train_from_iterator(CORPUS, library.trainers.BpeTrainer(
    vocab_size=400, special_tokens=['<|endoftext|>', '<s>'], show_progress=False,
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()))
  inner.add_tokens(['   '])
  config = {'bos_token': {'content': '<s>'}, 'eos_token': '<|endoftext|>', 'unk_token': None}
  return {'tokenizer.json': inner.to_str().encode(),
          'tokenizer_config.json': json.dumps(config).encode(),
          'chat_template.jinja': b'{{ messages }}'}


def _llama_json(num_special=3):
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)),
            '\u2581', 'a', 'b', '\u2581a']
  return {'tokenizer.json': json.dumps({
    'version': '1.0',
    'added_tokens': [{'id': i, 'content': pieces[i], 'single_word': False, 'lstrip': False,
                      'rstrip': False, 'normalized': False, 'special': True}
                     for i in range(num_special)],
    'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'},
    'pre_tokenizer': None, 'post_processor': None, 'truncation': None, 'padding': None,
    'decoder': {'type': 'Sequence', 'decoders': [
      {'type': 'Replace', 'pattern': {'String': '\u2581'}, 'content': ' '},
      {'type': 'ByteFallback'}, {'type': 'Fuse'}]},
    'model': {'type': 'BPE', 'vocab': {piece: i for i, piece in enumerate(pieces)},
              'merges': [['\u2581', 'a']], 'byte_fallback': True, 'unk_token': '<unk>',
              'fuse_unk': True},
  }).encode()}


BYTE_LEVEL = TokenizerConfig(kind='byte_level_bpe', vocab_size=400)


@pytest.fixture(scope='module')
def all_kinds():
  trained = {
    f'sentencepiece-{model_type}': tokenizers.train_or_load(
      TokenizerConfig(vocab_size=size, model_type=model_type), CORPUS)
    for model_type, size in (('bpe', 400), ('unigram', 360), ('char', None))
  }
  return trained | {
    'bytes': tokenizers.train_or_load(TokenizerConfig(kind='bytes'), ()),
    'byte_level_bpe': tokenizers.train_or_load(BYTE_LEVEL, CORPUS),
    'gpt2': tokenizers.from_files(_gpt2_files()),
    'json': tokenizers.from_files(_byte_level_json()),
  }


KINDS = ['sentencepiece-bpe', 'sentencepiece-unigram', 'sentencepiece-char', 'byte_level_bpe',
         'bytes', 'gpt2', 'json']


def _random_texts(count):
  draw = random.Random(7)
  ranges = [(0, 0x80), (0, 0x80), (0x80, 0x800), (0x2500, 0x2600), (0x4E00, 0x4F00),
            (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
  return [''.join(chr(draw.randrange(*draw.choice(ranges))) if draw.random() < 0.6
                  else draw.choice([' ', '\n', '\u2581', '  ', '<s>', 'to be']) for _ in
                  range(draw.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize('kind', KINDS)
def test_round_trip(all_kinds, kind):
  tokenizer = all_kinds[kind]
  texts = [*TEXTS, *CORPUS, *_random_texts(300)]
  batch = tokenizer.encode_batch(texts)
  for text, ids in zip(texts, batch, strict=True):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert b''.join(tokenizer.id_bytes[i] for i in ids) == text.encode()
    specials = {tokenizer.bos_id, tokenizer.eos_id} - {None}
    assert all(0 <= i < tokenizer.vocab_size and i not in specials for i in ids)


@pytest.mark.parametrize('kind', KINDS)
def test_special_tokens_have_ids_but_no_text(all_kinds, kind):
  tokenizer = all_kinds[kind]
  for i in (tokenizer.bos_id, tokenizer.eos_id):
    assert tokenizer.id_bytes[i] == b''
    assert tokenizer.decode([i, *tokenizer.encode('to be'), i]) == 'to be'
  assert 0 <= tokenizer.pad_id < tokenizer.vocab_size


@pytest.mark.parametrize('kind', KINDS)
def test_ids_that_only_the_model_has_say_nothing(all_kinds, kind):
  tokenizer = all_kinds[kind]
  ids = tokenizer.encode('to be')
  assert tokenizer.decode([tokenizer.vocab_size, *ids, 10**6]) == 'to be'
  with pytest.raises(ValueError, match='token id -1 is not in the vocabulary'):
    tokenizer.decode([-1])


@pytest.mark.parametrize('kind', KINDS)
def test_half_a_character_does_not_stop_decoding(all_kinds, kind):
  tokenizer = all_kinds[kind]
  ids = tokenizer.encode('a😀')
  assert tokenizer.decode(ids[:-1]).startswith('a')


@pytest.mark.parametrize('kind', KINDS)
def test_saved_and_loaded_among_other_files(all_kinds, kind, tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(b'weights')
  tokenizer = all_kinds[kind]
  tokenizers.save(tokenizer, tmp_path)
  again = tokenizers.load(tmp_path)
  assert again.files() == tokenizer.files()
  assert again.fingerprint == tokenizer.fingerprint
  assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
  assert (again.bos_id, again.eos_id, again.pad_id) == (
    tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_literal_ids(all_kinds):
  assert all_kinds['bytes'].encode('Aé') == [65, 0xC3, 0xA9]
  assert all_kinds['gpt2'].encode('to be') == [256, 258]
  assert all_kinds['gpt2'].eos_id == 260
  bpe = all_kinds['sentencepiece-bpe']
  assert (bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.vocab_size) == (0, 1, 2, 400)
  for trained in (bpe, all_kinds['byte_level_bpe']):
    assert len(trained.encode(CORPUS[0])) < len(CORPUS[0]) * 0.6
  assert (all_kinds['byte_level_bpe'].bos_id, all_kinds['byte_level_bpe'].eos_id) == (0, 0)
  char = all_kinds['sentencepiece-char']
  assert len(char.encode('To be\n')) == 6
  assert char.vocab_size == 4 + 256 + len(set(''.join(CORPUS)))


@pytest.mark.parametrize('model_type', ['bpe', 'unigram'])
def test_training_is_deterministic(model_type):
  config = TokenizerConfig(vocab_size=330, model_type=model_type)
  first, second = (tokenizers.train_or_load(config, iter(CORPUS)) for _ in range(2))
  assert first.fingerprint == second.fingerprint


SEES_THREADS = '''
import sys
from jaxllm.data import tokenizers
config = tokenizers.TokenizerConfig(kind='byte_level_bpe', vocab_size=400)
print(tokenizers.train_or_load(config, sys.stdin.buffer.read().decode().split('|')).fingerprint)
'''


def test_byte_level_bpe_is_the_same_with_any_number_of_threads(all_kinds):
  settings = [{'RAYON_NUM_THREADS': '5'}, {'TOKENIZERS_PARALLELISM': 'false'}]
  calls = [subprocess.Popen(
    [sys.executable, '-c', SEES_THREADS], env={**os.environ, **one}, stdin=subprocess.PIPE,
    stdout=subprocess.PIPE) for one in settings]
  corpus = '|'.join(CORPUS).encode()
  prints = {call.communicate(corpus)[0].decode().strip() for call in calls}
  assert prints == {all_kinds['byte_level_bpe'].fingerprint}


@pytest.mark.parametrize('kind', KINDS)
def test_documents_that_spell_special_tokens_give_none(kind, all_kinds):
  special = ('<|endoftext|>', '<s>', '</s>', '<pad>', '<unk>', '<0x0A>')
  corpus = [f'{token} to be {token}{token}\n' * 100 for token in special]
  name, _, model_type = kind.partition('-')
  tokenizer = all_kinds[kind]
  if tokenizer.vocab_size > 261:  # One that is trained.
    sizes = {} if model_type == 'char' else {'vocab_size': 290}
    types = {'model_type': model_type} if model_type else {}
    if name in ('sentencepiece', 'byte_level_bpe'):
      tokenizer = tokenizers.train_or_load(TokenizerConfig(kind=name, **sizes, **types), corpus)
  control = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_tokens.values()}
  for text in [*corpus, 'a\0b\0', 'to\u202e be\u2028\x85\ufeff or']:
    ids = tokenizer.encode(text)
    assert control.isdisjoint(ids) and tokenizer.decode(ids) == text


def test_a_sample_is_even_and_independent_of_order_and_of_who_takes_it():
  config = TokenizerConfig(vocab_size=300, sample_bytes=5000)
  texts = [*enumerate(f'{i:05d}' for i in range(4000))]
  sample = tokenizers.sample(config, texts)
  chunks = [chunk for *_, chunk in sample.kept]
  assert sample.total_bytes == 20_000
  assert 2000 < sum(map(len, chunks)) <= 5000
  assert 0.4 < sum(map(int, chunks)) / len(chunks) / 4000 < 0.6
  assert sorted(tokenizers.sample(config, texts[::-1]).kept) == sorted(sample.kept)
  whole = tokenizers.sample(config.replace(sample_bytes=20_000), texts)
  assert [chunk for *_, chunk in whole.kept] == [text for _, text in texts]
  # Some that are far below the limit beside some that are cut.
  parts = [tokenizers.sample(config, texts[i:j]) for i, j in ((10, 90), (90, 4000), (0, 10))]
  assert tokenizers.join_samples(parts, 5000) == sample
  two = tokenizers.join_samples(parts[:2], 5000)
  assert tokenizers.join_samples([two, parts[2]], 5000) == sample
  # What is cut again stays whole.
  texts = ['\n' + 'a' * 9000 + '\nb\n' + 'c' * 3998 + '\n', '\n' * 5000 + 'x\ny', '\u2585a']
  for cut_at_signs in (True, False):
    chunks = [*tokenizers._chunks(texts, cut_at_signs)]
    assert [*tokenizers._chunks(chunks, cut_at_signs)] == chunks and len(chunks) > 5


def test_the_share_of_the_sample_and_a_long_training_are_said(monkeypatch, caplog):
  caplog.set_level('INFO')
  monkeypatch.setattr(tokenizers, '_SAY_SECONDS', 0.01)
  monkeypatch.setattr(tokenizers, '_fit', lambda config, *_: [
    time.sleep(0.1), tokenizers._train_byte_level(config, CORPUS)][1]['tokenizer.json'])
  monkeypatch.setattr(tokenizers, 'from_files', lambda files: files)
  tokenizers.train_or_load(TokenizerConfig(vocab_size=300, sample_bytes=9_000), CORPUS)
  taken, total = re.search(r'on (\S+) of (\S+) MB \(', caplog.text).groups()
  assert float(taken) <= 0.009 and float(total) == pytest.approx(
    sum(len(text.encode()) for text in CORPUS) / 1e6, rel=1e-3)
  assert 'still being trained' in caplog.text


@pytest.mark.parametrize('fields', [
  {'model_type': 'bpe'}, {'model_type': 'unigram'}, {'model_type': 'char'},
  {'kind': 'byte_level_bpe'}])
def test_a_small_corpus_gives_the_vocabulary_that_it_can(fields, caplog):
  tokenizer = tokenizers.train_or_load(TokenizerConfig(vocab_size=10_000, **fields), CORPUS)
  assert 4 + 256 < tokenizer.vocab_size < 10_000
  assert f'vocab_size=10000: this corpus gives {tokenizer.vocab_size} pieces' in caplog.text
  assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


HAN = [''.join(chr(0x4E00 + (7 * i * i + j) % 900) for j in range(0, i % 50)) for i in range(400)]


@pytest.mark.parametrize('model_type', ['bpe', 'unigram'])
def test_rare_characters_are_left_to_their_bytes(model_type):
  """Chinese has more characters than a small vocabulary has pieces."""
  text = '的' * 50 + '一是' * 40
  config = TokenizerConfig(vocab_size=600, model_type=model_type)
  tokenizer = tokenizers.train_or_load(config, [*HAN, text])
  assert 540 < tokenizer.vocab_size <= 600
  for sample in [*HAN, text]:
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
  assert len(tokenizer.encode('的一是')) <= 3
  lone = sum(len(tokenizer.id_bytes[i].decode(errors='replace')) == 1 and
             len(tokenizer.id_bytes[i]) == 3 for i in range(tokenizer.vocab_size))
  assert lone == (600 - 260) * 2 // 3


@pytest.mark.parametrize('fields, advice', [
  ({'vocab_size': 200}, r'at least (\d+), and config\.model\.vocab_size with it$'),
  ({'vocab_size': 600, 'byte_fallback': False},
   r'at least (\d+), and config\.model\.vocab_size .*tokenizer\.byte_fallback=True'),
])
def test_a_vocabulary_without_room_names_all_fields_to_change(fields, advice):
  message = rf"tokenizer\.vocab_size={fields['vocab_size']} .*{advice}"
  with pytest.raises(ValueError, match=message) as error:
    tokenizers.train_or_load(TokenizerConfig(**fields), HAN)
  least = int(re.search(advice, str(error.value))[1])
  enough = TokenizerConfig(**fields | {'vocab_size': least})
  assert least - 1 <= tokenizers.train_or_load(enough, HAN).vocab_size <= least


def test_no_text_is_lost_for_a_sign_of_sentencepiece():
  texts = [f'zebra{sign}zebra \n' * 20 + sign * 3 for sign in ('\u2585', '\u2581', '\u2585\u2581')]
  assert ''.join(tokenizers._chunks(texts, True)) == ''.join(
    text.replace('\u2585', '').replace('\u2581', '') for text in texts)
  tokenizer = tokenizers.train_or_load(TokenizerConfig(vocab_size=275), texts)
  assert b'zebra' in [bytes(piece) for piece in tokenizer.id_bytes]
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('fields', [
  {'vocab_size': 290}, {'vocab_size': 290, 'model_type': 'unigram'},
  {'model_type': 'char', 'byte_fallback': False}])
def test_the_trainer_sees_every_character(fields, monkeypatch, capfd):
  """Counted by SentencePiece itself, which skips sentences in silence."""
  import sentencepiece
  texts = ['\u2585one\u2581 two\u2585\u2585', '\u2581', 'nul\x00nul \x00', 'long ' * 9000,
           '\t \n\n', 'x' * 20_001, '\ufeff\u202e\u2028\U0001f600', '<s></s><unk>']
  plain = sentencepiece.SentencePieceTrainer.train
  monkeypatch.setattr(sentencepiece.SentencePieceTrainer, 'train',
                      lambda **fields: plain(**{**fields, 'minloglevel': 0}))
  tokenizers.train_or_load(TokenizerConfig(**fields), texts)
  said = capfd.readouterr().err
  # Signs and NUL are given by their bytes, newlines at the end of a chunk do not count, and a
  # special token that is spelled counts as one character.
  text = ''.join(chunk.rstrip('\n') for chunk in tokenizers._chunks(texts, True))
  assert len(text) > sum(map(len, texts)) - 10
  text = text.replace('\x00', '')
  text = re.sub('<s>|</s>|<unk>', '.', text)
  assert re.findall(r'all chars count=(\d+)', said)[0] == str(len(text))
  assert 'kipped' not in said


@pytest.mark.parametrize('first', range(1, 0x3100, 0x800))
def test_a_chunk_with_any_character_is_trained_on(first):
  """What SentencePiece skips is skipped without a word, so each character is tried."""
  characters = [chr(code) for code in range(first, first + 0x800)]
  model = tokenizers._fit(TokenizerConfig(model_type='char'), [
    *tokenizers._chunks(characters, True)], None)
  known = set(tokenizers.from_files({'tokenizer.model': model}).id_bytes)
  assert {c for c in characters if c.encode() not in known} <= {'\u2581', '\u2585'}


def test_training_on_nothing():
  with pytest.raises(ValueError, match='no text to train'):
    tokenizers.train_or_load(TokenizerConfig(vocab_size=300), [''])


def test_without_byte_fallback_strange_text_is_refused():
  config = TokenizerConfig(model_type='char', byte_fallback=False)
  tokenizer = tokenizers.train_or_load(config, ['to be or not'])
  assert tokenizer.vocab_size == 4 + len(set('to be or not'))
  assert tokenizer.decode(tokenizer.encode('no rot')) == 'no rot'
  for text, strange in (('no x', r"'x' \(U\+0078\)"), ('no\u2581', r'U\+2581')):
    with pytest.raises(ValueError, match=strange):
      tokenizer.encode(text)


def test_a_llama_tokenizer_json():
  tokenizer = tokenizers.from_files(_llama_json())
  for text in ('a a', ' b\nc', '你'):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b''.join(tokenizer.id_bytes[i] for i in ids) == text.encode()


def test_bytes_that_are_listed_as_special_tokens_are_still_bytes():
  tokenizer = tokenizers.from_files(_llama_json(3 + 256))
  assert set(tokenizer.special_tokens) == {'<unk>', '<s>', '</s>'}
  assert tokenizer.encode('é') == [3 + 0xC3, 3 + 0xA9]
  assert tokenizer.encode_parts([1, 'é']) == [1, 3 + 0xC3, 3 + 0xA9]


def test_a_sentencepiece_model_with_a_dummy_prefix(tmp_path):
  import sentencepiece
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS[0].split('\n')), model_prefix=str(tmp_path / 'tokenizer'),
    vocab_size=320, model_type='bpe', byte_fallback=True, minloglevel=2,
    normalization_rule_name='identity', remove_extra_whitespaces=False)
  tokenizer = tokenizers.train_or_load(TokenizerConfig(path=str(tmp_path / 'tokenizer.model')), ())
  for text in ('to be', ' to  be\n', '你'):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('kind, names', [
  ('gpt2', {'vocab.json': 'vocab.json', 'merges.txt': 'merges.txt'}),
  ('gpt2', {'vocab.json': 'encoder.json', 'merges.txt': 'vocab.bpe'}),
])
def test_gpt2_files_by_either_name(tmp_path, kind, names):
  for name, content in _gpt2_files().items():
    (tmp_path / names[name]).write_bytes(content)
  for path in (tmp_path, tmp_path / names['vocab.json']):
    tokenizer = tokenizers.train_or_load(TokenizerConfig(kind=kind, path=str(path)), ())
    assert tokenizer.files() == _gpt2_files()


def test_tokenizer_json_from_a_directory_or_alone(tmp_path):
  for name, content in _byte_level_json().items():
    (tmp_path / name).write_bytes(content)
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='json', path=str(path)), ())
    assert tokenizer.files() == _byte_level_json()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
  (tmp_path / 'tokenizer_config.json').unlink()
  config = TokenizerConfig(kind='json', path=str(tmp_path))
  assert tokenizers.train_or_load(config, ()).eos_id is None
  named = tokenizers.train_or_load(config.replace(eos_token='<s>'), ())
  assert (named.bos_id, named.eos_id) == (None, 1)
  assert tokenizers.from_files(named.files()).eos_id == 1
  with pytest.raises(ValueError, match=r"bos_token='<b>' is not in the vocabulary"):
    tokenizers.train_or_load(config.replace(bos_token='<b>'), ())


@pytest.mark.parametrize('kind, path', [('gpt2', 'no'), ('json', 'no.json'),
                                        ('sentencepiece', 'no.model')])
def test_missing_files_are_named(tmp_path, kind, path):
  with pytest.raises(ValueError, match=r'config\.tokenizer\.path'):
    tokenizers.train_or_load(TokenizerConfig(kind=kind, path=str(tmp_path / path)), ())
  with pytest.raises(ValueError, match='no tokenizer in'):
    tokenizers.load(tmp_path)


def _changed(**fields):
  files = _byte_level_json()
  content = json.loads(files['tokenizer.json'])
  for path, value in fields.items():
    *keys, last = path.split('__')
    owner = content
    for key in keys:
      owner = owner[key]
    owner[last] = value
  return {'tokenizer.json': json.dumps(content).encode()}


@pytest.mark.parametrize('files, message', [
  ({'tokenizer.json': b'{}'}, 'tokenizer.json'),
  ({'tokenizer.json': b'\xff'}, 'tokenizer.json'),
  ({'tokenizer.model': b'garbage'}, 'not a SentencePiece model'),
  ({'vocab.json': b'{"a": 0}', 'merges.txt': b''}, '256 of the 256|255 of the 256'),
  ({'vocab.json': b'{"a": 0}', 'merges.txt': b'a b\n'}, 'not a byte-level BPE'),
  ({'vocab.json': b'[]', 'merges.txt': b''}, 'not a byte-level BPE'),
  ({'vocab.json': b'{}'}, 'merges.txt'),
  ({'README.md': b''}, 'no tokenizer among'),
  (_byte_level_json() | {'tokenizer_config.json': b'[1'}, 'tokenizer_config.json'),
  (_byte_level_json() | {'tokenizer_config.json': b'[]'}, 'tokenizer_config.json'),
])
def test_damaged_files_are_named(files, message):
  with pytest.raises(ValueError, match=message):
    tokenizers.from_files(files)


def test_absurd_ids_are_refused_before_anything_is_allocated():
  with pytest.raises(ValueError, match='highest id is 4294967295'):
    tokenizers.from_files(_changed(model__vocab__to=2**32 - 1))


def test_a_regex_that_runs_away_is_a_value_error(capfd, monkeypatch):
  monkeypatch.setattr(tokenizer_kinds, '_check_time', lambda pattern: None)
  tokenizer = tokenizers.from_files(_changed(pre_tokenizer={
    'type': 'Split', 'pattern': {'Regex': '(x+x+)+y'}, 'behavior': 'Isolated', 'invert': False}))
  assert tokenizer.encode('to')
  for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text, text])):
    with pytest.raises(ValueError, match='tokenizer failed'):
      call('x' * 60)


@pytest.mark.parametrize('fields', [
  {'kind': 'gpt2'}, {'kind': 'json'}, {'kind': 'bytes', 'path': 'x'}, {}, {'vocab_size': 0},
  {'kind': 'bytes', 'vocab_size': 10}, {'path': 'a.model', 'vocab_size': 10},
  {'vocab_size': 300, 'eos_token': 'x'}, {'kind': 'byte_level_bpe'},
  {'kind': 'byte_level_bpe', 'vocab_size': 256}, {'kind': 'byte_level_bpe', 'path': 'x'},
  {'kind': 'byte_level_bpe', 'vocab_size': 300, 'model_type': 'unigram'},
  {'kind': 'byte_level_bpe', 'vocab_size': 300, 'byte_fallback': False},
])
def test_settings_that_do_not_fit_are_refused(fields):
  with pytest.raises(ConfigError):
    TokenizerConfig(**fields)


@pytest.mark.parametrize('kind', KINDS)
def test_half_a_surrogate_pair_is_a_value_error(all_kinds, kind):
  for call in (all_kinds[kind].encode, lambda text: all_kinds[kind].encode_batch(['b', text])):
    with pytest.raises(ValueError, match='surrogates'):
      call('a\ud800')


def test_the_file_that_is_read_says_whether_vocabularies_are_the_same(all_kinds):
  json_files, model_files = (all_kinds[kind].files() for kind in ('json', 'sentencepiece-bpe'))
  both = tokenizers.from_files({**model_files, **json_files})
  assert tokenizers.same_vocabulary(both, all_kinds['json'])
  assert not tokenizers.same_vocabulary(both, all_kinds['sentencepiece-bpe'])


def test_special_tokens_are_known_without_a_look_into_the_files(all_kinds, monkeypatch):
  monkeypatch.setattr(json, 'loads', None)
  assert all_kinds['json'].special_tokens == {'<|endoftext|>': 0, '<s>': 1}
  assert all_kinds['sentencepiece-bpe'].special_tokens == {'<pad>': 0, '<s>': 1, '</s>': 2}
  assert all_kinds['gpt2'].special_tokens == {'<|endoftext|>': 260}
  assert all_kinds['bytes'].special_tokens == {}


def test_another_class_is_another_vocabulary(all_kinds):
  def of(**said):
    said_file = {'tokenizer_config.json': json.dumps(said).encode()}
    return tokenizers.from_files(_gpt2_files() | said_file)

  assert tokenizers.same_vocabulary(all_kinds['gpt2'], of(tokenizer_class='GPT2TokenizerFast'))
  assert not tokenizers.same_vocabulary(all_kinds['gpt2'], of(tokenizer_class='Qwen2Tokenizer'))


@pytest.mark.parametrize('part', ['normalizer', 'decoder'])
@pytest.mark.parametrize('pattern', [{'String': 'a'}, {'Regex': 'a|'}])
def test_rules_that_blow_texts_up_are_refused(part, pattern):
  import tokenizers as library
  content = json.loads(library.Tokenizer(library.models.BPE({'a': 0}, [])).to_str())
  rule = {'type': 'Replace', 'pattern': pattern, 'content': 'a' * 10}

  def build(times):
    rules = {'type': 'Sequence', f'{part}s': [rule] * times}
    return tokenizers.from_files({'tokenizer.json': json.dumps({**content, part: rules}).encode()})

  assert build(3).vocab_size == 1
  with pytest.raises(ValueError, match=f'its {part} makes texts more than 1000 times longer'):
    build(12)


@pytest.mark.parametrize(('pattern', 'message'), [
  ('a.*b', "of its pattern 'a.*b' grows with the square of a text of 'a'"),
  (r'[ \t]+$', "grows with the square of a text of ' '"), ('<!--.*?-->', "a text of '<!--'"),
  ('(a|aa)+c', 'the tokenizer failed'), (r"'s| ?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+", None)])
def test_patterns_take_linear_time(pattern, message):
  import tokenizers as library
  made = library.Tokenizer(library.models.BPE({'a': 0}, []))
  made.pre_tokenizer = library.pre_tokenizers.Sequence([
    library.pre_tokenizers.Split(library.Regex(pattern), 'isolated')])
  with contextlib.nullcontext() if message is None else pytest.raises(
      ValueError, match=re.escape(message)):
    tokenizers.from_files({'tokenizer.json': made.to_str().encode()})


def test_the_texts_of_a_charsmap_are_bounded():
  import tokenizers as library
  content = json.loads(library.Tokenizer(library.models.BPE({'a': 0}, [])).to_str())
  table = (1024).to_bytes(4, 'little') + bytes(1024) + b'b' * 2000 + b'\0'
  content['normalizer'] = {'type': 'Precompiled',
                           'precompiled_charsmap': base64.b64encode(table).decode()}
  with pytest.raises(ValueError, match='normalizer makes texts more than 1000 times longer'):
    tokenizers.from_files({'tokenizer.json': json.dumps(content).encode()})


def test_other_threads_run_while_a_long_text_is_encoded():
  tokenizer = tokenizers.from_files({
    'vocab.json': json.dumps(tokenizer_kinds.BYTE_SIGNS).encode(), 'merges.txt': b''})
  text, done, turns = 'some words of a text, ' * 20_000, threading.Event(), []

  def watch():
    while not done.wait(0.001):
      turns.append(time.perf_counter())

  thread = threading.Thread(target=watch)
  thread.start()
  ids = tokenizer.encode(text)
  done.set()
  thread.join()
  assert len(turns) > 10
  assert ids == tokenizer.library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('cuts', [
  (), (tokenizer_settings.DIGIT,), byte_level_words.CUTS[:1], byte_level_words.CUTS[1:],
  (r'\w+|\W+',)])
@pytest.mark.parametrize('composed', [False, True])
def test_texts_by_their_words_have_the_ids_of_the_library(cuts, composed):
  import tokenizers as library

  rng = random.Random(9)
  pieces = ["'s", "'LL", 'don', "'", ' ', '  ', '\t', '\n', '\r\n', '\x0b', '\x1c', '\x00', '1',
            '23', '4567', 'words', ' Word', '_', '!?', '...', '(', '<|endoftext|>', 'x' * 70]
  texts = [''.join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(400)]
  texts[::2] = [f'{text}<tool> a' for text in texts[::2]]
  trained = tokenizer_settings.byte_level({}, [])
  trained.train_from_iterator(texts, library.trainers.BpeTrainer(
    vocab_size=400, show_progress=False, initial_alphabet=[*tokenizer_kinds.BYTE_SIGNS]))
  model = json.loads(trained.to_str())['model']
  inner = tokenizer_settings.byte_level(
    model['vocab'], [tuple(merge) for merge in model['merges']], cuts, composed)
  inner.add_special_tokens(['<|endoftext|>'])
  inner.add_tokens(['<tool>'])
  ours = tokenizers.from_files({'tokenizer.json': inner.to_str().encode()})
  inner.encode_special_tokens = True
  by_words = byte_level_words.finder(json.loads(inner.to_str()), lambda word: inner.encode(
    word, add_special_tokens=False).ids)
  texts += ['', 'caf\u00e9 au lait', texts[0] * 200]
  expected = [inner.encode(text, add_special_tokens=False).ids for text in texts]
  for _ in range(2):
    assert ours.encode_batch(texts) == expected == [*map(ours.encode, texts)]
  known = [by_words(text) is not None for text in texts]
  assert not any(known) if cuts == (r'\w+|\W+',) else 100 < sum(known) < len(texts) - 100
