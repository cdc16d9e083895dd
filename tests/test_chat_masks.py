"""What a chat is trained on is what it is asked, the answer and its end, by templates as published.

The templates are short versions of our own of the formats that models are published with.
"""

import functools
import json

import pytest

from jaxllm import loading
from jaxllm.data import tokenizers
from jaxllm.interop import tokenizer_export
from jaxllm.tasks import encoding
from jaxllm.tasks.chat import Chat
from jaxllm.tasks.records import RecordsConfig, RecordSource

TURNS = '{% for m in messages %}'
OPEN = '{% if add_generation_prompt %}'

CHATML = (TURNS + '<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
          + OPEN + '<|im_start|>assistant\n{% endif %}')
LLAMA_2 = (
  "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
  "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
  "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
  "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate') }}{% endif %}"
  "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
  "+ m.content.strip() + ' [/INST]' }}"
  "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA_3 = (
  "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
  " + m.content | trim + '<|eot_id|>' %}"
  '{{ bos_token + text if loop.first else text }}{% endfor %}'
  + OPEN + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
GEMMA = (
  '{{ bos_token }}' + TURNS + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
  "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
  + OPEN + "{{ '<start_of_turn>model\\n' }}{% endif %}")
PHI_3 = (TURNS + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
         + OPEN + "{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}")
MISTRAL_1 = (
  '{{ bos_token }}' + TURNS + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
  '{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}')
MISTRAL_3 = (
  "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
  "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
  "{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
  "{% if loop.last and tools is not none %}[AVAILABLE_TOOLS] {{ tools | tojson }}{% endif %}"
  "[INST] {{ (system if loop.last else '') + m.content }}[/INST]"
  '{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}')
ZEPHYR = (TURNS + "{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
          + OPEN + "{{ '<|assistant|>' }}{% endif %}")
VICUNA = (
  "{{ 'A chat. ' }}" + TURNS + "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
  "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + '</s>' }}"
  "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}" + OPEN + "{{ 'ASSISTANT:' }}{% endif %}")
DEEPSEEK_2 = (
  '{{ bos_token }}' + TURNS + "{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
  "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
  "{% else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
  + OPEN + "{{ 'Assistant:' }}{% endif %}")
DEEPSEEK_3 = (
  '{{ bos_token }}' + TURNS + "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
  "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
  '{% else %}{{ m.content }}{% endif %}{% endfor %}' + OPEN + "{{ '<｜Assistant｜>' }}{% endif %}")
ALPACA = (
  TURNS + "{% if m.role == 'assistant' %}{{ '### Response:\\n' + m.content + '\\n\\n' }}"
  "{% else %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}"
  + OPEN + "{{ '### Response:\\n' }}{% endif %}")
NEXT_MARKER = (TURNS + "{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
               + OPEN + "{{ '<|assistant|>' }}{% endif %}")
COMMAND_R = (
  "{{ bos_token }}{% set names = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} %}"
  + TURNS + "{{ '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' + m.content.strip() "
  "+ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
  + OPEN + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}")
QWEN_3 = (
  "{% set state = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
  '{% set state.last = loop.index0 %}{% endif %}{% endfor %}'
  "{% for m in messages %}{% set text = m.content %}{% set thought = '' %}"
  "{% if m.role == 'assistant' and '</think>' in text %}"
  "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
  "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\\n' }}"
  "{% if m.role == 'assistant' and loop.index0 > state.last and (loop.last or thought) %}"
  "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
  "{{ text + '<|im_end|>\\n' }}{% endfor %}" + OPEN + "{{ '<|im_start|>assistant\\n' }}"
  "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
  '{% endif %}{% endif %}')

TEMPLATES = {
  # name: (template, EOS, what ends an answer, sequences for three answers)
  'chatml': (CHATML, '</s>', '<|im_end|>', 1),
  'llama-2': (LLAMA_2, '</s>', ' </s>', 1),
  'llama-3': (LLAMA_3, '<|eot_id|>', '<|eot_id|>', 1),
  'gemma': (GEMMA, '</s>', '<end_of_turn>', 1),
  'phi-3': (PHI_3, '</s>', '<|end|>', 1),
  'mistral-0.1': (MISTRAL_1, '</s>', '</s>', 1),
  'mistral-0.3': (MISTRAL_3, '</s>', '</s>', 1),
  'zephyr': (ZEPHYR, '</s>', '</s>', 1),
  'vicuna': (VICUNA, '</s>', '</s>', 1),
  'deepseek-2': (DEEPSEEK_2, '</s>', '</s>', 1),
  'deepseek-3': (DEEPSEEK_3, '</s>', '</s>', 1),
  # These give an answer no end that a model could stop at.
  'alpaca': (ALPACA, '</s>', '</s>', 3),
  'next marker': (NEXT_MARKER, '</s>', '</s>', 3),
  'command-r': (COMMAND_R, '<|END_OF_TURN_TOKEN|>', '<|END_OF_TURN_TOKEN|>', 1),
  # Thoughts of earlier answers are left out.
  'qwen-3': (QWEN_3, '<|im_end|>', '<|im_end|>', 3),
}
SPECIAL = [
  '<s>', '</s>', '<|im_start|>', '<|im_end|>', '[INST]', '[/INST]', '<|start_header_id|>',
  '<|end_header_id|>', '<|eot_id|>', '<start_of_turn>', '<end_of_turn>', '<|user|>', '<|system|>',
  '<|assistant|>', '<|end|>', '<｜User｜>', '<｜Assistant｜>', '<|START_OF_TURN_TOKEN|>',
  '<|END_OF_TURN_TOKEN|>', '<|USER_TOKEN|>', '<|CHATBOT_TOKEN|>', '<|SYSTEM_TOKEN|>']
TALK = [
  {'role': 'user', 'content': 'Hello <|im_end|> there</s>'},
  {'role': 'assistant', 'content': 'Hi [INST] you'},
  {'role': 'user', 'content': 'one\n\ntwo'},
  {'role': 'assistant', 'content': 'three\n\nfour.'},
  {'role': 'user', 'content': ' Bye'},
  {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\nBye'},
]


SYSTEM = {'role': 'system', 'content': 'Be brief.'}


@functools.cache
def byte_level(rstrip):
  import tokenizers as library

  signs = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  pairs = [('Ċ', 'Ċ'), ('Ġ', 'Ġ'), ('H', 'i'), ('Ġ', 'H'), ('Ġ', 'B'), (':', 'Ċ'), ('.', 'Ċ')]
  vocab = {sign: i for i, sign in enumerate([*signs, *map(''.join, pairs)])}
  cut = r'\s*\n+|\s+(?!\S)|\s?\S+|\s+'
  made = library.Tokenizer.from_str(
    tokenizer_export.byte_level_bpe(vocab, pairs, cuts=[cut]).decode())
  made.add_special_tokens([
    library.AddedToken(text, special=True, normalized=False, rstrip=rstrip and text[:2] == '<|')
    for text in SPECIAL])
  return made.to_str()


@functools.cache
def metaspace(rstrip):
  import tokenizers as library

  letters = [*map(chr, range(33, 127)), '▁', '\n', '｜']
  pairs = [('▁', 'H'), ('▁', '▁'), ('\n', '\n'), ('H', 'i'), ('▁', 'B')]
  vocab = {piece: i for i, piece in enumerate(['<unk>', *SPECIAL, *letters, *map(''.join, pairs)])}
  made = library.Tokenizer(library.models.BPE(vocab, pairs, unk_token='<unk>', fuse_unk=True))
  made.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  made.decoder = library.decoders.Metaspace(prepend_scheme='first', split=False)
  made.add_special_tokens([
    library.AddedToken(text, special=True, normalized=False, rstrip=rstrip and text[:2] == '<|')
    for text in SPECIAL])
  return made.to_str()


def model_of(content, template, eos):
  tokenizer = tokenizers.from_files({
    'tokenizer.json': content.encode(), 'chat_template.jinja': template.encode(),
    'tokenizer_config.json': json.dumps({'bos_token': '<s>', 'eos_token': eos}).encode()})
  return loading.make_model(None, None, tokenizer)


def examples_of(tmp_path, model, messages):
  path = tmp_path / 'chats.jsonl'
  path.write_text(json.dumps({'messages': messages}))
  task = Chat(template=None, data=RecordsConfig(sources=(RecordSource(location=str(path)),)))
  return loading.task_examples(task, 'train', model.tokenizer)


@pytest.mark.parametrize(('kind', 'rstrip'), [(byte_level, True), (metaspace, False)])
@pytest.mark.parametrize('name', TEMPLATES)
def test_trained_is_what_is_asked_the_answer_and_its_end(tmp_path, name, kind, rstrip):
  template, eos, end, count = TEMPLATES[name]
  model = model_of(kind(rstrip), template, eos)
  talk = TALK if name == 'mistral-0.3' else [SYSTEM, *TALK]
  example, = examples_of(tmp_path, model, talk)
  found, _ = encoding.training_sequences(
    [example], model.tokenizer, 4000, 'start', add_bos=False)
  assert len(found) == count
  names = {i: text for text, i in model.tokenizer.special_tokens.items()}
  answers = [i for i, message in enumerate(talk) if message['role'] == 'assistant']
  learnt = iter(answers)
  asked = iter(model.chat_format.encode_all([talk[:turn] for turn in answers]))
  for ids, weights in found:
    at = 0
    while 1.0 in weights[at:]:
      start = weights.index(1.0, at)
      at = weights.index(0.0, start) if 0.0 in weights[start:] else len(weights)
      turn = next(learnt)
      assert list(ids[:start]) == next(asked)
      assert ids[at - 1] in model.chat_format.eos_token_ids
      said = ''.join(names.get(i) or model.tokenizer.decode([i]) for i in ids[start:at])
      content = talk[turn]['content']
      if kind is metaspace:
        said = model.tokenizer.library.decode(ids[:at], skip_special_tokens=False)
      assert said.endswith(content.strip() + end) or content.replace(' ', '') in said
    assert at == len(ids)
  assert next(learnt, None) is None


@pytest.mark.parity
@pytest.mark.parametrize('kind', [byte_level, metaspace])
@pytest.mark.parametrize('rstrip', [False, True])
@pytest.mark.parametrize('name', TEMPLATES)
def test_chats_are_asked_as_transformers_asks_them(name, kind, rstrip):
  import tokenizers as library
  import transformers

  template, eos, _, _ = TEMPLATES[name]
  content = kind(rstrip)
  model = model_of(content, template, eos)
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=library.Tokenizer.from_str(content), bos_token='<s>', eos_token=eos,
    chat_template=template)
  plain = [{**message, 'content': message['content'].translate(str.maketrans('<>[]|', '     '))}
           for message in [SYSTEM, *TALK]]
  for end in range(2, 8):
    for opened in (False, True):
      assert model.chat_format.encode(plain[:end], add_generation_prompt=opened) == (
        theirs.apply_chat_template(
          plain[:end], add_generation_prompt=opened, return_dict=False))


def test_a_template_that_moves_the_system_message_is_refused(tmp_path):
  model = model_of(byte_level(False), MISTRAL_3, '</s>')
  with pytest.raises(ValueError, match='it is asked with .*Be brief.*use another template'):
    examples_of(tmp_path, model, [SYSTEM, *TALK])
