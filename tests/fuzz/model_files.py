"""Fuzzers of the files of models: GGUF, adapters, configs of every family, bundles, templates."""

import base64
import json
import struct

from tests.fuzz.mutations import ATOMS, mutate_bytes, mutate_json, mutate_tree


def _text(value):
  content = str(value).encode(errors='surrogatepass')
  return struct.pack('<Q', len(content)) + content


_FORMS = {0: '<B', 4: '<I', 5: '<i', 6: '<f', 7: '<?', 10: '<Q', 11: '<q', 12: '<d'}
_TYPED = [(0, 255), (4, 0), (4, 1), (4, 2**32 - 1), (5, -1), (6, float('nan')), (6, 1e30), (6, 0.5),
          (7, True), (7, False), (8, ''), (8, 'x' * 5000), (8, '\ud800'), (8, 'llama'), (10, 2**63),
          (11, -2**63), (12, float('inf')), (9, (8, [])), (9, (8, ['a', 'a'])), (9, (4, [3, 0])),
          (9, (6, [float('nan')] * 3)), (9, (0, [1] * 9)), (9, (7, [True, False]))]


def _gguf_value(kind, value):
  if kind == 8:
    return _text(value)
  if kind != 9:
    return struct.pack(_FORMS[kind], value)
  inner, items = value
  return struct.pack('<IQ', inner, len(items)) + b''.join(_gguf_value(inner, one) for one in items)


def _gguf(metadata, tensors, body):
  head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(metadata))
  for key, (kind, value) in metadata.items():
    head += _text(key) + struct.pack('<I', kind) + _gguf_value(kind, value)
  for name, shape, kind, offset in tensors:
    head += _text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, kind, offset)
  return head + bytes(-len(head) % 32) + body


