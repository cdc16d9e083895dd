"""Everything that a borrowed accelerator has to show, in one run of at most --minutes.

  python experiments/benchmarks/accelerator.py                 # on a GPU or a TPU
  JAX_PLATFORMS=cpu python experiments/benchmarks/accelerator.py   # a rehearsal of toy size

Parts, in the order of their worth; each is a process of its own, and what it finds is printed and
appended to --output at once, so that a run that is cut off has lost nothing but its last part:

- parity: logits, and the losses of 20 train steps, of a tiny model and of GPT-2 against those of
  the CPU; the fused attention against XLA's; bfloat16 against float32.
- train: tokens/s, MFU, peak memory and compile seconds of a train step in bfloat16, and the same of
  PyTorch: a compiled GPT-2 with its fused attention, AdamW and clipping.
- decode: tokens/s, and the share of the memory's bandwidth that reading the weights amounts to.
- engine: tokens/s of 64 requests that are decoded together as they come.

MFU is `training.goodput.flops_per_step` (6 operations per parameter of a matrix product and
token, and attention; recomputation left out) over the time of a step and the vendor's dense
bfloat16 peak. A device without one in `training/goodput.py` shows none.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from absl import app, flags

MINUTES = flags.DEFINE_float('minutes', 6.0, 'Time for all parts together.')
PARTS = flags.DEFINE_list('parts', None, 'A part of the parts, by name.')
TOY = flags.DEFINE_bool('toy', None, 'Toy sizes; by default on a CPU alone.')
OUTPUT = flags.DEFINE_string('output', 'runs/accelerator.jsonl', 'One JSON object a line.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: the part to measure here.')

# Bytes/s of the device's memory, from the vendors' data sheets, by `device_kind`.
BANDWIDTH = {
  'NVIDIA H100 80GB HBM3': 3.35e12, 'NVIDIA H100 PCIe': 2.0e12, 'NVIDIA H200': 4.8e12,
  'NVIDIA A100-SXM4-40GB': 1.555e12, 'NVIDIA A100-SXM4-80GB': 2.039e12, 'NVIDIA L4': 0.3e12,
  'Tesla T4': 0.32e12, 'TPU v4': 1.2e12, 'TPU v5 lite': 0.819e12, 'TPU v5': 2.765e12,
  'TPU v6 lite': 1.64e12,
}
# Preset, rows, tokens of a row, remat. PyTorch takes the same.
TRAIN = {
  'gpt2_124m': ('gpt2_124m', 32, 1024, 'none'),
  'gpt2_355m': ('gpt2_355m', 16, 1024, 'none'),
  'llama_1b': ('llama3.2_1b', 4, 2048, 'dots_no_batch'),
}
DECODE_BATCHES, PROMPT, NEW = (1, 8, 64), 64, 128
PARITY_STEPS, TIMED_STEPS = 20, 20


def main(_) -> None:
  if WORKER.value:
    part, _, size = WORKER.value.partition(':')
    {'parity': parity, 'train': train, 'torch': train_torch, 'decode': decode, 'engine': engine}[
      part](size)
    return
  toy = is_cpu() if TOY.value is None else TOY.value
  output = pathlib.Path(OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  deadline = time.monotonic() + 60 * MINUTES.value
  names = ['parity:tiny', 'train:gpt2_124m', 'torch:gpt2_124m', 'parity:gpt2_124m',
           'train:gpt2_355m', 'torch:gpt2_355m', 'decode:gpt2_124m', 'engine:gpt2_124m',
           'train:llama_1b', 'decode:llama_1b']
  for name in PARTS.value or names:
    left = deadline - time.monotonic()
    if left < 10:
      print(f'{name}: not begun, {left:.0f} s are left', flush=True)
      continue
    started = time.monotonic()
    print(f'{name} ... ({left:.0f} s left)', flush=True)
    results, why = run_worker(name, toy, left)
    with output.open('a') as file:
      for result in results:
        file.write(json.dumps({'part': name, 'toy': toy, **result}) + '\n')
    print(f'{name}: {time.monotonic() - started:.0f} s{why}', flush=True)
  print(f'wrote {output}')


def is_cpu() -> bool:
  """Return whether JAX has no accelerator, asked in a process that lets go of it again."""
  done = subprocess.run([sys.executable, '-c', 'import jax; print(jax.default_backend())'],
                        capture_output=True, text=True, check=True)
  return done.stdout.split()[-1] == 'cpu'


def run_worker(name: str, toy: bool, seconds: float) -> tuple[list[dict], str]:
  """Return what a part found before it ended or was cut off, and why it failed."""
  # Both libraries take what they need, as they need it: the peak is what was needed.
  environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  if os.environ.get('JAX_PLATFORMS') and 'cpu' not in os.environ['JAX_PLATFORMS']:
    environment['JAX_PLATFORMS'] = os.environ['JAX_PLATFORMS'] + ',cpu'
  command = [sys.executable, __file__, f'--worker={name}', f'--toy={str(toy).lower()}']
  results, why = [], ''
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                        env=environment) as process:
    try:
      out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      out, err = process.communicate()
      why = ', cut off'
  for line in out.splitlines():
    if line.startswith('RESULT '):
      results.append(json.loads(line.removeprefix('RESULT ')))
      print('  ' + '  '.join(f'{key} {shown(value)}' for key, value in results[-1].items()))
  if process.returncode and not why:
    why = ', failed: ' + ' | '.join(err.strip().splitlines()[-3:])
  return results, why


def shown(value) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def report(**result) -> None:
  print('RESULT ' + json.dumps(result), flush=True)


# What is measured.


def device_facts() -> dict:
  import jax

  device = jax.devices()[0]
  return {'device': device.device_kind, 'jax': jax.__version__}


def fused_attention() -> str:
  """Return the config's name of the kernel that suits the platform."""
  import jax

  return {'gpu': 'cudnn', 'tpu': 'splash'}.get(jax.default_backend(), 'xla')


