"""How byte-level BPE cuts text before merging, by the names that `tokenizer.ggml.pre` may have.

llama.cpp has a name for the pre-tokenizer of each published family. Those here cut as the
tokenizer.json of these families does; another name is refused.

Reference:
  src/llama-vocab.cpp in github.com/ggml-org/llama.cpp.
"""

from typing import Any

from jaxllm.data import tokenizer_settings
from jaxllm.data.tokenizer_settings import DIGIT as _DIGIT

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
  """Return the arguments of `tokenizer_settings.byte_level` besides vocabulary and merges.

  Raises:
    ValueError: there is no such name here.
  """
  if name not in _CUTS:
    raise ValueError(f'tokenizer.ggml.pre {name!r} is not supported (supported: '
                     f'{", ".join(_CUTS)}); take the model from its Hugging Face directory')
  return {'cuts': _CUTS[name], 'composed': name in _COMPOSED, 'ignore_merges': name in _WHOLE}