def _gguf_models():
  """Yield (metadata, tensors, body) of small models: one of each kind of tokenizer."""
  from jaxllm.data.tokenizer_kinds import BYTE_SIGNS

  signs = [*BYTE_SIGNS, 'ab', '<s>', '</s>']
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '\u2581', 'a', '\u2581a']
  tokens = {
    'gpt2': {'tokens': signs, 'merges': ['a b'], 'pre': 'qwen2',
             'token_type': [1] * 257 + [3, 3]},
    'llama': {'tokens': pieces, 'scores': [0.0] * len(pieces),
              'token_type': [2, 3, 3] + [6] * 256 + [1] * 3}}
  for kind, files in tokens.items():
    vocab = len(files['tokens'])
    numbers = {'embedding_length': 4, 'feed_forward_length': 6, 'block_count': 1,
               'context_length': 32, 'attention.head_count': 2, 'attention.head_count_kv': 1}
    metadata = {'general.architecture': (8, 'llama'), 'general.alignment': (4, 32)}
    metadata |= {f'llama.{name}': (4, value) for name, value in numbers.items()}
    metadata |= {'llama.attention.layer_norm_rms_epsilon': (6, 1e-5),
                 'llama.rope.freq_base': (6, 1e4), 'llama.rope.dimension_count': (4, 2),
                 'tokenizer.ggml.model': (8, kind), 'tokenizer.chat_template': (8, 'x'),
                 'tokenizer.ggml.bos_token_id': (4, vocab - 2 if kind == 'gpt2' else 1),
                 'tokenizer.ggml.eos_token_id': (4, vocab - 1 if kind == 'gpt2' else 2),
                 'tokenizer.ggml.add_bos_token': (7, True)}
    for name, value in files.items():
      inner = {str: 8, float: 6, int: 5}[type(value[0])]
      metadata[f'tokenizer.ggml.{name}'] = (8, value) if isinstance(value, str) else (
        9, (inner, value))
    layer, norm = 'blk.0.', {'attn_norm': (4,), 'ffn_norm': (4,)}
    shapes = {'token_embd': (4, vocab), 'output_norm': (4,)} | {
      layer + name: shape for name, shape in (norm | {
        'attn_q': (4, 4), 'attn_k': (4, 2), 'attn_v': (4, 2), 'attn_output': (4, 4),
        'ffn_gate': (4, 6), 'ffn_up': (4, 6), 'ffn_down': (6, 4)}).items()}
    tensors, size = [], 0
    for name, shape in shapes.items():
      tensors.append((f'{name}.weight', shape, 0, size))
      size += -(-4 * shape[0] * (shape[1:] or (1,))[0] // 32) * 32
    yield metadata, tensors, bytes(size)


def gguf(folder):
  from jaxllm.data import tokenizers
  from jaxllm.interop import gguf as library
  from jaxllm.interop import weights

  models, path = [*_gguf_models()], folder / 'a.gguf'
  places = (8, 16, 24, *(_gguf(*models[0]).index(name) - 8 + offset for name in (
    b'tokenizer.ggml.tokens', b'tokenizer.ggml.merges') for offset in (0, 8 + 21 + 8)))

  def one(rng):
    metadata, tensors, body = rng.choice(models)
    metadata, tensors, kind = dict(metadata), list(tensors), rng.random()
    for _ in range(rng.choice([1, 1, 2])):
      key = rng.choice([*metadata])
      if 0.25 < kind < 0.5:
        metadata[key] = rng.choice(_TYPED)
      elif kind < 0.6 and metadata[key][0] == 9:
        inner, items = metadata[key][1]
        place = rng.randrange(len(items) + 1)
        if isinstance(items, list):
          items = rng.choice([items[:place], items[:place] + items[place // 2:], [
            *items[:place], rng.choice([*items, *([''] if inner == 8 else [0, 1])]),
            *items[place + 1:]]])
        metadata[key] = (9, (inner, items))
      elif kind < 0.75:
        place = rng.randrange(len(tensors))
        name, shape, form, offset = tensors[place]
        tensors[place] = rng.choice([
          (name, (*shape[:-1], rng.choice([0, 1, 2**31, 2**63])), form, offset),
          (name, shape, rng.randrange(45), offset), (name, shape, form, offset + 8),
          (name, shape[:1] * rng.choice([1, 3, 4, 5]), form, 2**63),
          (rng.choice(tensors)[0], shape, form, offset)])
    content = _gguf(metadata, tensors, body)
    if kind < 0.25:
      content = mutate_bytes(rng, content)
    if 0.75 < kind < 0.9:
      place = rng.choice(places)
      number = struct.pack('<Q', rng.choice([2**20, 2**28, 2**40, 2**63, 2**64 - 1]))
      content = content[:place] + number + content[place + 8:]
    path.write_bytes(content)
    if kind > 0.85:
      with path.open('r+b') as file:  # A file that takes no room on the disk.
        file.truncate(rng.choice([2**20, 2**28, 2**30]))
    source = library.open_model(path)
    if source.files:
      found = tokenizers.from_files(source.files)
      found.decode(found.encode('a b <s>'))
    if rng.random() < 0.05:
      weights.load(source, 'float32')

  library.open_model(_write(path, _gguf(*models[0])))
  library.open_model(_write(path, _gguf(*models[1])))
  return one


def _write(path, content):
  path.write_bytes(content)
  return path


def families(folder):
  """config.json of every family, without weights."""
  from jaxllm.interop import weights
  from jaxllm.interop.huggingface import Reading
  from jaxllm.models.families import HUGGINGFACE
  from tests.interop import small

  valid = []
  for name, config in small.CONFIGS.items():
    form = HUGGINGFACE[small.MODEL_TYPES.get(name, name)]
    valid.append((form, {'model_type': form.model_type, **form.encode(config)}))
    form.decode(valid[-1][1])
  mixtral = next(keys for form, keys in valid if form.model_type == 'mistral') | {
    'num_local_experts': 4, 'num_experts_per_tok': 2}
  valid.append((HUGGINGFACE['mixtral'], mixtral))
  text = next(keys for form, keys in valid if form.model_type == 'gemma3_text')
  valid.append((HUGGINGFACE['gemma3'], {'text_config': text, 'vision_config': {}}))
  names = sorted({name for _, keys in valid for name in keys})

  def one(rng):
    form, keys = rng.choice(valid)
    for _ in range(rng.choice([1, 1, 2, 3])):
      keys = mutate_tree(rng, keys)
      if rng.random() < 0.2 and isinstance(keys, dict):
        keys = {**keys, rng.choice(names): rng.choice(ATOMS)}
    if not isinstance(keys, dict):
      return
    config = form.decode(Reading(keys))
    weights.locate(form, config, {})

  return one


def adapters(folder):
  """Adapters in PEFT's form."""
  import numpy as np
  from safetensors.numpy import save

  from jaxllm.interop import peft
  from jaxllm.models.families import HUGGINGFACE
  from tests.interop import small

  form = HUGGINGFACE['llama']
  config = small.CONFIGS['llama'].replace(num_layers=1, vocab_size=12, vocab_multiple=1)
  params = small.variables(config)['params']
  shapes = {'q_proj': (48, 24), 'k_proj': (16, 24)}
  tensors = {f'base_model.model.model.layers.0.self_attn.{name}.lora_{part}.weight':
             np.ones((2, inputs) if part == 'A' else (outputs, 2), np.float32)
             for name, (outputs, inputs) in shapes.items() for part in 'AB'}
  tensors['base_model.model.model.embed_tokens.weight'] = np.ones((12, 24), np.float32)
  keys = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'bias': 'none',
          'rank_pattern': {'q_proj': 2}, 'alpha_pattern': {'k_proj': 3},
          'target_modules': ['q_proj', 'k_proj'],
          'base_model_name_or_path': 'a/b', 'revision': None, 'use_rslora': False,
          'modules_to_save': ['embed_tokens'], 'init_lora_weights': True, 'task_type': 'CAUSAL_LM',
          'layers_to_transform': [0], 'ensure_weight_tying': False}
  valid = {'adapter_config.json': json.dumps(keys).encode(),
           'adapter_model.safetensors': save(tensors)}
  for name, content in valid.items():
    (folder / name).write_bytes(content)
  peft.merge(folder, form, config, params)

  def one(rng):
    name = rng.choice(['adapter_config.json', *valid])
    (folder / name).write_bytes((mutate_json if name.endswith('.json') else mutate_bytes)(
      rng, valid[name]))
    try:
      peft.base_model(folder)
      peft.merge(folder, form, config, params)
    finally:
      (folder / name).write_bytes(valid[name])

  return one


