"""Say what a run needs before a machine is paid for: memory, time, and what to change.

  python -m jaxllm.tools.plan --config=experiments/llama.py:llama3_8b [--topology=v5p:4x4x4]

The real train step is compiled for a TPU slice, for which no TPU but the package libtpu is needed
(extra `plan`), or for the devices of this machine (--topology=local). --estimate only traces it: a
second, and no libtpu. What does not fit comes with changes. --search looks for the fastest mesh,
microbatches, remat policy and chunk size by estimates, and compiles the best of them.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxllm import config, versions

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
TOPOLOGY = FLAGS.string('topology', None, 'TPU slice, as v5e:4x4, or local; by default that of the '
                        'variant, else local.')
PROGRAM = FLAGS.enum('program', 'train', ['train', 'prefill', 'decode'], 'What runs.')
ROWS = FLAGS.integer('rows', 8, 'Rows of --program=prefill and decode; prompts take half of the '
                     'context.', lower_bound=1)
SEARCH = FLAGS.bool('search', False, 'Rank meshes, microbatches, remat policies, chunk sizes.')
ESTIMATE = FLAGS.bool('estimate', False, 'Trace the program instead of compiling it.')
JSON = FLAGS.bool('json', False, 'Print JSON.')

# No TPU is looked for, and none is locked: only the compiler is used.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_STDERR_LOG_LEVEL': '3', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'none',
}
GIB = 2**30
MOST_COMPILED = 3


def main(_) -> None:  # noqa: D103
  from jaxllm.tools import launch
  from jaxllm.training import cost

  topology = TOPOLOGY.value or launch.topology_of(CONFIG.value) or 'local'
  if topology != 'local':
    os.environ.update(ENVIRONMENT)
  experiment = config.from_flags(CONFIG.value)
  if PROGRAM.value != 'train':
    experiment = decoding_run(experiment, ROWS.value)
  estimated = functools.partial(plan, topology=topology, program=PROGRAM.value, compiles=False)
  planned = estimated if ESTIMATE.value else functools.partial(estimated, compiles=True)
  if SEARCH.value:
    if PROGRAM.value != 'train':
      raise ValueError(f'--search --program={PROGRAM.value}: only train steps are searched')
    found = search(experiment, estimated, planned)
    print(json.dumps(found, indent=2) if JSON.value else ranking(found))
    return
  if not ESTIMATE.value:
    first = estimated(experiment)
    print('\n'.join([f'estimate: {cost.line(first)}', *first['problems']]), file=sys.stderr)
  made = planned(experiment)
  if made['problems'] and PROGRAM.value == 'train':
    made['proposals'] = ranked(experiment, proposals(experiment), planned)
  print(json.dumps(made, indent=2) if JSON.value else page(made))


def dry_run(location: str) -> None:
  """Print the config of --config=LOCATION on stdout, and on stderr the line of its plan."""
  from jaxllm.tools import launch
  from jaxllm.training import cost, pretrained

  experiment = config.from_flags(location)
  if experiment.reads_models:
    experiment = pretrained.resolve(experiment, None)
  print(experiment.to_json(), end='', flush=True)
  try:
    made = plan(experiment, launch.topology_of(location) or 'local', compiles=False)
    said = [cost.line(made), *made['problems']]
  except ValueError as error:  # The devices that it is for are elsewhere.
    said = [str(error)]
  print('\n'.join(said), file=sys.stderr)


def find_devices(topology: str, mesh: Any, compiles: bool = True) -> tuple[Any, Any]:
  """Return the mesh of a config over the devices of a slice, or of this machine, and their chip.

  Without `compiles` the mesh of a slice has no devices.
  """
  from jaxllm import sharding
  from jaxllm.tools import launch
  from jaxllm.training import cost

  if topology == 'local':
    found = sharding.make_mesh(mesh)
    return found, cost.local_chip(found)
  abstract = sharding.abstract_mesh(mesh, launch.parse_slice(topology).chips * mesh.slices)
  generation = topology.partition(':')[0]
  if generation not in cost.CHIPS:
    raise ValueError(f'--topology={topology}: chips that can be planned are '
                     f'{", ".join(cost.CHIPS)}')
  if not compiles:
    return abstract, cost.CHIPS[generation]
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(f'--topology={topology}: the compiler for TPUs, libtpu, is not installed: pip '
                     "install 'jaxllm[plan]', or add --estimate")
  if wrong := versions.mismatch():
    raise ValueError(wrong)
  from jax.experimental import topologies

  several = {'num_slices': mesh.slices} if mesh.slices > 1 else {}
  described = topologies.get_topology_desc(platform='tpu', topology_name=topology, **several)
  return sharding.make_mesh(mesh, described.devices), cost.CHIPS[generation]


def plan(
  experiment: Any, topology: str, program: str = 'train', compiles: bool = True
) -> dict[str, Any]:
  """Return the plan of a run's program on a slice, or on 'local' devices, as `cost.estimate` does.

  With `compiles` memory and what is sent are the compiler's, else estimated.
  """
  from jaxllm.training import cost, dataset, state, step

  mesh, chip = find_devices(topology, experiment.mesh, compiles)
  dataset.check_batch(experiment, mesh)
  if program == 'train':
    made = cost.estimate(experiment, mesh, chip)
  else:
    made = _estimate_decoding(experiment, mesh, chip, program)
  if not compiles:
    return made
  if program == 'train':
    tx = state.make_optimizer(experiment)
    run: Any = step.make_train_step(experiment, tx, mesh)
    arguments: Any = (
      state.abstract_state(experiment, tx, mesh), step.abstract_batch(experiment, mesh))
  else:
    run, arguments = _decoding(experiment, mesh, program)
  chip = _compile(made, run, arguments, mesh, chip)
  return cost.finish(experiment, mesh, chip, made)


def decoding_run(experiment: Any, rows: int) -> Any:
  """Return a run whose model is as `jaxllm.load` gives it, and whose batch has so many rows."""
  from jaxllm import loading

  return experiment.replace(
    model=loading.to_use(experiment.decoder),
    training=experiment.training.replace(batch_size=rows, microbatches=1),
    evaluation=experiment.evaluation.replace(batch_size=rows))


def _decoding(experiment: Any, mesh: Any, program: str) -> tuple[Any, tuple[Any, Any]]:
  """Return what reads a batch of prompts or adds a token to each, its variables and its state."""
  import jax

  from jaxllm import sharding
  from jaxllm.generation import decode_state
  from jaxllm.generation.sampling import Request, SamplingConfig
  from jaxllm.models import decoder

  model, context = experiment.decoder, experiment.data.context_length
  place = sharding.Placement(mesh, experiment.mesh)
  shapes, axes = decoder.abstract(model)

  def put(leaf: Any, where: Any, dtype: Any = None) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where)

  params = jax.tree.map(lambda leaf, where: put(leaf, where, model.dtype), shapes,
                        place.shardings(axes, shapes))['params']
  single = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape[1:], leaf.dtype, sharding=jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*leaf.sharding.spec[1:]))), params['layers'])
  params['layers'] = {str(layer): single for layer in range(model.num_layers)}
  prompt = context // 2
  request = Request((1,) * prompt, SamplingConfig(max_new_tokens=context - prompt), 0)
  rows = [request] * experiment.training.batch_size
  state = jax.eval_shape(lambda: decode_state.init_decode_state(
    model, rows, stacked=False, exact_rows=True))
  cache = 'batch', 'kv_heads', None, None
  state = jax.tree.map(lambda leaf: put(leaf, place.sharding(
    leaf.shape, *(cache if leaf.ndim == 4 else [None] * leaf.ndim))), state)
  state = dataclasses.replace(state, placement=place)
  carrier = decoder.Decoder(model, place)

  def run(variables: Any, state: Any) -> Any:
    if program == 'prefill':
      return decode_state.prefill(carrier, variables, state, prompt)
    return decode_state.sample_step(*decode_state.next_logits(carrier, variables, state))

  return jax.jit(run, donate_argnums=1), ({'params': params}, state)


def _estimate_decoding(experiment: Any, mesh: Any, chip: Any, program: str) -> dict[str, Any]:
  import jax

  from jaxllm import sharding
  from jaxllm.training import cost, op_costs

  _, (variables, state) = _decoding(experiment, mesh, program)
  part = cost.part_of_one_device(experiment, mesh)
  run, alone = _decoding(part, sharding.abstract_mesh(part.mesh, 1), program)
  traced = op_costs.trace_cost(jax.make_jaxpr(run)(*alone).jaxpr)
  params, cache = cost.device_bytes(variables), cost.device_bytes(state.cache)
  prompt = experiment.data.context_length // 2
  read = prompt if program == 'prefill' else 1
  rows, model = experiment.training.batch_size, experiment.decoder
  # Only what follows the last token is predicted.
  flops = rows * (read * model.flops_per_token(prompt)
                  - 2.0 * (read - 1) * model.embed_dim * model.vocab_size)
  return cost.finish(experiment, mesh, chip, {
    **cost.describe(experiment, mesh, chip, program), 'tokens_per_step': rows * read,
    'gib': {'parameters': params / GIB, 'cache': cache / GIB, 'temporaries': traced.peak / GIB},
    'flops': flops, 'executed': max(traced.flops, flops / mesh.size),
    'moved': traced.moved + cache, 'replicated': [],
    'exchanged': cost.exchange(experiment, mesh, read)})


def _compile(made: dict[str, Any], program: Any, arguments: Any, mesh: Any, chip: Any) -> Any:
  """Replace the estimates of a plan by what the compiler says; return the chip as it knows it."""
  import jax

  from jaxllm.tools import collectives
  from jaxllm.training import cost

  started, gib = time.monotonic(), made['gib']
  held = cost.device_bytes(arguments) / GIB
  try:
    compiled = program.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    made['exchanged'] = collectives.sent(compiled.as_text(), mesh)
    held = memory.argument_size_in_bytes / GIB
    rest = (memory.temp_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes) / GIB
  except jax.errors.JaxRuntimeError as error:  # The compiler of TPUs refuses what does not fit.
    used = re.search(r'Used ([\d.]+)G of ([\d.]+)G hbm', str(error))
    if not used:
      raise
    rest, chip = float(used[1]) - held, chip._replace(memory=float(used[2]))
  made['compile_seconds'] = time.monotonic() - started
  for name in ('total', 'memory'):
    del gib[name]
  for name in ('gradients', 'saved activations', 'temporaries'):
    if name in gib:
      gib[name] = rest if name == 'temporaries' else min(gib[name], rest)
      rest -= gib[name]
  gib['other arguments'] = held - sum(gib.get(name, 0.0) for name in cost.HELD)
  return chip


def proposals(experiment: Any) -> Iterator[dict[str, Any]]:
  """Yield changes that save memory, as dotted paths and values."""
  training, mesh, remat = experiment.training, experiment.mesh, experiment.decoder.remat
  yield {'training.microbatches': 2 * training.microbatches}
  yield from ({'model.remat': name} for name in ('full', 'offload')
              if remat not in (name, 'offload'))
  if getattr(experiment.objective, 'chunk_size', 0) is None:
    yield {'objective.chunk_size': 512}
  if mesh.data % 2 == 0:
    yield {'mesh.data': mesh.data // 2, 'mesh.fsdp': 2 * mesh.fsdp}


def ranked(
  experiment: Any, changes: Iterable[Mapping[str, Any]], planned: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
  """Return the plans of changed runs with their flags, best first."""
  found = []
  for change in changes:
    with contextlib.suppress(ValueError):  # Rows, or sizes of the model, do not divide.
      found.append(planned(config.override(experiment, change)) | {
        'changes': change,
        'flags': ' '.join(f'--config.{path}={value}' for path, value in change.items())})
  return sorted(found, key=_rank)


def search(
  experiment: Any, estimated: Callable[[Any], dict[str, Any]],
  planned: Callable[[Any], dict[str, Any]],
) -> list[dict[str, Any]]:
  """Return plans within memory, fastest first, chosen by estimates and planned again.

  First comes the best mesh for each number of microbatches, with as little memory as can be; then
  what these leave room for: remat policies, and a loss without chunks.
  """
  first, model = estimated(experiment), experiment.decoder
  chunks = {'objective.chunk_size': 512} if hasattr(experiment.objective, 'chunk_size') else {}
  free = first['devices'] // max(1, experiment.mesh.context)

  def meshes(parts: int) -> Iterator[dict[str, Any]]:
    experts = model.experts.num_experts if model.experts else 1
    for fsdp, tensor, expert in itertools.product(_divisors(free), _divisors(min(free, 16)),
                                                  _divisors(math.gcd(free, experts))):
      split = model.kv_heads % tensor or model.mlp_dim % tensor or model.padded_vocab_size % tensor
      if not split and free % (fsdp * tensor * expert) == 0:
        yield {'mesh.data': free // (fsdp * tensor * expert), 'mesh.fsdp': fsdp,
               'mesh.tensor': tensor, 'mesh.expert': expert, 'training.microbatches': parts,
               'model.remat': 'full', **chunks}

  best = [one['changes'] for parts in (1, 2, 4, 8, 16, 32)
          for one in ranked(experiment, meshes(parts), estimated)[:1]]
  found = ranked(experiment, (
    {**change, 'model.remat': remat, **dict.fromkeys(chunks, size)} for change in best
    for remat in ('none', 'dots_no_batch', 'full', 'offload')
    for size in ((None, 512) if chunks else (None,))), estimated)
  fitting = [one['changes'] for one in found if not one['problems']]
  return ranked(experiment, fitting[:MOST_COMPILED], planned)


def _divisors(number: int) -> list[int]:
  return [size for size in range(1, number + 1) if number % size == 0]


def ranking(found: list[dict[str, Any]]) -> str:
  """Return the plans of a search as lines to paste."""
  from jaxllm.training import cost

  return '\n'.join(f'{one["flags"]}\n  {cost.line(one)}' for one in found) or (
    'nothing fits: take a larger slice, or a smaller config.training.batch_size')


def _rank(made: Mapping[str, Any]) -> tuple[Any, ...]:
  """Order plans by what they lack, then by time, and by memory where that is equal."""
  gib, seconds = made['gib'], made['seconds'].values()
  longest = float(f'{max(seconds, default=0):.2g}')
  return max(gib['total'] - gib['memory'], 0.0), longest, sum(seconds), gib['total']


def better_compiler(found: Mapping[str, str]) -> str:
  """Return a sentence about a libtpu that packs memory better than this one; '': none is known."""
  best = next((known[0] for start, known in versions.LIBTPU.items()
               if found['jax'].startswith(start)), '')
  return '' if found.get('libtpu', best).startswith(best) else (
    f"libtpu {best} needs less memory than {found['libtpu']}: pip install 'libtpu=={best}.*'")


def page(made: Mapping[str, Any]) -> str:
  """Return a plan, and what to change about it, as a page of text."""
  from jaxllm.training import cost

  rows = [cost.page(dict(made))]
  for one in made.get('proposals', ()):
    rows.append(f'{"does not fit" if one["problems"] else "fits":<16}{one["flags"]}\n{"":16}'
                f'{cost.line(one)}')
  if made['device'].startswith('TPU'):
    rows.append(better_compiler(made['versions']))
  return '\n'.join(filter(None, rows))


if __name__ == '__main__':
  config.run_program(main, FLAGS)
