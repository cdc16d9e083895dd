"""Measure the laws that jaxllm promises on a config or a model of yours, on this machine.

  jaxllm selfcheck --config=experiments/quickstart.py
  jaxllm selfcheck --model=runs/quickstart

Laws compare two ways to compute the same, in float32 at the highest precision and without dropout:
the largest difference of logits by their deviation, or the difference of gradients by their norm. A
drift is what fewer bits cost: KL divergence per token, in nats. Parameters are those of the model,
or random. The exit code is 1 where an error is larger than its bound.
"""

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm import config, mistakes

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP)
MODEL = FLAGS.string('model', None, 'A run, or anything else that jaxllm.load takes.')
LENGTH = FLAGS.integer('length', 64, 'Tokens of a sequence.', 8)
JSON = FLAGS.bool('json', False, 'Print JSON.')

# Rounding alone stays below by far; what is broken lies above.
LAW, BFLOAT16, INT8 = 1e-3, 0.02, 0.05
Row = tuple[str, float, float]


def main(_) -> None:  # noqa: D103
  if (CONFIG.value is None) == (MODEL.value is None):
    raise ValueError('one of --config and --model is needed: what to check')
  import jax

  found = []
  with jax.default_matmul_precision('highest'):
    for law, error, bound in _measure():
      holds = bool(error <= bound)
      found.append({'law': law, 'error': error, 'bound': bound, 'holds': holds})
      if not JSON.value:
        verdict = mistakes.paint('holds', 'green') if holds else mistakes.paint('BROKEN', 'red')
        print(f'{law:<26}{error:>10.2g}  of {bound:<8.2g}{verdict}', flush=True)
  if JSON.value:
    print(json.dumps(found, indent=2))
  sys.exit(not all(one['holds'] for one in found))


def _measure() -> Iterator[Row]:
  import jax

  from jaxllm import loading
  from jaxllm.models import decoder
  from jaxllm.training import pretrained

  if MODEL.value:
    model = loading.load(MODEL.value, dtype='float32')
    shape, variables, experiment = model.config, model.variables, model.experiment
  else:
    experiment = pretrained.resolve(config.from_flags(CONFIG.value))
    shape = loading.to_use(experiment.decoder)
    variables = decoder.init(shape, jax.random.key(0))
  yield from model_laws(shape, variables, min(LENGTH.value, shape.max_length) // 8 * 8)
  if experiment is not None:
    yield from training_laws(experiment, LENGTH.value, jax.devices())


def model_laws(shape: Any, variables: Any, length: int) -> Iterator[Row]:
  """Compare the ways to compute logits, and those of smaller numbers, on random tokens."""
  import jax
  import jax.numpy as jnp

  from jaxllm.adapters.quantization import QuantizationConfig, quantize
  from jaxllm.models.cache import init_cache
  from jaxllm.models.decoder import Decoder

  shape = shape.replace(dtype='float32')
  tokens_BT = np.random.default_rng(0).integers(0, shape.vocab_size, (4, length), dtype=np.int32)

  def logits(shape: Any, variables: Any, *inputs: Any) -> np.ndarray:
    return np.asarray(jax.jit(Decoder(shape).apply)(variables, *inputs))[..., :shape.vocab_size]

  whole_BTV, half = logits(shape, variables, tokens_BT), length // 2

  def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())

  packed = np.concatenate([tokens_BT[0, :half], tokens_BT[1, :half]])[None]
  segments = np.repeat([[1, 2]], half, axis=1)
  yield ('packed = unpacked', apart(logits(shape, variables, packed, segments)[0],
                                    whole_BTV[:2, :half].reshape(2 * half, -1)), LAW)
  alone = np.concatenate([logits(shape, variables, row[None]) for row in tokens_BT])
  yield 'batched = alone', apart(alone, whole_BTV), LAW
  other = shape.replace(scan_layers=not shape.scan_layers)
  yield 'scan = unrolled', apart(logits(other, variables, tokens_BT), whole_BTV), LAW

  model, cache, parts = Decoder(shape), init_cache(shape, 4, length), []
  extend = jax.jit(functools.partial(model.apply, method='extend'))
  for start, stop in ((0, half), *((i, i + 1) for i in range(half, length))):
    piece = tokens_BT[:, start:stop]
    hidden_BTD, cache = extend(variables, piece, cache, jnp.full(4, stop - start))
    parts.append(hidden_BTD)
  cached = jax.jit(functools.partial(model.apply, method='logits'))(
    variables, jnp.concatenate(parts, 1))
  yield 'cached = full', apart(np.asarray(cached)[..., :shape.vocab_size], whole_BTV), LAW

  def drift(found: np.ndarray) -> float:
    right, wrong = jax.nn.log_softmax(whole_BTV), jax.nn.log_softmax(found.astype(np.float32))
    return float((jnp.exp(right) * (right - wrong)).sum(-1).mean())

  narrow, levels = shape.replace(dtype='bfloat16'), quantize(variables, QuantizationConfig())
  yield 'drift of bfloat16', drift(logits(narrow, variables, tokens_BT)), BFLOAT16
  yield 'drift of int8', drift(logits(shape, levels, tokens_BT)), INT8


