"""Facts that a directory leaves to the class of its tokenizer, put into the tokenizer's files."""

import json
from collections.abc import Mapping
from typing import Any

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizer_settings import CONFIG, GENERATION
from jaxllm.interop import sentencepiece_model, tokenizer_export, tokenizer_files

# The class by model_type, where tokenizer_config.json names none.
_CLASSES = {
  'gpt2': 'GPT2Tokenizer', 'gpt_neox': 'GPTNeoXTokenizer', 'qwen2': 'Qwen2Tokenizer',
  'qwen3': 'Qwen2Tokenizer'}
# Families to which `transformers` gives no class, whatever their files say.
_GENERIC = ('mistral', 'phi3', 'olmo2')
_ANY_CLASS = (None, 'PreTrainedTokenizer', 'PreTrainedTokenizerFast', 'TokenizersBackend')


def complete(
  files: Mapping[str, bytes], keys: Mapping[str, Any], vocab_size: int
) -> dict[str, bytes]:
  """Return the files with the facts that only config.json or the tokenizer's class holds.

  Older directories have no generation_config.json, and leave the special tokens of a family, and
  how it cuts text, to the class that `transformers` has for it.

  Args:
    files: of the directory, checked.
    keys: of config.json.
    vocab_size: rows of the model.

  Raises:
    ValueError: the class is not known, or a SentencePiece model has no equal with its added tokens.
  """
  ids = {name: keys[name] for name in tokenizer_files.SPECIAL_IDS
         if keys.get(name) not in (None, -1)}
  completed = dict(files)
  if ids and GENERATION not in files:
    completed[GENERATION] = json.dumps(ids).encode()
  kind = next((name for name in tokenizers.BUILDERS if name in files), None)
  if kind is None:
    return completed
  settings = tokenizer_settings.settings(files)
  if settings.get('tokenizer_class') in _ANY_CLASS and keys.get('tokenizer_class') is not None:
    settings['tokenizer_class'] = keys['tokenizer_class']
  model_type = str(keys.get('model_type'))
  if kind == 'tokenizer.model':
    return _from_sentencepiece(completed, settings, model_type, vocab_size)
  if kind == 'vocab.json':
    if settings.get('tokenizer_class') in _ANY_CLASS:
      settings['tokenizer_class'] = _CLASSES.get(model_type, f'none for model_type {model_type}')
    vocab, tokens = json.loads(files[kind]), tokenizer_settings.class_of(settings).tokens
    settings = {**tokens, 'add_bos_token': 'cls_token' in tokens, **settings}
  else:
    content = json.loads(files[kind])
    added = {token.get('content'): token['id'] for token in content.get('added_tokens') or []}
    texts = {i: text for text, i in added.items()}
    settings = {name.removesuffix('_id'): texts[value] for name, value in ids.items()
            if isinstance(value, int) and value in texts} | settings
    model = content.get('model')
    pieces = model.get('vocab') if isinstance(model, dict) else None
    vocab = added | (pieces if isinstance(pieces, dict) else {
      piece[0]: i for i, piece in enumerate(pieces or ()) if isinstance(piece, list) and piece})
  return _with_settings(completed, _numbered(files, settings, vocab, vocab_size))


def _numbered(
  files: Mapping[str, bytes], settings: dict[str, Any], vocab: Mapping[str, int], vocab_size: int
) -> dict[str, Any]:
  """Return the settings with the next ids for special tokens that have none, in their order."""
  listed = tokenizer_settings.listed(files, settings)
  known = {**vocab, **{token.content: i for i, token in listed.items()}}
  texts = dict.fromkeys(token.content for token in tokenizer_settings.special(settings))
  end = max(known.values(), default=-1) + 1
  missing = enumerate((text for text in texts if text not in known), end)
  tokens = {i: {'content': text, 'special': True} for i, text in missing if i < vocab_size}
  if not tokens:
    return settings
  tokens = {i: {**token.__getstate__()} for i, token in listed.items()} | tokens
  return {**settings, 'added_tokens_decoder': {str(i): token for i, token in tokens.items()}}


def _from_sentencepiece(
  files: dict[str, bytes], settings: dict[str, Any], model_type: str, vocab_size: int
) -> dict[str, bytes]:
  """Make a tokenizer.json where a model of SentencePiece does not say all of its tokenizer.

  It has no tokens but its own, and puts a space before every stretch of text between those that
  are special, where the classes of `transformers` may not.
  """
  original = tokenizers.from_files({'tokenizer.model': files['tokenizer.model']})
  model = sentencepiece_model.parse(files['tokenizer.model'])
  vocab = {piece: i for i, piece in enumerate(model.pieces)}
  own: dict[str, Any] = {'add_bos_token': True} | {
    f'{name}_token': model.pieces[i] for name, i in (
      ('bos', model.bos_id), ('eos', model.eos_id), ('unk', model.unk_id)) if i >= 0}
  named = _numbered(files, own | settings, vocab, vocab_size)
  added = tokenizer_settings.listed(files, named)
  beyond = {i: token.content for i, token in added.items() if token.content not in vocab}
  prefix = _prefix(settings, model_type)
  if not beyond and all(named[name] == token for name, token in own.items()) and (
      prefix == 'sentencepiece' or not model.dummy_prefix):
    return files
  try:
    tokenizer_export.check_equal(
      original, tokenizer_export.from_sentencepiece(files['tokenizer.model']))
  except ValueError:
    if beyond:
      raise
    return files
  content = tokenizer_export.from_sentencepiece(
    files['tokenizer.model'], prefix, {i: text for i, text in beyond.items() if i < len(vocab)})
  return _with_settings({**files, 'tokenizer.json': content}, named)


def _prefix(settings: Mapping[str, Any], model_type: str) -> tokenizer_export.Prefix:
  """Return where a class of `transformers` puts the space before a text."""
  name = str(settings.get('tokenizer_class')).removesuffix('Fast')
  if name not in ('LlamaTokenizer', 'CodeLlamaTokenizer') or model_type in _GENERIC:
    return 'sentencepiece' if settings.get('legacy', True) else 'first'
  if settings.get('add_prefix_space') is False:
    return 'never'
  return 'always' if name == 'LlamaTokenizer' and settings.get('legacy') else 'first'


def _with_settings(files: dict[str, bytes], settings: Mapping[str, Any]) -> dict[str, bytes]:
  if settings == tokenizer_settings.settings(files):
    return files
  kept = {name: content for name, content in files.items() if name != 'special_tokens_map.json'}
  return {**kept, CONFIG: tokenizer_export.json_bytes(settings)}
