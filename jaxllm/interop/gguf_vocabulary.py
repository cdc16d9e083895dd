"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face tokenizer.

llama.cpp has a name, `tokenizer.ggml.pre`, for how the byte-level BPE of each published family cuts
text before merging. Those here cut as the tokenizer.json of the family; another one is refused.

Reference:
  src/llama-vocab.cpp in github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from jaxllm.data import tokenizer_settings
from jaxllm.data.tokenizer_kinds import MARK
from jaxllm.data.tokenizer_settings import CONFIG, GENERATION
from jaxllm.data.tokenizer_settings import DIGIT as _DIGIT
from jaxllm.interop import chat, sentencepiece_model, tokenizer_export
from jaxllm.interop.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED
from jaxllm.interop.tokenizer_export import json_bytes
from jaxllm.mistakes import twice

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_SIGNS = r' ?[^\s\p{L}\p{N}]+[\r\n]*'
_SPACE = r'\s*[\r\n]+|\s+(?!\S)|\s+'
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_ASCII_SIGN = r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~]'


def _any(*parts: str) -> str:
  return '|'.join(parts)


def _cased(numbers: str, suffix: str) -> str:
  """Words that begin where small letters turn to capitals."""
  head = r'[^\r\n\p{L}\p{N}]?'
  return _any(f'{head}{_UPPER}*{_LOWER}+{suffix}', f'{head}{_UPPER}+{_LOWER}*{suffix}', numbers,
              r' ?[^\s\p{L}\p{N}]+[\r\n/]*', _SPACE)


_DIGITS, _NUMBER = r'\p{N}{1,3}', r'\p{N}+'
_LLAMA = _any(_SUFFIX, _WORD, _DIGITS, _SIGNS, _SPACE)
_O200K = _cased(_DIGITS, _SUFFIX + '?')
_BLOOM = ' ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+'
_CJK = '[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+'