def training_laws(experiment: Any, length: int, devices: Sequence[Any]) -> Iterator[Row]:
  """Compare the ways to compute a gradient, and a state that was saved with one that was not."""
  import jax

  from jaxllm import sharding
  from jaxllm.checkpoints import store
  from jaxllm.checkpoints.bundle import Bundle
  from jaxllm.models import decoder
  from jaxllm.tools import rehearsal
  from jaxllm.training import state as state_lib
  from jaxllm.training import step

  count = len(devices)
  shape = experiment.decoder.replace(dtype='float32', dropout_rate=0.0, attention_dropout_rate=0.0)
  experiment = experiment.replace(
    model=shape, privacy=None, mesh=rehearsal.mesh(experiment.mesh, count),
    objective=experiment.objective.replace(**{'chunk_size': None} if experiment.chunk_size else {}),
    data=experiment.data.replace(context_length=min(length, experiment.data.context_length)),
    training=experiment.training.replace(batch_size=2 * count, microbatches=1))
  tx = state_lib.make_optimizer(experiment)
  others = experiment.finetune.lora and shape, getattr(experiment.objective, 'teacher_model', None)

  def begin(run: Any, devices: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return the mesh of a run, its state before the first step, and a batch of random tokens."""
    mesh = sharding.make_mesh(run.mesh, devices)
    batch = {name: _filled(name, like, shape.vocab_size)
             for name, like in step.abstract_batch(run, mesh).items()}
    base, teacher = (one and decoder.init(one, jax.random.key(1))['params'] for one in others)
    state = state_lib.create_state(run, tx, mesh, base, teacher)
    return mesh, state, sharding.put_batch(batch, sharding.batch_sharding(mesh, run.mesh))

  def gradient(run: Any, devices: Sequence[Any]) -> np.ndarray:
    mesh, state, batch = begin(run, devices)
    with sharding.active(sharding.Placement(mesh, run.mesh)):
      grads, _ = jax.jit(functools.partial(step.accumulate_gradients, run))(
        state=state, batch=batch, key=jax.random.key(0))
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sharding.to_host(grads))])

  def apart(found: np.ndarray) -> float:
    return float(np.linalg.norm(found - whole) / np.linalg.norm(whole))

  single = experiment.replace(mesh=sharding.MeshConfig(rules=experiment.mesh.rules))
  whole = gradient(single, devices[:1])
  parts = single.replace(training=single.training.replace(microbatches=2))
  yield 'accumulated = one batch', apart(gradient(parts, devices[:1])), LAW
  if count > 1:
    yield 'sharded = single', apart(gradient(experiment, devices)), LAW

  mesh, state, batch = begin(experiment, devices)
  train_step = step.make_train_step(experiment, tx, mesh)
  state, _ = train_step(state, batch)
  with tempfile.TemporaryDirectory() as folder:
    saved = store.open_store(pathlib.Path(folder), experiment.checkpoint)
    store.save(saved, 1, state.replace(frozen={}), Bundle(experiment.to_json(), {}, {}))
    store.wait(saved)
    restored = store.restore(
      saved, state_lib.abstract_state(experiment, tx, mesh).replace(frozen={}), 1)
    store.close(saved)
  _, again, _ = begin(experiment, devices)  # A step donates what is frozen too.
  ends = [sharding.to_host(train_step(one, batch)[0].replace(frozen={}))
          for one in (state, restored.replace(frozen=again.frozen))]
  yield 'resumed = never stopped', max(jax.tree.leaves(jax.tree.map(
    lambda one, other: float(np.abs(np.subtract(one, other, dtype=np.float64)).max(initial=0)),
    *ends))), 0.0


def _filled(name: str, like: Any, vocab_size: int) -> np.ndarray:
  """Return an array of a batch: random tokens, all of them with weight, in one document each."""
  if name.endswith(('tokens', 'targets')):
    return np.random.default_rng(len(name)).integers(0, vocab_size, like.shape, like.dtype)
  if name.endswith('positions'):
    return np.broadcast_to(np.arange(like.shape[1], dtype=like.dtype), like.shape)
  return np.full(like.shape, name.endswith(('weights', 'segment_ids')), like.dtype)


if __name__ == '__main__':
  config.run_program(main, FLAGS)
