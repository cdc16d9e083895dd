"""Servers of the APIs of buckets on this machine, and the environment that leads to them."""

import contextlib
import os
import socket
import subprocess
import sys
import time

_GCS = '''
import sys
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

original = objects.download

def download(request, response, storage, *args):
  # The API tells which version of an object it gives, and TensorStore relies on it.
  try:
    found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
    response['x-goog-generation'] = found['generation']
  except objects.NotFound:
    pass
  original(request, response, storage, *args)

objects.download = download
for _, handlers in server.HANDLERS:
  handlers.update({method: download for method, old in handlers.items() if old is original})
server.create_server('127.0.0.1', int(sys.argv[1]), in_memory=True, default_bucket='bucket').run()
'''
_S3 = '''
import sys, urllib.request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer('127.0.0.1', int(sys.argv[1]), verbose=False)
server.start()
urllib.request.urlopen(
  urllib.request.Request(f'http://127.0.0.1:{sys.argv[1]}/bucket', method='PUT'))
sys.stdin.read()
'''


@contextlib.contextmanager
def serving(scheme):
  """Run a server with an empty bucket named 'bucket'; yield the environment of its clients."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  server = subprocess.Popen(
    [sys.executable, '-c', _GCS if scheme == 'gs' else _S3, str(port)], stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    for _ in range(300):
      with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
        break
      time.sleep(0.1)
    yield {
      'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url, 'NO_GCE_CHECK': 'true',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    } if scheme == 'gs' else {
      'AWS_ENDPOINT_URL': url, 'AWS_ACCESS_KEY_ID': 'any', 'AWS_SECRET_ACCESS_KEY': 'any',
      'AWS_DEFAULT_REGION': 'us-east-1',
    }
  finally:
    server.kill()
    server.wait()


def environment(home, **more):
  """Return an environment without any credentials: nothing of ours but what finds the programs."""
  kept = {name: os.environ[name] for name in (
    'PATH', 'PYTHONPATH', 'JAX_PLATFORMS', 'LD_LIBRARY_PATH') if name in os.environ}
  return {**kept, 'HOME': str(home), **more}
