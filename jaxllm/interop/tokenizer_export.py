"""Any tokenizer as the files that `transformers` reads.

A `tokenizer.json` is passed on; of SentencePiece models, GPT-2 vocabularies and bytes one is made,
and checked to give the same ids as the original.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxllm.data import tokenizer_kinds, tokenizer_settings, tokenizers
from jaxllm.data.tokenizer_kinds import MARK
from jaxllm.data.tokenizer_settings import CHAT, CONFIG, END, GENERATION
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.interop import sentencepiece_model
from jaxllm.interop.sentencepiece_model import texts
from jaxllm.models.config import DecoderConfig

Files = Mapping[str, bytes]

Prefix = Literal['sentencepiece', 'always', 'first', 'never']

# Kinds of pieces that no text gives.
_NEVER = (sentencepiece_model.CONTROL, sentencepiece_model.UNKNOWN, sentencepiece_model.UNUSED,
          sentencepiece_model.BYTE)
SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Text of many kinds, on which a tokenizer made anew must agree with its original.
_PROBES = (
  'The quick brown fox jumps over the lazy dog, 31,415 times in 2026.', ' leading', 'trailing ',
  'two  spaces,\ttab,\n\nnewlines\n', 'def f(x):\n    return x[0] ** 2  # ok', 'naïve Ærøskøbing',
  '机器学习很有趣', 'Привет, мир', '🦜🚀', 'aaaaaaaaaaaaaaaaaaaaaaa', '0000123456789', "don't",
  'x' * 40 + ' ' * 17 + 'y', '',
)


def huggingface_files(
  files: Files, config: DecoderConfig, add_bos: bool | None = None
) -> tuple[dict[str, bytes], dict[str, Any]]:
  """Return the files beside config.json, and the ids of special tokens for config.json.

  Args:
    files: of the tokenizer, as `Tokenizer.files()` or a model directory gives them; may be empty.
    add_bos: whether prompts begin with BOS; None: as the files say.

  Raises:
    ValueError: the tokenizer has ids that the model has not, or has no equal in a tokenizer.json.
  """
  import tokenizers as library

  if not files:
    return {}, dict.fromkeys(SPECIAL_IDS)
  tokenizer = tokenizers.from_files(files)
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(f'the tokenizer has {tokenizer.vocab_size} ids, the model only '
                     f'{config.vocab_size}')
  made = dict(files)
  add_bos = tokenizer.add_bos if add_bos is None else add_bos
  if tokenizer.library is not None:
    keys = json.loads(files.get('tokenizer.json', b'{}'))
    added = {i: {'id': i, **token.__getstate__()}
             for i, token in tokenizer.library.get_added_tokens_decoder().items()}
    if not keys or {token['id']: token for token in keys.get('added_tokens') or ()} != added:
      made['tokenizer.json'] = tokenizer.library.to_str().encode()
  elif 'tokenizer.json' not in made:
    kind = next(name for name in _MAKERS if name in files)
    content = _MAKERS[kind](files)
    check_equal(tokenizer, content)
    made['tokenizer.json'] = content
    made.pop('bytes.txt', None)
  inner: Any = library.Tokenizer.from_str(made['tokenizer.json'].decode())
  plain = isinstance(inner.post_processor, library.processors.ByteLevel | None)
  if add_bos and tokenizer.bos_id is not None and plain:  # That of bytes adds no token.
    _begin_with(inner, inner.id_to_token(tokenizer.bos_id), tokenizer.bos_id)
    made['tokenizer.json'] = inner.to_str().encode()
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id,
         'pad_token_id': tokenizer.pad_id if tokenizer.pad_id != tokenizer.eos_id else None}
  inner = tokenizers.from_files({'tokenizer.json': made['tokenizer.json']}).library
  names = {name.removesuffix('_id'): token for name, i in ids.items()
           if i is not None and (token := inner.id_to_token(i)) is not None}
  settings = json.loads(made.get(CONFIG, b'{}'))
  settings.pop('auto_map', None)
  if CHAT in made:
    settings['chat_template'] = made.pop(CHAT).decode()
  defaults = {
    'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
    'model_max_length': config.max_length, 'add_bos_token': add_bos}
  made[CONFIG] = json_bytes({**defaults, **names, **settings})
  made.setdefault('special_tokens_map.json', json_bytes(names))
  generation = json.loads(made.get(GENERATION, b'{}'))
  ids = {name: generation.get(name, value) for name, value in ids.items()}
  named = {name: value for name, value in ids.items() if value is not None}
  made[GENERATION] = json_bytes({**named, **generation})
  return made, ids


def json_bytes(value: Any) -> bytes:
  """Return indented JSON."""
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()


def from_sentencepiece(
  content: bytes, prefix: Prefix = 'sentencepiece', renamed: Mapping[int, str] | None = None
) -> bytes:
  """Make a tokenizer.json of a SentencePiece model.

  Two rare texts differ from the original: a literal U+2581 becomes a space; and in a unigram model
  that gives '<' by its byte, a text that spells '<s>' gives that token.

  Args:
    content: of tokenizer.model.
    prefix: where a model that puts a space before a text puts it. 'sentencepiece': before every
      stretch between special tokens; 'always': only before those without a space of their own;
      'first': only before such a beginning of a text; 'never'.
    renamed: id -> text of pieces that have another name now.
  """
  import tokenizers as library

  model = sentencepiece_model.parse(content)
  for i, text in (renamed or {}).items():
    model.pieces[i].piece = text.encode()
  made = library.Tokenizer(_inner(model))
  prefix = prefix if model.normalizer.dummy_prefix else 'never'
  normalizers: list[Any] = []
  if model.normalizer.charsmap:
    normalizers.append(library.normalizers.Precompiled(model.normalizer.charsmap))
  if model.normalizer.squeeze:
    normalizers += [library.normalizers.Replace(library.Regex(r'\A +| +\z'), ''),
                    library.normalizers.Replace(library.Regex(' {2,}'), ' ')]
  if prefix == 'sentencepiece':
    normalizers.append(library.normalizers.Prepend(MARK))
  made.normalizer = library.normalizers.Sequence(
    [*normalizers, library.normalizers.Replace(' ', MARK)])
  cuts: list[Any] = []
  if prefix in ('always', 'first'):
    cuts.append(library.pre_tokenizers.Metaspace(MARK, prepend_scheme=prefix, split=False))
  words = texts(model, sentencepiece_model.USER_DEFINED)
  if words and model.trainer.algorithm != sentencepiece_model.UNIGRAM:
    # A stretch between two of them that spells a piece which no text gives is kept from it.
    never = _any_of([piece[:-1] for piece in texts(model, *_NEVER)])
    patterns = (_any_of([word for word in words if ' ' not in word]), rf'\A(?:{never})(?=.\z)')
    cuts += [library.pre_tokenizers.Split(library.Regex(pattern), 'isolated')
             for pattern in patterns]
  if cuts:
    made.pre_tokenizer = library.pre_tokenizers.Sequence(cuts)
  decoders: list[Any] = [library.decoders.Replace(MARK, ' '), library.decoders.ByteFallback(),
                         library.decoders.Fuse()]
  if prefix != 'never':
    decoders.append(library.decoders.Strip(' ', 1, 0))
  made.decoder = library.decoders.Sequence(decoders)
  made.add_special_tokens(texts(model, sentencepiece_model.CONTROL, sentencepiece_model.UNKNOWN))
  return made.to_str().encode()


def _inner(model: Any) -> Any:
  """Return the model of the tokenizers library that has the pieces of SentencePiece's."""
  import tokenizers as library

  pieces, trainer = texts(model), model.trainer
  if trainer.algorithm == sentencepiece_model.UNIGRAM:
    # A text that spells '<s>' must not give that piece. SentencePiece scores with -0.1 what always
    # is a piece.
    fixed = {sentencepiece_model.USER_DEFINED: -0.1} | dict.fromkeys(_NEVER, -1e4)
    scored = [(piece, fixed.get(entry.kind, entry.score))
              for piece, entry in zip(pieces, model.pieces, strict=True)]
    return library.models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
  vocab = {piece: i for i, piece in enumerate(pieces)}
  return library.models.BPE(
    vocab, _merges(model, vocab), unk_token=pieces[trainer.unk_id], fuse_unk=True,
    byte_fallback=trainer.byte_fallback,
    ignore_merges=bool(texts(model, sentencepiece_model.USER_DEFINED)))


