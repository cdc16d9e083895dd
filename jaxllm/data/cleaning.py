"""Cleaning of text: named steps, each a pure function of a document, and what they did.

`cleaner` runs the steps of a `CleaningConfig`: those of `STEPS`, each on a document alone, in
`stages` that end with one `ACROSS` documents. A step that is run again on what it returned changes
nothing.
"""

import functools
import html
import html.parser
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from jaxllm.config import Config
from jaxllm.data import duplicates, filters, redaction
from jaxllm.data.documents import Sources, documents
from jaxllm.data.duplicates import Comparison, Filtered, Step


class CleaningConfig(Config):
  """Which steps of cleaning run. By default none does, and text goes through untouched."""

  steps: tuple[Literal[
    'mojibake', 'html', 'article', 'control', 'bidi', 'nfc', 'whitespace', 'boilerplate', 'c4',
    'gopher_quality', 'gopher_repetition', 'language', 'redact', 'exact_duplicates',
    'near_duplicates', 'decontaminate'], ...] = ()
  """Steps in the order in which they run: 'mojibake' repairs text that was decoded wrongly, 'html'
  keeps the text of a page, 'article' that of its article alone (a page has <html> or <body>),
  'control' drops control characters, 'bidi' marks of the direction of writing, 'nfc' composes
  accents, 'whitespace' joins runs of blanks and of empty lines, 'boilerplate' drops lines that are
  buttons, counters and notices. 'c4', 'gopher_quality' and 'gopher_repetition' are the published
  filters of `data/filters.py`, 'language' keeps `languages`, 'redact' puts [EMAIL], [PHONE], [IP],
  [CARD], [IBAN] and [KEY] in the place of such data. 'exact_duplicates' and 'near_duplicates' keep
  the first of what is alike in all sources, 'decontaminate' drops what shares 13 words in a row
  with `evaluation`. 'article', 'language' and 'near_duplicates' need the extra clean."""
  min_characters: int = pydantic.Field(default=1, ge=1)
  """Documents that are shorter after these steps are dropped."""
  languages: tuple[str, ...] = pydantic.Field(default=('en',), min_length=1)
  """The languages that the step 'language' keeps, by their codes of two letters (ISO 639-1)."""
  similarity: float = pydantic.Field(default=0.8, gt=0, le=1)
  """The share of runs of 5 words, of those in either text, that near duplicates have in common."""
  evaluation: Sources = ()
  """Sources of the evaluation texts that the step 'decontaminate' looks for."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'CleaningConfig':
    if bool(self.evaluation) != ('decontaminate' in self.steps):
      raise ValueError(f'evaluation={[source.location for source in self.evaluation]}: expected '
                       "sources where steps has 'decontaminate', and there alone")
    return self

  def facts(self) -> dict[str, Any]:
    """Return what decides the cleaned texts but `evaluation`, for the records' fingerprint."""
    # Records from before a field existed stay valid while it has its default.
    fields = self.model_dump(mode='json', include={'steps', 'min_characters'})
    fields |= self.model_dump(mode='json', exclude_defaults=True, exclude={'evaluation'})
    # Since 'html' keeps what only looks like a tag.
    return fields | ({'html': 2} if 'html' in self.steps else {})


Cleaned = tuple[str | None, Counter[str]]


class Stage(NamedTuple):
  """Steps on documents one by one, and after them one that compares documents.

  Attributes:
    clean: runs the steps; a function of the document alone.
    name: of the step that compares, '' for the last stage, which has none.
    comparison: how it does.
  """

  clean: Callable[[str], Cleaned]
  name: str = ''
  comparison: Comparison | None = None


Passed = tuple[str | None, Mapping[str, int], bytes | None]
"""A document after the steps of a stage, what they did, and its key for the comparison."""


def stages(config: CleaningConfig, others: bool = True) -> list[Stage]:
  """Return the steps, cut at those `ACROSS`; without others and their texts, these are left out."""
  found: list[Stage] = []
  steps: list[tuple[str, Step]] = []
  for name in config.steps:
    if name in ACROSS and others:
      found.append(Stage(functools.partial(_run, steps), name, ACROSS[name](config)))
      steps = []
    elif name not in ACROSS and (others or name != 'decontaminate'):
      steps.append((name, STEPS[name](config)))
  steps.append(('min_characters', lambda text: (
    text if len(text) >= config.min_characters else None, {})))
  return [*found, Stage(functools.partial(_run, steps))]


