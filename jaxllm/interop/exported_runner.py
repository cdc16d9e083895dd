"""Sample from this directory: python run.py --prompt="Once upon a time" --max_new_tokens=64.

Needs jax, numpy, safetensors and tokenizers; the model itself is in the programs beside this file.
As a library: `artefact = load(directory)`, then `generate(artefact, ids, ...)`.
"""

import argparse
import datetime
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax import export
from safetensors import safe_open


def load(directory: str | pathlib.Path) -> dict[str, Any]:
  """Check the files of a directory against its manifest and read them."""
  directory = pathlib.Path(directory)
  manifest = json.loads((directory / 'manifest.json').read_text())
  if manifest['format'] != 1:
    raise ValueError(f'{directory}: format {manifest["format"]}, this program reads format 1')
  for name, digest in manifest['sha256'].items():
    with open(directory / name, 'rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != digest:
        raise ValueError(f'{directory / name} differs from what the manifest says')
  if manifest.get('valid_until', '9') < datetime.date.today().isoformat():
    print(f'warning: {outdated(manifest)}', file=sys.stderr)
  with safe_open(directory / 'weights.safetensors', 'np') as file:
    weights = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}
  tokenizer = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  tokenizer.encode_special_tokens = True  # Text that spells a special token stays text.
  return {'manifest': manifest, 'weights': weights, 'tokenizer': tokenizer, 'programs': {},
          'directory': directory}


def outdated(manifest: dict[str, Any]) -> str:
  """Return the sentence about programs that are older than JAX promises to run them."""
  return (f'made on {manifest.get("made_on")} with jax {manifest["jax"]}, these programs are '
          f'promised to run until {manifest.get("valid_until")}, here with jax {jax.__version__}; '
          f'make them anew: python -m jaxllm.convert --source={manifest.get("source") or "MODEL"} '
          '--target=NEW --format=exported')


def program(artefact: dict[str, Any], name: str) -> Any:
  """Return a program by name, compiled when it is first called; its cache argument is reused."""
  if name not in artefact['programs']:
    content = (artefact['directory'] / f'{name}.bin').read_bytes()
    try:
      call = export.deserialize(bytearray(content)).call
    except Exception as error:  # Of any kind, as the format goes on.
      raise ValueError(f'{name}.bin: {error}; {outdated(artefact["manifest"])}') from error
    donated = (1,) if name.startswith('decode') else ()
    artefact['programs'][name] = jax.jit(call, donate_argnums=donated)
  return artefact['programs'][name]


def encode(artefact: dict[str, Any], text: str) -> list[int]:
  """Return the token ids that a prompt begins with."""
  manifest = artefact['manifest']
  first = [manifest['bos_id']] if manifest['add_bos'] and manifest['bos_id'] is not None else []
  return first + artefact['tokenizer'].encode(text, add_special_tokens=False).ids


def generate(
  artefact: dict[str, Any], ids: list[int], max_new_tokens: int, temperature: float = 1.0,
  top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
) -> list[int]:
  """Continue token ids until a stop token, `max_new_tokens`, or the largest bucket is full."""
  manifest, buckets = artefact['manifest'], artefact['manifest']['buckets']
  if not ids or min(ids) < 0 or max(ids) >= manifest['vocab_size']:
    raise ValueError(f'1 or more token ids below {manifest["vocab_size"]} are needed')
  if len(ids) > buckets[-1]:
    raise ValueError(f'{len(ids)} tokens, but programs exist for {buckets[-1]}')
  rules = {'temperature': temperature, 'top_p': top_p, 'min_p': min_p}
  request: dict[str, Any] = {
    'seed': np.array([seed], np.uint32), 'index': np.zeros(1, np.int32),
    'rules': {name: np.array([value], np.float32) for name, value in rules.items()}
    | {'top_k': np.array([top_k], np.int32)}}
  size = next((size for size in buckets if size >= len(ids) + max_new_tokens - 1), buckets[-1])
  tokens = np.zeros((1, size), np.int32)
  tokens[0, : len(ids)] = ids
  token, cache = program(artefact, f'prefill_{size}')(
    artefact['weights'], tokens, np.array([len(ids)], np.int32), request)
  made: list[int] = []
  while True:
    made.append(int(token[0]))
    if made[-1] in manifest['stop_ids']:
      return made[:-1]
    if len(made) == max_new_tokens or len(ids) + len(made) > size:
      return made
    request['index'] = np.array([len(made)], np.int32)
    token, cache = program(artefact, f'decode_{size}')(
      artefact['weights'], cache, token[:, None], request)


def main() -> None:
  """Print the continuation of a prompt."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--prompt', required=True)
  parser.add_argument('--max_new_tokens', type=int, default=64)
  for name, default in (('temperature', 1.0), ('top_p', 1.0), ('min_p', 0.0)):
    parser.add_argument(f'--{name}', type=float, default=default)
  for name in ('top_k', 'seed'):
    parser.add_argument(f'--{name}', type=int, default=0)
  options = vars(parser.parse_args())
  artefact = load(pathlib.Path(__file__).parent)
  ids = encode(artefact, options.pop('prompt'))
  made = generate(artefact, ids, **options)
  print(artefact['tokenizer'].decode(ids + made, skip_special_tokens=True))


if __name__ == '__main__':
  main()
