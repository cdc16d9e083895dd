"""The tokenizer in a GGUF file: llama.cpp's conventions for pieces, ends and cuts."""

import io
import json
import pathlib
import types

import pytest
import small_gguf

from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.interop import gguf_vocabulary, tokenizer_export

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACES, NEWLINES = ['▁' * i for i in range(2, 17)], ['\n' * i for i in range(1, 9)]
WORDS = [*SPACES, *NEWLINES, '\t', '\t\t', '<h1>', '<start_of_turn>', '<end_of_turn>']
TEXTS = (
  pathlib.Path(small_gguf.__file__).read_text(), 'def f(x):\n    return x\n\n\n\n        y  z',
  ' a  b   c    d', '\n' * 20 + 'x', '<h1>t<h1> x', '  \n  \n\t\t\tq', 'a\n b',
  '   <start_of_turn>   user', 'é 机器 🦜',
)


def ggml(**metadata):
  return {f'tokenizer.ggml.{name}': value for name, value in metadata.items()}


@pytest.fixture(scope='module')
def gemma():
  """(A SentencePiece model like Gemma's, its processor, the metadata that the converter makes)."""
  import sentencepiece

  content = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS[0].splitlines()), model_writer=content, vocab_size=500,
    model_type='bpe', byte_fallback=True, normalization_rule_name='identity', minloglevel=2,
    remove_extra_whitespaces=False, add_dummy_prefix=False, user_defined_symbols=WORDS, pad_id=0,
    eos_id=1, bos_id=2, unk_id=3)
  model = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
  ids = range(model.vocab_size())
  pieces = [model.id_to_piece(i) for i in ids]
  kinds = [UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i)
           else BYTE if model.is_byte(i) else USER_DEFINED if pieces[i] in WORDS else NORMAL
           for i in ids]
  # What the converter does to user-defined pieces alone.
  written = [piece.replace('▁', ' ') if kind == USER_DEFINED else piece
             for piece, kind in zip(pieces, kinds, strict=True)]
  return content.getvalue(), model, ggml(
    model='llama', pre='default', tokens=written, token_type=kinds, add_space_prefix=False,
    scores=[model.get_score(i) for i in ids], bos_token_id=2, eos_token_id=1, padding_token_id=0,
    unknown_token_id=3)


def test_runs_of_spaces_are_those_of_the_original(gemma):
  _, model, metadata = gemma
  files = gguf_vocabulary.tokenizer_files(metadata)
  made = tokenizers.from_files(files)
  for text in TEXTS:
    assert made.encode(text) == model.encode(text)
    assert made.decode(made.encode(text)) == text
  assert made.encode('a' + ' ' * 20) == [*map(model.piece_to_id, ('a', '▁' * 16, '▁' * 4))]
  assert tokenizer_settings.eos_token_ids(files) == (1, model.piece_to_id('<end_of_turn>'))


def test_its_export_gives_the_same_ids(gemma):
  _, model, metadata = gemma
  config = types.SimpleNamespace(vocab_size=model.vocab_size(), max_length=64)
  files, keys = tokenizer_export.huggingface_files(
    gguf_vocabulary.tokenizer_files(metadata), config)
  exported = tokenizers.from_files(files)
  for text in (*TEXTS, *(word.replace('▁', ' ') for word in WORDS)):
    assert exported.encode(text) == model.encode(text)
    assert exported.decode(exported.encode(text)) == text
  assert keys['eos_token_id'] == [1, model.piece_to_id('<end_of_turn>')]


