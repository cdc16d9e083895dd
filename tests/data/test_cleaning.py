"""Each step of cleaning does its one thing, and nothing runs unless it is named."""

import collections
import random
import re
import time

import pytest

from jaxllm.config import ConfigError
from jaxllm.data import cleaning, duplicates
from jaxllm.data.cleaning import ACROSS, STEPS, CleaningConfig, clean, cleaner
from jaxllm.data.filters import Page


def test_by_default_nothing_changes():
  text = ' cafe\u0301\x00 \r\n<b>x</b>  &amp; schÃ¶n\t'
  assert clean(text, CleaningConfig()) == text


@pytest.mark.parametrize('step, text, expected', [
  ('nfc', 'cafe\u0301', 'café'),
  ('mojibake', 'schÃ¶n\nrichtig: schön 你', 'schön\nrichtig: schön 你'),
  ('mojibake', 'dj vu: d√©j√† vu\n你', 'dj vu: déjà vu\n你'),  # Line by line.
  ('mojibake', 'itâ€™s “quoted”', 'it’s “quoted”'),
  ('control', 'a\x00b\x07\x01c\td\r\ne\x7f\x85\ufeff', 'a b c\td\ne\n'),
  ('control', 'one\rtwo\x0cthree\x0bfour\x85five\x1csix', 'one\ntwo\nthree\nfour\nfive\nsix'),
  ('control', '\ufeffa\x1fb\ufeffc \x08d\x9f\n\x00e\x00', 'a b c d\ne'),
  ('control', 'family: 👨\u200d👩\u200d👧', 'family: 👨\u200d👩\u200d👧'),
  ('html', '<p>a &lt; b &amp; c</p><script>x = "<p>";</script><p>d<br>e</p>', 'a < b & c\n\nd\ne'),
  ('html', '<!-- no --><style>p {}</style>text <b>bold</b>', 'text bold'),
  ('html', '<pre>def f():\n    a = 1\n\n\n    return a\n</pre>',
   'def f():\n    a = 1\n\n\n    return a'),
  ('html', '<p>so:\n\n  <pre>\n  x &gt; 1\n\n\ty</pre> \n\n and <pre>  z',
   'so:\n\n  x > 1\n\n\ty\n\nand \n  z'),
  ('html', 'a<br/>b<br>c<option>d<option>e', 'a\nb\nc\nd\ne'),
  ('html', 'no markup, 1 < 2', 'no markup, 1 < 2'),
  ('html', '<p>List&lt;int&gt; <joe@x.com> #include <stdio.h></p>',
   'List<int> <joe@x.com> #include <stdio.h>'),
  ('html', '<p>the &lt;b&gt; tag, &amp;amp;</p>', 'the &lt;b> tag, &amp;amp;'),
  ('bidi', 'a\u202eb\u202c c\u200f.', 'a b c.'),
  ('whitespace', '  a \t\xa0 b \n\n\n\n c\u3000d ', 'a b\n\nc d'),
])
def test_steps(step, text, expected):
  assert clean(text, CleaningConfig(steps=(step,))) == expected
  assert STEPS[step](CleaningConfig())(expected) == (expected, {})


# What steps look for, to be put together at random.
PIECES = [
  *(' \n\t\x00\x85\u2028\ufeff\u202e\u200f\u0301eé你&;<>"/=#.-{[]1'),
  '\n\n', '\r\n', '...', '- ', '42', 'schÃ¶n', 'â€™', 'word', 'Two words.',
  '<p>', '</p>', '<b ', '<int>', '<!--', '-->', '<pre>', '</pre>', '<script>', '</script>',
  'amp;', '&lt;', '&gt;', '&#7;', '&copy', 'lt', '<?', '<![CDATA[', '<x-y>',
  '[1]', '[edit]', '[citation ', 'needed]', 'a@b.org', '4111111111111111', '8.8.8.8',
  '+1 415 555 2671', 'GB82 WEST 1234 5698 7654 32', '[EMAIL]', '[IP]', 'AKIAIOSFODNN7EXAMPLE',
  'Sign in', 'LOUD', '3 likes', 'privacy policy', 'javascript',
  'The end of that is with them.',
]


