"""Mutates small valid files for some seconds and reads them; prints what escapes as JSON lines.

    python -m tests.fuzz.parsers GROUP SECONDS [SEED]

Whatever is no ValueError, ImportError or OSError is a finding; so is more than 4 GiB of memory.
"""

import io
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
import traceback

ATOMS = (None, True, 0, -1, 2**63, 1e308, '', 'a', '<s>', [], [[]], {}, {'a': []}, '\ud800',
         [None], {'content': 5}, {'content': ['a']}, 'x' * 5000)
SPECIAL = (b'\0', b'\xff\xfe', b'[' * 5000, b'{"text":' * 3000, b'"' * 1001, b'<!--' * 500,
           b'<![', b'<a "', b'\r\r\n', b'9' * 6000, b'{"a":1,"a":2}', b'NaN', b'\x1c\x85',
           b'*_' * 2000, b'\xf4\x90\x80\x80', b'\\ud800')


def mutate_bytes(rng, content):
  content = bytearray(content)
  for _ in range(rng.choice([1, 1, 2, 5])):
    place, kind = rng.randrange(len(content) + 1), rng.random()
    if kind < 0.4 and content:
      content[place % len(content)] ^= 1 << rng.randrange(8)
    elif kind < 0.6:
      content[place:place + rng.choice([1, 4, 100])] = b''
    elif kind < 0.8:
      content[place:place] = rng.choice(SPECIAL)
    else:
      content[place:place] = content[place // 2:place]
  return bytes(content)


def mutate_tree(rng, value):
  """Replace, drop or double one value somewhere in JSON."""
  if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
    return rng.choice(ATOMS)
  if isinstance(value, dict):
    key = rng.choice([*value])
    if rng.random() < 0.15:
      return {name: item for name, item in value.items() if name != key}
    return {**value, key: mutate_tree(rng, value[key])}
  place = rng.randrange(len(value))
  if rng.random() < 0.2:
    return value[:place] + value[place + 1:]
  return [*value[:place], mutate_tree(rng, value[place]), *value[place + 1:]]


def mutate_json(rng, content):
  if rng.random() < 0.25:
    return mutate_bytes(rng, content)
  tree = json.loads(content)
  for _ in range(rng.choice([1, 1, 2])):
    tree = mutate_tree(rng, tree)
  return json.dumps(tree).encode()


def texts(folder):
  import pyarrow
  from pyarrow import parquet

  from jaxllm.data.documents import SourceConfig, documents
  from jaxllm.tasks.records import RecordsConfig, RecordSource, load

  rows = [{'text': f'line {i} é', 'n': [1, 2]} for i in range(9)]
  jsonl = b''.join(json.dumps(row).encode() + b'\n' for row in rows)
  table = b'text,label,"a ""b"""\n' + b'"two\nlines",x,1\n' * 6
  packed = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
  squad = {'data': [{'title': 't', 'paragraphs': [{'context': 'c', 'qas': [
    {'id': 'i', 'question': 'q', 'answers': [{'text': 'c', 'answer_start': 0}]}]}]}]}
  markdown = b'# Title\n\nsome *emphasis* and **bold** a_b \\* \n' * 5
  valid = {'.jsonl': jsonl, '.csv': table, '.tsv': table.replace(b',', b'\t'), '.md': markdown,
           '.txt': markdown, '.json': json.dumps(squad).encode(), '.parquet': packed.getvalue()}

  def one(rng):
    ending = rng.choice([*valid])
    path = folder / f'a{ending}'
    path.write_bytes((mutate_json if ending == '.json' else mutate_bytes)(rng, valid[ending]))
    source = {'location': str(path), 'encoding_errors': rng.choice(['strict', 'replace']),
              'format': 'markdown' if ending == '.md' else None}
    if rng.random() < 0.5:
      list(documents(SourceConfig(**source, slice=rng.choice([(0.0, 1.0), (0.3, 0.9)]))))
    else:
      load(RecordsConfig(sources=(RecordSource(**source),)), 'train')

  return one


def cleaning(folder):
  from jaxllm.data.cleaning import STEPS

  page = '<p>A <b>b</b> &amp; c<pre>x\n y</pre><script>s</script><!-- c --><![CDATA[d]]>é\x01'

  def one(rng):
    text = mutate_bytes(rng, page.encode()).decode('utf-8', 'replace') * rng.choice([1, 1, 20])
    for step in STEPS.values():
      step(text)

  return one


def tokenizer(folder):
  import tokenizers as library

  from jaxllm.data import tokenizer_kinds, tokenizers

  inner = library.Tokenizer(library.models.BPE(dict(tokenizer_kinds.BYTE_SIGNS), []))
  inner.normalizer = library.normalizers.Sequence([
    library.normalizers.NFC(), library.normalizers.Replace('x', 'y')])
  inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = library.decoders.ByteLevel()
  inner.add_special_tokens(['<s>', '</s>'])
  inner.post_processor = library.processors.TemplateProcessing('<s> $A', None, [('<s>', 256)])
  sequences = {'tokenizer.json': inner.to_str().encode(), 'tokenizer_config.json': json.dumps({
    'chat_template': [{'name': 'default', 'template': 'x'}], 'bos_token': '<s>',
    'eos_token': {'content': '</s>'}, 'add_bos_token': True, 'tokenizer_class': 'GPT2Tokenizer',
    'added_tokens_decoder': {'256': {'content': '<s>', 'special': True}},
    'additional_special_tokens': ['<s>'], 'extra_special_tokens': {'a': '</s>'}}).encode(),
    'special_tokens_map.json': b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}}',
    'generation_config.json': b'{"eos_token_id": [257, 256]}',
    'added_tokens.json': b'{"<s>": 256, "</s>": 257}'}
  pair = {'vocab.json': json.dumps(tokenizer_kinds.BYTE_SIGNS).encode(), 'merges.txt': b''}

  def one(rng):
    files = dict(sequences)
    if rng.random() < 0.3:
      files |= pair
      del files['tokenizer.json']
    if rng.random() < 0.5:
      del files['tokenizer_config.json']
    name = rng.choice([*files])
    files[name] = (mutate_bytes if name == 'merges.txt' else mutate_json)(rng, files[name])
    found = tokenizers.from_files(files)
    found.decode(found.encode_parts(['a b <s> é', *list(found.special_tokens.values())[:1], 'c']))
    assert found.eos_token_ids is not None and found.add_bos in (True, False)
    assert found.chat_templates is not None and found.named_tokens is not None

  return one


