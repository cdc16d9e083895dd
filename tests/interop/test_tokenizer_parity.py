"""Tokenizers that we write are to transformers what they are to us."""

import json
import logging
import warnings

import pytest
import small
from test_tokenizer_directory import ADDED, END, MAP, QWEN, opened, settings, vocab_and_merges
from test_tokenizer_files import PROBES, TEXT

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.interop import chat, huggingface, tokenizer_files

pytestmark = pytest.mark.parity

TEMPLATE = ('{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}'
            '{% endfor %}')


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'unigram', 'byte_level_bpe'])
@pytest.mark.parametrize('add_bos', [True, False])
def test_a_written_tokenizer(kind, add_bos, tmp_path, caplog):
  import transformers

  if kind == 'bytes':
    original = tokenizers.from_files({'bytes.txt': b''})
  else:
    fields = {'kind': kind} if kind == 'byte_level_bpe' else {'model_type': kind}
    config = TokenizerConfig(vocab_size=315, **fields)
    original = tokenizers.train_or_load(config, [TEXT])
  files = original.files() | {'chat_template.jinja': TEMPLATE.encode()}
  config = small.CONFIGS['llama'].replace(vocab_size=320)
  huggingface.save(tmp_path / 'model', config, small.variables(config), files,
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
  assert chat.encode_all(ours, TEMPLATE, [messages], False) == [expected]
  assert tokenizer_settings.add_bos(tokenizer_files.read(tmp_path / 'model')) == add_bos


WORDS = [*PROBES, '12(a 345', "it's IT'S\n\n  x", ' lead', 'trail ', 'e\u0301', f'a{END} b',
         f'{END}b', '<s>a</s> b']
MORE = {'320': {'content': END, 'special': True, 'normalized': False},
        '321': {'content': 'fox', 'special': False, 'normalized': False}}


@pytest.mark.parametrize('model_type, files', [
  ('qwen2', QWEN),
  ('qwen3', settings(tokenizer_class='Qwen2Tokenizer') | ADDED | MAP),
  ('qwen2', {}),
  ('gpt2', {}),
  ('gpt2', settings(tokenizer_class='GPT2Tokenizer', add_prefix_space=True, eos_token=END) | ADDED),
  ('gpt_neox', settings(tokenizer_class='GPTNeoXTokenizer')),
  *[(model_type, settings(**said, add_bos_token=True, eos_token=END, added_tokens_decoder=MORE))
    for model_type, said in (
      ('llama', {}), ('llama', {'tokenizer_class': 'LlamaTokenizer'}),
      ('llama', {'tokenizer_class': 'LlamaTokenizer', 'legacy': True}),
      ('llama', {'tokenizer_class': 'LlamaTokenizer', 'add_prefix_space': False}),
      ('mistral', {'tokenizer_class': 'LlamaTokenizer'}),
      ('phi3', {'tokenizer_class': 'LlamaTokenizer', 'legacy': False}))],
])
def test_a_directory_without_a_tokenizer_json(model_type, files, tmp_path):
  import io

  import sentencepiece
  import transformers

  if 'add_bos_token' in str(files):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT.split('\n')), model_writer=model, vocab_size=320,
      model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
      remove_extra_whitespaces=False, minloglevel=2)
    files = {'tokenizer.model': model.getvalue(), **files}
  else:
    files = {**vocab_and_merges(), **files}
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': model_type, 'vocab_size': 330}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours, kept = opened(tokenizer_files.read(tmp_path), model_type, 330)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
  assert tokenizer_settings.add_bos(kept) == (theirs('a').input_ids[:1] == [theirs.bos_token_id])
  assert ours.special_tokens == {
    token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special}
  ours.library.encode_special_tokens = False
  for text in WORDS:
    expected = theirs(text, add_special_tokens=False).input_ids
    assert ours.library.encode(text, add_special_tokens=False).ids == expected, text
    assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text
