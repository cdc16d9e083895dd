"""A text with special tokens is encoded as one, and no text ever gives a special token."""

import io
import random
import re

import pytest
import sentencepiece
import tokenizers as library
from tokenizers import models, normalizers, pre_tokenizers

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig

SPECIAL = ['<s>', '</s>', '<|user|>', '[INST]']
MARK = '▁'
BYTES = TokenizerConfig(kind='bytes')


def made(model, pre_tokenizer=None, normalizer=None, **properties):
  inner = library.Tokenizer(model)
  if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
    inner.decoder = library.decoders.ByteLevel()
  if pre_tokenizer is not None:
    inner.pre_tokenizer = pre_tokenizer
  if normalizer is not None:
    inner.normalizer = normalizer
  inner.add_special_tokens(
    [library.AddedToken(text, special=True, **{'normalized': False, **properties})
     for text in SPECIAL])
  return inner.to_str()


def bpe():
  letters = [MARK, *'abxé <>|/su', *SPECIAL[:2], 'ab', f'{MARK}a', f'{MARK}{MARK}', '<s', '<unk>']
  merges = [('a', 'b'), (MARK, 'a'), (MARK, MARK), ('<', 's'), ('<s', '>')]
  return models.BPE({piece: i for i, piece in enumerate(letters)}, merges, unk_token='<unk>')


def byte_bpe():
  signs = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {sign: i for i, sign in enumerate([*signs, 'ab', 'Ġa', 'ĊĊ'])}
  return models.BPE(vocab, [('a', 'b'), ('Ġ', 'a'), ('Ċ', 'Ċ')])


def pieces(*more):
  return ['<unk>', *SPECIAL, MARK, *'abxé', f'{MARK}a', 'ab', '##b', '##x', *more]


def byte_level(**properties):
  return made(byte_bpe(), pre_tokenizers.ByteLevel(add_prefix_space=False), **properties)


def words(model):
  return model({piece: i for i, piece in enumerate(pieces())}, unk_token='<unk>')


KINDS = {
  **{f'metaspace {scheme}': (lambda scheme=scheme: made(
    bpe(), pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)))
    for scheme in ('first', 'always', 'never')},
  'prepend': lambda: made(bpe(), normalizer=normalizers.Sequence(
    [normalizers.Prepend(MARK), normalizers.Replace(' ', MARK)])),
  'byte level': byte_level,
  'rstrip': lambda: byte_level(rstrip=True),
  'lstrip': lambda: byte_level(lstrip=True),
  'single word': lambda: byte_level(single_word=True, lstrip=True, rstrip=True),
  'normalized': lambda: byte_level(normalized=True),
  'wordpiece': lambda: made(
    words(models.WordPiece), pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
  'word level': lambda: made(words(models.WordLevel), pre_tokenizers.WhitespaceSplit()),
  'unigram': lambda: made(
    models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces())], unk_id=0),
    pre_tokenizers.Metaspace(prepend_scheme='first'), normalizers.NFKC()),
}


def parts_of(text, special):
  cut = re.split(f'({"|".join(map(re.escape, SPECIAL))})', text)
  return [special.get(part, part) for part in cut]


@pytest.mark.parametrize('kind', KINDS)
def test_parts_are_encoded_as_the_library_encodes_the_text(kind):
  content = KINDS[kind]()
  theirs = library.Tokenizer.from_str(content)
  ours = tokenizers.from_files({'tokenizer.json': content.encode()})
  reserved = {ours.special_tokens[text] for text in SPECIAL}
  random.seed(0)
  some = [*SPECIAL, '\n', ' ', '  ', 'ab', 'a', 'é', 'x', ' ab']
  for _ in range(200):
    text = ''.join(random.choices(some, k=random.randrange(1, 9)))
    assert ours.encode_parts(parts_of(text, ours.special_tokens)) == theirs.encode(
      text, add_special_tokens=False).ids
    # Whatever it spells, text is text.
    for found in (ours.encode_parts([text]), ours.encode(text), ours.encode_batch([text])[0]):
      assert not reserved & set(found)


def test_spelled_tokens_are_the_text_that_they_spell():
  ours = tokenizers.from_files({'tokenizer.json': byte_level(rstrip=True).encode()})
  text = ' <s>\n\n[INST] ab<|user|></s>'
  found = ours.encode_parts(['x', ours.special_tokens['<s>'], '\n\n', text])
  # The white space after the token is the token's.
  assert b''.join(ours.id_bytes[i] for i in found) == b'x<s>\n\n[INST] ab<|user|></s>'
  assert found.count(ours.special_tokens['<s>']) == 1
  assert ours.encode_parts([text]) == ours.encode(text)


def test_literal_ids():
  ours = tokenizers.from_files({'tokenizer.json': KINDS['metaspace first']().encode()})
  bos, user = ours.special_tokens['<s>'], ours.special_tokens['<|user|>']
  mark, a, mark_a, b = (ours.library.token_to_id(piece) for piece in (MARK, 'a', f'{MARK}a', 'b'))
  # A space is put before the first word of the text, not before those after a special token.
  assert ours.encode_parts(['ax', bos, 'a', user, 'b']) == [
    mark_a, ours.library.token_to_id('x'), bos, a, user, b]
  assert ours.encode_parts([bos, '', 'a', '', ' b']) == [bos, a, mark, b]
  stripping = tokenizers.from_files({'tokenizer.json': byte_level(rstrip=True).encode()})
  user = stripping.special_tokens['<|user|>']
  assert stripping.encode_parts([user, '\n', 'x', user, ' \n']) == [
    user, *stripping.encode('x'), user]


def test_other_tokenizers_take_parts_too():
  ours = tokenizers.train_or_load(BYTES, [])
  assert ours.encode_parts([256, 'a', '', 'b', 256]) == [256, 97, 98, 256]
  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b ab ba'] * 9), model_writer=writer, vocab_size=270, bos_id=1,
    model_type='bpe', byte_fallback=True, add_dummy_prefix=True, minloglevel=2,
    remove_extra_whitespaces=False, normalization_rule_name='identity', hard_vocab_limit=False)
  ours = tokenizers.from_files({'tokenizer.model': writer.getvalue()})
  bos = ours.special_tokens['<s>']
  # A space is put before every stretch, as llama.cpp and an exported tokenizer.json do.
  assert ours.encode_parts(['b', bos, ' b', bos, 'x']) == [
    *ours.encode('b'), bos, *ours.encode(' b'), bos, *ours.encode('x')]
  assert ours.encode_parts(['<s>']) == ours.encode('<s>') and bos not in ours.encode('<s>')


def test_the_longest_special_token_is_found():
  words = ['<a>', '<ab>', '<', '<a>>', 'x.y', 'b', '<ab', 'ab']
  random.seed(1)
  plain = re.compile('|'.join(sorted(map(re.escape, words), key=len, reverse=True)))
  for _ in range(300):
    text = ''.join(random.choices('<ab>x.y ', k=12))
    found = [match[1] for match in tokenizer_settings.spelled(tuple(words)).finditer(text)]
    assert found == plain.findall(text)
  assert tokenizer_settings.spelled(()).findall('a') == []
  assert tokenizer_settings.spelled(('a',)).findall('aba') == ['a', 'a']
