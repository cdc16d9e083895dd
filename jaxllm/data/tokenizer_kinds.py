"""The kinds of tokenizers: `Tokenizer`, and a function that builds each kind from its files."""

import base64
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxllm.data import byte_level_words, parallel, tokenizer_settings
from jaxllm.data.tokenizer_settings import Files, Part

MARK = '\u2581'  # SentencePiece's own sign for a space.
_MOST_GROWTH = 1000
_BYTE = re.compile('<0x[0-9A-F]{2}>')


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to ids and back.

  `encode` adds no special tokens, and text that spells one ('<s>') stays plain text.
  """

  id_bytes: Sequence[bytes] = dataclasses.field(repr=False)
  """The bytes that each id stands for; none for special tokens."""
  bos_id: int | None
  eos_id: int | None
  pad_id: int
  special_tokens: Mapping[str, int] = dataclasses.field(repr=False)
  """Text -> id of the tokens that plain text never gives."""
  _encode: Callable[[str], list[int]] = dataclasses.field(repr=False)
  _encode_batch: Callable[[Sequence[str]], list[list[int]]] = dataclasses.field(repr=False)
  _decode: Callable[[Sequence[int]], str] = dataclasses.field(repr=False)
  _files: Files = dataclasses.field(repr=False)
  library: Any = dataclasses.field(repr=False, default=None)
  """The tokenizer of the tokenizers library that does the work; None: another library does."""
  joins_bytes: bool = True
  """Whether the text of ids is their bytes joined; if not, only `decode` gives it."""

  @property
  def vocab_size(self) -> int:
    """All ids are below this."""
    return len(self.id_bytes)

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text.

    Raises:
      ValueError: the vocabulary cannot express the text, or the library fails on it.
    """
    return self._never_special(text, self._encode(_valid(text)))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Return `encode` of each text, on all cores."""
    found = self._encode_batch([_valid(text) for text in texts])
    return [*map(self._never_special, texts, found)]

  def _never_special(self, text: str, ids: list[int]) -> list[int]:
    # A unigram model gives a piece that text spells, be it a special token.
    return ids if self._special_ids.isdisjoint(ids) else _no_panic(self._encode_parts, [text])

  @functools.cached_property
  def _special_ids(self) -> frozenset[int]:
    return frozenset(self.special_tokens.values())

  def encode_parts(self, parts: Sequence[Part]) -> list[int]:
    """Return the ids of one text in which tokens stand at given places.

    Args:
      parts: text, and ids of special tokens. Text never gives a special token, whatever it spells.

    Raises:
      ValueError: as `encode`.
    """
    parts = tokenizer_settings.joined([_valid(p) if isinstance(p, str) else p for p in parts])
    if len(parts) == 1 and isinstance(parts[0], str):
      return self.encode(parts[0])
    if self.library is not None:
      return _no_panic(self._encode_parts, parts)
    return [i for part in parts for i in ([part] if isinstance(part, int) else self.encode(part))]

  @functools.cached_property
  def _encode_parts(self) -> Callable[[Sequence[Part]], list[int]]:
    return tokenizer_settings.encoder(self.library, self.special_tokens)

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of ids: nothing for special tokens, U+FFFD for bytes that are not UTF-8.

    A model may have more ids than its tokenizer; they say nothing.
    """
    ids = [i for i in map(int, ids) if i < self.vocab_size]
    if ids and min(ids) < 0:
      raise ValueError(f'token id {min(ids)} is not in the vocabulary of {self.vocab_size}')
    return self._decode(ids)

  def files(self) -> dict[str, bytes]:
    """Return the files that build this tokenizer again, by name."""
    return dict(self._files)

  @functools.cached_property
  def eos_token_ids(self) -> tuple[int, ...]:
    """The tokens that end an answer: those of generation_config.json, and EOS."""
    ids = (*tokenizer_settings.eos_token_ids(self._files), self.eos_id)
    return tuple(dict.fromkeys(i for i in ids if i is not None))

  @functools.cached_property
  def add_bos(self) -> bool:
    """Whether the files say that prompts begin with BOS."""
    return tokenizer_settings.add_bos(self._files)

  @functools.cached_property
  def chat_templates(self) -> Mapping[str, str]:
    """The chat templates of the files by name, Jinja; 'default' is the usual one."""
    return tokenizer_settings.chat_templates(self._files)

  @property
  def chat_template(self) -> str | None:
    """The default chat template; None: there is none."""
    return self.chat_templates.get('default')

  @functools.cached_property
  def named_tokens(self) -> Mapping[str, Any]:
    """The special tokens by the names that chat templates know: {'bos_token': '<s>', ...}."""
    keys = tokenizer_settings.settings(self._files)
    texts = {i: text for text, i in self.special_tokens.items()}
    ids = {'bos_token': self.bos_id, 'eos_token': self.eos_id}
    named = {name: texts[i] for name, i in ids.items() if i in texts}
    said = {key: value for key, value in keys.items() if key.endswith('_token')}
    for name in ('extra_special_tokens', 'model_specific_special_tokens'):
      said |= keys[name] if isinstance(keys.get(name), dict) else {}
    found = {key: tokenizer_settings.text_of(value) for key, value in said.items()}
    return named | {key: text for key, text in found.items() if isinstance(text, str)}

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the files, as hexadecimal digits."""
    return fingerprint(self._files)


def fingerprint(files: Files) -> str:
  """Return the SHA-256 of files of a tokenizer, as hexadecimal digits."""
  digest = hashlib.sha256()
  for name, content in sorted(files.items()):
    digest.update(f'{name}\0{len(content)}\0'.encode() + content)
  return digest.hexdigest()


def _valid(text: str) -> str:
  if not text.isascii():
    text.encode()  # Half a surrogate pair is a ValueError here; the libraries differ.
  return text


def from_bytes(files: Files) -> Tokenizer:
  """Build the tokenizer whose ids are the 256 bytes, then one that begins and ends documents."""
  id_bytes = [*(bytes([value]) for value in range(256)), b'']
  return Tokenizer(
    id_bytes, 256, 256, 256, {}, lambda text: [*text.encode()],
    lambda texts: [[*text.encode()] for text in texts],
    functools.partial(_join_bytes, id_bytes), files)


def _join_bytes(id_bytes: Sequence[bytes], ids: Sequence[int]) -> str:
  return b''.join(id_bytes[i] for i in ids).decode('utf-8', errors='replace')


def from_sentencepiece(files: Files) -> Tokenizer:
  """Build a SentencePiece tokenizer from `tokenizer.model`.

  A literal U+2581, SentencePiece's sign for a space, is given by its three bytes, so that it comes
  back. The model's normalizer may lose more; models trained here have none.
  """
  import sentencepiece

  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=files['tokenizer.model'])
  except RuntimeError as error:
    is_tiktoken = re.match(rb'[A-Za-z0-9+/]+=* \d+\s', files['tokenizer.model'])
    why = ('it is one of tiktoken; put the tokenizer.json of the model there' if is_tiktoken
           else error)
    raise ValueError(f'tokenizer.model: not a SentencePiece model: {why}') from None
  id_bytes = [_piece_bytes(processor, i) for i in range(processor.vocab_size())]
  unknown = processor.unk_id()
  mark = [processor.piece_to_id(f'<0x{value:02X}>') for value in MARK.encode()]
  # Llama's models put a space before every text.
  prefixed = ''.join(processor.encode('a', out_type=str)).startswith(MARK)

  def encode(text: str) -> list[int]:
    parts = [text] if prefixed else text.split(MARK)
    ids = processor.encode(parts[0])
    for part in parts[1:]:
      ids += mark + processor.encode(part)
    if unknown in ids:
      strange = next(c for c in text if c == MARK or unknown in processor.encode(c))
      raise ValueError(f'the tokenizer has no id for {strange!r} (U+{ord(strange):04X}); train it '
                       'with byte_fallback=True, or clean the text')
    return ids

  decode = processor.decode if prefixed else functools.partial(_join_bytes, id_bytes)
  bos, eos, pad = (i if i >= 0 else None for i in (
    processor.bos_id(), processor.eos_id(), processor.pad_id()))
  special = {processor.id_to_piece(i): i for i in range(processor.vocab_size())
             if processor.is_control(i)}
  threads = os.cpu_count() or 1
  # SentencePiece lets go of Python's lock; its own batches do not.
  return Tokenizer(
    id_bytes, bos, eos, _padding(pad, eos), special, encode,
    lambda texts: [*parallel.map_ahead(encode, texts, threads, 4 * threads)], decode, files)


def _piece_bytes(processor: Any, i: int) -> bytes:
  piece = processor.id_to_piece(i)
  if processor.is_byte(i):
    return bytes([int(piece[3:5], 16)])
  if processor.is_control(i) or processor.is_unknown(i):
    return b''
  return piece.replace(MARK, ' ').encode()


def from_library(files: Files) -> Tokenizer:
  """Build a tokenizer from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

  BOS, EOS and padding are the tokens that `tokenizer_config.json` or `special_tokens_map.json`
  names, if they are there, or those of its class.
  """
  inner, named = _inner(files)
  content = json.loads(inner.to_str())
  for part in ('normalizer', 'pre_tokenizer', 'decoder'):
    for pattern in _patterns(content[part] or {}):
      _check_time(pattern)
    if _growth(content[part]) > _MOST_GROWTH:
      raise ValueError(f'tokenizer.json: its {part} makes texts more than {_MOST_GROWTH} times '
                       'longer, which no tokenizer needs')
  inner.encode_special_tokens = True  # Text that spells a special token stays text.
  inner.no_truncation()
  inner.no_padding()
  vocab = inner.get_vocab()
  size = max(vocab.values(), default=-1) + 1
  if size > 2 * len(vocab) + 1024:
    raise ValueError(f'tokenizer.json: {len(vocab)} tokens, but the highest id is {size - 1}')

  def special(name: str) -> int | None:
    return vocab.get(tokenizer_settings.text_of(named.get(name)))

  def encode(text: str) -> list[int]:
    ids = by_words(text)
    return _no_panic(tokenizer_settings.ids_of, inner, text) if ids is None else ids

  def encode_batch(texts: Sequence[str]) -> list[list[int]]:
    found = [*map(by_words, texts)]
    slow = [text for text, ids in zip(texts, found, strict=True) if ids is None]
    done = iter(_no_panic(inner.encode_batch_fast, slow, add_special_tokens=False) if slow else ())
    return [next(done).ids if ids is None else ids for ids in found]

  by_words = byte_level_words.finder(content, lambda word: _no_panic(
    inner.encode, word, add_special_tokens=False).ids)
  bos, eos, pad = (special(f'{name}_token') for name in ('bos', 'eos', 'pad'))
  # Text falls back to bytes, which some trainers list as special.
  fallback = getattr(inner.model, 'byte_fallback', False)
  added = {token.content: i for i, token in inner.get_added_tokens_decoder().items()
           if token.special and not (fallback and _BYTE.fullmatch(token.content))}
  id_bytes, joins = _library_bytes(inner, content['decoder'], vocab, size)
  return Tokenizer(
    id_bytes, bos, eos, _padding(pad, eos), added,
    encode, encode_batch,
    lambda ids: _no_panic(inner.decode, ids, skip_special_tokens=True), files, inner, joins)


def _inner(files: Files) -> tuple[Any, Mapping[str, Any]]:
  """Return (the tokenizer of the tokenizers library, its settings) that files describe."""
  import tokenizers

  named = tokenizer_settings.settings(files)
  if 'tokenizer.json' in files:
    try:
      inner = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
    except Exception as error:  # The library raises bare Exception.
      raise ValueError(f'tokenizer.json: {error}') from None
  else:
    known = tokenizer_settings.class_of(named)
    try:
      vocab = json.loads(files['vocab.json'])
      lines = files['merges.txt'].decode().replace('\r\n', '\n').split('\n')
      merges: Any = [tuple(line.split(' ')) for line in lines
                     if line and not line.startswith('#version')]
      inner = tokenizer_settings.byte_level(
        vocab, merges, known.cuts, known.composed, bool(named.get('add_prefix_space')))
    except Exception as error:  # The library raises bare Exception.
      raise ValueError(f'vocab.json and merges.txt: not a byte-level BPE: {error}') from None
    if missing := set(BYTE_SIGNS) - set(vocab):
      raise ValueError(f'vocab.json: {len(missing)} of the 256 bytes have no id of their own')
    named = {**known.tokens, **named}
  tokenizer_settings.add_tokens(inner, files, named)
  return inner, named


def _no_panic(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  try:
    return call(*args, **kwargs)
  except BaseException as error:
    # The Rust side panics with a class that is no Exception, as on a regex that runs away.
    if type(error).__name__ != 'PanicException' and type(error) is not Exception:
      raise
    raise ValueError(f'the tokenizer failed: {error}') from None


def _growth(rule: Any) -> float:
  """Return how many times longer a rule of a normalizer or decoder can make a text."""
  if not isinstance(rule, Mapping):
    return 1.0
  if rule.get('type') == 'Replace':
    return max(len(rule['content']) / max(len(rule['pattern'].get('String', '')), 1), 1.0)
  if rule.get('type') == 'Precompiled':  # The size of a table, the table, the texts that it gives.
    content = base64.b64decode(rule['precompiled_charsmap'])
    texts = content[4 + int.from_bytes(content[:4], 'little'):].split(b'\0')
    return max(1.0, *map(len, texts))
  return math.prod(map(_growth, rule.get('normalizers') or rule.get('decoders') or ()))


def _patterns(rule: Any) -> Iterator[str]:
  """Yield the regular expressions of a rule and of those inside of it."""
  for name, part in rule.items() if isinstance(rule, Mapping) else enumerate(rule):
    if name == 'Regex':
      yield part
    elif isinstance(part, Mapping | list):
      yield from _patterns(part)


@functools.lru_cache(maxsize=256)
def _check_time(pattern: str) -> None:
  """Refuse a regular expression whose time was seen to grow with the square of a text."""
  import tokenizers

  rule = tokenizers.normalizers.Replace(tokenizers.Regex(pattern), '')
  literal = re.findall(r'[^\W_]|[^\\()\[\]{}|*+?.^$]+', pattern)

  def seconds(text: str) -> float:
    start = time.thread_time()
    _no_panic(rule.normalize_str, text)
    return time.thread_time() - start

  for unit in dict.fromkeys(['a', ' ', '\n', '0', '.', *literal[:40]]):
    short, long = (f'{unit * (size // len(unit))}!' for size in (2000, 8000))
    # Of a regular one it takes a millisecond.
    if seconds(long) > 0.02 and min(seconds(long) for _ in range(3)) > 8 * seconds(short):
      raise ValueError(f'tokenizer.json: the time of its pattern {pattern!r:.60} grows with the '
                       f'square of a text of {unit!r:.20}')


def _library_bytes(
  inner: Any, decoder: Any, vocab: Mapping[str, int], size: int
) -> tuple[list[bytes], bool]:
  """Return the bytes that each id adds to a text, and whether they join to all of it."""
  steps = _decoding_steps(decoder)
  added = inner.get_added_tokens_decoder()
  id_bytes = [b''] * size
  if steps:
    for token, i in vocab.items():
      id_bytes[i] = _token_bytes(token, steps)
    for i, token in added.items():
      id_bytes[i] = b'' if token.special else token.content.encode()
    return id_bytes, True
  plain = [i for i in vocab.values() if i not in added or not added[i].special]
  alone = inner.decode_batch([[i] for i in plain])
  word = next(((i, text) for i, text in zip(plain, alone, strict=True) if text.isalpha()), None)
  if word is not None:
    # After a word a token may add a space.
    after = inner.decode_batch([[word[0], i] for i in plain])
    alone = [text.removeprefix(word[1]) for text in after]
  for i, text in zip(plain, alone, strict=True):
    id_bytes[i] = text.encode()
  return id_bytes, False


def _decoding_steps(decoder: Any) -> set[str]:
  """Return the steps of a decoder that joins the bytes of tokens; none: it does something else."""
  steps = decoder.get('decoders', [decoder]) if decoder else []
  known = all(
    step['type'] in ('ByteLevel', 'Metaspace', 'ByteFallback', 'Fuse')
    # SentencePiece leaves out a space at the beginning of a text.
    or step['type'] == 'Strip' and step['content'] == ' ' and not step['stop']
    or step['type'] == 'Replace' and (step['pattern'], step['content']) == ({'String': MARK}, ' ')
    for step in steps)
  return {step['type'] for step in steps} if known else set()


def _token_bytes(token: str, steps: set[str]) -> bytes:
  if 'ByteLevel' in steps and all(sign in BYTE_SIGNS for sign in token):
    return bytes(BYTE_SIGNS[sign] for sign in token)
  if 'ByteFallback' in steps and len(token) == 6 and token.startswith('<0x'):
    return bytes([int(token[3:5], 16)])
  return (token.replace(MARK, ' ') if steps & {'Metaspace', 'Replace'} else token).encode()


# GPT-2's sign of every byte: itself where it prints, else a letter from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_SIGNS = {chr(value): value for value in _PRINTABLE} | {
  chr(0x100 + i): value for i, value in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


def _padding(pad: int | None, eos: int | None) -> int:
  return next(i for i in (pad, eos, 0) if i is not None)
