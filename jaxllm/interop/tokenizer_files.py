"""The files beside the weights: read, checked, and completed.

`complete` puts facts that a directory leaves to the class of its tokenizer into the files.
"""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizer_settings import CHAT, CONFIG, GENERATION
from jaxllm.interop import sentencepiece_model, tokenizer_export
from jaxllm.mistakes import parse_json

FILE_NAMES = (*(name for name in tokenizers.FILE_NAMES if name != 'bytes.txt'), GENERATION)
MORE_CHATS = 'additional_chat_templates/*.jinja'


def read(directory: pathlib.Path) -> dict[str, bytes]:
  """Return the tokenizer's files of a model directory, and those that tell how to use it.

  Raises:
    ValueError: one is absurdly large, or the only tokenizer is one of tiktoken.
  """
  files = tokenizers.read_directory(directory, FILE_NAMES)
  if not files.keys() & set(tokenizers.BUILDERS):
    for path in sorted(directory.glob('*')):
      if path.name in ('tekken.json', 'tiktoken.model') or path.suffix == '.tiktoken':
        raise ValueError(f'{path}: a tokenizer of tiktoken is not read; put the tokenizer.json of '
                         'the model there')
  named = {path.stem: path.read_bytes() for path in sorted(directory.glob(MORE_CHATS))}
  if named:
    named |= {'default': files.pop(CHAT)} if CHAT in files else {}
    settings = parse_json(files.get(CONFIG, b'{}'), f'{directory}/{CONFIG}')
    settings['chat_template'] = [{'name': name, 'template': template.decode('utf-8')}
                                 for name, template in named.items()]
    files[CONFIG] = json.dumps(settings).encode()
  return files


def overlaid(files: Mapping[str, bytes], others: Mapping[str, bytes]) -> dict[str, bytes]:
  """Return the files of a model with `others`, a whole tokenizer or parts of it, in their place."""
  if others.keys() & {'tokenizer.json', 'tokenizer.model', 'vocab.json'}:
    templates = tokenizer_settings.chat_templates(files)
    files = {name: content for name, content in files.items() if name == GENERATION}
    files |= {CHAT: templates['default'].encode()} if 'default' in templates else {}
  if tokenizer_settings.chat_templates(others):
    files = {name: content for name, content in files.items() if name != CHAT}
  return {**files, **others}


def check(files: Mapping[str, bytes], vocab_size: int, where: object) -> dict[str, bytes]:
  """Check that every id that the files name is in the model's vocabulary.

  Returns:
    The files, without special tokens past the rows of the model that nothing uses: a tokenizer may
    have one for what this model does not do, as Gemma 3's for images.

  Raises:
    ValueError: an id is not, or a file is damaged.
  """
  objects = {name: parse_json(content, f'{where}/{name}')
             for name, content in files.items() if name.endswith('.json')}
  for name, content in objects.items():
    if not isinstance(content, dict):
      raise ValueError(f'{where}/{name}: {type(content).__name__}, an object is needed')
  tokenizer = objects.get('tokenizer.json') or {}
  ids = _ids_in_tokenizer(tokenizer, f'{where}/tokenizer.json')
  kept = dict(files)
  if past := _unused(files, tokenizer, vocab_size):
    logging.warning('%s: the model has %d tokens; the special tokens past them are left out: %s',
                    where, vocab_size, past)
    for name in objects.keys() & {'tokenizer.json', CONFIG, 'special_tokens_map.json',
                                  'added_tokens.json'}:
      model = objects[name].get('model')
      pieces = model.get('vocab') if isinstance(model, dict) else None
      objects[name] = _without(objects[name], past, pieces if isinstance(pieces, list) else None)
      kept[name] = json.dumps(objects[name], ensure_ascii=False).encode()
    ids = _ids_in_tokenizer(objects.get('tokenizer.json') or {}, f'{where}/tokenizer.json')
  for name in objects.keys() & {'vocab.json', 'added_tokens.json'}:
    ids |= {f'{name}: {token!r}': i for token, i in objects[name].items()}
  ids |= special_ids(objects.get(GENERATION, {}), GENERATION)
  listed = tokenizer_settings.listed(kept, tokenizer_settings.settings(kept))
  ids |= {f'added token {token.content!r}': i for i, token in listed.items()}
  for what, value in ids.items():
    if not isinstance(value, int) or not 0 <= value < vocab_size:
      raise ValueError(f'{where}: {what} has id {value!r}, but the model has {vocab_size} tokens '
                       f'(ids 0 to {vocab_size - 1}); the tokenizer belongs to another model')
  return kept