def _run(steps: Sequence[tuple[str, Step]], text: str) -> Cleaned:
  counts: Counter[str] = Counter()
  for name, step in steps:
    cleaned, found = step(text)
    if cleaned != text:
      counts[f'{name}.{"dropped" if cleaned is None else "changed"}'] += 1
      counts[f'{name}.characters'] += len(text) - len(cleaned or '')
      counts.update({f'{name}.{kind}': number for kind, number in found.items()})
    if cleaned is None:
      return None, counts
    text = cleaned
  return text, counts


def passed(stages: Sequence[Stage], text: str) -> Iterator[Passed]:
  """Yield what each stage makes of a document that no comparison drops; it compares nothing."""
  for stage in stages:
    cleaned, counts = stage.clean(text)
    if cleaned is None:
      yield None, counts, None
      return
    text = cleaned
    yield text, counts, stage.comparison.key(text) if stage.comparison else None


def comparer(stages: Sequence[Stage]) -> Callable[[Iterable[Passed]], Cleaned]:
  """Return a function to call with what `passed` gives for one document after the other."""
  keepers = [stage.comparison.keeper() if stage.comparison else None for stage in stages]

  def compare(passes: Iterable[Passed]) -> Cleaned:
    total: Counter[str] = Counter()
    text: str | None = None
    for stage, keep, (text, counts, key) in zip(stages, keepers, passes, strict=False):
      total.update(counts)
      if text is not None and keep and key is not None and not keep(key):
        total.update({f'{stage.name}.dropped': 1, f'{stage.name}.characters': len(text)})
        return None, total
    return text, total

  return compare


Chunk = tuple[int, int, Sequence[str]]
"""Documents that follow each other: the number of their source, of the first in it, their texts."""


def chunk_passer(config: str) -> Callable[[Chunk], Any]:
  """Return a function from a chunk to all that `passed` gives for each document, with its size.

  It takes and gives what marshal knows, for `parallel.processes`; `config` is JSON.
  """
  found = stages(CleaningConfig.from_json(config))
  return lambda chunk: (*chunk[:2], [
    (len(text), [(cleaned, dict(counts), key) for cleaned, counts, key in passed(found, text)])
    for text in chunk[2]])


def cleaner(config: CleaningConfig) -> Callable[[str], Cleaned]:
  """Return a function from a document to the cleaned one, or None, and what each step did.

  Its counts are named 'STEP.changed' and 'STEP.dropped' (documents), 'STEP.characters' (those that
  the step took away, below 0 where it added some) and by what the step itself counts. It is to be
  called with all documents in order, as some steps compare them.
  """
  found = stages(config)
  compare = comparer(found)
  return lambda text: compare(passed(found, text))


def clean(text: str, config: CleaningConfig) -> str | None:
  """Return a document after all steps that need no other text; None: it is to be dropped."""
  return stages(config, others=False)[0].clean(text)[0]


def repair_mojibake(text: str) -> str:
  """Undo decoding with the wrong encoding ('schÃ¶n' -> 'schön'), line by line; needs ftfy."""
  import ftfy
  if text.isascii():
    return text
  return '\n'.join(ftfy.fix_encoding(line) for line in text.split('\n'))


def strip_html(text: str) -> str:
  """Return the visible text of HTML, one line per block; scripts, styles and comments go.

  What would be a tag or a character reference if it were read again stays escaped ('&lt;b>'), and
  what names no element of HTML ('<int>', '<a@b.com>') stays as it is.
  """
  last = text.rfind('>') + 1  # No tag ends after it.
  if not _MARKUP.search(text, 0, last):
    return _escaped(html.unescape(text)) if '&' in text else text
  parser = _TextParser()
  # The parser would look for the end of each tag in vain, in time that grows with the square.
  parser.feed(_NO_MARKUP.sub('&lt;', text[:last]) + text[last:].replace('<', '&lt;'))
  parser.close()
  runs = [''.join(pieces) for pieces in parser.runs]
  runs[::2] = [re.sub(r'\n\s*\n\s*', '\n\n', run) for run in runs[::2]]
  runs[1::2] = [run.removeprefix('\n').rstrip('\n') for run in runs[1::2]]
  runs[0] = runs[0].lstrip()
  runs[-1] = runs[-1].rstrip()
  return _escaped(''.join(runs))


def _escaped(text: str) -> str:
  """Escape what `strip_html` would take for markup."""
  text = _REFERENCE.sub(lambda m: m[0] if html.unescape(m[0]) == m[0] else f'&amp;{m[0][1:]}', text)
  last = text.rfind('>') + 1
  return _MARKUP.sub(lambda m: f'&lt;{m[0][1:]}', text[:last]) + text[last:]


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


