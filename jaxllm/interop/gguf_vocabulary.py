"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face tokenizer."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.interop import sentencepiece_model, tokenizer_export
from jaxllm.interop.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED
from jaxllm.interop.tokenizer_export import json_bytes
from jaxllm.interop.tokenizer_files import GENERATION

_KEY = 'tokenizer.ggml.'
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
  """Return the files of the tokenizer: its vocabulary, its special tokens, its chat template.

  Raises:
    ValueError: the metadata are damaged, or of a kind of tokenizer that is not supported.
  """
  kind, tokens = metadata.get(_KEY + 'model'), metadata.get(_KEY + 'tokens')
  if kind is None:
    return {}
  if kind not in _KINDS:
    raise ValueError(f'{_KEY}model {kind!r} is not supported (supported: {", ".join(_KINDS)})')
  if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
    raise ValueError(f'{_KEY}tokens is no list of strings')
  if len(set(tokens)) != len(tokens):
    twice = next(token for token in tokens if tokens.count(token) > 1)
    raise ValueError(f'{_KEY}tokens: {twice!r} stands twice')
  files = _KINDS[kind](metadata, tokens)
  ids = _special_ids(metadata, len(tokens))
  settings = {name.removesuffix('_id'): tokens[value] for name, value in ids.items()}
  add_bos = metadata.get(_KEY + 'add_bos_token', kind == 'llama')
  settings |= {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': bool(add_bos),
               'clean_up_tokenization_spaces': False}
  template = metadata.get('tokenizer.chat_template')
  if isinstance(template, str):
    settings['chat_template'] = template
  files['tokenizer_config.json'] = json_bytes(settings)
  files[GENERATION] = json_bytes(
    {name: value for name, value in ids.items() if name != 'unk_token_id'}
  )
  return files


def _special_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
  ids = {}
  for theirs, ours in (('bos', 'bos'), ('eos', 'eos'), ('padding', 'pad'), ('unknown', 'unk')):
    value = metadata.get(f'{_KEY}{theirs}_token_id')
    if value is None:
      continue
    if not isinstance(value, int) or not 0 <= value < count:
      raise ValueError(f'{_KEY}{theirs}_token_id={value!r}, but there are {count} tokens')
    ids[f'{ours}_token_id'] = value
  return ids


def _list(metadata: Mapping[str, Any], name: str, count: int, default: Any) -> list[Any]:
  values = metadata.get(_KEY + name, [default] * count)
  if not isinstance(values, list) or len(values) != count:
    raise ValueError(f'{_KEY}{name} does not have one item for each of {count} tokens')
  return values


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, bytes]:
  """'llama': pieces with scores, merged as SentencePiece's BPE does."""
  ids = _special_ids(metadata, len(tokens))
  kinds = _list(metadata, 'token_type', len(tokens), sentencepiece_model.NORMAL)
  model = sentencepiece_model.Model(
    tokens, _list(metadata, 'scores', len(tokens), 0.0), kinds,
    byte_fallback=sentencepiece_model.BYTE in kinds,
    dummy_prefix=bool(metadata.get(_KEY + 'add_space_prefix', True)),
    bos_id=ids.get('bos_token_id', -1), eos_id=ids.get('eos_token_id', -1),
    pad_id=ids.get('pad_token_id', -1),
    unk_id=kinds.index(UNKNOWN) if UNKNOWN in kinds else ids.get('unk_token_id', 0),
  )
  return {'tokenizer.model': sentencepiece_model.build(model)}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, bytes]:
  """'gpt2': byte-level BPE, with text cut as `tokenizer.ggml.pre` says."""
  import tokenizers as library

  pre = metadata.get(_KEY + 'pre', 'default')
  if pre not in _CUTS:
    raise ValueError(f'{_KEY}pre {pre!r} is not supported (supported: {", ".join(_CUTS)})')
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
  with_bos = metadata.get(_KEY + 'add_bos_token') and 'bos_token_id' in ids
  content = tokenizer_export.byte_level_bpe(
    vocab, merges,
    special=[token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
    words=[token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED],
    pre_tokenizer=library.pre_tokenizers.Sequence(_CUTS[pre](library)),
    normalizer=library.normalizers.NFC() if pre == 'qwen2' else None,
    ignore_merges=pre == 'llama-bpe',
    first=tokens[ids['bos_token_id']] if with_bos else None,
  )
  return {'tokenizer.json': content}


def _gpt2(library: Any) -> list[Any]:
  return [library.pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _single_digits(library: Any) -> list[Any]:
  return [library.pre_tokenizers.Digits(individual_digits=True), *_gpt2(library)]


def _pattern(numbers: str) -> Callable[[Any], list[Any]]:
  def cuts(library: Any) -> list[Any]:
    pattern = library.Regex(_WORDS + numbers + _REST)
    return [library.pre_tokenizers.Split(pattern, 'isolated'),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  return cuts


# How text is cut before merging, by `tokenizer.ggml.pre`.
_CUTS: dict[str, Callable[[Any], list[Any]]] = {
  'default': _gpt2,
  'gpt-2': _gpt2,
  'smollm': _single_digits,
  'llama-bpe': _pattern(r'\p{N}{1,3}'),
  'qwen2': _pattern(r'\p{N}'),
}
_KINDS: dict[str, Callable[[Mapping[str, Any], list[str]], dict[str, bytes]]] = {
  'gpt2': _byte_level,
  'llama': _sentencepiece,
}
