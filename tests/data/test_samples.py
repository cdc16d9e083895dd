"""Samples show what cleaning did, and how a tokenizer does; nothing personal, nothing hidden."""

import collections
import re
import time

import numpy as np
import pytest

from jaxllm.data import batches, cleaning, packing, samples, tokenizers
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.documents import SourceConfig
from jaxllm.data.tokenizers import TokenizerConfig
from tests.data.test_cleaning import random_texts

BYTES = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), ())


def joined(pieces, kinds):
  return ''.join(text for kind, text in pieces if kind in kinds)


def test_an_excerpt_holds_the_text_before_and_after():
  for before, after in [('a b c', 'a c'), ('', 'x'), ('x', ''), ('the same\n', 'the same'),
                        ('cafe\u0301!', 'café!'), ('a\u202eb', 'ab')]:
    pieces = samples.differences(before, after)
    assert joined(pieces, ('same', 'gone')).replace('␣', ' ').replace('↵', '') == (
      before.replace('\u202e', '⟨U+202E⟩'))
    assert joined(pieces, ('same', 'new')).replace('␣', ' ').replace('↵', '') == after
  assert samples.differences('one two', None) == [('same', 'one two')]


def test_an_excerpt_of_a_long_text_is_about_the_first_difference():
  words = ' '.join(f'w{number}' for number in range(5000))
  pieces = samples.differences(words, words.replace(' w2500 ', ' '))
  assert joined(pieces, ('gone',)) == 'w2500␣' or joined(pieces, ('gone',)) == '␣w2500'
  assert not joined(pieces, ('new',)) and sum(len(text) for _, text in pieces) < 300
  # Where one of both is cut, what the other has there is no difference.
  pieces = samples.differences('x ' + words, words[1000:])
  assert len(joined(pieces, ('gone', 'same'))) < 1200
  for text in random_texts(50, seed=3, most=800):
    assert sum(len(part) for _, part in samples.differences(text, text[len(text) // 3:])) < 9000


def test_an_excerpt_of_a_repetition_takes_no_time():
  text = '! ' * 20_000
  start = time.process_time()
  samples.differences(text, text.replace(' ', '  '))
  assert time.process_time() - start < 1


SECRETS = ('jane.doe@example.org', '+1 415 555 2671', '4111 1111 1111 1111', '8.8.8.8',
           'GB82 WEST 1234 5698 7654 32', 'AKIAIOSFODNN7EXAMPLE')


def test_personal_data_is_shown_by_its_shape():
  text = ' , '.join(SECRETS)
  shown = samples.differences(f'{text}\x00', text)
  shown += samples.differences(text, cleaning.clean(text, CleaningConfig(steps=('redact',))))
  shown += samples.differences(text, None)
  for secret in SECRETS:
    assert secret not in str(shown) and secret[:6] not in str(shown)
  assert 'xxxx.xxx@xxxxxxx.xxx' in str(shown) and '[EMAIL]' in str(shown)


def test_invisible_characters_are_given_by_their_numbers():
  assert samples.visible('a\x00\u202e\u2028\ufeff b\n') == 'a⟨U+0000⟩⟨U+202E⟩⟨U+2028⟩⟨U+FEFF⟩ b\n'
  assert samples.visible('\xa0\t \n', blanks=True) == '⟨U+00A0⟩⇥␣↵\n'


def test_what_a_step_uncovers_is_not_shown():
  before = 'Write to jane&#64;example.org.'
  pieces = samples.differences(before, cleaning.clean(before, CleaningConfig(steps=('html',))))
  assert 'jane' not in str(pieces) and 'left out' in str(pieces)


def test_samples_are_of_what_the_counts_count(tmp_path, monkeypatch):
  monkeypatch.setattr(samples, 'differences', lambda *texts: texts)
  texts = [*random_texts(60, seed=2), 'twice over', 'twice over']
  for number, half in enumerate((texts[:30], texts[30:])):
    path = tmp_path / f'{number}.txt'
    path.write_text('|'.join(re.sub('[|\r\x00]', '', text) for text in half), newline='')
  sources = [SourceConfig(location=str(tmp_path / f'{number}.txt'), separator='|')
             for number in range(2)]
  config = CleaningConfig(steps=('control', 'html', 'whitespace', 'exact_duplicates'),
                          min_characters=5)
  looks, found = samples.rehearse(sources, config, most=1000)
  total = sum((look.counts for look in looks), collections.Counter())
  number = collections.Counter(
    f'{one["step"]}.{"dropped" if one["dropped"] else "changed"}' for one in found)
  assert number == {name: times for name, times in total.items()
                    if name.endswith(('.changed', '.dropped'))}
  for one in found:
    before, after = one['pieces']
    assert before != after and (after is None) == one['dropped'] and str(tmp_path) in one['where']
    if after is not None:
      assert cleaning.STEPS[one['step']](config)(before)[0] == after
  kept = [text for look in looks for _, text in look.kept]
  assert len(kept) == total['documents'] - total['dropped']
  assert sum(map(len, kept)) == total['after']
  few = samples.rehearse(sources, config, most=2)[1]
  assert all(one in found for one in few) and len(few) <= 2 * 2 * 5 < len(found)
  assert samples.rehearse(sources, config, count=10)[0][1].counts['documents'] == 5


@pytest.fixture
def by_source(monkeypatch):
  monkeypatch.setattr(samples.importlib.util, 'find_spec', lambda name: None)


def test_a_tokenizer_in_figures(by_source):
  found = samples.measure(BYTES, {'a': [('1', 'to be'), ('2', 'é')], 'b': [('3', '你好')]})
  groups = found['groups']
  assert found['by'] == 'source' and not found['first_failures'] and [*groups] == ['all', 'a', 'b']
  names = ('documents', 'characters', 'bytes', 'tokens', 'failures')
  assert [groups['all'][name] for name in names] == [3, 8, 13, 13, 0]
  assert groups['a']['tokens_per_word'] == 7 / 3 and groups['b']['tokens_per_word'] == 3
  assert groups['all']['parts_per_token'] == 8 / 13 and groups['all']['unknown_per_token'] == 0
  assert groups['all']['characters_per_token'] == 8 / 13


def test_texts_that_do_not_come_back_are_named(by_source):
  poor = tokenizers.train_or_load(
    TokenizerConfig(model_type='char', byte_fallback=False), ['to be or not'])
  found = samples.measure(poor, {'a': [('x.txt, line 1', 'to be'), ('x.txt, line 2', 'to see')]})
  assert found['groups']['all']['failures'] == 1 and found['groups']['all']['documents'] == 2
  assert found['first_failures'][0]['where'] == 'x.txt, line 2'
  assert "no id for 's'" in found['first_failures'][0]['why']


def test_languages_where_they_are_known():
  pytest.importorskip('py3langid')
  texts = [('1', 'The people of the town have gone to the river.'), ('2', '今天天气很好。')]
  assert {*samples.measure(BYTES, {'a': texts})['groups']} == {'all', 'en', 'zh'}


def test_pieces_that_nothing_uses():
  tokenizer = tokenizers.train_or_load(
    TokenizerConfig(kind='byte_level_bpe', vocab_size=260), ['to be to be'])
  ids = tokenizer.encode('\nto to tx')
  row = np.zeros(1, packing.record_dtype(len(ids) + 1, tokenizer.vocab_size))
  row['tokens'][0, : len(ids)], row['segment_ids'][0, : len(ids)] = ids, 1
  found = samples.usage(tokenizer, batches.Stored([row.tobytes()], row.dtype, tokenizer.vocab_size))
  counts = np.bincount(ids[1:], minlength=tokenizer.vocab_size)
  assert found['pieces'] == tokenizer.vocab_size - 1
  assert found['unused'] == (counts == 0).sum() - 1
  longer = [piece for i, piece in enumerate(tokenizer.id_bytes)
            if len(piece) > 1 and not counts[i]]
  assert found['first_unused'] == [piece.decode().replace(' ', '␣') for piece in longer]
  assert found['unused_bytes'] == found['unused'] - len(longer)
  assert sum(times for _, times in found['most_frequent']) == counts.sum() == found['targets']
