"""Text in which special tokens stand at given places, encoded in one call of the library.

The tokenizers library finds special tokens by their spelling, and a user may spell one. Here a copy
of the tokenizer has its special tokens spelled with a secret, so that text never gives one, and
what the library does around them (a space before the first word, white space that a token takes
with it) is done as ever.
"""

import itertools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Part = int | str
"""Plain text, or the id of a token."""


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
