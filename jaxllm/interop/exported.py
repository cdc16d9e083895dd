"""Deployment artefacts: a model as StableHLO programs, which run without any code of ours.

A directory holds `prefill_S.bin` and `decode_S.bin` for each length S of a few buckets (from
`jax.export`, for CPU, CUDA and TPU alike), `weights.safetensors`, the tokenizer, `manifest.json`
and `run.py`, which samples from them. Programs take one row; the cache crosses as plain lists. The
draw is part of the program, so that the same seed gives the same tokens as in the library.
"""

import datetime
import functools
import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import mistakes, storage
from jaxllm.checkpoints import tree
from jaxllm.data import tokenizers
from jaxllm.generation import decode_state, sampling
from jaxllm.interop import tensorfile, tokenizer_export
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig, KVCache, init_cache

PLATFORMS = ('cpu', 'cuda', 'tpu')
BUCKETS = (128, 512, 2048)
# The rules that the runner offers, each with the dtype of its value.
RULES = {'temperature': np.float32, 'top_k': np.int32, 'top_p': np.float32, 'min_p': np.float32}
MANIFEST = 'manifest.json'
PROMISED_DAYS = 182
"""JAX reads programs of the last six months."""


def save(
  directory: pathlib.Path, config: DecoderConfig, variables: Mapping[str, Any],
  files: Mapping[str, bytes], buckets: Sequence[int] = BUCKETS,
  platforms: Sequence[str] = PLATFORMS, add_bos: bool | None = None,
  source: str | None = None,
) -> None:
  """Write a deployment artefact.

  Args:
    directory: is created.
    variables: {'params': ...}; adapters must be merged before.
    buckets: numbers of tokens, prompt and continuation together, for which programs are made; those
      beyond the model's context become its context.
    platforms: of the programs.
    add_bos: whether prompts begin with BOS; None: as the files say.
    source: of the model, from which it can be made anew.

  Raises:
    ValueError: the tokenizer has no equal in a tokenizer.json.
    ImportError: the package flatbuffers is missing.
    OSError: the disk is full.
  """
  if 'lora' in variables:
    raise ValueError('variables hold adapters; merge them into the parameters first')
  mistakes.package('flatbuffers')
  beside, _ = tokenizer_export.huggingface_files(files, config, add_bos)
  if not beside:
    raise ValueError('the model has no tokenizer, without which the artefact cannot be used')
  config = config.replace(attention='xla', remat='none')
  params = tree.flatten(decoder.unstack(variables)['params'])
  directory.mkdir(parents=True)
  lengths = sorted({min(bucket, config.max_length) for bucket in buckets})
  for length in lengths:
    for name, program in _programs(config, params, length, platforms).items():
      (directory / f'{name}_{length}.bin').write_bytes(program)
  tensorfile.write(directory / 'weights.safetensors', jax.device_get(params))
  for name, content in beside.items():
    (directory / name).write_bytes(content)
  shutil.copy(pathlib.Path(__file__).with_name('exported_runner.py'), directory / 'run.py')
  tokenizer = tokenizers.from_files(beside)
  today = datetime.date.today()
  manifest = {
    'format': 1,
    **{name: importlib.metadata.version(name) for name in ('jax', 'flax', 'jaxllm')},
    'made_on': today.isoformat(),
    'valid_until': (today + datetime.timedelta(PROMISED_DAYS)).isoformat(),
    'source': source,
    'platforms': list(platforms),
    'buckets': lengths,
    'vocab_size': config.vocab_size,
    'max_length': config.max_length,
    'add_bos': tokenizer.add_bos,
    'bos_id': tokenizer.bos_id,
    'stop_ids': list(tokenizer.eos_token_ids),
    'model': json.loads(config.to_json()),
    'sha256': {file.name: storage.file_digest(file, {}) for file in sorted(directory.iterdir())},
  }
  (directory / MANIFEST).write_bytes(tokenizer_export.json_bytes(manifest))


def source_of(path: str) -> str:
  """Return the source of the model in a deployment artefact; of anything else, the path itself."""
  manifest = storage.read_json(pathlib.Path(path) / MANIFEST)
  if 'buckets' not in manifest:
    return path
  if not manifest.get('source'):
    raise ValueError(f'--source={path} does not say of which model its programs are; name that')
  return manifest['source']


def _programs(
  config: DecoderConfig, params: Mapping[str, Any], length: int, platforms: Sequence[str]
) -> dict[str, bytes]:
  """Return the programs of one bucket: each gives the next token, (1,), and the cache."""
  from jax import export

  def empty() -> dict[str, Any]:
    return _lists(init_cache(config, 1, length, stacked=False))

  def shape(dims: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)

  weights = {name: shape(leaf.shape, leaf.dtype) for name, leaf in params.items()}
  request = {'seed': shape((1,), np.uint32), 'index': shape((1,)),
             'rules': {name: shape((1,), dtype) for name, dtype in RULES.items()}}
  step = functools.partial(_step, config)
  calls = {
    'prefill': (lambda w, tokens, count, r: step(w, empty(), tokens, count, r),
                (weights, shape((1, length)), shape((1,)), request)),
    'decode': (lambda w, cache, token, r: step(w, cache, token, jnp.ones(1, jnp.int32), r),
               (weights, jax.eval_shape(empty), shape((1, 1)), request)),
  }
  return {
    name: bytes(export.export(jax.jit(call), platforms=platforms)(*shapes).serialize())
    for name, (call, shapes) in calls.items()}


def _step(
  config: DecoderConfig, weights: Mapping[str, jax.Array], cache: dict[str, Any],
  tokens_1T: jax.Array, count_1: jax.Array, request: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
  kv_cache = KVCache(tuple(cache['keys']), tuple(cache['values']), cache['lengths'])
  variables = {'params': tree.nest(weights)}
  logits_1V, kv_cache = decode_state.last_logits(
    Decoder(config), variables, kv_cache, tokens_1T, count_1)
  keys_1 = sampling.row_keys(request['seed'], request['index'])
  # None of these rules looks at the tokens so far.
  token_1 = sampling.sample(keys_1, logits_1V, request['rules'], None)  # type: ignore[arg-type]
  return token_1, _lists(kv_cache)


def _lists(cache: KVCache) -> dict[str, Any]:
  return {'keys': list(cache.keys), 'values': list(cache.values), 'lengths': cache.lengths_B}