def _unused(files: Mapping[str, bytes], content: Mapping[str, Any], vocab_size: int
            ) -> dict[str, int]:
  """Return the special tokens past the rows of the model that neither begin nor end a text."""
  settings = tokenizer_settings.settings(files)
  used = [json.dumps(content.get('post_processor'), ensure_ascii=False), *(
    tokenizer_settings.text_of(settings.get(name)) or '' for name in ('bos_token', 'eos_token'))]
  special = [(token.content, i) for i, token in tokenizer_settings.listed(files, settings).items()
             if token.special]
  special += [(token.get('content'), token.get('id')) for token in content.get('added_tokens') or ()
              if token.get('special')]
  return {text: i for text, i in special
          if isinstance(i, int) and i >= vocab_size and isinstance(text, str)
          and not any(text in one for one in used)}


def _without(value: Any, texts: Mapping[str, int], whole: Any = None) -> Any:
  """Remove tokens from a JSON value, but for the part `whole`: keys, and items that name one."""
  def is_token(item: Any) -> bool:
    text = tokenizer_settings.text_of(item)
    return isinstance(text, str) and text in texts

  if isinstance(value, dict):
    return {key: _without(item, texts, whole) for key, item in value.items()
            if key not in texts and not is_token(item)}
  if isinstance(value, list) and value is not whole:
    return [_without(item, texts, whole) for item in value if not is_token(item)]
  return value


def special_ids(keys: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Return the ids of BOS, EOS and padding that a config names, by where they stand."""
  values = {name: value if isinstance(value := keys.get(name), list) else [value]
            for name in tokenizer_export.SPECIAL_IDS}
  # -1 stands for none, in older files.
  return {f'{where}: {name}[{i}]': item for name, items in values.items()
          for i, item in enumerate(items) if item not in (None, -1)}


def _ids_in_tokenizer(content: Mapping[str, Any], where: str) -> dict[str, Any]:
  model, added = content.get('model') or {}, content.get('added_tokens') or []
  vocab = model.get('vocab') if isinstance(model, dict) else None
  if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
    raise ValueError(f'{where}: added_tokens is no list of objects')
  ids = {f'added token {token.get("content")!r}': token.get('id') for token in added}
  if isinstance(vocab, dict):
    ids |= {f'token {token!r}': i for token, i in vocab.items()}
  elif isinstance(vocab, list) and vocab:
    ids[f'the last of {len(vocab)} pieces'] = len(vocab) - 1
  return ids


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
    vocab_size: rows of the model.

  Raises:
    ValueError: the class is not known, or a SentencePiece model has no equal with its added tokens.
  """
  ids = {name: keys[name] for name in tokenizer_export.SPECIAL_IDS
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
    settings = {**tokens, 'add_bos_token': False, **settings}
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
  pieces = sentencepiece_model.texts(model)
  vocab = {piece: i for i, piece in enumerate(pieces)}
  own: dict[str, Any] = {'add_bos_token': True} | {
    f'{name}_token': pieces[i] for name in ('bos', 'eos', 'unk')
    if (i := getattr(model.trainer, f'{name}_id')) >= 0}
  named = _numbered(files, own | settings, vocab, vocab_size)
  added = tokenizer_settings.listed(files, named)
  beyond = {i: token.content for i, token in added.items() if token.content not in vocab}
  prefix = _prefix(settings, model_type)
  if not beyond and all(named[name] == token for name, token in own.items()) and (
      prefix == 'sentencepiece' or not model.normalizer.dummy_prefix):
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
