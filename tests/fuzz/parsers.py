"""Mutates small valid files for some seconds and reads them; prints what escapes as JSON lines.

    python -m tests.fuzz.parsers GROUP,GROUP|all SECONDS [SEED [COUNT]]

An error that a program would not show as one sentence is a finding; so are 5 seconds of computing
and half a GiB of memory for one file. With COUNT at least so many files are read.
"""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import random
import re
import resource
import sys
import tempfile
import time
import traceback

import pyarrow

from jaxllm import mistakes
from tests.fuzz import model_files
from tests.fuzz.mutations import ATOMS, mutate_bytes, mutate_json, mutate_tree

PACKERS = {
  '.gz': gzip.compress, '.bz2': bz2.compress,
  '.xz': lambda content: lzma.compress(content, preset=0),  # Others take 90 MiB, piecemeal.
  '.zst': lambda content: pyarrow.Codec('zstd').compress(content).to_pybytes()}


def array_record(folder, entries):
  from array_record.python import array_record_module

  path = folder / 'valid.array_record'
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:2')
  for entry in entries:
    writer.write(entry)
  writer.close()
  return path.read_bytes()


def texts(folder):
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
  page = (b'<html><head><title>t</title></head><body><p>' + b'A sentence of words. ' * 9
          + b'</p></body></html>')
  entries = array_record(folder, [json.dumps(row).encode() for row in rows])
  valid = {'.jsonl': jsonl, '.csv': table, '.tsv': table.replace(b',', b'\t'), '.md': markdown,
           '.txt': markdown, '.json': json.dumps(squad).encode(), '.parquet': packed.getvalue(),
           '.html': page, '.py': b'import os\n\ndef f():\n  return 1\n', '.array_record': entries}
  formats = {'.md': 'markdown', '.html': 'html', '.py': 'code'}

  def one(rng):
    ending = rng.choice([*valid])
    content = (mutate_json if ending == '.json' else mutate_bytes)(rng, valid[ending])
    packing = rng.choice(['', '', '', *PACKERS])
    if packing:
      content = PACKERS[packing](content)
      content = mutate_bytes(rng, content) if rng.random() < 0.5 else content
    path = folder / f'a{ending}{packing}'
    path.write_bytes(content)
    source = {'location': str(path), 'encoding_errors': rng.choice(['strict', 'replace']),
              'format': formats.get(ending)}
    try:
      if rng.random() < 0.5:
        list(documents(SourceConfig(**source, slice=rng.choice([(0.0, 1.0), (0.3, 0.9)]))))
      else:
        load(RecordsConfig(sources=(RecordSource(**source),)), 'train')
    except ValueError as error:
      known = (str(path), "split 'train' has no records", 'no programs in')
      assert str(error).startswith(known), error
    finally:
      path.unlink()

  return one


def cleaning(folder):
  from jaxllm.data.cleaning import STEPS, CleaningConfig

  page = '<p>A <b>b</b> &amp; c<pre>x\n y</pre><script>s</script><!-- c --><![CDATA[d]]>é\x01'

  def one(rng):
    text = mutate_bytes(rng, page.encode()).decode('utf-8', 'replace') * rng.choice([1, 1, 20])
    for step in STEPS.values():
      step(CleaningConfig())(text)

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


def tasks(folder):
  """Records of every task, and the JSON file that names tasks."""
  from jaxllm.tasks import TASKS, suite
  from tests.tasks.test_fields import CONFIGS, WHOLE

  listed = json.dumps({name: json.loads(config.to_json()) for name, config in CONFIGS.items()})

  def one(rng):
    kind = rng.choice([*WHOLE, None])
    if kind is None:
      (folder / 'tasks.json').write_bytes(mutate_json(rng, listed.encode()))
      suite.select(str(folder / 'tasks.json'), 'test')
      return
    record = WHOLE[kind]
    for _ in range(rng.choice([1, 1, 2])):
      record = mutate_tree(rng, record)
      if isinstance(record, dict) and rng.random() < 0.3:
        record = {**record, rng.choice(['id', 'prompt', 'tools', 'answer_starts', 'title']):
                  rng.choice(ATOMS)}
    if isinstance(record, dict):
      TASKS[kind].example(CONFIGS[kind], record, True)

  return one


def runs(folder):
  """What lies in a run's directory, and files of keys."""
  from jaxllm import config, storage
  from jaxllm.experiment import Experiment
  from jaxllm.serving import access
  from jaxllm.training import metrics

  experiment = config.load('experiments/quickstart.py').to_json().encode()
  lines = b''.join(json.dumps({'step': i, 'loss': 1.5}).encode() + b'\n' for i in range(4))
  keys = b'# clients\nthe-key-of-a-client-1\nthe-key-of-a-client-2\n'

  def one(rng):
    kind, path = rng.choice(['lines', 'keys', 'json', 'config']), folder / 'a'
    if kind == 'lines':
      path.write_bytes(mutate_bytes(rng, lines))
      metrics.read(path)
    elif kind == 'keys':
      path.write_bytes(mutate_bytes(rng, keys))
      access.read_keys(str(path), {})
    elif kind == 'json':
      path.write_bytes(mutate_json(rng, b'{"id": "a", "step": [1]}'))
      storage.read_json(path)
    else:
      Experiment.from_json(mutate_json(rng, experiment).decode(errors='replace'))

  return one


GROUPS = {'texts': texts, 'cleaning': cleaning, 'tokenizer': tokenizer, 'weights': weights,
          'tasks': tasks, 'runs': runs, **model_files.GROUPS}


def peak():
  """Return the most memory that this process has had, in MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def resident():
  """Return the memory that this process has now, in MiB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() >> 20


def fuzz(group, seconds, seed, count):
  """Return {'files', 'peak', 'found'} of one group."""
  found, number = {}, 0
  with tempfile.TemporaryDirectory() as folder:
    one = GROUPS[group](pathlib.Path(folder))
    # Where a bomb would fill the machine it fails.
    size = int(re.search(r'VmSize:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, ((size + (6 << 20)) << 10, -1))
    before, end = peak(), time.monotonic() + seconds
    while time.monotonic() < end or number < count:
      number += 1
      rng = random.Random(f'{group} {seed} {number}')
      start, held = time.process_time(), resident()
      try:
        one(rng)
      except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if not isinstance(error, Exception) or mistakes.sentence(error) is None:
          found[f'{type(error).__name__} at {last.filename}:{last.lineno}'] = (
            f'{number}: {str(error)[:200]}')
      if time.process_time() - start > 5:
        found[f'slow {number}'] = f'{time.process_time() - start:.1f} s'
      if peak() > max(before, held) + 512:
        found[f'memory {number}'] = f'{peak()} MiB after {before}'
        before = peak()
  return {'files': number, 'peak': peak(), 'found': found}


def main(groups, seconds, seed=0, count=0):
  names = [*GROUPS] if groups == 'all' else groups.split(',')
  resource.setrlimit(resource.RLIMIT_CPU, (len(names) * (int(seconds) * 4 + int(count) + 60),) * 2)
  for name in names:
    print(json.dumps({'group': name} | fuzz(name, seconds, seed, int(count))), flush=True)


if __name__ == '__main__':
  main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