# Names, and the patterns that cut one after the other; none: GPT-2's, which is the library's own.
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
  ('default gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe '
   'gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4', ()),
  ('smollm starcoder refact command-r codeshell exaone minerva-7b mellum2', (_DIGIT,)),
  ('llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe '
   'glm4 chatglm-bpe', (_LLAMA,)),
  ('qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2',
   tokenizer_settings.CLASSES['Qwen2Tokenizer'].cuts),
  ('qwen35', (_any(_SUFFIX, r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+', _DIGIT,
                   r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*', _SPACE),)),
  ('seed-coder', (_any(_SUFFIX, _WORD, _DIGIT, r' ?[^\s\p{L}\p{N}\r\n]+', _SPACE),)),
  ('minicpm5', (_DIGITS, _any(_SUFFIX, _WORD, _NUMBER, _SIGNS, _SPACE))),
  ('tekken', (_cased(_DIGIT, ''),)),
  ('gpt-4o llama4 kanana2 talkie minimax-m2', (_O200K,)),
  ('bloom poro-chat gpt3-finnish', (_BLOOM,)),
  ('viking', (_BLOOM, _DIGIT)),
  ('deepseek-coder', (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', _CJK, _DIGIT)),
  ('deepseek-v3 hunyuan-dense joyai-llm hy_v4', (
    _DIGITS, '[\u4e00-\u9fa5\u3040-\u30ff]+',
    _any(_ASCII_SIGN + '[A-Za-z]+', r'[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+',
         r' ?[\p{P}\p{S}]+[\r\n]*', _SPACE))),
)
_CUTS = {name: cuts for names, cuts in _GROUPS for name in names.split()}

# A whole stretch of text that is a token becomes it, merges or not.
_WHOLE = ('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'falcon-h1', 'pixtral', 'midm-2.0', 'lfm2',
         'jina-v5-nano', 'tekken', 'minicpm5')
# Texts begin with BOS where the file does not say.
WITH_BOS = tuple(name for name in _WHOLE if name != 'minicpm5')
_COMPOSED = ('qwen2', 'qwen35', 'command-r', 'mpt', 'olmo')


def treatment(name: Any) -> dict[str, Any]:
  """Return a known name's arguments of `byte_level` besides vocabulary and merges."""
  if str(name) not in _CUTS:
    raise ValueError(f'tokenizer.ggml.pre {name!r} is not supported (supported: '
                     f'{", ".join(_CUTS)}); take the model from its Hugging Face directory')
  return {'cuts': _CUTS[name], 'composed': name in _COMPOSED, 'ignore_merges': name in _WHOLE}


_KEY = 'tokenizer.ggml.'


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
  """Return the files of the tokenizer: its vocabulary, its special tokens, its chat template.

  Raises:
    ValueError: the metadata are damaged, or of a kind of tokenizer that is not supported.
  """
  kind, tokens = metadata.get(_KEY + 'model'), metadata.get(_KEY + 'tokens')
  if kind is None:
    return {}
  if str(kind) not in _KINDS:
    raise ValueError(f'{_KEY}model {kind!r} is not supported (supported: {", ".join(_KINDS)})')
  if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
    raise ValueError(f'{_KEY}tokens is no list of strings')
  # llama.cpp's name for a token without one.
  tokens = [token or f'[EMPTY_{i}]' for i, token in enumerate(tokens)]
  if (token := twice(tokens)) is not None:
    raise ValueError(f'{_KEY}tokens: {token!r} stands twice')
  files = _KINDS[kind](metadata, tokens)
  ids = _special_ids(metadata, len(tokens))
  settings = {name.removesuffix('_id'): tokens[value] for name, value in ids.items()}
  settings |= {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': _adds_bos(metadata),
               'clean_up_tokenization_spaces': False}
  if isinstance(template := metadata.get('tokenizer.chat_template'), str):
    settings['chat_template'] = template
  generation: dict[str, Any] = {name: i for name, i in ids.items() if name != 'unk_token_id'}
  eos = [ids['eos_token_id']] if 'eos_token_id' in ids else []
  if ends := list(dict.fromkeys([*eos, *_ends(metadata, tokens)])):
    generation['eos_token_id'] = ends if len(ends) > 1 else ends[0]
  return {**files, CONFIG: json_bytes(settings), GENERATION: json_bytes(generation)}


def _special_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
  # llama.cpp's defaults of SentencePiece models.
  usual = {'bos': 1, 'eos': 2} if metadata.get(_KEY + 'model') == 'llama' else {}
  ids = {}
  for theirs, ours in (('bos', 'bos'), ('eos', 'eos'), ('padding', 'pad'), ('unknown', 'unk')):
    value = metadata.get(f'{_KEY}{theirs}_token_id', usual.get(theirs))
    if value is not None:
      ids[f'{ours}_token_id'] = _id(f'{theirs}_token_id', value, count)
  return ids


def _id(name: str, value: Any, count: int) -> int:
  if type(value) is not int or not 0 <= value < count:
    raise ValueError(f'{_KEY}{name}={value!r}, but there are {count} tokens')
  return value


def _ends(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
  """Return the tokens besides EOS that end a generation, by a key or by their text."""
  named = ('eot_token_id', 'eom_token_id', 'fim_pad_token_id', 'fim_rep_token_id',
           'fim_sep_token_id')
  several = metadata.get(_KEY + 'eos_token_ids', [])
  found = [(name, metadata[_KEY + name]) for name in named if _KEY + name in metadata]
  found += [('eos_token_ids', i) for i in (several if isinstance(several, list) else [several])]
  ids = [_id(name, i, len(tokens)) for name, i in found]
  kinds = _list(metadata, 'token_type', len(tokens), sentencepiece_model.NORMAL)
  # In HTML '</s>' ends struck-out text.
  known = {token: i for i, token in enumerate(tokens)
           if (token, kinds[i]) != ('</s>', sentencepiece_model.NORMAL)}
  return [*ids, *chat.turn_ends(known)]


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
  """Return whether prompts begin with BOS, by llama.cpp's defaults."""
  usual = (metadata.get(_KEY + 'model') == 'llama'
           or metadata.get(_KEY + 'pre') in WITH_BOS)
  return bool(metadata.get(_KEY + 'add_bos_token', usual))


def _list(metadata: Mapping[str, Any], name: str, count: int, default: Any) -> list[Any]:
  values = metadata.get(_KEY + name, [default] * count)
  if not isinstance(values, list) or len(values) != count:
    raise ValueError(f'{_KEY}{name} does not have one item for each of {count} tokens')
  return values


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, bytes]:
  """'llama': pieces with scores, merged as SentencePiece's BPE does."""
  ids = _special_ids(metadata, len(tokens))
  kinds = _list(metadata, 'token_type', len(tokens), sentencepiece_model.NORMAL)
  # llama.cpp finds these in text as it is, SentencePiece in text whose spaces are marked.
  pieces = [token.replace(' ', MARK) if kind == USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)]
  if (piece := twice(pieces)) is not None:
    raise ValueError(f'{_KEY}tokens: {piece!r} stands twice, with spaces and with their sign')
  ids.setdefault('unk_token_id', 0)
  if UNKNOWN in kinds:
    ids['unk_token_id'] = kinds.index(UNKNOWN)
  content = sentencepiece_model.build(
    zip(pieces, _list(metadata, 'scores', len(tokens), 0.0), kinds, strict=True),
    {'algorithm': sentencepiece_model.BPE, 'byte_fallback': sentencepiece_model.BYTE in kinds,
     **{f'{name}_id': ids.get(f'{name}_token_id', -1) for name in ('unk', 'bos', 'eos', 'pad')}},
    {'dummy_prefix': bool(metadata.get(_KEY + 'add_space_prefix', True)), 'squeeze': False})
  return {'tokenizer.model': content}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, bytes]:
  """'gpt2': byte-level BPE, with text cut as `tokenizer.ggml.pre` says."""
  pre = metadata.get(_KEY + 'pre', 'default')
  if pre == 'default':
    logging.warning('%spre does not say how text is cut; it is as for GPT-2', _KEY)
  lines = metadata.get(_KEY + 'merges')
  if not isinstance(lines, list):
    raise ValueError(f'{_KEY}merges is missing')
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = []
  for line in map(str, lines):
    first, _, second = line.partition(' ')
    if not all(token in vocab for token in (first, second, first + second)):
      raise ValueError(f'{_KEY}merges: {line!r} does not join two tokens into a third')
    merges.append((first, second))
  kinds = _list(metadata, 'token_type', len(tokens), sentencepiece_model.NORMAL)
  ids = _special_ids(metadata, len(tokens))
  with_bos = _adds_bos(metadata) and 'bos_token_id' in ids
  content = tokenizer_export.byte_level_bpe(
    vocab, merges,
    special=[token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
    words=[token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED],
    first=tokens[ids['bos_token_id']] if with_bos else None, **treatment(pre))
  return {'tokenizer.json': content}


_KINDS: dict[str, Callable[[Mapping[str, Any], list[str]], dict[str, bytes]]] = {
  'gpt2': _byte_level,
  'llama': _sentencepiece,
}
