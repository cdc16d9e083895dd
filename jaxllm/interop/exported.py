"""Deployment artefacts: a model as StableHLO programs, which run without any code of ours.

A directory holds `prefill_S.bin` and `decode_S.bin` for each length S of a few buckets (from
`jax.export`, for CPU, CUDA and TPU alike), `weights.safetensors`, the tokenizer, `manifest.json`
and `run.py`, which samples from them. Programs take one row; the cache crosses as plain lists. The
draw is part of the program, so that the same seed gives the same tokens as in the library.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import storage
from jaxllm.checkpoints import tree
from jaxllm.data import tokenizers
from jaxllm.generation import sampling, slots
from jaxllm.interop import tensorfile, tokenizer_export
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig, KVCache, init_cache

PLATFORMS = ('cpu', 'cuda', 'tpu')
BUCKETS = (128, 512, 2048)
# The rules that the runner offers, each with the dtype of its value.
RULES = {'temperature': np.float32, 'top_k': np.int32, 'top_p': np.float32, 'min_p': np.float32}
MANIFEST = 'manifest.json'


def save(
  directory: str | os.PathLike[str],
  config: DecoderConfig,
  variables: Mapping[str, Any],
  files: Mapping[str, bytes],
  buckets: Sequence[int] = BUCKETS,
  platforms: Sequence[str] = PLATFORMS,
  add_bos: bool | None = None,
) -> None:
  """Write a deployment artefact.

  Args:
    directory: must not exist, or be empty.
    config: of the model.
    variables: {'params': ...}; adapters must be merged before.
    files: of the tokenizer.
    buckets: numbers of tokens, prompt and continuation together, for which programs are made; those
      beyond the model's context become its context.
    platforms: what the programs run on.
    add_bos: whether prompts begin with BOS; None: as the files say.

  Raises:
    ValueError: the directory is in use, the tokenizer has no equal in a tokenizer.json, or the
      package flatbuffers is missing.
    OSError: the disk is full; nothing is left behind.
  """
  path = pathlib.Path(directory).expanduser()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'{path} is not empty; choose another target')
  if 'lora' in variables:
    raise ValueError('variables hold adapters; merge them into the parameters first')
  beside, _ = tokenizer_export.huggingface_files(files, config, add_bos)
  if not beside:
    raise ValueError('the model has no tokenizer, without which the artefact cannot be used')
  config = config.replace(attention='xla', remat='none')
  params = tree.flatten(decoder.unstack(variables)['params'])
  with storage.replaced(path) as partial:
    partial.mkdir()
    lengths = sorted({min(bucket, config.max_length) for bucket in buckets})
    for length in lengths:
      for name, program in _programs(config, params, length, platforms).items():
        (partial / f'{name}_{length}.bin').write_bytes(program)
    _write_rest(partial, params, beside)
    manifest = _manifest(config, beside, lengths, platforms)
    manifest['sha256'] = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_bytes(tokenizer_export.json_bytes(manifest))


def _write_rest(
  directory: pathlib.Path, params: Mapping[str, Any], beside: Mapping[str, bytes]
) -> None:
  """Write weights, tokenizer and runner."""
  tensorfile.write(
    directory / 'weights.safetensors',
    {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in params.items()},
    lambda name: np.asarray(params[name]),
  )
  for name, content in beside.items():
    (directory / name).write_bytes(content)
  shutil.copy(pathlib.Path(__file__).with_name('exported_runner.py'), directory / 'run.py')


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _manifest(
  config: DecoderConfig, files: Mapping[str, bytes], lengths: Sequence[int],
  platforms: Sequence[str],
) -> dict[str, Any]:
  tokenizer = tokenizers.from_files(files)
  return {
    'format': 1,
    'jax': jax.__version__,
    'platforms': list(platforms),
    'buckets': list(lengths),
    'vocab_size': config.vocab_size,
    'max_length': config.max_length,
    'slot_axis': _slot_axis(config),
    'add_bos': tokenizer.add_bos,
    'bos_id': tokenizer.bos_id,
    'stop_ids': list(tokenizer.eos_token_ids),
    'model': json.loads(config.to_json()),
  }


def _slot_axis(config: DecoderConfig) -> int:
  """Return the axis of a layer's keys and values on which tokens lie."""
  shapes = [
    jax.eval_shape(lambda n=n: init_cache(config, 1, n, stacked=False)).keys[0].shape
    for n in (1, 2)
  ]
  return next(axis for axis, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b)


def _programs(
  config: DecoderConfig, params: Mapping[str, Any], length: int, platforms: Sequence[str]
) -> dict[str, bytes]:
  """Return the serialised programs of one bucket."""
  from jax import export

  shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
  cache = jax.eval_shape(lambda: _lists(init_cache(config, 1, length, stacked=False)))
  request = {
    'seed': jax.ShapeDtypeStruct((1,), np.uint32), 'index': jax.ShapeDtypeStruct((1,), np.int32),
    'rules': {name: jax.ShapeDtypeStruct((1,), dtype) for name, dtype in RULES.items()},
  }

  def tokens(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, count), np.int32)

  count = jax.ShapeDtypeStruct((1,), np.int32)
  made = {
    'prefill': export.export(
      jax.jit(functools.partial(_prefill, config, length)), platforms=platforms
    )(shapes, tokens(length), count, request),
    'decode': export.export(jax.jit(functools.partial(_decode, config)), platforms=platforms)(
      shapes, cache, tokens(1), request
    ),
  }
  try:
    return {name: bytes(program.serialize()) for name, program in made.items()}
  except ImportError:
    raise ValueError('exported programs need the package flatbuffers: '
                     'pip install "jaxllm[export]"') from None


def _prefill(
  config: DecoderConfig, length: int, weights: Mapping[str, jax.Array], tokens_1T: jax.Array,
  count_1: jax.Array, request: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
  """Read a prompt of `count` tokens; return the next token, (1,), and the cache."""
  cache = _lists(init_cache(config, 1, length, stacked=False))
  return _step(config, weights, cache, tokens_1T, count_1, request)


def _decode(
  config: DecoderConfig, weights: Mapping[str, jax.Array], cache: dict[str, Any],
  token_11: jax.Array, request: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
  """Append one token; return the next one, (1,), and the cache."""
  return _step(config, weights, cache, token_11, jnp.ones(1, jnp.int32), request)


def _step(
  config: DecoderConfig, weights: Mapping[str, jax.Array], cache: dict[str, Any],
  tokens_1T: jax.Array, count_1: jax.Array, request: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
  kv_cache = KVCache(tuple(cache['keys']), tuple(cache['values']), cache['lengths'])
  variables = {'params': tree.nest(weights)}
  logits_1V, kv_cache = slots.feed(Decoder(config), variables, kv_cache, tokens_1T, count_1)
  keys_1 = sampling.row_keys(request['seed'], request['index'])
  # None of these rules looks at the tokens so far.
  token_1 = sampling.sample(keys_1, logits_1V, request['rules'], None)  # type: ignore[arg-type]
  return token_1, _lists(kv_cache)


def _lists(cache: KVCache) -> dict[str, Any]:
  return {'keys': list(cache.keys), 'values': list(cache.values), 'lengths': cache.lengths_B}
