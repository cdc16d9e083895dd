"""Facts in the files beside a vocabulary: special and added tokens, chat templates, the class.

A `tokenizer.json` says how text is cut; a `vocab.json` with `merges.txt` leaves that to the class
that `tokenizer_config.json` names. `CLASSES` holds those that are known.

Reference:
  The tokenizers of github.com/huggingface/transformers, version 5.
"""

import functools
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.mistakes import parse_json

Files = Mapping[str, bytes]

CONFIG, GENERATION, CHAT = (
  'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja')
DIGIT = r'\p{N}'
END = '<|endoftext|>'
_ENDS = {'bos_token': END, 'eos_token': END, 'unk_token': END}
_NAMES = tuple(f'{name}_token' for name in ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask'))
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
_LISTS = ('additional_special_tokens', 'extra_special_tokens')


class ByteLevelClass(NamedTuple):
  """A class of byte-level BPE.

  Attributes:
    tokens: names of its special tokens, where the files do not name them.
    composed: whether text is composed first (Unicode NFC).
    cuts: see `byte_level`.
  """

  tokens: Mapping[str, str] = _ENDS
  composed: bool = False
  cuts: tuple[str, ...] = ()


CLASSES: Mapping[str, ByteLevelClass] = {
  'GPT2Tokenizer': ByteLevelClass(),
  'CodeGenTokenizer': ByteLevelClass(),
  'GPTNeoXTokenizer': ByteLevelClass({**_ENDS, 'pad_token': '<|padding|>'}, composed=True),
  'Qwen2Tokenizer': ByteLevelClass(
    {'eos_token': END, 'unk_token': END, 'pad_token': END}, composed=True,
    cuts=(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
          r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+',)),
}


def settings(files: Files) -> dict[str, Any]:
  """Return the keys of tokenizer_config.json and special_tokens_map.json.

  Where the former lists its added tokens, it is newer than the latter, which is not read.

  Raises:
    ValueError: one is damaged, or a special token is no text.
  """
  keys: dict[str, Any] = {}
  for name in (CONFIG, 'special_tokens_map.json'):
    if 'added_tokens_decoder' in keys:
      break
    keys.update(parsed(files, name))
  for name in _LISTS:
    if not isinstance(keys.get(name) or [], list | dict):
      raise ValueError(f'{name}={keys[name]!r}: a list or an object of tokens is needed')
  for name in _NAMES:
    token = text_of(keys.get(name))
    if token is not None and not isinstance(token, str):
      raise ValueError(f'{name}={keys[name]!r}: a text, or an object with its content, is needed')
  return keys


def parsed(files: Files, name: str) -> dict[str, Any]:
  """Return the JSON object of a file; {} where there is no such file, a ValueError for others."""
  found = parse_json(files.get(name, b'{}'), f'{name}: not a JSON object')
  if not isinstance(found, dict):
    raise ValueError(f'{name}: not a JSON object: {found!r:.60}')
  return found


def eos_token_ids(files: Files) -> tuple[int, ...]:
  """Return the ids that end a generation, as generation_config.json names them."""
  value = parsed(files, GENERATION).get('eos_token_id')
  # -1 stands for none, in older files.
  ids = [i for i in (value if isinstance(value, list) else [value]) if i not in (None, -1)]
  if not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
    raise ValueError(f'{GENERATION}: eos_token_id={value!r:.60}: ids of tokens are needed')
  return tuple(ids)


def add_bos(files: Files) -> bool:
  """Return whether prompts of this model begin with BOS.

  tokenizer_config.json says so, or else the tokenizer.json does it to every text; SentencePiece
  models alone are of families that do.
  """
  said = parsed(files, CONFIG).get('add_bos_token')
  if isinstance(said, bool):
    return said
  if 'tokenizer.json' not in files:
    return 'tokenizer.model' in files
  processor = parsed(files, 'tokenizer.json').get('post_processor') or {}
  steps = processor.get('processors') if processor.get('type') == 'Sequence' else [processor]
  return any('SpecialToken' in first for step in steps or []
             if step.get('type') == 'TemplateProcessing' for first in step['single'][:1])


def chat_templates(files: Files) -> dict[str, str]:
  """Return the chat templates by name: of their own file, or those in tokenizer_config.json."""
  if CHAT in files:
    return {'default': files[CHAT].decode('utf-8')}
  said = parsed(files, CONFIG).get('chat_template')
  if isinstance(said, str):
    return {'default': said}
  items = [item for item in said if isinstance(item, dict)] if isinstance(said, list) else []
  return {item['name']: item['template'] for item in items
          if isinstance(item.get('name'), str) and isinstance(item.get('template'), str)}


def class_of(keys: Mapping[str, Any]) -> ByteLevelClass:
  """Return the class that the settings name, GPT-2's where they name none, if it is known."""
  name = keys.get('tokenizer_class') or 'GPT2Tokenizer'
  known = CLASSES.get(str(name).removesuffix('Fast'))
  if known is None:
    raise ValueError(
      f'tokenizer_config.json: tokenizer_class={name!r}: how it cuts text is not known without a '
      f'tokenizer.json; put that there (known by vocab.json and merges.txt: {", ".join(CLASSES)})')
  return known


def text_of(token: Any) -> Any:
  """Return the text of a special token, which may be an object with its content."""
  return token.get('content') if isinstance(token, Mapping) else token


def byte_level(
  vocab: dict[str, int], merges: Sequence[tuple[str, str]], cuts: Sequence[str] = (),
  composed: bool = False, prefix_space: bool = False, ignore_merges: bool = False,
) -> Any:
  """Build a byte-level BPE of the tokenizers library.

  Args:
    vocab: piece in GPT-2's signs for bytes -> id.
    merges: pairs of pieces, in order.
    cuts: patterns that cut text one after the other before it is merged; none: as GPT-2 does.
    composed: whether text is composed first (Unicode NFC).
    prefix_space: whether a space is put before a text that begins without one.
    ignore_merges: whether a whole stretch that is a token becomes it, merges or not.
  """
  import tokenizers as library

  made = library.Tokenizer(library.models.BPE(vocab, merges, ignore_merges=ignore_merges))
  kinds = library.pre_tokenizers
  made.pre_tokenizer = kinds.Sequence([
    *(kinds.Digits(individual_digits=True) if cut == DIGIT
      else kinds.Split(library.Regex(cut), 'isolated') for cut in cuts),
    kinds.ByteLevel(prefix_space, use_regex=tuple(cuts) in ((), (DIGIT,)))])
  if composed:
    made.normalizer = library.normalizers.NFC()
  made.decoder = library.decoders.ByteLevel()
  return made


def add_tokens(inner: Any, files: Files, keys: Mapping[str, Any]) -> None:
  """Give a tokenizer of the tokenizers library the tokens that only the other files have.

  Args:
    inner: the tokenizer, which is changed.
    files: may hold added_tokens.json.
    keys: from `settings`.

  Raises:
    ValueError: a token has an id that belongs to another, or is damaged.
  """
  for i, token in sorted(listed(files, keys).items()):
    size = inner.get_vocab_size(with_added_tokens=True)
    there = inner.id_to_token(i) if 0 <= i < 2**32 else None
    if not size <= i < 2 * size + 1024 and there != token.content:
      raise ValueError(f'added token {token.content!r} has id {i}, which is {there!r} in the '
                       f'vocabulary of {size}')
    if inner.token_to_id(token.content) not in (None, i):
      raise ValueError(f'added token {token.content!r} has id {i}, but in the vocabulary '
                       f'{inner.token_to_id(token.content)}')
    # The library numbers without gaps.
    inner.add_special_tokens([f'<|unused {hole}|>' for hole in range(size, i)])
    inner.add_tokens([token])
  added = {token.content for token in inner.get_added_tokens_decoder().values()}
  inner.add_tokens([token for token in special(keys) if token.content not in added
                    and inner.token_to_id(token.content) is not None])


def listed(files: Files, keys: Mapping[str, Any]) -> dict[int, Any]:
  """Return the added tokens that a file gives an id."""
  from tokenizers import AddedToken

  named = {text_of(keys.get(name)) for name in _NAMES}
  found = keys.get('added_tokens_decoder')
  try:
    if found is None:
      texts = {token.content for token in special(keys)}
      ids = parsed(files, 'added_tokens.json')
      found = {i: {'content': text, 'special': text in texts, 'normalized': False}
               for text, i in ids.items()}
    return {
      int(i): AddedToken(token['content'], **{
        flag: bool(token[flag]) or flag == 'special' and token['content'] in named
        for flag in _FLAGS if flag in token})
      for i, token in found.items()}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError('added_tokens.json or added_tokens_decoder of tokenizer_config.json: no table '
                     f'of tokens and ids: {error!r}') from None


def special(keys: Mapping[str, Any]) -> Iterator[Any]:
  """Yield the special tokens that the settings name."""
  from tokenizers import AddedToken

  lists = [keys.get(name) or () for name in _LISTS]
  tokens = [keys.get(name) for name in _NAMES]
  for token in [*tokens, *(token for one in lists for token in (
      one.values() if isinstance(one, Mapping) else one))]:
    text = text_of(token)
    if isinstance(text, str) and text:
      flags = token if isinstance(token, Mapping) else {}
      yield AddedToken(text, special=True, **{
        flag: bool(flags[flag]) for flag in _FLAGS[:-1] if flag in flags})


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
    self._spelled = spelled(tuple(self._chars))

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


@functools.lru_cache(maxsize=16)
def spelled(special: tuple[str, ...]) -> re.Pattern[str]:
  """Return the pattern, one group, of texts that spell special tokens; the longest one wins."""
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


def ids_of(inner: Any, text: str) -> list[int]:
  """Return the ids of a text by a tokenizer of the tokenizers library, without special tokens."""
  if len(text) < 1000:
    return inner.encode(text, add_special_tokens=False).ids
  # Other threads run meanwhile; `encode` would let none.
  return inner.encode_batch_fast([text], add_special_tokens=False)[0].ids


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
        ids += ids_of(sealed, text)
      else:
        ids += [part for part in run if isinstance(part, int)]
    return ids

  return encode
