"""Published filters of web text, each rule with its published bounds in a flat table.

A document is dropped at the first rule that it breaks; `c4` and `boilerplate` drop lines, too.

References:
  C4: Raffel et al., Exploring the Limits of Transfer Learning, arXiv 1910.10683, section 2.2.
  GOPHER_QUALITY, GOPHER_REPETITION: Rae et al., Scaling Language Models, arXiv 2112.11446, A1.1 and
    Table A1.
  BOILERPLATE: Penedo et al., The RefinedWeb Dataset, arXiv 2306.01116, section G.2.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxllm.data.duplicates import Filtered, words

Rules = Mapping[str, tuple[Callable[['Page'], float], float, float]]
"""Name -> (what is measured, its least value, its greatest)."""
LineRules = Mapping[str, Callable[[str], object]]
"""Name -> whether a line obeys; one that does not is dropped."""


class Page:
  """A document, and what several rules measure of it, computed once."""

  def __init__(self, text: str):
    self.text = text
    self.words = text.split()
    self.lines = [line.strip() for line in text.split('\n') if line.strip()]

  @functools.cached_property
  def paragraphs(self) -> list[str]:
    """What stands between empty lines."""
    return [part.strip() for part in re.split(r'\n\s*\n', self.text) if part.strip()]

  @functools.cached_property
  def ngrams(self) -> dict[int, tuple[float, float]]:
    """Length -> the shares of characters in the most frequent n-gram, and in repetitions of any."""
    lengths = np.array([len(word) for word in self.words])
    known: dict[str, int] = {}
    first = np.array([known.setdefault(word, len(known)) for word in self.words], np.int64)
    ids, found = first, {}
    for n in range(2, 11):
      # An n-gram is that of n - 1 words and the next word; its number fits 64 bits.
      ids = ids[:-1] * len(known) + first[n - 1:]
      _, where, ids, counts = np.unique(ids, return_index=True, return_inverse=True,
                                        return_counts=True)
      if not counts.size or counts.max() == 1:
        break
      sizes = np.lib.stride_tricks.sliding_window_view(lengths, n).sum(axis=1)
      top = sizes[where[counts == counts.max()]].max() * counts.max()
      repeated, inside = where[ids] != np.arange(len(ids)), np.zeros(len(lengths), bool)
      for shift in range(n):
        inside[shift:shift + len(repeated)] |= repeated
      found[n] = float(top / lengths.sum()), float(lengths[inside].sum() / lengths.sum())
    return found


def _share(items: Sequence[object]) -> float:
  """Return the share of those that are true."""
  return sum(map(bool, items)) / max(len(items), 1)


def _repeated(parts: Sequence[str], characters: bool = False) -> float:
  """Return the share of parts, or of their characters, that were there before."""
  size: Callable[[str], int] = len if characters else lambda _: 1
  return 1 - sum(map(size, set(parts))) / max(sum(map(size, parts)), 1)


def _in_ngrams(n: int, which: int) -> Callable[[Page], float]:
  return lambda page: page.ngrams.get(n, (0.0, 0.0))[which]


_STOP_WORDS = frozenset('the be to of and that have with'.split())

GOPHER_QUALITY: Rules = {
  'words': (lambda page: len(page.words), 50, 100_000),
  'mean_word_length': (lambda page: sum(map(len, page.words)) / max(len(page.words), 1), 3, 10),
  'hashes_per_word': (lambda page: page.text.count('#') / max(len(page.words), 1), 0, 0.1),
  'ellipses_per_word': (
    lambda page: len(re.findall(r'\.\.\.|…', page.text)) / max(len(page.words), 1), 0, 0.1),
  'bullet_lines': (lambda page: _share([line[0] in '•‣◦●-*' for line in page.lines]), 0, 0.9),
  'ellipsis_lines': (
    lambda page: _share([line.endswith(('...', '…')) for line in page.lines]), 0, 0.3),
  'alphabetic_words': (
    lambda page: _share([any(map(str.isalpha, word)) for word in page.words]), 0.8, 1),
  'stop_words': (lambda page: len(_STOP_WORDS.intersection(words(page.text))), 2, 8),
}
GOPHER_REPETITION: Rules = {
  'lines': (lambda page: _repeated(page.lines), 0, 0.30),
  'paragraphs': (lambda page: _repeated(page.paragraphs), 0, 0.30),
  'line_characters': (lambda page: _repeated(page.lines, True), 0, 0.20),
  'paragraph_characters': (lambda page: _repeated(page.paragraphs, True), 0, 0.20),
  **{f'top_{n}_gram': (_in_ngrams(n, 0), 0, most)
     for n, most in {2: 0.20, 3: 0.18, 4: 0.16}.items()},
  **{f'repeated_{n}_grams': (_in_ngrams(n, 1), 0, most)
     for n, most in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items()},
}


def obey(rules: Rules, text: str) -> Filtered:
  """Return the text, or None and the first rule that it breaks.

  The papers leave open what a repetition is: here, what was there before, without the first time.
  """
  page = Page(text)
  for name, (measure, least, most) in rules.items():
    if not least <= measure(page) <= most:
      return None, {name: 1}
  return text, {}


# Which marks of a citation may be taken away without making a new one of what stands around it.
_CITATION = re.compile(r'\[(?:\d*|edit|citation needed)\](?![\w\]]| needed\])')
C4_LINES: LineRules = {
  'end_mark': lambda line: line.endswith(('.', '?', '!', '"', '”')) and not line.endswith('...'),
  'words': lambda line: len(line.split()) >= 5,
  'word_length': lambda line: max(map(len, line.split())) <= 1000,
  'javascript': lambda line: 'javascript' not in line.lower(),
  'policy': lambda line: not re.search(
    'terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies',
    line.lower()),
}
C4_PAGES: Rules = {
  'lorem_ipsum': (lambda page: 'lorem ipsum' in page.text.lower(), 0, 0),
  'curly_bracket': (lambda page: '{' in page.text, 0, 0),
  'sentences': (lambda page: len(re.findall(r'[.?!]+["”]?(?=\s|$)', page.text)), 3, np.inf),
}


def c4(text: str) -> Filtered:
  """Drop lines and documents, and marks of citations, as C4 did.

  Left out are its list of bad words, its language (a step of its own) and the deduplication of
  three sentences; sentences are counted by their end marks.
  """
  lines = (_CITATION.sub('', line).strip() for line in text.split('\n'))
  return _drop_lines(filter(None, lines), C4_LINES, C4_PAGES)


_BOILERPLATE_WORDS = re.compile(
  r'^sign[ -]in\b|read more\W*$|items in cart|all rights reserved|skip to (?:main )?content'
  r'|(?:terms of|privacy|cookie) (?:use|service|policy)|accept (?:all )?cookies', re.IGNORECASE)
BOILERPLATE: LineRules = {
  'upper_case': lambda line: 2 * sum(map(str.isupper, line)) <= len(line),
  'numbers': lambda line: any(map(str.isalpha, line)),
  'counter': lambda line: not re.fullmatch(
    r'[\d.,]+[km]?\s+(?:likes?|shares?|comments?|retweets?|reposts?|quotes?|views?|downloads?)',
    line.strip(), re.IGNORECASE),
  'one_word': lambda line: len(words(line)) > 1,
  'phrase': lambda line: len(line.split()) > 10 or not _BOILERPLATE_WORDS.search(line.strip()),
}


def boilerplate(text: str) -> Filtered:
  """Drop the lines of a page that are buttons, counters and notices; empty lines stay.

  The phrases are more than the paper's three, and their lines go whole; documents that lose more
  than 5% of their words are kept, which the paper dropped.
  """
  return _drop_lines(text.split('\n'), BOILERPLATE, {})


def _drop_lines(lines: Iterable[str], rules: LineRules, pages: Rules) -> Filtered:
  kept, found = [], Counter[str]()
  for line in lines:
    broken = next((name for name, obeys in rules.items() if line.strip() and not obeys(line)), None)
    if broken:
      found[broken] += 1
    else:
      kept.append(line)
  cleaned, dropped = obey(pages, '\n'.join(kept))
  return cleaned, found + Counter(dropped)
