"""Cleaning of text: a list of steps, each a function from text to text."""

import functools
import html.parser
import re
import unicodedata
from collections.abc import Callable
from typing import Literal

import pydantic

from jaxllm.config import Config


class CleaningConfig(Config):
  """Which steps of cleaning run. By default none does, and text goes through untouched."""

  steps: tuple[Literal['mojibake', 'html', 'control', 'nfc', 'whitespace'], ...] = ()
  """Steps in the order in which they run: 'mojibake' repairs text that was decoded wrongly, 'html'
  keeps the text of a page, 'control' drops control characters, 'nfc' composes accents, 'whitespace'
  joins runs of blanks and of empty lines."""
  min_characters: int = pydantic.Field(default=1, ge=1)
  """Documents that are shorter after these steps are dropped."""


def clean(text: str, config: CleaningConfig) -> str | None:
  """Return the text after all steps, or None where the document is to be dropped."""
  for step in config.steps:
    text = STEPS[step](text)
  return text if len(text) >= config.min_characters else None


def repair_mojibake(text: str) -> str:
  """Undo decoding with the wrong encoding ('schÃ¶n' -> 'schön'), line by line; needs ftfy."""
  import ftfy
  if text.isascii():
    return text
  return '\n'.join(ftfy.fix_encoding(line) for line in text.split('\n'))


def strip_html(text: str) -> str:
  """Return the visible text of HTML, one line per block; scripts, styles and comments go."""
  if not ('<' in text or '&' in text):
    return text
  parser = _TextParser()
  # The parser would look for the end of each tag in vain, in time that grows with the square.
  last = text.rfind('>') + 1
  parser.feed(text[:last] + text[last:].replace('<', '&lt;'))
  parser.close()
  runs = [''.join(pieces) for pieces in parser.runs]
  runs[::2] = [re.sub(r'\n\s*\n\s*', '\n\n', run) for run in runs[::2]]
  runs[1::2] = [run.removeprefix('\n').rstrip('\n') for run in runs[1::2]]
  runs[0] = runs[0].lstrip()
  runs[-1] = runs[-1].rstrip()
  return ''.join(runs)


def drop_control_characters(text: str) -> str:
  """Drop control characters except tab and newline, and U+FEFF, without joining words.

  Those that end a line or page (CR, CRLF, vertical tab, form feed, U+0085 and the separators from
  U+001C to U+001E) become a newline, any others between two words a space.
  """
  return _CONTROL.sub('', _BETWEEN_WORDS.sub(' ', _LINE_END.sub('\n', text)))


def join_whitespace(text: str) -> str:
  """Make runs of blanks one space and runs of empty lines one, and strip lines and text."""
  text = re.sub(r'[^\S\n]+', ' ', text)
  text = re.sub(r' ?\n ?', '\n', text)
  return re.sub(r'\n{3,}', '\n\n', text).strip()


STEPS: dict[str, Callable[[str], str]] = {
  'mojibake': repair_mojibake,
  'html': strip_html,
  'control': drop_control_characters,
  'nfc': functools.partial(unicodedata.normalize, 'NFC'),
  'whitespace': join_whitespace,
}

_LINE_END = re.compile('\r\n|[\r\x0b\x0c\x1c-\x1e\x85]')
_CONTROL = re.compile('[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f\ufeff]+')
_BETWEEN_WORDS = re.compile(rf'(?<=\S)(?<!{_CONTROL.pattern[:-1]}){_CONTROL.pattern}(?=\S)')

_BLOCKS = frozenset(
  'address article aside blockquote body br caption dd details dialog div dl dt fieldset '
  'figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr legend li main nav ol optgroup option '
  'p pre section summary table td th tr ul'.split())
_HIDDEN = frozenset(('script', 'style', 'template', 'noscript', 'title'))


class _TextParser(html.parser.HTMLParser):
  """Collect character data; the standard parser calls methods, so this is a class."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.runs: list[list[str]] = [[]]
    """Pieces of text, outside and inside of <pre> by turns."""
    self._hidden = 0

  def handle_startendtag(self, tag, attrs):
    self._break(tag)

  def handle_starttag(self, tag, attrs):
    self._hidden += tag in _HIDDEN
    self._break(tag)
    if tag == 'pre' and len(self.runs) % 2:
      self.runs.append([])

  def handle_endtag(self, tag):
    self._hidden = max(0, self._hidden - (tag in _HIDDEN))
    if tag == 'pre' and not len(self.runs) % 2:
      self.runs.append([])
    self._break(tag)

  def handle_data(self, data):
    if not self._hidden:
      self.runs[-1].append(data)

  def parse_marked_section(self, i, report=1):
    try:
      return super().parse_marked_section(i, report)
    except AssertionError:  # The standard parser's answer to '<![' before what is no name.
      return self.parse_bogus_comment(i, report)

  def _break(self, tag):
    if tag in _BLOCKS:
      self.runs[-1].append('\n')
