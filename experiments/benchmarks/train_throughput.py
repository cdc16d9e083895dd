"""Training tokens/s of jaxllm against transformers in PyTorch, in one run.

  make bench              (installs the extra `parity`: torch, transformers, peft)
  python experiments/benchmarks/train_throughput.py [--rounds=3] [--sizes=small,124m,lora]
      [--nanogpt=nanoGPT/model.py] [--jaxllm_python=.venv313/bin/python]

The sizes are those of a GPT-2, against `GPT2LMHeadModel`, all of which is trained; `lora` are
adapters of rank 8 to every linear map of the layers of a SmolLM2-135M, against `peft`. Where
--nanogpt names the `model.py` of a clone of github.com/karpathy/nanoGPT, that model takes turns
too. --jaxllm_python measures jaxllm on another Python, as one with a newer jax and no torch.

Every measurement is a process of its own, which takes a few steps to warm up and then times some;
the candidates take turns, so that a machine whose speed drifts treats them alike. The table holds
medians over the rounds and the ratio to PyTorch's eager float32 at the same size (`torch`, or
`nanogpt` where that alone is measured). On a GPU the same program measures the GPU.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

from absl import app, flags

ROUNDS = flags.DEFINE_integer('rounds', 3, 'Times that each candidate is measured.')
SIZES = flags.DEFINE_list('sizes', ['small', '124m'], 'characters, small, 124m, 355m, lora.')
CANDIDATES = flags.DEFINE_list('candidates', None, 'A part of the candidates, by name.')
OUTPUT = flags.DEFINE_string('output', 'runs/train_throughput.json', 'Where the JSON goes.')
NANOGPT = flags.DEFINE_string('nanogpt', None, "Path of nanoGPT's model.py.")
JAXLLM_PYTHON = flags.DEFINE_string('jaxllm_python', sys.executable, 'Interpreter for jaxllm.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: size/candidate to measure here.')
SECONDS = flags.DEFINE_float('seconds', 12.0, 'Seconds to time for each measurement, at least.')

# layers, width, heads, context, batch, vocabulary
SHAPES = {
  'characters': (6, 384, 6, 256, 16, 65),  # As nanoGPT's Shakespeare.
  'small': (6, 384, 6, 256, 16, 4096),
  '124m': (12, 768, 12, 256, 4, 50257),
  '355m': (24, 1024, 16, 256, 4, 50257),
  'lora': (30, 576, 9, 128, 4, 49152),
}
NAMES = (
  'jaxllm float32', 'jaxllm float32 unrolled', 'jaxllm bfloat16',
  'torch eager float32', 'torch compiled float32', 'torch eager bfloat16',
  'torch compiled bfloat16',
)
NANOGPT_NAMES = ('nanogpt eager float32', 'nanogpt compiled float32')


def main(_) -> None:
  if WORKER.value:
    size, name = WORKER.value.split('/')
    library, *_ = name.split()
    measures = {'jaxllm': measure_jaxllm, 'torch': measure_torch, 'nanogpt': measure_nanogpt}
    print('RESULT ' + json.dumps(measures[library](size, name)))
    return
  results = {}
  for size in SIZES.value:
    names = CANDIDATES.value or (NAMES + NANOGPT_NAMES if NANOGPT.value else NAMES)
    runs = {name: [] for name in names}
    for _ in range(ROUNDS.value):
      for name in names:
        if runs[name] is not None:
          result = run_worker(size, name)
          runs[name] = None if result is None else [*runs[name], result]
    results[size] = {name: summary(found) for name, found in runs.items() if found}
    print_table(size, results[size])
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=2) + '\n')
  print(f'wrote {path}')


def run_worker(size: str, name: str) -> dict | None:
  python = JAXLLM_PYTHON.value if name.startswith('jaxllm') else sys.executable
  command = [python, __file__, f'--worker={size}/{name}', f'--seconds={SECONDS.value}']
  if NANOGPT.value:
    command.append(f'--nanogpt={NANOGPT.value}')
  done = subprocess.run(command, capture_output=True, text=True)
  lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
  if not lines:
    print(f'{name}: not measured: {done.stderr.strip().splitlines()[-1:]}', file=sys.stderr)
    return None
  return json.loads(lines[0].removeprefix('RESULT '))


def summary(found: list[dict]) -> dict:
  rates = [result['tokens_per_second'] for result in found]
  return {
    'tokens_per_second': statistics.median(rates),
    'slowest': min(rates),
    'fastest': max(rates),
    'first_step_seconds': statistics.median(result['first_step_seconds'] for result in found),
    'peak_memory_gb': statistics.median(result['peak_memory_gb'] for result in found),
    'loss': found[-1]['loss'],
  }


def print_table(size: str, rows: dict) -> None:
  layers, width, heads, context, batch, vocabulary = SHAPES[size]
  base = next((rows[name]['tokens_per_second'] for name in (
    'torch eager float32', 'nanogpt eager float32') if name in rows), None)
  print(f'\n{size}: {layers} layers, {width} wide, {heads} heads, context {context}, '
        f'batch {batch}, vocabulary {vocabulary}')
  print(f'{"":26}{"tokens/s":>10}{"min..max":>18}{"ratio":>8}{"first step":>12}{"peak GB":>9}')
  for name, row in rows.items():
    ratio = f'{row["tokens_per_second"] / base:.2f}' if base else '-'
    spread = f'{row["slowest"]:.0f}..{row["fastest"]:.0f}'
    print(f'{name:26}{row["tokens_per_second"]:10.0f}{spread:>18}{ratio:>8}'
          f'{row["first_step_seconds"]:11.1f}s{row["peak_memory_gb"]:9.2f}')


def timed(step, tokens_per_step: int) -> dict:
  """Warm `step` up, then time it; `step()` returns the loss once the work is done."""
  import resource

  started = time.perf_counter()
  loss = step()
  first = time.perf_counter() - started
  for _ in range(2):
    loss = step()
  count, started = 0, time.perf_counter()
  while time.perf_counter() - started < SECONDS.value or count < 3:
    loss = step()
    count += 1
  elapsed = time.perf_counter() - started
  return {
    'tokens_per_second': count * tokens_per_step / elapsed,
    'first_step_seconds': first,
    'peak_memory_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    'loss': loss,
  }


def measure_jaxllm(size: str, name: str) -> dict:
  import jax
  import numpy as np

  from jaxllm import sharding
  from jaxllm.adapters.lora import LoraConfig
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS
  from jaxllm.training import state, step

  layers, width, heads, context, batch, vocabulary = SHAPES[size]
  if size == 'lora':
    model = PRESETS['smollm2_135m']
  else:
    model = PRESETS['gpt2_124m'].replace(
      num_layers=layers, embed_dim=width, num_heads=heads, mlp_dim=4 * width, max_length=context,
      vocab_size=vocabulary, dropout_rate=0.0)
  experiment = Experiment(
    name='train_throughput',
    model=model.replace(
      dtype='bfloat16' if 'bfloat16' in name else 'float32', scan_layers='unrolled' not in name),
    init_from='unused' if size == 'lora' else None,
    finetune=FinetuneConfig(lora=LoraConfig(rank=8, alpha=16.0) if size == 'lora' else None),
    data=DataConfig(sources=(SourceConfig(location='unused'),), context_length=context),
    tokenizer=TokenizerConfig(kind='bytes'),
    training=TrainingConfig(num_steps=1000, batch_size=batch),
  )
  mesh = sharding.make_mesh(experiment.mesh)
  tx = state.make_optimizer(experiment)
  train_step = step.make_train_step(experiment, tx, mesh)
  base = None
  if size == 'lora':
    base = decoder.init(experiment.decoder, jax.random.key(0))['params']
  holder = [state.create_state(experiment, tx, mesh, base)]
  del base
  ids = np.random.default_rng(0).integers(0, vocabulary, (batch, context + 1), dtype=np.int32)
  host_batch = {
    'tokens': ids[:, :-1],
    'targets': ids[:, 1:],
    'weights': np.ones((batch, context), np.float32),
    'segment_ids': np.ones((batch, context), np.int32),
    'positions': np.tile(np.arange(context, dtype=np.int32), (batch, 1)),
  }
  placed = sharding.put_batch(host_batch, sharding.batch_sharding(mesh, experiment.mesh))

  def one() -> float:
    holder[0], metrics = train_step(holder[0], placed)
    return float(jax.block_until_ready(metrics)['loss'])

  result = timed(one, batch * context)
  stats = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    result['peak_memory_gb'] = stats['peak_bytes_in_use'] / 1e9
  return result


def measure_torch(size: str, name: str) -> dict:
  import torch

  _, _, _, context, batch, vocabulary = SHAPES[size]
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  model = (torch_adapters() if size == 'lora' else torch_gpt2(size)).to(device).train()
  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
  forward = torch.compile(model) if 'compiled' in name else model
  ids = torch.randint(0, vocabulary, (batch, context + 1), device=device)
  tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

  def one() -> float:
    with torch.autocast(device, torch.bfloat16, enabled='bfloat16' in name):
      logits = forward(tokens).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().view(-1, vocabulary), targets.view(-1)
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss)

  result = timed(one, batch * context)
  if device == 'cuda':
    result['peak_memory_gb'] = torch.cuda.max_memory_allocated() / 1e9
  return result


def measure_nanogpt(size: str, name: str) -> dict:
  import importlib.util

  import torch

  spec = importlib.util.spec_from_file_location('nanogpt_model', NANOGPT.value)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  layers, width, heads, context, batch, vocabulary = SHAPES[size]
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  model = module.GPT(module.GPTConfig(
    block_size=context, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width,
    dropout=0.0, bias=True)).to(device).train()
  optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)
  forward = torch.compile(model) if 'compiled' in name else model
  ids = torch.randint(0, vocabulary, (batch, context + 1), device=device)
  tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

  def one() -> float:
    _, loss = forward(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())

  return timed(one, batch * context)


def torch_gpt2(size: str):
  import transformers

  layers, width, heads, context, _, vocabulary = SHAPES[size]
  return transformers.GPT2LMHeadModel(transformers.GPT2Config(
    n_layer=layers, n_embd=width, n_head=heads, n_positions=context, vocab_size=vocabulary,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
  ))


def torch_adapters():
  import peft
  import transformers

  layers, width, heads, _, _, vocabulary = SHAPES['lora']
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=3,
    intermediate_size=1536, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
  ))
  return peft.get_peft_model(model, peft.LoraConfig(
    r=8, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM'))


if __name__ == '__main__':
  app.run(main)
