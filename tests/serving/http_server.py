"""A tiny random model behind a real server, in a thread, on a free port."""

import contextlib
import dataclasses
import functools
import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import jax
import tokenizers
import uvicorn

from jaxllm import loading
from jaxllm.data import tokenizers as tokenizer_lib
from jaxllm.interop import huggingface
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.linear import InitializerConfig
from jaxllm.serving import connections
from jaxllm.serving.access import Keys, LimitsConfig
from jaxllm.serving.app import make_app
from jaxllm.serving.engine import Engine, EngineConfig
from jaxllm.serving.service import Service

TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
END, TURN, TURN_END = 256, 257, 258
NAME = 'tiny'
# To make one takes a moment.
CLIENT = httpx.Client(timeout=30)


def tokenizer():
  """Return a tokenizer of bytes with special tokens and a chat template."""
  # Bytes that print stand for themselves, the others for signs from 256 on.
  printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  vocab = {chr(byte if byte in printed else next(others)): byte for byte in range(256)}
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.add_special_tokens(SPECIAL)
  return tokenizer_lib.from_files({
    'tokenizer.json': inner.to_str().encode(),
    'tokenizer_config.json': json.dumps({
      'chat_template': TEMPLATE, 'eos_token': SPECIAL[0], 'bos_token': SPECIAL[0]}).encode(),
  })


def tiny_model(max_length=512):
  """Return a random model that speaks no sense, but always the same."""
  config = DecoderConfig(
    vocab_size=259, vocab_multiple=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
    max_length=max_length, initializer=InitializerConfig(stddev=None))
  variables = decoder.init(config, jax.random.key(2))
  return loading.make_model(config, variables, tokenizer())


def save(model, directory):
  """Write a model as a directory that the program can load."""
  huggingface.save(directory, model.config, model.variables, model.tokenizer.files(),
                          model_type='llama')


def wait_until(condition, seconds=20.0):
  """Return once a condition holds; the server works in threads of its own."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it does not come true'
    time.sleep(0.002)


def make_engine(model):
  """Return an engine; the first of a process compiles its programs."""
  return Engine(model, EngineConfig(num_slots=4, max_queue=32, prefill_chunk=64))


@dataclasses.dataclass(frozen=True)
class Server:
  """Where a server listens, and what is inside."""

  url: str
  port: int
  service: Service
  stop: Callable[[], None]

  def post(self, path, content, **headers):
    """Send JSON, or bytes as they are."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return CLIENT.post(f'{self.url}{path}', content=body,
                       headers={'content-type': 'application/json', **headers})

  def complete(self, **fields):
    return self.post('/v1/completions', {'model': NAME, 'prompt': 'ab', 'max_tokens': 4} | fields)

  def chat(self, **fields):
    return self.post('/v1/chat/completions', {
      'model': NAME, 'messages': [{'role': 'user', 'content': 'hi'}], 'max_tokens': 4} | fields)

  def get(self, path, **headers):
    return CLIENT.get(f'{self.url}{path}', headers=headers)

  def wait_until_idle(self, seconds=20.0):
    """Return once no slot is in use and nothing waits."""
    def idle():
      now = self.service.engine.statistics()
      return not (now.busy_slots or now.queued or self.service.active.used)

    wait_until(idle, seconds)


@contextlib.contextmanager
def running(model, engine, keys=(), hosts=('127.0.0.1', 'localhost', '::1'), send_bytes=None,
            make=uvicorn.Server, metrics_keys=(), **limits):
  """Serve a model while the context lasts; the engine stays open.

  Args:
    model: what the engine generates with.
    engine: from `make_engine`.
    keys: API keys.
    hosts: names that the server goes by.
    send_bytes: what the system may keep of what a client does not take.
    make: makes the server of its config.
    metrics_keys: the key of /metrics.
    **limits: fields of `LimitsConfig`.
  """
  bounds = LimitsConfig(**limits)
  service = Service(model, engine, NAME, bounds, len(keys) > 1)
  app = make_app(service, Keys(keys, metrics_keys), hosts)
  server = make(uvicorn.Config(
    app, host='127.0.0.1', log_level='warning', **connections.settings(bounds)))
  with socket.create_server(('127.0.0.1', 0)) as listener:
    port = listener.getsockname()[1]
    if send_bytes is not None:
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
      assert thread.is_alive()
      time.sleep(0.005)
    try:
      yield Server(f'http://127.0.0.1:{port}', port, service,
                   functools.partial(setattr, server, 'should_exit', True))
    finally:
      server.should_exit = True
      thread.join(10)
      assert not thread.is_alive()


@functools.cache
def shared():
  """Return a model and its engine, made once for all tests that leave it open."""
  model = tiny_model()
  return model, make_engine(model)