def weights(folder):
  import numpy as np
  from safetensors.numpy import save

  from jaxllm.interop import huggingface

  keys = {'model_type': 'llama', 'vocab_size': 8, 'hidden_size': 4, 'num_hidden_layers': 1,
          'num_attention_heads': 2, 'num_key_value_heads': 1, 'intermediate_size': 6,
          'max_position_embeddings': 16, 'rms_norm_eps': 1e-5, 'hidden_act': 'silu',
          'tie_word_embeddings': True, 'rope_theta': 1e4, 'architectures': ['LlamaForCausalLM'],
          'rope_scaling': None, 'eos_token_id': [1], 'torch_dtype': 'float32'}
  layer, shapes = 'model.layers.0.', {'q_proj': (4, 4), 'k_proj': (2, 4), 'v_proj': (2, 4),
                                      'o_proj': (4, 4)}
  tensors = {'model.embed_tokens.weight': (8, 4), 'model.norm.weight': (4,),
             f'{layer}input_layernorm.weight': (4,),
             f'{layer}post_attention_layernorm.weight': (4,),
             **{f'{layer}mlp.{name}.weight': shape for name, shape in (
               ('gate_proj', (6, 4)), ('up_proj', (6, 4)), ('down_proj', (4, 6)))},
             **{f'{layer}self_attn.{name}.weight': shape for name, shape in shapes.items()}}
  valid = {'config.json': json.dumps(keys).encode(),
           'model.safetensors': save({n: np.zeros(s, np.float32) for n, s in tensors.items()}),
           'generation_config.json': b'{"eos_token_id": [1], "temperature": 0.5}'}
  for name, content in valid.items():
    (folder / name).write_bytes(content)
  huggingface.open_model(folder)

  def one(rng):
    name = rng.choice([*valid])
    (folder / name).write_bytes(
      mutate_bytes(rng, valid[name]) if name == 'model.safetensors' else
      mutate_json(rng, valid[name]))
    try:
      huggingface.open_model(folder)
    finally:
      (folder / name).write_bytes(valid[name])

  return one


GROUPS = {'texts': texts, 'cleaning': cleaning, 'tokenizer': tokenizer, 'weights': weights}


def main(group, seconds, seed=0):
  resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) * 4 + 60,) * 2)
  found, number = {}, 0
  with tempfile.TemporaryDirectory() as folder:
    one = GROUPS[group](pathlib.Path(folder))
    end = time.monotonic() + seconds
    while time.monotonic() < end or not number:
      number += 1
      rng = random.Random(f'{group} {seed} {number}')
      start = time.process_time()
      try:
        one(rng)
      except (ValueError, OSError, ImportError):
        pass
      except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found[f'{type(error).__name__} at {last.filename}:{last.lineno}'] = (
          f'{number}: {str(error)[:200]}')
      if time.process_time() - start > 5:
        found[f'slow {number}'] = f'{time.process_time() - start:.1f} s'
  if (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) > 4096:
    found['memory'] = f'{peak} MiB'
  print(json.dumps({'group': group, 'files': number, 'found': found}))


if __name__ == '__main__':
  main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