def random_texts(number, seed=0, most=40):
  rng = random.Random(seed)
  return [''.join(rng.choices(PIECES, k=rng.randint(1, most))) for _ in range(number)]


NEEDS = {'article': 'trafilatura', 'language': 'py3langid'}
EVALUATION = 'A question of a test asks for the one word that nobody would ever expect to read.'


def config(tmp_path, *steps, **fields):
  (tmp_path / 'evaluation.txt').write_text(f'{EVALUATION}\n\nToo short.\n\n')
  if 'decontaminate' in steps:
    source = {'location': str(tmp_path / 'evaluation.txt'), 'separator': '\n\n'}
    fields['evaluation'] = (source,)
  return CleaningConfig(steps=steps, **fields)


@pytest.mark.parametrize('name', STEPS)
def test_a_step_that_is_run_again_changes_nothing(name, tmp_path):
  if name in NEEDS:
    pytest.importorskip(NEEDS[name])
  settings = config(tmp_path, name)
  step, again = STEPS[name](settings), STEPS[name](settings)
  changed = 0
  for text in [*random_texts(1000), *random_texts(2, most=4000)]:
    once, _ = step(text)
    changed += once != text
    if once is not None:
      assert again(once) == (once, {}), repr(text)
  assert changed or name in ('article', 'decontaminate')


def test_characters_and_documents_are_accounted_for(tmp_path):
  steps = [name for name in STEPS if name not in NEEDS and 'gopher' not in name and name != 'c4']
  steps.insert(3, 'exact_duplicates')
  run = cleaner(config(tmp_path, *steps, min_characters=20))
  kept = dropped = 0
  for text in random_texts(300, seed=1):
    cleaned, counts = run(text)
    taken = sum(number for name, number in counts.items() if name.endswith('.characters'))
    assert len(text) == len(cleaned or '') + taken
    assert (cleaned is None) == sum(
      number for name, number in counts.items() if name.endswith('.dropped'))
    kept, dropped = kept + (cleaned is not None), dropped + (cleaned is None)
  assert kept and dropped


@pytest.mark.parametrize('step, marks', [
  ('control', '\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff'),
  ('bidi', '\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069'),
])
def test_no_two_words_are_joined(step, marks):
  rng = random.Random(3)
  found = [chr(code) for code in (*range(0x3000), 0xFEFF) if re.match(f'[{marks}]', chr(code))]
  for _ in range(2000):
    text = ''.join(rng.choice(('ab', 'é', 'א', 'x1', '_', '\u0301', '-', ' ', '.', '你', '\n'))
                   + ''.join(rng.choices(found, k=rng.randint(0, 3))) for _ in range(8))
    cleaned = clean(text, CleaningConfig(steps=(step,))) or ''
    assert re.findall(r'\w+', cleaned) == re.findall(r'\w+', re.sub(f'[{marks}]', ' ', text))
    assert ''.join(cleaned.split()) == ''.join(re.sub(f'[{marks}]', '', text).split())


@pytest.mark.parametrize('piece', ['<a ', '<a a="', '<!--', '<!', '<![', '<?', '</', '&#', '<pre>'])
@pytest.mark.parametrize('end', ['', '>', '">x<b c="'])
def test_broken_html_neither_fails_nor_takes_long(piece, end):
  start = time.process_time()
  clean(f'kept {piece * 5000}{end}', CleaningConfig(steps=('html',)))
  assert time.process_time() - start < 1


def test_steps_run_in_order():
  assert clean('<p>a&nbsp;  b</p>', CleaningConfig(steps=('html', 'whitespace'))) == 'a b'


def test_short_documents_are_dropped_after_cleaning():
  config = CleaningConfig(steps=('whitespace',), min_characters=3)
  assert clean(' ab ', config) is None
  assert clean(' abc ', config) == 'abc'
  assert clean('', CleaningConfig()) is None


def test_an_unknown_step_is_refused():
  with pytest.raises(ConfigError, match='steps'):
    CleaningConfig(steps=('nfd',))


GOOD = 'The people of the town have gone to the river with that boat and they will be back soon.\n'


