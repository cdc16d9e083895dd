"""Serve a model with OpenAI's API: `python -m jaxllm.serve --model=runs/demo --port=8000`.

API keys are read from `--api_keys_file` (one per line) and JAXLLM_API_KEYS (commas between).
"""

import dataclasses
import functools
import logging
import pathlib
import signal
import socket

from jaxllm import config

FLAGS = config.Flags()
MODEL, MESH, DTYPE = FLAGS.model()
HOST = FLAGS.string('host', '127.0.0.1', 'Address to listen at; 0.0.0.0: from everywhere.')
PORT = FLAGS.integer('port', 8000, 'Port to listen at.', 0, 65535)
NAME = FLAGS.string('name', None, 'What clients call the model; by default its last part.')
API_KEYS_FILE = FLAGS.string('api_keys_file', None, 'A file of API keys, one per line.')
ANONYMOUS = FLAGS.bool('anonymous', False, 'Let others than this machine in without a key.')
FLAGS.section('Access and limits')
ALLOWED_HOSTS = FLAGS.list(
  'allowed_hosts', [], 'Further names that requests to a loopback address may give as their host.')
METRICS_KEY_FILE = FLAGS.string(
  'metrics_key_file', None, 'A file with the key of /metrics, which is closed without one where '
  'there are API keys.')
NUM_SLOTS = FLAGS.integer('num_slots', 8, 'Choices decoded together.', 1)
CONTEXT_LENGTH = FLAGS.integer(
  'context_length', None, "Tokens of prompt and continuation; by default the model's, up to 2048.",
  1)
MAX_QUEUE = FLAGS.integer('max_queue', 64, 'Choices that may wait.', 0)
LIMITS = FLAGS.string(
  'limits', '{}', 'Other limits, as JSON: {"max_body_bytes": 1000000, "request_seconds": 60}; see '
  'LimitsConfig.')
FLAGS.section(config.LOADING)
VERIFY = FLAGS.enum('verify', 'full', ['full', 'off'], 'Whether checkpoints are checked.')
QUANTIZE = FLAGS.enum('quantize', None, ['int8', 'int4'], 'Store the weights smaller.')
CACHE_DTYPE = FLAGS.enum('cache_dtype', None, ['int8'], 'Store keys and values smaller.')


def main(_) -> None:  # noqa: D103
  import uvicorn

  from jaxllm.serving import access, connections

  bounds = connections.fitting(access.LimitsConfig.from_json(LIMITS.value))
  api_keys = access.read_keys(API_KEYS_FILE.value, metrics_path=METRICS_KEY_FILE.value)
  local = HOST.value in access.LOOPBACK
  if not (local or api_keys or ANONYMOUS.value):
    raise ValueError(f'--host={HOST.value}: without API keys everyone who reaches this address '
                     'could use the model; give --api_keys_file or JAXLLM_API_KEYS, or --anonymous')
  listener = _bind(HOST.value, PORT.value)
  from jaxllm import loading
  from jaxllm.serving import app as http
  from jaxllm.serving.engine import Engine, EngineConfig
  from jaxllm.serving.service import Service

  model = loading.load(MODEL.value, MESH.value, DTYPE.value, VERIFY.value)
  if QUANTIZE.value:
    model = model.quantized(QUANTIZE.value)
  # The stacked ones are not needed any more.
  model = dataclasses.replace(model, variables=model.unstacked)
  logging.info('Compiling for %d choices at a time.', NUM_SLOTS.value)
  engine = Engine(model, EngineConfig(
    num_slots=NUM_SLOTS.value, context_length=CONTEXT_LENGTH.value, max_queue=MAX_QUEUE.value,
    cache_dtype=CACHE_DTYPE.value))
  name = NAME.value or pathlib.Path(MODEL.value).resolve().name
  name = name.removeprefix('hf:').removesuffix('.gguf')
  service = Service(model, engine, name, bounds, len(api_keys) > 1)
  hosts = (*access.LOOPBACK, *ALLOWED_HOSTS.value) if local else None
  server = connections.Server(
    uvicorn.Config(http.make_app(service, api_keys, hosts), HOST.value, PORT.value,
                   **connections.settings(bounds)),
    functools.partial(engine.close, bounds.drain_seconds))
  # uvicorn drains on either, then raises it again, to end what is ended already.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  port = listener.getsockname()[1]
  logging.info('Serving %r at http://%s:%d (Ctrl-C stops it).', name, HOST.value, port)
  for handler in logging.getLogger().handlers:
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
  server.run([listener])
  service.close()


def _bind(host: str, port: int) -> socket.socket:
  """Take the address before anything is loaded; the server listens when it can answer."""
  listener = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    raise ValueError(f'--host={host} --port={port}: cannot listen there ({error.strerror}); choose '
                     'another port (0: any that is free)') from error
  return listener


if __name__ == '__main__':
  config.run_program(main, FLAGS)