def byte_level_bpe(
  vocab: dict[str, int], merges: Sequence[tuple[str, str]], special: Sequence[str] = (),
  words: Sequence[str] = (), first: str | None = None, **treatment: Any,
) -> bytes:
  """Make a tokenizer.json of GPT-2's kind.

  Args:
    vocab: piece in GPT-2's signs for bytes -> id.
    merges: pairs of pieces, in order.
    special: tokens that are never found in plain text.
    words: tokens that are always found in it.
    first: the token that begins a text when special tokens are asked for.
    **treatment: `cuts`, `composed`, ... of `tokenizer_settings.byte_level`.
  """
  import tokenizers as library

  made = tokenizer_settings.byte_level(vocab, merges, **treatment)
  made.post_processor = library.processors.ByteLevel(trim_offsets=False)
  if first is not None:
    _begin_with(made, first, vocab[first])
  made.add_special_tokens(list(special))
  made.add_tokens([library.AddedToken(word, normalized=False) for word in words])
  return made.to_str().encode()


def _begin_with(made: Any, token: str, i: int) -> None:
  """Let texts begin with a token where special tokens are asked for."""
  import tokenizers as library

  made.post_processor = library.processors.TemplateProcessing(
    single=f'{token} $A', pair=f'{token} $A {token} $B', special_tokens=[(token, i)])


