"""Ids of ASCII texts by those of their words, in a fifth of the time that the library takes."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxllm.data import tokenizer_settings

# How words are cut: by GPT-2, Qwen and Llama 3.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN, = tokenizer_settings.CLASSES['Qwen2Tokenizer'].cuts
CUTS = (_QWEN, _QWEN.replace(r'\p{N}|', r'\p{N}{1,3}|'))
_ASCII = ((r'[^\s\p{L}\p{N}]', '[^\t-\r A-Za-z0-9]'), (r'[^\r\n\p{L}\p{N}]', r'[^\r\nA-Za-z0-9]'),
          (r'\p{L}', '[A-Za-z]'), (r'\p{N}', '[0-9]'), (r'\s', '[\t-\r ]'), (r'\S', '[^\t-\r ]'))


def finder(
  content: Mapping[str, Any], encode: Callable[[str], Sequence[int]]
) -> Callable[[str], list[int] | None]:
  """Return a function that gives the ids of an ASCII text by those of its words, once known.

  It gives None for other texts, and for all where words are cut in ways that are not known.

  Args:
    content: of a tokenizer.json.
    encode: gives the ids of a word.
  """
  before = content['pre_tokenizer'] or {}
  cuts = [*map(_cut, splits := before.get('pretokenizers') or [before])]
  model, normal = content['model'], content['normalizer']
  if None in cuts or splits[-1]['type'] != 'ByteLevel' or model['type'] != 'BPE' or (
      model['dropout'] or normal and normal != {'type': 'NFC'}):
    return lambda text: None
  finders = [re.compile(functools.reduce(lambda cut, pair: cut.replace(*pair), _ASCII, cut)).findall
             for cut in cuts if cut]
  # Special tokens in a text are text.
  added = [re.escape(token['content']) for token in content['added_tokens'] if not token['special']]
  has_added, known = re.compile('|'.join(added) or '(?!)').search, _Words(encode)

  def by_words(text: str) -> list[int] | None:
    # Other threads do not run while the words of a text are found.
    if not text.isascii() or len(text) > 2**17 or has_added(text):
      return None
    words: Iterable[str] = (text,)
    for find in finders:
      words = itertools.chain.from_iterable(map(find, words))
    return [*itertools.chain.from_iterable(map(known.__getitem__, words))]

  return by_words


def _cut(split: Mapping[str, Any]) -> str | None:
  """Return the pattern of the words that a pre-tokenizer makes; '': all is one; None: unknown."""
  match split:
    case {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': by_regex}:
      return _GPT2 if by_regex else ''
    case {'type': 'Digits', 'individual_digits': True}:
      return r'\p{N}|[^0-9]+'
    case {'type': 'Split', 'pattern': {'Regex': cut}, 'behavior': 'Isolated', 'invert': False}:
      return cut if cut in CUTS else None
  return None


class _Words(dict[str, tuple[int, ...]]):
  """The ids of words, encoded where they are not there."""

  def __init__(self, encode: Callable[[str], Sequence[int]]):
    super().__init__()
    self._encode = encode

  def __missing__(self, word: str) -> tuple[int, ...]:
    ids = (*self._encode(word),)
    if len(self) < 2**16 and len(word) <= 64:  # About 15 MB.
      self[word] = ids
    return ids