def preset(name: str, length: int):
  """Return the decoder's config for a row of `length` tokens, small if this is a rehearsal."""
  from jaxllm.models.families import PRESETS

  config = PRESETS[name].replace(dropout_rate=0.0, attention_dropout_rate=0.0)
  if TOY.value:
    config = config.replace(vocab_size=512, embed_dim=64, num_layers=2, num_heads=4,
                            num_kv_heads=2 if config.num_kv_heads else None, mlp_dim=128)
  return config.replace(max_length=max(length, 256))


def tiny():
  from jaxllm.models.decoder import DecoderConfig

  return DecoderConfig(vocab_size=512, embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=2,
                       mlp_dim=384, max_length=256)


def make_experiment(model, rows: int, length: int, steps: int = 1000):
  from jaxllm.data.documents import SourceConfig
  from jaxllm.data.records import DataConfig
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.experiment import Experiment, TrainingConfig

  return Experiment(
    name='accelerator', model=model,
    data=DataConfig(sources=(SourceConfig(location='unused'),), context_length=length),
    tokenizer=TokenizerConfig(kind='bytes'),
    training=TrainingConfig(num_steps=steps, batch_size=rows))


def random_batch(vocabulary: int, rows: int, length: int) -> dict:
  import numpy as np

  ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
  return {
    'tokens': ids[:, :-1], 'targets': ids[:, 1:],
    'weights': np.ones((rows, length), np.float32),
    'segment_ids': np.ones((rows, length), np.int32),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }


def losses(model, rows: int, length: int, device) -> list[float]:
  """Return the losses of the first train steps on one device, always from the same parameters."""
  import jax
  import numpy as np

  from jaxllm import sharding
  from jaxllm.training import state, step

  with jax.default_device(device):
    experiment = make_experiment(model, rows, length)
    mesh = sharding.make_mesh(experiment.mesh, [device])
    tx = state.make_optimizer(experiment)
    train_step = step.make_train_step(experiment, tx, mesh)
    current = state.create_state(experiment, tx, mesh)
    batch = random_batch(model.vocab_size, rows, length)
    placed = sharding.put_batch(batch, sharding.batch_sharding(mesh, experiment.mesh))
    found = []
    for _ in range(PARITY_STEPS):
      current, metrics = train_step(current, placed)
      found.append(metrics['loss'])
    return np.asarray(jax.device_get(found)).tolist()


