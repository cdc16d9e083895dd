"""Text in which special tokens stand at given places, encoded in one call of the library.

The tokenizers library finds special tokens by their spelling, and a user may spell one. Here a copy
of the tokenizer has its special tokens spelled with a secret, so that text never gives one, and
what the library does around them (a space before the first word, white space that a token takes
with it) is done as ever.
"""

import functools
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Part = int | str
"""Plain text, or the id of a token."""


# The last plane of Unicode, for private use, and how JSON in ASCII writes its characters.
_PRIVATE = range(0x100000, 0x10FFFE)
_STAND_IN = re.compile('[\U00100000-\U0010fffd]' r'|\\udb[c-f][0-9a-f]\\ud[c-f][0-9a-f]{2}')


class StandIns:
  """Private characters in the place of special tokens that a text from outside spells.

  A template puts such texts together, and cannot take a character apart; it is put back in what is
  plain text once the special tokens that the template wrote are cut out.
  """

  def __init__(self, special: Iterable[str], given: Any):
    """Choose characters for special tokens that are not in `given`, a value of JSON's types."""
    used = set(json.dumps(given, ensure_ascii=False))
    free = (char for char in map(chr, _PRIVATE) if char not in used)
    self._chars = dict(zip(special, free, strict=False))
    self._texts = {char: text for text, char in self._chars.items()}
    self._spelled = spelled(self._chars)

  def hide(self, value: Any) -> Any:
    """Return the value with every special token replaced, in all its texts and names."""
    if isinstance(value, str):
      return self._spelled.sub(lambda match: self._chars[match[0]], value)
    if isinstance(value, Mapping):
      return {self.hide(key): self.hide(item) for key, item in value.items()}
    return [*map(self.hide, value)] if isinstance(value, list | tuple) else value

  def cut(self, text: str) -> list[tuple[str, bool]]:
    """Cut a text into (plain text as it was given or a special token, whether it is one)."""
    def put_back(match: re.Match[str]) -> str:
      return self._texts.get(json.loads(f'"{match[0]}"'), match[0])

    pieces = self._spelled.split(text)
    return [(piece if i % 2 else _STAND_IN.sub(put_back, piece), bool(i % 2))
            for i, piece in enumerate(pieces) if piece]


def spelled(special: Iterable[str]) -> re.Pattern[str]:
  """Return the pattern, one group, of texts that spell special tokens; the longest one wins."""
  return _spelled(tuple(special))


@functools.lru_cache(maxsize=16)
def _spelled(special: tuple[str, ...]) -> re.Pattern[str]:
  return re.compile(f'({_branches(special) or "(?!)"})')


def _branches(words: Sequence[str]) -> str:
  """Return a pattern in which every character is looked at once, be there thousands of words."""
  start = os.path.commonprefix(words)
  tails: dict[str, list[str]] = {}
  for word in words:
    tails.setdefault(word[len(start) : len(start) + 1], []).append(word[len(start) :])
  ends = tails.pop('', [])
  more = '|'.join(map(_branches, tails.values()))
  return re.escape(start) + (f'(?:{more}){"?" if ends else ""}' if more else '')


def joined(parts: Sequence[Part]) -> list[Part]:
  """Return the parts without empty texts, neighbouring texts as one."""
  result: list[Part] = []
  for part in parts:
    if isinstance(part, str) and result and isinstance(result[-1], str):
      result[-1] += part
    elif part != '':
      result.append(part)
  return result


def encoder(inner: Any, special: Mapping[str, int]) -> Callable[[Sequence[Part]], Any]:
  """Return the function from parts to ids.

  Args:
    inner: of the tokenizers library.
    special: text -> id of its special tokens.
  """
  import tokenizers

  secret = secrets.token_hex(16)
  # Whoever looks at the neighbours of a token sees the same characters.
  spelled = {text: f'{text[:1]}{secret}{i:08d}{text[-1:]}' for text, i in special.items()}
  content = json.loads(inner.to_str())
  for token in content['added_tokens']:
    token['content'] = spelled.get(token['content'], token['content'])
  # It checks that its tokens are there, and is not asked for them.
  content['post_processor'] = None
  model = content['model']
  vocab = model['vocab']
  model['vocab'] = (
    {spelled.get(piece, piece): i for piece, i in vocab.items()} if isinstance(vocab, dict)
    else [[spelled.get(piece, piece), score] for piece, score in vocab])
  if model.get('unk_token') is not None:
    model['unk_token'] = spelled.get(model['unk_token'], model['unk_token'])
  if 'merges' in model:
    # Text does not grow together to a special token.
    model['merges'] = [pair for pair in model['merges']
                       if not {*pair, ''.join(pair)} & spelled.keys()]
  sealed = tokenizers.Tokenizer.from_str(json.dumps(content))
  found = {text: sealed.token_to_id(secretly) for text, secretly in spelled.items()}
  if found != dict(special):
    raise ValueError('tokenizer.json: the ids of its special tokens are not those that it names')
  spellings = {i: spelled[text] for text, i in special.items()}
  # Between letters such a token is text, for the library and for us.
  single = {spelled[token.content]: token.content
            for token in inner.get_added_tokens_decoder().values()
            if token.single_word and token.content in spelled}
  either = '|'.join(map(re.escape, single))
  inside_word = re.compile(rf'(?<=\w)(?:{either})|(?:{either})(?=\w)')

  def encode(parts: Sequence[Part]) -> list[int]:
    ids: list[int] = []
    for known, run in itertools.groupby(parts, lambda p: isinstance(p, str) or p in spellings):
      if known:
        text = ''.join(part if isinstance(part, str) else spellings[part] for part in run)
        if single:
          text = inside_word.sub(lambda match: single[match[0]], text)
        ids += sealed.encode(text, add_special_tokens=False).ids
      else:
        ids += [part for part in run if isinstance(part, int)]
    return ids

  return encode
