"""Text from tokens: stop strings across borders, whole characters, log-probabilities, scores."""

import jax
import numpy as np
import pytest

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.text import TextDecoder, complete, stream_text, text_of
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig

TOKENIZER = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
CONFIG = DecoderConfig(
  vocab_size=257, vocab_multiple=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
  max_length=64, initializer=InitializerConfig(stddev=None),
)
MODEL = Decoder(CONFIG)
VARIABLES = decoder.unstack(decoder.init(CONFIG, jax.random.key(2)))
apply = jax.jit(MODEL.apply)
PROMPTS = [[256, 104, 105], [65], [1, 2, 3, 4], [200, 201]]
WARM = SamplingConfig(max_new_tokens=20, seed=4)
# Without EOS, so that rows have their length.
FREE = WARM.replace(logit_bias=((256, -100.0),))


def feed(text, stop, size=1):
  decoding = TextDecoder(TOKENIZER, stop)
  parts = []
  for token in text.encode() if isinstance(text, str) else text:
    parts.append(decoding.push(token))
    if decoding.stop:
      return parts, decoding.stop
  return [*parts, decoding.finish()], decoding.stop


@pytest.mark.parametrize('text, stop, want, found', [
  ('one\n\ntwo', ['\n\n'], 'one', '\n\n'),
  ('aaab', ['aab'], 'a', 'aab'),
  ('abcabd', ['abd'], 'abc', 'abd'),
  ('ababab', ['abac'], 'ababab', None),
  ('xyz', ['yz', 'xyzq', 'z'], 'x', 'yz'),
  ('end', ['end'], '', 'end'),
  ('naïve 中文 🙂!', ['文'], 'naïve 中', '文'),
  ('abc', [], 'abc', None),
])
def test_stop_strings(text, stop, want, found):
  parts, stopped = feed(text, stop)
  assert ''.join(parts) == want and stopped == found


@pytest.mark.parametrize('stop, text, want, found', [
  ('\n', ' Ja.\nNein.', 'Ja.', '\n'), ('\n', '\n\nJa', 'Ja', None), ('\n', '', '', None),
  (None, ' a\nb', 'a\nb', None), ('##', 'a# ##b', 'a# ', '##'),
])
def test_space_at_the_beginning_is_skipped_and_stops_nothing(stop, text, want, found):
  decoder = TextDecoder(TOKENIZER, [stop] if stop else [], skip_space=True)
  parts = [*map(decoder.push, text.encode()), decoder.finish()]
  assert ''.join(parts) == want and decoder.stop == found


def test_only_whole_characters_are_given():
  parts, _ = feed('é🙂中', [])
  assert parts == ['', 'é', '', '', '', '🙂', '', '', '中', '']
  parts, _ = feed(bytes([0xF0, 0x9F, 65, 0xE4]), [])
  assert ''.join(parts) == bytes([0xF0, 0x9F, 65, 0xE4]).decode(errors='replace')


def test_streamed_text_equals_whole_text_and_rows_alone():
  for sampling, stop in ((FREE, ()), (FREE, ('e', '\ufffd\ufffd'))):
    whole = complete(MODEL, VARIABLES, TOKENIZER, PROMPTS, sampling, stop)
    texts = [''] * 4
    tokens = [[], [], [], []]
    for piece in stream_text(MODEL, VARIABLES, TOKENIZER, PROMPTS, sampling, stop):
      texts[piece.row] += piece.text
      tokens[piece.row] += piece.tokens
    assert texts == [result.text for result in whole]
    assert tokens == [result.tokens for result in whole]
    for row, result in enumerate(whole):
      full = bytes(result.tokens).decode(errors='replace')
      cut = min([full.find(s) for s in stop if s in full], default=len(full))
      assert result.text == full[:cut]
      assert (result.stop is not None) == (result.finish_reason == 'stop') == (cut < len(full))
      alone, = complete(MODEL, VARIABLES, TOKENIZER, PROMPTS[row : row + 1],
                        [sampling], stop, seeds=[4 + row])
      assert alone.text == result.text
  assert {result.finish_reason for result in whole} >= {'stop'}


def test_logprobs_are_the_model_s():
  results = complete(MODEL, VARIABLES, TOKENIZER, PROMPTS, FREE)
  for prompt, result in zip(PROMPTS, results, strict=True):
    assert result.text == text_of(TOKENIZER, result.tokens)
    tokens = np.zeros((1, 64), np.int32)
    whole = [*prompt, *result.tokens]
    tokens[0, : len(whole)] = whole
    want = np.asarray(jax.nn.log_softmax(apply(VARIABLES, tokens)[0, :, :257]))
    places = range(len(prompt) - 1, len(whole) - 1)
    np.testing.assert_allclose(result.logprobs, want[places, result.tokens], atol=2e-5)


def test_empty_stop_is_refused():
  with pytest.raises(ValueError, match='stop'):
    stream_text(MODEL, VARIABLES, TOKENIZER, PROMPTS, WARM, stop=[''])