_MAKERS: dict[str, Callable[[Files], bytes]] = {
  'tokenizer.model': lambda files: from_sentencepiece(files['tokenizer.model']),
  # Nothing is merged, wherever text is cut.
  'bytes.txt': lambda _: byte_level_bpe(tokenizer_kinds.BYTE_SIGNS | {END: 256}, [], special=[END]),
}


def _any_of(texts: Sequence[str]) -> str:
  """Return a pattern of any of the texts, the longest first."""
  return '|'.join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _merges(model: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
  """Return the merges of a BPE model: every pair of pieces that makes a piece, best piece first."""
  normal = set(texts(model, sentencepiece_model.NORMAL))
  found = [
    (-entry.score, vocab[first], vocab[second], first, second)
    for entry in model.pieces if (piece := entry.piece.decode()) in normal
    for cut in range(1, len(piece))
    if (first := piece[:cut]) in normal and (second := piece[cut:]) in normal]
  return [(first, second) for *_, first, second in sorted(found)]


def check_equal(original: Tokenizer, content: bytes) -> None:
  """Check that a tokenizer.json gives the ids of the original; an error names the text."""
  made, words = tokenizers.from_files({'tokenizer.json': content}), []
  if 'tokenizer.model' in original.files():
    model = sentencepiece_model.parse(original.files()['tokenizer.model'])
    # Pieces that text always or never gives.
    kinds = [sentencepiece_model.USER_DEFINED]
    if model.trainer.algorithm != sentencepiece_model.UNIGRAM:
      kinds += [sentencepiece_model.CONTROL, sentencepiece_model.BYTE]
    words = [piece.replace(MARK, ' ') for piece in texts(model, *kinds)]
  # Alone, within text, beside spaces and beside each other.
  around = [form.format(piece, other) for piece, other in zip(
    words, [*words[1:], *words[:1]], strict=True)
            for form in ('{}', 'a{}b', ' {} ', 'a {} b', '{0}{0}', '{}{}')]
  for text in (*_PROBES, *around):
    try:
      expected = original.encode(text)
    except ValueError:
      continue  # It has no id for some character.
    if made.encode(text) != expected:
      raise ValueError(f'this tokenizer has no equal in a tokenizer.json: {text!r} gives '
                       f'{made.encode(text)} instead of {expected}')
