"""The files beside the weights, read and checked."""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizer_settings import CHAT, CONFIG, GENERATION
from jaxllm.interop.tensorfile import parse_json

FILE_NAMES = (*(name for name in tokenizers.FILE_NAMES if name != 'bytes.txt'), GENERATION)
MORE_CHATS = 'additional_chat_templates/*.jinja'
SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


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
            for name in SPECIAL_IDS}
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