@pytest.mark.parity
def test_transformers_gives_the_same_ids(gemma, tmp_path):
  import transformers

  content, _, metadata = gemma
  (tmp_path / 'tokenizer.model').write_bytes(content)
  settings = {'tokenizer_class': 'GemmaTokenizer'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  made = tokenizers.from_files(gguf_vocabulary.tokenizer_files(metadata))
  for text in TEXTS:
    assert made.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_a_piece_with_spaces_beside_one_with_their_sign_is_refused():
  metadata = ggml(model='llama', tokens=['<unk>', '<s>', '</s>', '  ', '▁▁'],
                  token_type=[2, 3, 3, 4, 1])
  with pytest.raises(ValueError, match='stands twice, with spaces and with their sign'):
    gguf_vocabulary.tokenizer_files(metadata)


def test_what_llama_cpp_takes_for_granted_of_sentencepiece():
  tokens = ['<unk>', '<s>', '</s>', 'a', '']
  files = gguf_vocabulary.tokenizer_files(
    ggml(model='llama', tokens=tokens, token_type=[2, 3, 3, 1, 5]))
  made = tokenizers.from_files(files)
  assert (made.bos_id, made.eos_id, made.vocab_size) == (1, 2, 5)
  assert tokenizer_settings.add_bos(files)


def byte_level(tokens=(), kinds=(), **changes):
  """Return the files of a byte-level vocabulary: a, b, ab, then `tokens`."""
  metadata = {'model': 'gpt2', 'pre': 'gpt-2', 'merges': ['a b'],
              'tokens': ['a', 'b', 'ab', *tokens],
              'token_type': [NORMAL] * 3 + [*(kinds or [CONTROL] * len(tokens))]}
  return gguf_vocabulary.tokenizer_files(ggml(**metadata | changes))


@pytest.mark.parametrize(('tokens', 'changes', 'stops'), [
  (['<e>', '<t>'], {'eos_token_id': 3}, (3,)),
  (['<e>', '<t>'], {'eos_token_id': 3, 'eot_token_id': 4}, (3, 4)),
  (['<e>', '<t>'], {'eos_token_id': 4, 'eom_token_id': 3}, (4, 3)),
  (['<e>', '<t>', '<u>'], {'eos_token_id': 4, 'eos_token_ids': [3, 4, 5]}, (4, 3, 5)),
  (['<e>', '<t>'], {'eot_token_id': 4}, (4,)),
  (['<e>', '<t>'], {'eos_token_id': 3, 'fim_pad_token_id': 4, 'fim_pre_token_id': 4}, (3, 4)),
  (['<|im_start|>', '<|im_end|>', '<|endoftext|>'], {'eos_token_id': 5}, (5, 4)),
  (['<|eot_id|>', '<|eom_id|>', '<end_of_turn>', '<|end|>'], {}, (3, 4, 5, 6)),
  # A separator where there are two ends besides.
  (['<|end|>', '<|return|>', '<|call|>'], {'eos_token_id': 4}, (4, 5)),
  (['<|start|>', '<|return|>', '<|end|>'], {'eos_token_id': 4}, (4, 5)),
])
def test_tokens_that_end_a_generation(tokens, changes, stops):
  assert tokenizer_settings.eos_token_ids(byte_level(tokens, **changes)) == stops


def test_plain_text_ends_nothing():
  files = byte_level(['</s>', '<e>'], [NORMAL, CONTROL], eos_token_id=4)
  assert tokenizer_settings.eos_token_ids(files) == (4,)
  with pytest.raises(ValueError, match='eot_token_id=9, but there are 5 tokens'):
    byte_level(['<e>', '<t>'], eot_token_id=9)


@pytest.mark.parametrize(('changes', 'begins'), [
  ({'pre': 'llama-bpe'}, True), ({'pre': 'tekken'}, True), ({'pre': 'qwen2'}, False),
  ({'pre': 'llama3', 'add_bos_token': False}, False),
  ({'pre': 'qwen2', 'add_bos_token': True}, True),
])
def test_whether_texts_begin_with_bos(changes, begins):
  files = byte_level(['<s>'], bos_token_id=3, **changes)
  assert tokenizer_settings.add_bos(files) == begins
  inner = json.loads(files['tokenizer.json'])['post_processor']
  assert (inner['type'] == 'TemplateProcessing') == begins


TEXT = "I'LL pay 1234 €!!\n\n  HeWo don't x=1;\r\n\t机a  "
CUTS = {
  'gpt-2 jina-v2-code exaone4':
    "I|'|LL| pay| 1234| €!!|\n\n | HeWo| don|'t| x|=|1|;|\r\n|\t|机a|  ",
  'smollm command-r mellum2':
    "I|'|LL| pay| |1|2|3|4| €!!|\n\n | HeWo| don|'t| x|=|1|;|\r\n|\t|机a|  ",
  'llama-bpe falcon3 smaug-bpe glm4':
    "I|'LL| pay| |123|4| €!!\n\n| | HeWo| don|'t| x|=|1|;\r\n|\t机a|  ",
  'qwen2 deepseek-r1-qwen megrez stablelm2':
    "I|'LL| pay| |1|2|3|4| €!!\n\n| | HeWo| don|'t| x|=|1|;\r\n|\t机a|  ",
  'seed-coder': "I|'LL| pay| |1|2|3|4| €!!|\n\n| | HeWo| don|'t| x|=|1|;|\r\n|\t机a|  ",
  'tekken': "I|'LL| pay| |1|2|3|4| €!!\n\n| | He|Wo| don|'t| x|=|1|;\r\n|\t机a|  ",
  'gpt-4o llama4': "I'LL| pay| |123|4| €!!\n\n| | He|Wo| don't| x|=|1|;\r\n|\t机a|  ",
  'bloom': "I'LL| pay| 1234| €|!!\n\n | HeWo| don't| x=1;|\r\n\t|机a|  ",
  'viking': "I'LL| pay| |1|2|3|4| €|!!\n\n | HeWo| don't| x=|1|;|\r\n\t|机a|  ",
  'deepseek-coder':
    "I|'|LL| pay| |1|2|3|4| |€|!!|\n|\n| | HeWo| don|'|t| x|=|1|;|\r|\n|\t|机|a|  ",
  'deepseek-v3 hunyuan-dense':
    "I|'LL| pay| |123|4| €!!\n\n| | HeWo| don|'t| x|=|1|;\r\n|\t|机|a|  ",
}


@pytest.mark.parametrize(('name', 'cuts'), [
  (name, cuts) for names, cuts in CUTS.items() for name in names.split()])
def test_how_text_is_cut(name, cuts):
  made = tokenizer_settings.byte_level({}, [], **gguf_vocabulary.treatment(name))
  places = [place for _, place in made.pre_tokenizer.pre_tokenize_str(TEXT)]
  assert [TEXT[begin:end] for begin, end in places] == cuts.split('|')


def test_marks_that_combine_belong_to_words_where_the_family_says_so():
  text = 'e\u0301a'
  for name, parts in (('qwen35', 1), ('qwen2', 2)):
    made = tokenizer_settings.byte_level({}, [], **gguf_vocabulary.treatment(name))
    assert len(made.pre_tokenizer.pre_tokenize_str(text)) == parts
    assert made.normalizer.normalize_str(text) == '\u00e9a'


def test_a_text_cut_in_an_unknown_way_is_refused(caplog):
  with pytest.raises(ValueError, match="'kimi-k2' is not supported .*llama-bpe.*take the model"):
    byte_level(pre='kimi-k2')
  byte_level(pre='default')
  assert 'tokenizer.ggml.pre does not say how text is cut' in caplog.text


def test_a_stretch_that_is_a_token_becomes_it():
  for pre, ids in (('llama-bpe', [3]), ('qwen2', [2, 0])):
    assert tokenizers.from_files(byte_level(['aba'], [NORMAL], pre=pre)).encode('aba') == ids
