"""How long a client waits while another one, with a key of its own, floods the server.

A tiny model behind real HTTP, in this process; run it in the root of the repository:

  python -m experiments.benchmarks.hostile_clients

Prints, for each flood, how many requests of one token were answered meanwhile and the longest wait.
"""

import collections
import contextlib
import json
import logging
import pathlib
import random
import socket
import threading
import time

import httpx
from absl import app, flags

from tests.fuzz import test_requests as fuzz
from tests.serving import http_server as server

SECONDS = flags.DEFINE_float('seconds', 4, 'How long the patient client asks in each flood.')
MUTATIONS = flags.DEFINE_integer('mutations', 3000, 'Mutated requests.')
ONLY = flags.DEFINE_string('only', '', 'Only floods whose name holds this text.')
FLOODER, PATIENT = 'the-key-of-a-flooder', 'the-key-of-a-patient'
HEAD = (b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
        b'authorization: Bearer ' + FLOODER.encode() + b'\r\ncontent-length: 100\r\n\r\n{"model"')


def chain(length: int, characters: int) -> dict:
  """Return a schema of references one after the other."""
  links = {f'd{i}': {'anyOf': [{'const': str(i) * characters}, {'$ref': f'#/$defs/d{i + 1}'}]}
           for i in range(length)}
  return {'$ref': '#/$defs/d0', '$defs': links | {f'd{length}': {'type': 'null'}}}


def constrained(schema: dict) -> tuple[str, dict]:
  """Return a request for JSON of a schema."""
  return '/v1/completions', {'prompt': 'a', 'max_tokens': 4, 'response_format': {
    'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': schema}}}


SLOW = {'type': 'object', 'patternProperties': {f'^x{i}_.*$': {} for i in range(1000)}}
MUTATED = 'mutated'
FLOODS = {
  'nothing': [],
  '24 x /tokenize of 2.3 MB': [('/tokenize', {'prompt': 'ab <|im_end|>' * 180_000})] * 24,
  '24 x /tokenize of 195 kB': [('/tokenize', {'prompt': 'ab <|im_end|>' * 15_000})] * 24,
  'n=24, 200 tokens each': [('/v1/completions', {
    'prompt': 'a', 'n': 24, 'max_tokens': 200, 'logit_bias': {'256': -100}})],
  '6 x a schema of 48 kB, 6 x one of 2 s': [constrained(chain(320, 50)), constrained(SLOW)] * 6,
  '300 half bodies': None,
  'mutated requests': MUTATED,
}


def post(url: str, path: str, body: dict) -> None:
  with contextlib.suppress(httpx.HTTPError):
    httpx.post(url + path, timeout=300, content=json.dumps({'model': server.NAME} | body), headers={
      'content-type': 'application/json', 'authorization': f'Bearer {FLOODER}'})


def send_mutated(url: str, number: int, counts: collections.Counter) -> None:
  """Send one thread's share of mutated bodies; an answer that no client may get is odd."""
  draw = random.Random(f'hostile {number}')
  headers = {'content-type': 'application/json', 'authorization': f'Bearer {FLOODER}'}
  with httpx.Client(timeout=60, headers=headers) as client:
    for _ in range(MUTATIONS.value // 8):
      path, body = draw.choice(fuzz.VALID)
      try:
        answer = client.post(url + path, content=fuzz.mutate(body, draw))
        fuzz.judge(answer)
        counts[answer.status_code] += 1
      except (httpx.HTTPError, AssertionError, ValueError) as error:
        counts[f'odd: {error!r:.80}'] += 1


def memory() -> int:
  """Return the MiB that this process holds, server and clients."""
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096 >> 20


class Tracebacks(logging.Handler):
  """Counts what is logged with a traceback."""

  count = 0

  def emit(self, record: logging.LogRecord) -> None:
    self.count += bool(record.exc_info)


def patient(url: str, awaited: list[threading.Thread]) -> str:
  """Ask for one token after the other, at least until threads end; return the table's cells."""
  waits, statuses, end = [], set(), time.monotonic() + SECONDS.value
  with httpx.Client(timeout=300, headers={'authorization': f'Bearer {PATIENT}'}) as client:
    while time.monotonic() < end or any(thread.is_alive() for thread in awaited):
      begin = time.monotonic()
      answer = client.post(f'{url}/v1/completions', json={
        'model': server.NAME, 'prompt': 'a', 'max_tokens': 1})
      waits.append(time.monotonic() - begin)
      statuses.add(answer.status_code)
  waits.sort()
  p50, p99 = (waits[int(share * (len(waits) - 1))] for share in (0.5, 0.99))
  return f'{len(waits):>8} {p50:>7.3f} {p99:>7.3f} {waits[-1]:>9.2f}   {sorted(statuses)}'


def main(_) -> None:
  print(f'{"flood":<40} {"answers":>8} {"p50 s":>7} {"p99 s":>7} {"longest s":>9}   statuses')
  model, engine = server.shared()
  tracebacks = Tracebacks()
  logging.getLogger().addHandler(tracebacks)
  for name, requests in FLOODS.items():
    if ONLY.value not in name:
      continue
    keys = [FLOODER, PATIENT]
    with server.running(model, engine, keys=keys) as started, contextlib.ExitStack() as stack:
      if requests is None:
        for _ in range(300):
          half = socket.create_connection(('127.0.0.1', started.port))
          stack.enter_context(half).sendall(HEAD)
      counts, before = collections.Counter(), memory()
      threads = [threading.Thread(target=post, args=(started.url, *request))
                 for request in (requests or [] if requests != MUTATED else [])]
      if requests == MUTATED:
        threads = [threading.Thread(target=send_mutated, args=(started.url, i, counts))
                   for i in range(8)]
      for thread in threads:
        thread.start()
      time.sleep(0.3)
      awaited = threads if requests == MUTATED else []
      print(f'{name:<40} {patient(started.url, awaited)}', flush=True)
      for thread in threads:
        thread.join()
      if counts:
        print(f'  {counts.total()} requests: {dict(counts)}; {before} MiB before, {memory()} '
              f'after, {tracebacks.count} tracebacks')


if __name__ == '__main__':
  app.run(main)
