"""Tokenizers that we write are to transformers what they are to us."""

import logging
import warnings

import pytest
import small
from test_tokenizer_files import PROBES, TEXT

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.interop import chat, huggingface_writer, tokenizer_files

pytestmark = pytest.mark.parity

TEMPLATE = ('{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}'
            '{% endfor %}')


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'unigram'])
@pytest.mark.parametrize('add_bos', [True, False])
def test_a_written_tokenizer(kind, add_bos, tmp_path, caplog):
  import transformers

  if kind == 'bytes':
    original = tokenizers.from_files({'bytes.txt': b''})
  else:
    config = TokenizerConfig(kind='sentencepiece', vocab_size=315, model_type=kind)
    original = tokenizers.train_or_load(config, [TEXT])
  files = original.files() | {'chat_template.jinja': TEMPLATE.encode()}
  config = small.CONFIGS['llama'].replace(vocab_size=320)
  huggingface_writer.save(tmp_path / 'model', config, small.variables(config), files,
                          add_bos=add_bos)
  logging.getLogger('transformers').propagate = True
  with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
    warnings.simplefilter('error')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / 'model')
  assert not caplog.records, caplog.text
  assert (theirs.bos_token_id, theirs.eos_token_id) == (original.bos_id, original.eos_id)
  assert settings.eos_token_id == original.eos_id
  first = [original.bos_id] if add_bos else []
  for text in PROBES:
    text = text.replace('<', '').replace('>', '')
    assert theirs(text).input_ids == first + original.encode(text)
    assert theirs.decode(original.encode(text)) == text
  ours = tokenizers.from_files(tokenizer_files.read(tmp_path / 'model'))
  messages = [{'role': 'user', 'content': 'The quick  fox'}]
  expected = theirs.apply_chat_template(messages, return_dict=False)
  assert chat.encode(ours, TEMPLATE, messages, add_generation_prompt=False) == expected
  assert tokenizer_files.add_bos(tokenizer_files.read(tmp_path / 'model')) == add_bos
