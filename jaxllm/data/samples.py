"""What cleaning and a tokenizer do on the first documents of each source, for people to look at."""

import collections
import difflib
import functools
import importlib.util
import itertools
import os
import re
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import batches, parallel, redaction
from jaxllm.data.cleaning import STEPS, CleaningConfig, cleaner, language_of
from jaxllm.data.documents import SourceConfig, located
from jaxllm.data.duplicates import words
from jaxllm.data.tokenizers import Tokenizer

MOST_CHARACTERS = 20_000_000
_SHOWN, _AROUND, _WINDOW, _PIECES = 500, 60, 1500, 400
_RATIOS = (('characters', 'token'), ('bytes', 'token'), ('tokens', 'word'), ('parts', 'token'),
           ('unknown', 'token'))


class Look(NamedTuple):
  """What cleaning did to documents of a source, and what it left of them: (place, text)."""

  source: SourceConfig
  counts: Counter[str]
  seconds: float
  kept: list[tuple[str, str]]


def rehearse(
  sources: Sequence[SourceConfig], config: CleaningConfig, count: int = 1000, most: int = 3
) -> tuple[list[Look], list[dict[str, Any]]]:
  """Clean the first documents of each source, `count` in all, and count as `cleaner` does.

  Texts are kept up to `MOST_CHARACTERS`. Of each step `most` texts that it changed are samples, and
  as many that it dropped, JSON-able.
  """
  looks, run, room = list[Look](), cleaner(config), MOST_CHARACTERS
  drawn: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
  for source in sources:
    look, begin = Look(source, Counter(), 0.0, []), time.perf_counter()
    for document, row in itertools.islice(located(source), -(-count // len(sources))):
      text, steps = run(document)
      look.counts.update(steps, documents=1, dropped=not text, before=len(document),
                         after=len(text or ''))
      if text and len(text) <= room:
        room -= len(text)
        look.kept.append((row.where, text))
      for step, _, kind in (name.partition('.') for name in steps):
        if kind in ('changed', 'dropped') and len(document) <= MOST_CHARACTERS:
          why = [name.removeprefix(f'{step}.') for name in steps if name.startswith(f'{step}.')]
          few = drawn[step, kind]
          few.append((zlib.crc32(document.encode()), row.where, document, ', '.join(why[2:])))
          few.sort()
          del few[most:]
    looks.append(look._replace(seconds=time.perf_counter() - begin))
  samples = []
  for step in dict.fromkeys((*config.steps, 'min_characters')):
    earlier = [STEPS[name](config) for name in itertools.takewhile(step.__ne__, config.steps)
               if name in STEPS and name != 'decontaminate']
    for kind in ('changed', 'dropped'):
      for _, where, text, why in drawn[step, kind]:
        text = functools.reduce(lambda text, run: run(text)[0], earlier, text)
        after = STEPS[step](config)(text)[0] if kind == 'changed' else None
        samples.append({'step': step, 'where': where, 'why': why, 'dropped': after is None,
                        'pieces': differences(text, after)})
  return looks, samples


def differences(before: str, after: str | None) -> list[tuple[str, str]]:
  """Return an excerpt from the first difference on, in pieces that are 'same', 'gone' or 'new'.

  Personal data is masked, and characters that nobody sees are given by their numbers.
  """
  before, known = redaction.masked(before)
  if after is None:
    return [('same', visible(before[:_SHOWN]))]
  after, found_then = redaction.masked(after)
  if any(found_then[kind] > known[kind] for kind in found_then):
    return [('same', '(left out, as only after this step its personal data can be told)')]
  start = max(0, len(os.path.commonprefix([before, after])) - _AROUND)
  old, new = (re.findall(r'\w+|\s+|[^\w\s]', text[start:start + _WINDOW])[:_PIECES]
              for text in (before, after))
  changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
  # Where one of both is cut the other goes on, up to what they have in common for the last time.
  cut = [sum(map(len, old)), sum(map(len, new))] != [len(before) - start, len(after) - start]
  while cut and len(changes) > 2 and not (
      changes[-1][0] == 'equal' and changes[-1][2] - changes[-1][1] > 3):
    changes.pop()
  found = [('same', '…')] if start else []
  for kind, a, b, c, d in changes:
    gone, fresh = ''.join(old[a:b]), ''.join(new[c:d])
    if kind != 'equal':
      found += [(name, visible(text[:_SHOWN], blanks=True))
                for name, text in (('gone', gone), ('new', fresh)) if text]
    else:
      short = gone if len(gone) <= 2 * _AROUND else f'{gone[:_AROUND]} … {gone[-_AROUND:]}'
      found.append(('same', visible(short)))
    if sum(len(text) for _, text in found) > _SHOWN:
      break
  return found


def visible(text: str, blanks: bool = False) -> str:
  """Return the text with the numbers of invisible characters, those of blanks where asked for."""
  signs = {'\n': '↵\n', ' ': '␣', '\t': '⇥'} if blanks else {'\n': '\n', ' ': ' ', '\t': '\t'}
  unseen = ('Cc', 'Cf', 'Cn', 'Co', 'Zl', 'Zp', *(['Zs'] if blanks else ()))
  return ''.join(signs.get(one) or (
    f'⟨U+{ord(one):04X}⟩' if unicodedata.category(one) in unseen else one) for one in text)


def measure(
  tokenizer: Tokenizer, texts: Mapping[str, Sequence[tuple[str, str]]], most: int = 10
) -> dict[str, Any]:
  """Return how a tokenizer does on texts of sources, (place, text) each, JSON-able.

  Fertility is tokens per word, by language where py3langid is installed, else by source. A token
  that is a part of a character is one of bytes that are no text by themselves.
  """
  by_language = importlib.util.find_spec('py3langid') is not None
  special = set(tokenizer.special_tokens.values())
  parts = {i for i, piece in enumerate(tokenizer.id_bytes)
           if piece and not piece.decode(errors='ignore')}

  def look(item: tuple[str, tuple[str, str]]) -> tuple[str, Counter[str], dict[str, str]]:
    source, (where, text) = item
    ids, again, why = [], text, ''
    try:
      ids = tokenizer.encode(text)
      again = tokenizer.decode(ids)
    except ValueError as error:
      why = str(error)
    if again != text:
      at = len(os.path.commonprefix([text, again]))
      lost, found = (redaction.masked(one)[0][at:at + 20] for one in (text, again))
      why = f'{lost!r} comes back as {found!r}'
    return language_of(text) if by_language else source, Counter(
      documents=1, characters=len(text), bytes=len(text.encode()), tokens=len(ids),
      words=len(words(text)), parts=sum(map(parts.__contains__, ids)),
      unknown=sum(map(special.__contains__, ids)), failures=bool(why),
    ), {'where': where, 'why': visible(why)}

  groups: dict[str, Counter[str]] = collections.defaultdict(Counter)
  failures = []
  items = ((source, one) for source, several in texts.items() for one in several)
  for group, counts, failure in parallel.map_ahead(look, items, os.cpu_count()):
    groups['all'].update(counts)
    groups[group].update(counts)
    failures += [failure] if failure['why'] else []
  return {
    'by': 'language' if by_language else 'source', 'first_failures': failures[:most], 'groups': {
      name: {**counts, **{f'{of}_per_{per}': counts[of] / max(counts[f'{per}s'], 1)
                          for of, per in _RATIOS}}
      for name, counts in sorted(groups.items(), key=lambda item: -item[1]['characters'])}}


def usage(tokenizer: Tokenizer, stored: batches.Stored, most: int = 40) -> dict[str, Any]:
  """Return which pieces are targets in the records, all of which are read, and how often."""
  def text(i: int) -> str:
    return visible(tokenizer.id_bytes[i].decode(errors='backslashreplace'), True).replace('\n', '')

  counts_V = np.zeros(stored.vocab_size, np.int64)
  for _, _, ids in batches.runs(stored, range(len(stored.rows))):
    counts_V += np.bincount(ids[1:], minlength=len(counts_V))
  pieces = [i for i, piece in enumerate(tokenizer.id_bytes) if piece]
  unused = [i for i in pieces if not counts_V[i]]
  longer = [i for i in unused if len(tokenizer.id_bytes[i]) > 1]
  return {
    'targets': int(counts_V.sum()), 'pieces': len(pieces), 'unused': len(unused),
    'unused_bytes': len(unused) - len(longer), 'first_unused': [*map(text, longer[:most])],
    'most_frequent': [(text(i), int(counts_V[i])) for i in sorted(
      pieces, key=lambda i: -counts_V[i])[:most] if counts_V[i]]}
