"""Conversations: history grows, is forgotten, and fits the context; answers stream."""

import jax
import pytest

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation import chat
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig

TOKENIZER = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
CONFIG = DecoderConfig(
  vocab_size=257, vocab_multiple=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
  max_length=64,
)
VARIABLES = decoder.unstack(decoder.init(CONFIG, jax.random.key(2)))


def encode(messages):
  return TOKENIZER.encode(''.join(f'{m["role"][0]}:{m["content"]}|' for m in messages) + 'a:')


def talk(lines, **options):
  written = []
  sampling = SamplingConfig(max_new_tokens=6, logit_bias=((256, -100.0),))
  messages = chat.converse(Decoder(CONFIG), VARIABLES, TOKENIZER, encode, sampling, lines,
                           written.append, **options)
  return messages, written


def test_history_grows_and_is_forgotten():
  messages, written = talk(['hi', '', 'more'], system='S')
  assert [m['role'] for m in messages] == ['system', 'user', 'assistant', 'user', 'assistant']
  assert ''.join(written) == ''.join(
    m['content'] + '\n' for m in messages if m['role'] == 'assistant')
  assert len(written) > 6
  messages, written = talk(['hi', '/reset', 'more', '/quit', 'never'], system='S')
  assert [m['content'] for m in messages][:2] == ['S', 'more'] and len(messages) == 3
  assert '(forgotten)\n' in written
  messages, written = talk(['/what'])
  assert messages == [] and '/reset' in written[0]


def test_the_oldest_exchanges_go_first():
  turns = [{'role': 'system', 'content': 'S'}]
  for index in range(4):
    turns += [{'role': 'user', 'content': f'q{index}'}, {'role': 'assistant', 'content': 'x' * 8}]
  turns.append({'role': 'user', 'content': 'last'})
  kept, ids = chat.fit(turns, encode, 40)
  assert [m['content'] for m in kept] == ['S', 'q3', 'x' * 8, 'last'] and len(ids) <= 40
  with pytest.raises(ValueError, match='tokens with its template; 5 fit'):
    chat.fit(turns, encode, 5)
  _, written = talk(['y' * 100, 'ok'])
  assert written[0].startswith('(the message has') and len(written) > 2