def drop_direction_marks(text: str) -> str:
  """Drop the invisible marks of the direction of writing; one between two words becomes a space."""
  return _BIDI.sub('', _BIDI_BETWEEN_WORDS.sub(' ', text))


def keep_article(text: str) -> str:
  """Return the text of a page's article, without menus and the like; needs trafilatura."""
  if not re.search(r'<(?:html|body)[\s>]', text, re.IGNORECASE):
    return text
  import trafilatura
  return _escaped(trafilatura.extract(text, include_comments=False) or '')


def _language(config: CleaningConfig) -> Step:
  language_of('')  # Refused before anything is read.
  from py3langid.langid import IDENTIFIER
  if unknown := sorted({*config.languages} - {*IDENTIFIER.labels}):
    raise ValueError(f"cleaning.languages: {unknown[0]!r} is no code of py3langid's, as 'en' is")

  def step(text: str) -> Filtered:
    language = language_of(text)
    return (text, {}) if language in config.languages else (None, {language: 1})

  return step


def language_of(text: str) -> str:
  """Return the code of a text's language, from its beginning; needs py3langid."""
  import py3langid
  return py3langid.classify(text[:100_000])[0]


def _rewriting(function: Callable[[str], str]) -> Callable[[CleaningConfig], Step]:
  return lambda config: lambda text: (function(text), {})


def _pure(step: Step) -> Callable[[CleaningConfig], Step]:
  return lambda config: step


STEPS: Mapping[str, Callable[[CleaningConfig], Step]] = {
  'mojibake': _rewriting(repair_mojibake),
  'html': _rewriting(strip_html),
  'article': _rewriting(keep_article),
  'control': _rewriting(drop_control_characters),
  'bidi': _rewriting(drop_direction_marks),
  'nfc': _rewriting(functools.partial(unicodedata.normalize, 'NFC')),
  'whitespace': _rewriting(join_whitespace),
  'boilerplate': _pure(filters.boilerplate),
  'c4': _pure(filters.c4),
  'gopher_quality': _pure(functools.partial(filters.obey, filters.GOPHER_QUALITY)),
  'gopher_repetition': _pure(functools.partial(filters.obey, filters.GOPHER_REPETITION)),
  'language': _language,
  'redact': _pure(redaction.redact),
  'decontaminate': lambda config: duplicates.not_in(
    text for source in config.evaluation for text in documents(source)),
}
"""Name -> function of the settings that makes the step, a function of documents."""
ACROSS: Mapping[str, Callable[[CleaningConfig], Comparison]] = {
  'exact_duplicates': lambda config: duplicates.exact(),
  'near_duplicates': lambda config: duplicates.near(config.similarity),
}
"""Name of a step that compares documents -> function of the settings that says how."""

_LINE_END = re.compile('\r\n|[\r\x0b\x0c\x1c-\x1e\x85]')
_CONTROL = re.compile('[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f\ufeff]+')
_BETWEEN_WORDS = re.compile(rf'(?<=\S)(?<!{_CONTROL.pattern[:-1]}){_CONTROL.pattern}(?=\S)')
_BIDI = re.compile('[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]+')
_BIDI_BETWEEN_WORDS = re.compile(rf'(?<=\w){_BIDI.pattern}(?=\w)')

_ELEMENTS = (
  'a abbr acronym address applet area article aside audio b base basefont bdi bdo big blockquote '
  'body br button canvas caption center cite code col colgroup data datalist dd del details dfn '
  'dialog dir div dl dt em embed fieldset figcaption figure font footer form frame frameset h1 h2 '
  'h3 h4 h5 h6 head header hgroup hr html i iframe img input ins kbd label legend li link main '
  'map mark marquee math menu meta meter nav nobr noembed noframes noscript object ol optgroup '
  'option output p param path picture plaintext pre progress q rb rp rt rtc ruby s samp script '
  'search section select slot small source span strike strong style sub summary sup svg table '
  'tbody td template textarea tfoot th thead time title tr track tt u ul var video wbr xmp').split()
# A tag of HTML or of an element of one's own (with - or :), a comment, a declaration.
_TAG = (rf'(?:/?(?:{"|".join(_ELEMENTS)}|[a-z][a-z0-9]*[-:][a-z][\w-]*)(?=[\s/>])'
        r'|!--|!doctype\b|!\[|\?)')
_MARKUP = re.compile(f'<{_TAG}', re.IGNORECASE)
_NO_MARKUP = re.compile(f'<(?!{_TAG})', re.IGNORECASE)
_REFERENCE = re.compile(r'&[^\t\n\f <&;]{1,32};?')
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