def parity(size: str) -> None:
  """Compare this device with the CPU, its fused attention with XLA's, bfloat16 with float32."""
  import jax
  import numpy as np

  from jaxllm.models import decoder

  rows, length = 2, 128
  model = tiny() if size == 'tiny' else preset(size, length)
  host, device = jax.devices('cpu')[0], jax.devices()[0]
  batch = random_batch(model.vocab_size, rows, length)
  with jax.default_device(host):
    variables = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(0))

  def logits(config, where) -> np.ndarray:
    apply = jax.jit(decoder.Decoder(config).apply)
    with jax.default_device(where):
      # Segments are given, as in training: a fused kernel takes whole sequences alone.
      out = apply(jax.device_put(variables, where), jax.device_put(batch['tokens'], where),
                  segment_ids_BT=jax.device_put(batch['segment_ids'], where))
    return np.asarray(out, np.float32)[..., :model.vocab_size]

  low = model.replace(dtype='bfloat16')
  with jax.default_matmul_precision('highest'):
    expected, found = logits(model, host), logits(model, device)
    report(size=size, **device_facts(), logits_error=float(np.abs(found - expected).max()),
           logits_largest=float(np.abs(expected).max()))
    on_host, on_device = (losses(model, rows, length, where) for where in (host, device))
    report(size=size, steps=PARITY_STEPS, loss_first=on_host[0], loss_last=on_host[-1],
           loss_error=float(np.abs(np.subtract(on_host, on_device)).max()))
  plain = logits(low, device)
  report(size=size, bfloat16_logits_error=float(np.abs(plain - expected).max()),
         bfloat16_loss_error=float(np.abs(np.subtract(
           losses(low, rows, length, device), on_host)).max()))
  if (kernel := fused_attention()) != 'xla':
    fused = low.replace(attention=kernel)
    report(size=size, kernel=kernel,
           kernel_logits_error=float(np.abs(logits(fused, device) - plain).max()),
           kernel_loss_error=float(np.abs(np.subtract(
             losses(fused, rows, length, device), losses(low, rows, length, device))).max()))


def timed(step, wait, tokens: int) -> dict:
  """Return the rate of `step()`, whose work `wait()` waits for; the median of 3 rounds."""
  for _ in range(3):
    step()
  wait()
  rates = []
  for _ in range(3):
    started = time.perf_counter()
    for _ in range(2 if TOY.value else TIMED_STEPS):
      step()
    wait()
    rates.append((2 if TOY.value else TIMED_STEPS) * tokens / (time.perf_counter() - started))
  return {'tokens_per_second': statistics.median(rates), 'slowest': min(rates),
          'fastest': max(rates)}


def train(size: str) -> None:
  import jax

  from jaxllm import sharding
  from jaxllm.training import goodput, state, step

  name, rows, length, remat = TRAIN[size]
  rows, length = (2, 64) if TOY.value else (rows, length)
  model = preset(name, length).replace(
    dtype='bfloat16', attention=fused_attention(), remat=remat, scan_layers=size == 'llama_1b')
  experiment = make_experiment(model, rows, length)
  mesh = sharding.make_mesh(experiment.mesh)
  tx = state.make_optimizer(experiment)
  holder = [state.create_state(experiment, tx, mesh)]
  placed = sharding.put_batch(random_batch(model.vocab_size, rows, length),
                              sharding.batch_sharding(mesh, experiment.mesh))
  started = time.perf_counter()
  compiled = step.make_train_step(experiment, tx, mesh).lower(holder[0], placed).compile()
  compile_seconds = time.perf_counter() - started
  last = []

  def one() -> None:
    holder[0], found = compiled(holder[0], placed)
    last[:] = [found['loss']]

  result = timed(one, lambda: jax.block_until_ready(last), rows * length)
  device = jax.devices()[0]
  peak = goodput.device_peak_flops(device.device_kind, 'bfloat16')
  rate = goodput.flops_per_step(experiment) * result['tokens_per_second'] / (rows * length)
  report(size=size, library='jaxllm', **device_facts(), rows=rows, length=length, **result,
         mfu=rate / peak if peak else None, compile_seconds=compile_seconds,
         peak_memory_gb=goodput.device_memory_bytes() / 1e9, loss=float(last[0]))