@pytest.mark.parametrize('step, text, expected, found', [
  ('boilerplate', 'Sign in\nHELLO ALL OF YOU\n1,234\n3 likes\nword\nA line.\n\n今天天气很好。',
   'A line.\n\n今天天气很好。',
   {'phrase': 1, 'upper_case': 1, 'numbers': 1, 'counter': 1, 'one_word': 1}),
  ('c4', f'{GOOD * 3}Short one.\nno end mark here at all\n'
         'This page here needs JavaScript to work.\nWe have a privacy policy for you.\n'
         'This is known to all.[2][citation needed]',
   f'{GOOD * 3}This is known to all.', {'words': 1, 'end_mark': 1, 'javascript': 1, 'policy': 1}),
  ('c4', GOOD * 2, None, {'sentences': 1}),
  ('c4', f'{GOOD * 3}Here is an open bracket {{ of code.', None, {'curly_bracket': 1}),
  ('c4', f'{GOOD * 3}Now Lorem ipsum dolor sit amet.', None, {'lorem_ipsum': 1}),
  ('gopher_quality', GOOD * 3, GOOD * 3, {}),
  ('gopher_quality', GOOD * 2, None, {'words': 1}),
  ('gopher_quality', 'extraordinarily ' * 60, None, {'mean_word_length': 1}),
  ('gopher_quality', GOOD * 3 + '# ' * 9, None, {'hashes_per_word': 1}),
  ('gopher_quality', GOOD * 3 + ' ... ' * 9, None, {'ellipses_per_word': 1}),
  ('gopher_quality', f'- {GOOD}' * 3, None, {'bullet_lines': 1}),
  ('gopher_quality', GOOD.replace('.', '...') * 3, None, {'ellipsis_lines': 1}),
  ('gopher_quality', GOOD * 3 + '12345 ' * 30, None, {'alphabetic_words': 1}),
  ('gopher_quality', 'word ' * 60, None, {'stop_words': 1}),
  ('gopher_repetition', GOOD, GOOD, {}),
  ('gopher_repetition', GOOD * 2, None, {'lines': 1}),
  ('gopher_repetition', 'a b ' + 'c d ' * 3, None, {'top_2_gram': 1}),
])
def test_filters_tell_which_rule_was_broken(step, text, expected, found):
  assert STEPS[step](CleaningConfig())(text) == (expected, found)


def test_repetitions_are_those_of_literal_counting():
  rng = random.Random(3)
  for number in range(200):
    own = [rng.choice('a bb ccc dddd'.split()) for _ in range(rng.randint(1, 30))]
    total = sum(map(len, own))
    for n in range(2, 11):
      runs = [tuple(own[i:i + n]) for i in range(len(own) - n + 1)]
      most = max(map(runs.count, runs), default=0)
      inside = {i + k for i, run in enumerate(runs) if run in runs[:i] for k in range(n)}
      top = max((most * sum(map(len, run)) for run in runs if runs.count(run) == most), default=0)
      expected = (top / total, sum(len(own[i]) for i in inside) / total) if most > 1 else (0, 0)
      assert Page(' '.join(own)).ngrams.get(n, (0, 0)) == pytest.approx(expected), number


@pytest.mark.parametrize('text, expected', [
  ('write to jane.doe+x@mail.example.co.uk, or not', 'write to [EMAIL], or not'),
  ('card: 4111 1111 1111 1111, 4111-1111-1111-1112', 'card: [CARD], 4111-1111-1111-1112'),
  ('378282246310005 and 1234567890123456', '[CARD] and 1234567890123456'),
  ('IBAN GB82 WEST 1234 5698 7654 32 or DE89370400440532013000; GB82 WEST 1234 5698 7654 33',
   'IBAN [IBAN] or [IBAN]; GB82 WEST 1234 5698 7654 33'),
  ('at 8.8.8.8:53, not 192.168.0.1 or 127.0.0.1 or 1.2.3.4.5', 'at [IP]:53, not 192.168.0.1 or '
   '127.0.0.1 or 1.2.3.4.5'),
  ('2001:4860:4860::8888 at 12:30:45', '[IP] at 12:30:45'),
  ('tel:+1 (415) 555-2671, (415) 555-2671, +49 30 901820', 'tel:[PHONE], [PHONE], [PHONE]'),
  ('in 2019-2020 of 1,234,567.89 or 10.1.2', 'in 2019-2020 of 1,234,567.89 or 10.1.2'),
  ('key=AKIAIOSFODNN7EXAMPLE ghp_' + 'a1' * 18, 'key=[KEY] [KEY]'),
])
def test_redaction(text, expected):
  redacted, found = STEPS['redact'](CleaningConfig())(text)
  assert redacted == expected
  assert sum(found.values()) == sum(map(expected.count, ('[EMAIL]', '[CARD]', '[IBAN]', '[IP]',
                                                         '[PHONE]', '[KEY]')))


