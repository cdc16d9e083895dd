"""Each step of cleaning does its one thing, and nothing runs unless it is named."""

import random
import time

import pytest

from jaxllm.config import ConfigError
from jaxllm.data.cleaning import STEPS, CleaningConfig, clean, cleaner


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
  assert STEPS[step](expected) == (expected, {})


# What steps look for, to be put together at random.
PIECES = [
  *(' \n\t\x00\x85\u2028\ufeff\u202e\u200f\u0301eé你&;<>"/=#.-{[]1'),
  '\n\n', '\r\n', '...', '- ', '42', 'schÃ¶n', 'â€™', 'word', 'Two words.',
  '<p>', '</p>', '<b ', '<int>', '<!--', '-->', '<pre>', '</pre>', '<script>', '</script>',
  'amp;', '&lt;', '&gt;', '&#7;', '&copy', 'lt', '<?', '<![CDATA[', '<x-y>',
  '[1]', '[edit]', 'Sign in', 'LOUD', '3 likes', 'privacy policy', 'javascript',
  'The end of that is with them.',
]


def random_texts(number, seed=0, most=40):
  rng = random.Random(seed)
  return [''.join(rng.choices(PIECES, k=rng.randint(1, most))) for _ in range(number)]


@pytest.mark.parametrize('name', STEPS)
def test_a_step_that_is_run_again_changes_nothing(name):
  for text in random_texts(1000):
    once, _ = STEPS[name](text)
    if once is not None:
      assert STEPS[name](once) == (once, {}), repr(text)


def test_characters_and_documents_are_accounted_for():
  run = cleaner(CleaningConfig(steps=tuple(STEPS), min_characters=20))
  kept = dropped = 0
  for text in random_texts(300, seed=1):
    cleaned, counts = run(text)
    taken = sum(number for name, number in counts.items() if name.endswith('.characters'))
    assert len(text) == len(cleaned or '') + taken
    assert (cleaned is None) == sum(
      number for name, number in counts.items() if name.endswith('.dropped'))
    kept, dropped = kept + (cleaned is not None), dropped + (cleaned is None)
  assert kept and dropped


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