def bundles(folder):
  """Bundles of checkpoints and manifests of records, some with digests that are made anew."""
  from jaxllm import loading
  from jaxllm.checkpoints import bundle as library
  from jaxllm.data import records, tokenizers
  from jaxllm.experiment import Experiment

  tokenizer = tokenizers.from_files(tokenizers.read_files(tokenizers.TokenizerConfig(kind='bytes')))
  experiment = Experiment(**{'name': 'a', 'model': {
    'vocab_size': 257, 'embed_dim': 8, 'num_layers': 1, 'num_heads': 1, 'mlp_dim': 8,
    'max_length': 16}, 'tokenizer': {'kind': 'bytes'},
    'data': {'sources': [{'location': 'a'}], 'context_length': 16},
    'training': {'num_steps': 1, 'batch_size': 1}})
  valid = [library.Bundle(experiment.to_json(), tokenizer.files(), {'fingerprint': 'a' * 64},
                          {'step': 3}, {'params/a': '(1,) float32 0'}),
           library.Bundle(json.dumps({'model': json.loads(experiment.decoder.to_json())}),
                          tokenizer.files(), {library.CONVERTED: {'model_type': 'llama'}})]
  valid = [library.to_dict(one) for one in valid]
  manifest = {'fingerprint': 'a', 'tokenizer_fingerprint': 'b', 'seq_len': 8, 'sha256': 'c'}

  def one(rng):
    fields = rng.choice(valid)
    if rng.random() < 0.5:
      config = mutate_json(rng, fields['config_json'].encode()).decode(errors='replace')
      fields = {**fields, 'config_json': config}
    elif rng.random() < 0.2:
      files = {'tokenizer.json': base64.b64encode(mutate_bytes(rng, b'{"a": [1]}')).decode()}
      fields = {**fields, 'tokenizer_files': files}
    else:
      fields = mutate_tree(rng, fields)
    if rng.random() < 0.8 and isinstance(fields, dict) and isinstance(
        fields.get('tokenizer_files'), dict):
      fields = {**fields, 'sha256': library._digests(fields)}
    content = json.dumps(manifest).encode()
    (folder / 'manifest.json').write_bytes(mutate_json(rng, content))
    try:
      records.load_manifest(folder)
    except ValueError:
      pass
    try:
      bundle = library.from_dict(fields)
    except (ValueError, library.CheckpointError):
      return  # The store says whose it is.
    loading._stored(bundle, None, *loading._described(bundle, 'bundle'))

  for fields in valid:
    bundle = library.from_dict(fields)
    loading._stored(bundle, None, *loading._described(bundle, 'bundle'))
  return one


_PIECES = (
  '{{ ', ' }}', '{% ', ' %}', '{#', '#}', "{{ messages[0]['content'] }}", '{% for m in messages %}',
  '{% endfor %}', '{% if m.role == "user" %}', '{% endif %}', '{{ bos_token }}', '<|im_start|>',
  "{{ raise_exception('x') }}", "{{ strftime_now('%Y') }}", '{% set ns = namespace(a=[]) %}',
  '{{ messages|tojson }}', '{{ "a" * 10**10 }}', '{{ 9**9**9 }}', '{{ range(10**9)|list }}',
  '|join', "{{ ''.__class__.__mro__ }}",
  '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}', '{% break %}',
  "{{ messages|map(attribute='__class__')|list }}", '{% include "/etc/passwd" %}', '{{ self }}',
  '{% for a in range(10**8) %}{% endfor %}', '[' * 300, "{{ '%1000000000d'|format(1) }}", '\0',
  '{% generation %}', '{% endgeneration %}', '{{ messages.append(1) }}', '\ud800',
  "{{ [1]|random }}")


def templates(folder):
  """Chat templates, in a process with less than the usual time."""
  from jaxllm.interop import chat

  chat.CPU_SECONDS = 1

  def one(rng):
    pieces = [rng.choice(_PIECES) for _ in range(rng.randrange(1, 6))]
    text = ''.join(pieces)
    if rng.random() < 0.3:
      text = mutate_bytes(rng, text.encode(errors='replace')).decode(errors='replace')
    talk = [{'role': 'user', 'content': rng.choice(ATOMS)}, {'role': 'assistant', 'content': 'a'}]
    chat.render(text, [talk], rng.random() < 0.5, bos_token='<s>')

  return one


GROUPS = {'gguf': gguf, 'families': families, 'adapters': adapters, 'bundles': bundles,
          'templates': templates}