@pytest.mark.parametrize('piece', [
  '+1', '1' * 30, '+' + '1' * 30, 'a@', 'a.', 'GB82 ', 'GB82WEST', '1.', '2001:', '4', '[1', '# ',
  'eyJaaaaaaaaaa.', '-----BEGIN PRIVATE KEY-----', 'word ', 'a b ', '\n', '. '])
def test_no_text_takes_long(piece):
  text = piece * (200_000 // len(piece))
  for name in ('redact', 'c4', 'boilerplate', 'gopher_quality', 'gopher_repetition'):
    start = time.process_time()
    STEPS[name](CleaningConfig())(text)
    assert time.process_time() - start < 1, name


def test_of_what_is_alike_the_first_is_kept(tmp_path):
  run = cleaner(config(tmp_path, 'whitespace', 'exact_duplicates', 'decontaminate'))
  texts = ['a', 'b', ' a', EVALUATION, 'c', f'It said: {EVALUATION.upper()!r}', 'b', 'too short',
           ' '.join(EVALUATION.split()[:12]), ' '.join(EVALUATION.split()[2:15])]
  found = [run(text) for text in texts]
  assert [text for text, _ in found if text is not None] == ['a', 'b', 'c', 'too short', texts[8]]
  assert [next(iter(counts)) for text, counts in found if text is None] == [
    'whitespace.changed', 'decontaminate.dropped', 'decontaminate.dropped',
    'exact_duplicates.dropped', 'decontaminate.dropped']
  # Without the others, each is kept.
  assert clean(EVALUATION, config(tmp_path, 'decontaminate')) == EVALUATION


def test_evaluation_texts_and_their_step_need_each_other(tmp_path):
  with pytest.raises(ConfigError, match='evaluation=.*decontaminate'):
    CleaningConfig(steps=('decontaminate',))
  with pytest.raises(ConfigError, match='evaluation=.*decontaminate'):
    CleaningConfig(evaluation='a.txt')


def _near(rng, own, similarity):
  """Return words that share this part of their runs of 5 words, each changed word breaking 5."""
  changed = list(own)
  runs = len(own) - 4
  for place in rng.sample(range(2, len(own) - 2, 6),
                          round(runs * (1 - similarity) / (1 + similarity) / 5)):
    changed[place] = f'new{rng.random()}'
  return changed


@pytest.mark.parametrize('similarity, least, most', [
  (0.95, 1, 1), (0.9, 0.98, 1), (0.85, 0.85, 1), (0.6, 0, 0.05), (0.3, 0, 0)])
def test_planted_near_duplicates_are_found(similarity, least, most):
  """The stated recall, at the default similarity of 0.8."""
  pytest.importorskip('rensa')
  rng = random.Random(4)
  run = cleaner(CleaningConfig(steps=('near_duplicates',)))
  found = 0
  for _ in range(200):
    own = [f'w{rng.randrange(10_000)}' for _ in range(240)]
    assert run(' '.join(own))[0] is not None
    found += run(' '.join(_near(rng, own, similarity)))[0] is None
  assert least <= found / 200 <= most
  assert run('...')[0] == run('...')[0] == '...'


@pytest.mark.parametrize('similarity', [0.5, 0.8, 1])
def test_pairs_in_any_order_drop_what_is_dropped_one_by_one_by_us_and_by_rensa(similarity):
  rensa = pytest.importorskip('rensa')
  rng, near = random.Random(6), duplicates.near(similarity)
  theirs, keep = rensa.RMinHashDeduplicator(similarity, 128, True, 16), near.keeper()
  texts, keys, dropped, buckets = [], [], set(), collections.defaultdict(list)
  for number in range(600):
    # Chains: a text that is near one that is near another, which is kept or dropped.
    own = list(rng.choice(texts)) if texts and rng.random() < 0.8 else [
      f'w{rng.randrange(99)}' for _ in range(60)]
    for _ in range(rng.randrange(4)):
      own[rng.randrange(60)] = f'w{rng.randrange(99)}'
    texts.append(own)
    keys.append(near.key(' '.join(own)))
    kept = keep(keys[-1])
    assert kept == theirs.add_pairs([(str(number), [*map(' '.join, duplicates.ngrams(own, 5))])])[0]
    dropped |= set() if kept else {number}
  # As many machines do it: equal signatures first, then each bucket, then all pairs.
  first = {key: number for number, key in reversed([*enumerate(keys)])}
  for key, number in sorted(first.items(), key=lambda item: item[1]):
    for band in duplicates.bands(key):
      buckets[band].append((number, key))
  pairs = [pair for bucket in buckets.values() for pair in duplicates.pairs(bucket, similarity)]
  rng.shuffle(pairs)
  equal = {number for number, key in enumerate(keys) if first[key] != number}
  assert duplicates.dropped(pairs) | equal == dropped and 50 < len(dropped) < 550
  kept_by_chains = {later for _, later in pairs} - dropped
  assert similarity == 1 or kept_by_chains and len(pairs) > 2 * len({*pairs})


def test_stages_are_pure_and_their_keys_alone_decide(tmp_path):
  settings = config(tmp_path, 'whitespace', 'exact_duplicates', 'control', 'near_duplicates',
                    'redact', 'exact_duplicates', min_characters=5)
  texts = [*random_texts(200, seed=2, most=8), *random_texts(200, seed=2, most=8), '', 'a b c d e']
  run, stages = cleaner(settings), cleaning.stages(settings)
  assert [stage.name for stage in stages] == [
    'exact_duplicates', 'near_duplicates', 'exact_duplicates', '']
  # All of a document is done before anything is decided, in any order, by another's copy.
  passes = {text: [*cleaning.passed(cleaning.stages(settings), text)] for text in sorted(texts)}
  compare = cleaning.comparer(stages)
  found = [compare(passes[text]) for text in texts]
  assert found == [run(text) for text in texts]
  total = collections.Counter(name for _, counts in found for name in counts)
  assert {f'{name}.dropped' for name in (*ACROSS, 'min_characters')} <= total.keys()
  assert any(text for text, _ in found)


def test_languages_are_told_and_others_counted():
  pytest.importorskip('py3langid')
  step = STEPS['language'](CleaningConfig(languages=('de', 'fr')))
  texts = ['Das ist ein deutscher Satz, den man gut erkennt.', 'This is a sentence in English.',
           'Ceci est une phrase écrite en français.']
  assert [step(text) for text in texts] == [(texts[0], {}), (None, {'en': 1}), (texts[2], {})]
  with pytest.raises(ValueError, match="languages: 'english' is no code"):
    STEPS['language'](CleaningConfig(languages=('english',)))
  with pytest.raises(ValueError, match='languages'):
    CleaningConfig(languages=())


def test_an_article_is_kept_without_its_page():
  pytest.importorskip('trafilatura')
  text = 'This is a sentence of the article that is long enough, with a &lt;b&gt; in it. '
  page = (f'<html><body><nav><a href="/">Home</a> <a href="/b">About</a></nav><article>'
          f'<p>{text * 4}</p><p>{text * 3}</p></article><footer>Copyright</footer></body></html>')
  article = clean(page, CleaningConfig(steps=('article',)))
  assert 'long enough, with a &lt;b> in it' in article
  assert 'Home' not in article and 'Copyright' not in article
  assert clean('<p>no page</p>', CleaningConfig(steps=('article',))) == '<p>no page</p>'
