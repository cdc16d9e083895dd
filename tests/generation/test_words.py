"""Text of tokenizers that do not join bytes: what their own decoder makes of it, as it grows."""

import json
import random

import jax
import pytest

from jaxllm.data import tokenizers
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.text import TextDecoder, complete, text_of
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig

CORPUS = [
  'the server loads the models', 'a model is served; it loads (and reloads).', "don't stop"] * 3


def build(model, decoding, pre='Whitespace', **trainer):
  import tokenizers as library

  kind = getattr(library.models, model)
  inner = library.Tokenizer(kind() if model == 'Unigram' else kind(unk_token='[UNK]'))
  inner.pre_tokenizer = getattr(library.pre_tokenizers, pre)()
  make = getattr(library.trainers, f'{"Bpe" if model == "BPE" else model}Trainer')
  special = ['[UNK]', '[EOS]']
  inner.train_from_iterator(CORPUS, make(special_tokens=special, vocab_size=90, **trainer))
  inner.decoder = decoding(library.decoders) if decoding else None
  content = inner.to_str() if decoding else json.dumps(
    json.loads(inner.to_str()) | {'decoder': None})
  names = json.dumps({'eos_token': '[EOS]', 'unk_token': '[UNK]'}).encode()
  return tokenizers.from_files(
    {'tokenizer.json': content.encode(), 'tokenizer_config.json': names})


KINDS = {
  'no decoder': lambda: build('BPE', None),
  'words': lambda: build('WordLevel', None),
  'word pieces': lambda: build('WordPiece', lambda d: d.WordPiece()),
  'suffix': lambda: build('BPE', lambda d: d.BPEDecoder('</w>'), end_of_word_suffix='</w>'),
  'replace': lambda: build('BPE', lambda d: d.Replace('_', ' ')),
  'metaspace': lambda: build('Unigram', lambda d: d.Metaspace(), 'Metaspace', unk_token='[UNK]'),
  'bytes': lambda: build('BPE', lambda d: d.ByteLevel(), 'ByteLevel'),
}


@pytest.fixture(scope='module', params=KINDS)
def tokenizer(request):
  return KINDS[request.param]()


def test_text_grows_to_what_the_tokenizer_says(tokenizer):
  draw = random.Random(1)
  whole = tokenizer.decode
  for _ in range(60):
    before = tokenizer.encode(draw.choice(CORPUS))[: draw.randrange(9)]
    ids = [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randrange(30))]
    said = whole(before)
    if not said:
      continue  # A space at the beginning of a text is not part of it.
    expected = whole([*before, *ids])[len(said) :]
    assert text_of(tokenizer, ids, before) == expected


def test_words_have_their_spaces():
  words = KINDS['words']()
  the, server = words.encode('the server')
  assert not words.joins_bytes and words.id_bytes[server] == b' server'
  assert text_of(words, [the, 1, server, 999, the]) == 'the server the'
  assert text_of(words, [server], [the]) == ' server'
  assert text_of(words, [server], [1, 1]) == 'server'
  pieces = KINDS['word pieces']()
  ids = pieces.encode('reloads models')
  assert [pieces.id_bytes[i].decode() for i in ids[1:]] == [
    piece.removeprefix('##') if piece.startswith('##') else f' {piece}'
    for piece in map(pieces.library.id_to_token, ids[1:])]
  assert text_of(pieces, ids[1:], ids[:1]) == 'reloads models'[len(pieces.decode(ids[:1])):]


def test_stop_texts_span_words(tokenizer):
  ids = tokenizer.encode('the server loads the models')
  text = tokenizer.decode(ids)
  stop = text[len(text) // 2 - 3 : len(text) // 2 + 2]
  decoding = TextDecoder(tokenizer, [stop], ids[:1])
  said = tokenizer.decode(ids[:1]) + ''.join(map(decoding.push, ids[1:])) + decoding.finish()
  assert (said, decoding.stop) == (text[: text.index(stop)], stop)


def test_a_decoding_costs_the_same_however_long_the_text():
  class Counted:
    joins_bytes, id_bytes, longest = False, [b'a'] * 5, 0

    def decode(self, ids):
      self.longest = max(self.longest, len(ids))
      return ' '.join('a\ufffd'[i == 4] for i in ids)

  counted = Counted()
  decoding = TextDecoder(counted, context=[1] * 900)
  text = ''.join(map(decoding.push, [0] * 500 + [4] * 99))
  assert text + decoding.finish() == ' a' * 500 + ' \ufffd' * 99
  assert counted.longest < 20


def test_a_continuation_is_words():
  words = KINDS['words']()
  config = DecoderConfig(
    vocab_size=words.vocab_size + 4, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
    max_length=64)
  prompt = words.encode('the server loads the')
  done, = complete(
    Decoder(config), decoder.unstack(decoder.init(config, jax.random.key(0))), words, [prompt],
    SamplingConfig(max_new_tokens=12, temperature=2.0, seed=1))
  assert words.decode(prompt) + done.text == words.decode([*prompt, *done.tokens])
  assert done.text.startswith(' ')
