"""Each step of cleaning does its one thing, and nothing runs unless it is named."""

import time

import pytest

from jaxllm.config import ConfigError
from jaxllm.data.cleaning import STEPS, CleaningConfig, clean


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
  ('whitespace', '  a \t\xa0 b \n\n\n\n c\u3000d ', 'a b\n\nc d'),
])
def test_steps(step, text, expected):
  assert clean(text, CleaningConfig(steps=(step,))) == expected
  assert STEPS[step](expected) == expected


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