def train_torch(size: str) -> None:
  import torch
  import transformers

  _, rows, length, _ = TRAIN[size]
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  layers, width, heads = {'gpt2_124m': (12, 768, 12), 'gpt2_355m': (24, 1024, 16)}[size]
  vocabulary = 50304
  if TOY.value:
    rows, length, layers, width, heads, vocabulary = 2, 64, 2, 64, 4, 512
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    n_layer=layers, n_embd=width, n_head=heads, n_positions=length, vocab_size=vocabulary,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation='sdpa',
  )).to(device).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  forward = torch.compile(model)
  ids = torch.randint(0, vocabulary, (rows, length + 1), device=device)
  tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
  last = []

  def one() -> None:
    with torch.autocast(device, torch.bfloat16):
      logits = forward(tokens).logits
      loss = torch.nn.functional.cross_entropy(logits.view(-1, vocabulary), targets.view(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    last[:] = [loss.detach()]

  started = time.perf_counter()
  one()
  float(last[0])
  compile_seconds = time.perf_counter() - started
  result = timed(one, lambda: float(last[0]), rows * length)
  peak = torch.cuda.max_memory_allocated() / 1e9 if device == 'cuda' else None
  report(size=size, library='torch compiled', torch=torch.__version__, rows=rows, length=length,
         **result, compile_seconds=compile_seconds, peak_memory_gb=peak, loss=float(last[0]))


def in_bfloat16(name: str):
  """Return (config, variables in bfloat16, their bytes), drawn at random."""
  import jax
  import jax.numpy as jnp

  from jaxllm.models import decoder

  config = preset(name, 1024).replace(dtype='bfloat16')

  @jax.jit
  def make(key):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder.init(config, key))

  variables = jax.block_until_ready(make(jax.random.key(0)))
  return config, variables, sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def decode(size: str) -> None:
  import jax

  from jaxllm.generation import decode as decoding
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.models import decoder

  config, variables, weight_bytes = in_bfloat16(TRAIN[size][0])
  variables, model = decoder.unstack(variables), decoder.Decoder(config)
  new = 16 if TOY.value else NEW
  peak = BANDWIDTH.get(jax.devices()[0].device_kind)
  for batch in DECODE_BATCHES:
    def run(count: int, batch: int = batch) -> float:
      greedy = SamplingConfig(temperature=0.0, max_new_tokens=count)
      started = time.perf_counter()
      results = decoding.generate(
        model, variables, [[*range(1, PROMPT + 1)]] * batch, greedy)
      assert all(len(result.tokens) == count for result in results)
      return time.perf_counter() - started

    run(1), run(new)
    first = min(run(1) for _ in range(3))
    seconds = statistics.median(run(new) for _ in range(3))
    # The time of a step without that of the prompt.
    steps_per_second = (new - 1) / max(seconds - first, 1e-9)
    report(size=size, **device_facts(), batch=batch, tokens_per_second=batch * new / seconds,
           steps_per_second=steps_per_second, first_token_ms=1000 * first,
           bandwidth_share=weight_bytes * steps_per_second / peak if peak else None)


def engine(size: str) -> None:
  """Serve 64 requests of mixed lengths, sent at once, as `serve` does behind its HTTP."""
  import asyncio
  import random

  from jaxllm.data import tokenizers
  from jaxllm.data.tokenizers import TokenizerConfig
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.model import Model
  from jaxllm.serving.engine import Engine, EngineConfig
  from jaxllm.serving.streams import Request

  config, variables, _ = in_bfloat16(TRAIN[size][0])
  tokenizer = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  started = time.perf_counter()
  slots = 4 if TOY.value else 64
  served = Engine(Model(config, variables, tokenizer),
                  EngineConfig(num_slots=slots, context_length=512, max_queue=256))
  compile_seconds = time.perf_counter() - started
  chance = random.Random(0)
  news = [chance.choice((8,) if TOY.value else (64, 128, 256)) for _ in range(64)]
  prompts = [tuple(chance.randrange(256) for _ in range(chance.choice((8, 32, 100, 200))))
             for _ in news]

  async def one(prompt, new) -> float:
    # The end of a text is never sampled, so that every request has its number of tokens.
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=new, min_new_tokens=new)
    began = time.perf_counter()
    first = None
    async for _ in served.submit([Request(prompt, sampling, 0)]):
      first = first or time.perf_counter() - began
    return first

  async def everyone() -> list[float]:
    return await asyncio.gather(*map(one, prompts, news))

  asyncio.run(one(prompts[0], 8))
  before = served.statistics().completion_tokens
  started = time.perf_counter()
  firsts = asyncio.run(everyone())
  seconds = time.perf_counter() - started
  tokens = served.statistics().completion_tokens - before
  served.close(5)
  assert tokens == sum(news), (tokens, sum(news))
  report(size=size, **device_facts(), clients=64, slots=slots, tokens_per_second=tokens / seconds,
         first_token_p50_ms=1000 * statistics.median(firsts), compile_seconds=compile_seconds)


if __name__ == '__main__':
  app.run(main)
