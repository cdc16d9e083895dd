"""Decoding tokens/s of jaxllm against transformers.generate in PyTorch, in one run, as ratios.

  make bench              (installs the extra `parity`; runs this among others)
  python experiments/benchmarks/decode_throughput.py [--rounds=3] [--sizes=gpt2,smollm2]

Weights are random, prompts have 64 tokens and 128 new ones follow, greedily. Every measurement is a
process of its own, warmed up by a run of the same shape; the candidates take turns. The table holds
medians: new tokens/s (prompt included in the time), the ratio to PyTorch, the share of the memory
bandwidth (that of summing an array) which reading the weights once per step amounts to, and the
milliseconds to a first token.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

from absl import app, flags

ROUNDS = flags.DEFINE_integer('rounds', 3, 'Times that each candidate is measured.')
SIZES = flags.DEFINE_list('sizes', ['gpt2', 'smollm2'], 'Shapes to measure.')
BATCHES = flags.DEFINE_list('batches', ['1', '8'], 'Rows that are decoded together.')
CANDIDATES = flags.DEFINE_list('candidates', ['torch', 'jaxllm', 'jaxllm-int8'], 'Who decodes.')
OUTPUT = flags.DEFINE_string('output', 'runs/decode_throughput.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: size/candidate to measure here.')

PRESETS = {'gpt2': 'gpt2_124m', 'smollm2': 'smollm2_135m'}
PROMPT, NEW, REPEATS = 64, 128, 2


def main(_) -> None:
  batches = [int(batch) for batch in BATCHES.value]
  if WORKER.value:
    size, name = WORKER.value.split('/')
    measure = measure_torch if name == 'torch' else measure_jaxllm
    print('RESULT ' + json.dumps(measure(size, name, batches)))
    return
  results = {}
  for size in SIZES.value:
    runs = {name: [] for name in CANDIDATES.value}
    for _ in range(ROUNDS.value):
      for name, found in runs.items():
        found.append(run_worker(size, name))
    results[size] = {name: summary([run for run in found if run]) for name, found in runs.items()}
    print_table(size, results[size], batches)
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=2) + '\n')
  print(f'wrote {path}')


def run_worker(size: str, name: str) -> dict | None:
  command = [sys.executable, __file__, f'--worker={size}/{name}',
             f'--batches={",".join(BATCHES.value)}']
  done = subprocess.run(command, capture_output=True, text=True)
  lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
  if not lines:
    print(f'{name}: not measured: {done.stderr.strip().splitlines()[-1:]}', file=sys.stderr)
    return None
  return json.loads(lines[0].removeprefix('RESULT '))


def summary(found: list[dict]) -> dict:
  return {key: statistics.median(run[key] for run in found) for key in (found[0] if found else ())}


def print_table(size: str, results: dict, batches: list[int]) -> None:
  print(f'{size}: prompt {PROMPT}, {NEW} new tokens, float32 but for int8')
  heads = f'{"batch":>6}{"tokens/s":>10}{"ratio":>8}{"bandwidth":>11}{"first ms":>10}'
  print(f'{"candidate":<14}{heads}')
  for name, result in results.items():
    for batch in batches if result else ():
      rate = result[f'tokens_per_second_{batch}']
      base = results.get('torch', {}).get(f'tokens_per_second_{batch}')
      ratio = f'{rate / base:.2f}' if base else '-'
      share = result['weight_bytes'] * rate / batch / result['bandwidth']
      first = 1000 * result[f'first_token_seconds_{batch}']
      print(f'{name:<14}{batch:>6}{rate:>10.1f}{ratio:>8}{share:>11.0%}{first:>10.1f}', flush=True)


def timed(decode, batches: list[int], weight_bytes: int) -> dict:
  """Time `decode(batch, new)` warm, for all and for one new token."""
  result = {'bandwidth': bandwidth(), 'weight_bytes': weight_bytes}
  for batch in batches:
    decode(batch, 1), decode(batch, NEW)
    seconds = {1: [], NEW: []}
    for new in [*[1] * (2 * REPEATS), *[NEW] * REPEATS]:
      start = time.perf_counter()
      decode(batch, new)
      seconds[new].append(time.perf_counter() - start)
    result[f'tokens_per_second_{batch}'] = batch * NEW / min(seconds[NEW])
    result[f'first_token_seconds_{batch}'] = min(seconds[1])
  return result


def bandwidth() -> float:
  """Return bytes/s at which this machine sums a large array."""
  import jax
  import jax.numpy as jnp

  numbers = jnp.ones(2**26, jnp.float32)
  total = jax.jit(jnp.sum)
  total(numbers).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    total(numbers).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return numbers.nbytes / min(seconds)


def measure_jaxllm(size: str, name: str, batches: list[int]) -> dict:
  import jax

  from jaxllm.adapters.quantization import QuantizationConfig, quantize
  from jaxllm.generation import decode
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.models import decoder
  from jaxllm.models.families import PRESETS as CONFIGS

  config = CONFIGS[PRESETS[size]].replace(dropout_rate=0.0)
  variables = decoder.init(config, jax.random.key(0))
  if name == 'jaxllm-int8':
    variables = jax.jit(quantize, static_argnums=1)(variables, QuantizationConfig())
  variables, model = decoder.unstack(variables), decoder.Decoder(config)

  def run(batch: int, new: int) -> None:
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=new)
    results = decode.generate(model, variables, [[*range(1, PROMPT + 1)]] * batch, greedy)
    assert all(len(result.tokens) == new for result in results)

  return timed(run, batches, sum(leaf.nbytes for leaf in jax.tree.leaves(variables)))


def measure_torch(size: str, name: str, batches: list[int]) -> dict:
  del name
  import torch
  import transformers

  if size == 'gpt2':
    config = transformers.GPT2Config()
  else:
    config = transformers.LlamaConfig(
      vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
      num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
      max_position_embeddings=8192,
    )
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  model.generation_config.eos_token_id = None

  def run(batch: int, new: int) -> None:
    prompt = torch.arange(1, PROMPT + 1).repeat(batch, 1)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                         do_sample=False, pad_token_id=0)
    assert out.shape == (batch, PROMPT + new)

  parameters = sum(parameter.numel() for parameter in model.parameters())
  return timed(run, batches, 4 * parameters)


if __name__ == '__main__':
  app.run(main)
