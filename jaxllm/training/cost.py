"""What a step costs before it runs: bytes of a device, operations, what is sent, and a roofline.

`estimate` fills a plan by tracing the part of one device: its rows, heads, and share of MLP and
vocabulary. `jaxllm.tools.plan` replaces what the compiler knows better. `finish` adds what follows,
`line` and `page` print a plan.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from jaxllm import sharding
from jaxllm.data.records import DataConfig
from jaxllm.experiment import Experiment, TrainingConfig, abstract_params
from jaxllm.models import decoder
from jaxllm.training import examples, goodput, op_costs, step
from jaxllm.training import state as state_lib

GIB = 2**30
# Of `gib`, what is there before a step.
HELD = ('parameters', 'optimizer', 'cache')
# In the place of mesh axes: over the slow network.
SLICES = 'between slices'
Plan = dict[str, Any]


class Chip(NamedTuple):
  """A device: GiB of memory; GB/s of links, of memory, and between slices (inf: not known)."""

  kind: str
  memory: float
  links: float = math.inf
  bandwidth: float = math.inf
  network: float = math.inf


# cloud.google.com/tpu/docs
CHIPS = {'v4': Chip('TPU v4', 32.0, 300.0, 1228.0),
         'v5e': Chip('TPU v5e', 15.75, 200.0, 819.0, 3.125),
         'v5p': Chip('TPU v5p', 95.0, 600.0, 2765.0, 6.25),
         'v6e': Chip('TPU v6e', 31.25, 400.0, 1640.0, 12.5)}


def local_chip(mesh: Mesh) -> Chip:
  """Return the device of a mesh of this machine."""
  device = mesh.local_devices[0]
  limit = (device.memory_stats() or {}).get('bytes_limit')
  if limit is None:  # A CPU: the memory of the machine.
    limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()
  return Chip(device.device_kind, limit / GIB)


def estimate(experiment: Experiment, mesh: Mesh | AbstractMesh, chip: Chip) -> Plan:
  """Return the plan of a train step; nothing is compiled, and the mesh need not be here.

  Returns:
    JSON: `gib` of a device by what it is for, with the `total` and the `memory` that there is;
    `flops` of the model and `executed` by a device, recomputation included; `exchanged`, the bytes
    that a device sends by kind and mesh axes; `seconds` at the chip's peak, and the `ceiling` that
    follows from the longest (None: no peak is known); `replicated` and `problems`, as sentences.
  """
  place: Any = mesh
  state = state_lib.abstract_state(experiment, state_lib.make_optimizer(experiment), place)
  part = part_of_one_device(experiment, mesh)
  with sharding.active(_placement(chip)):
    jaxpr, shapes = _traced_gradients(part, chip.kind)
  share = {shape: math.prod(whole.sharding.shard_shape(whole.shape)) / math.prod(shape)
           for shape, whole in zip(shapes, jax.tree.leaves(state.params), strict=True)}
  traced = op_costs.trace_cost(jaxpr, lambda shape: share.get(shape, 1.0))
  params, flops = device_bytes(state.params), goodput.flops_per_step(experiment)
  # Where a sequence is split, the queries of one part ask the keys of all.
  longer = flops / mesh.size / goodput.flops_per_step(part)
  return finish(experiment, mesh, chip, {
    **describe(experiment, mesh, chip, 'train'),
    'tokens_per_step': experiment.training.batch_size * experiment.data.context_length
    * examples.of(experiment).sequences,
    'gib': {name: size / GIB for name, size in (
      ('parameters', params + device_bytes(state.frozen)),
      ('optimizer', device_bytes((state.opt_state, state.ema))),
      ('gradients', params), ('saved activations', traced.saved),
      ('temporaries', max(traced.peak - traced.saved - params, 0.0)))},
    'flops': flops, 'executed': traced.flops * max(longer, 1.0),
    'moved': traced.moved + 2 * (device_bytes(state) + params),
    'exchanged': exchange(experiment, mesh), 'replicated': _replicated(state, mesh)})


def describe(experiment: Experiment, mesh: Mesh | AbstractMesh, chip: Chip, program: str) -> Plan:
  """Return the beginning of every plan."""
  return {
    'name': experiment.name, 'program': program, 'device': chip.kind, 'devices': mesh.size,
    'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')
                 if importlib.util.find_spec(name)},
    'compile_seconds': None, 'parameters': decoder.parameter_count(experiment.decoder)}


def finish(experiment: Experiment, mesh: Mesh | AbstractMesh, chip: Chip, plan: Plan) -> Plan:
  """Add what follows from bytes, operations and what is sent: total, seconds, ceiling, problems."""
  gib, steps = plan['gib'], experiment.training.num_steps
  gib |= {'total': sum(gib.values()), 'memory': chip.memory}
  peak = goodput.device_peak_flops(chip.kind, experiment.decoder.dtype)
  slow = sum(one['bytes'] for one in plan['exchanged'] if one['axes'] == SLICES)
  fast = sum(one['bytes'] for one in plan['exchanged']) - slow
  seconds = {
    'arithmetic': plan['executed'] / peak, 'memory': plan['moved'] / chip.bandwidth / 1e9,
    'exchange': fast / chip.links / 1e9} if peak else {}
  if slow:
    seconds[SLICES] = slow / chip.network / 1e9
  longest = max(seconds.values(), default=None)
  plan |= {'seconds': seconds, 'problems': [], 'ceiling': longest and peak and {
    'bound': max(seconds, key=seconds.__getitem__), 'seconds': longest,
    'mfu': plan['flops'] / (mesh.size * peak * longest),
    'tokens_per_second': plan['tokens_per_step'] / longest,
    **({} if plan['program'] != 'train' else {
      'days': steps * longest / 86400, 'chip_hours': steps * longest * mesh.size / 3600})}}
  if gib['total'] > gib['memory']:
    plan['problems'].append(f'needs {gib["total"]:.1f} GiB of {gib["memory"]:.1f}')
    logits = 8 * plan['tokens_per_step'] / experiment.training.microbatches / mesh.size * (
      experiment.decoder.padded_vocab_size) / GIB  # With their gradients.
    if getattr(experiment.objective, 'chunk_size', 0) is None and logits > 0.1 * gib['memory']:
      plan['problems'][0] += (
        f'; config.objective.chunk_size=512 leaves little of the {logits:.1f} GiB of logits')
  return plan


def device_bytes(tree: Any) -> float:
  """Return the bytes that each device holds of a tree of shapes with shardings."""
  return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(tree)
                   if leaf.sharding.memory_kind != 'pinned_host'))


def _replicated(state: Any, mesh: Mesh | AbstractMesh) -> list[str]:
  """Return what each device holds whole although the mesh could split it."""
  found = [
    f'{jax.tree_util.keystr(path, simple=True, separator="/")} is replicated, which the mesh could '
    'split' for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    if mesh.shape['fsdp'] * mesh.shape['tensor'] > 1 and path[-1].key in ('kernel', 'embedding')
    and leaf.sharding.shard_shape(leaf.shape) == leaf.shape]
  copies = mesh.shape['data']
  spared = device_bytes((state.params, state.opt_state, state.ema)) * (1 - 1 / copies) / GIB
  return found + [
    f'parameters and optimizer state are there {copies} times (mesh axis data); as fsdp they would '
    f'take {spared:.1f} GiB less of each device'] * (spared >= 1)


def exchange(
  experiment: Experiment, mesh: Mesh | AbstractMesh, length: int | None = None
) -> list[dict[str, Any]]:
  """Return the bytes that each device sends by kind and mesh axes, with rings as the links.

  Matrices that are split along axes of the batch are gathered forward and backward, and their
  gradients scattered, in the model's dtype; gradients of the others are added up in float32. Split
  heads and MLPs add up activations twice a layer and pass. Tokens go to their experts and back, or
  to all of them where that is less.

  Args:
    length: tokens of each row in a forward pass alone; None: a train step.
  """
  sizes, rules, config = mesh.shape, dict(experiment.mesh.rules), experiment.decoder
  training, itemsize = experiment.training, jax.numpy.dtype(config.dtype).itemsize
  passes = 2 if length is None else 1
  shapes, axes = abstract_params(experiment)
  sent: dict[tuple[str, str], float] = {}

  def add(kind: str, over: Sequence[str], size: float) -> None:
    if over := [axis for axis in over if sizes[axis] > 1]:
      where = kind, ' '.join(over)
      sent[where] = sent.get(where, 0.0) + size * training.microbatches

  names = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  for leaf, own in zip(jax.tree.leaves(shapes), names, strict=True):
    kept = [axis for name in own if name == 'experts' for axis in rules[name]]
    split = [axis for name in own if name and name != 'experts' for axis in rules[name]]
    gathered = [axis for axis in split if axis in rules['batch']]
    whole = leaf.size / math.prod(sizes[axis] for axis in {*split, *kept} - {*gathered})
    add('all-gather', gathered, passes * whole * itemsize)
    if length is None:
      add('reduce-scatter', gathered, whole * itemsize)
      others = [axis for axis in (*rules['batch'], *rules['length'])
                if axis not in (*gathered, *kept)]
      gradient = 8 * whole / math.prod(sizes[axis] for axis in gathered)
      add('all-reduce', others, gradient)
      if (slices := experiment.mesh.slices) > 1:  # What each keeps of the sum within a slice.
        size = gradient * (slices - 1) / math.prod(sizes[axis] for axis in others)
        where = 'all-reduce', SLICES
        sent[where] = sent.get(where, 0.0) + size * training.microbatches
  part = part_of_one_device(experiment, mesh)
  rows, stretches = part.training.batch_size // training.microbatches, math.prod(
    sizes[axis] for axis in rules['length'])
  tokens = rows * (length or experiment.data.context_length) / stretches
  stream = passes * config.num_layers * tokens * config.embed_dim * itemsize
  add('all-reduce', sorted({*rules['heads'], *rules['mlp']}), 4 * stream)
  add('all-gather', rules['length'], 2 * passes * config.num_layers * tokens * stretches
      * config.kv_heads * config.head_size * itemsize)
  if experts := config.experts:
    parts = math.prod(sizes[axis] for axis in rules['experts'])
    factor = experts.capacity_factor if length is None else None
    if factor or experts.top_k < parts:
      sent_to = (factor or 1) * experts.top_k * (1 - 1 / parts)
      add('all-to-all', rules['experts'], 2 * sent_to * stream)
    else:
      add('all-gather', rules['experts'], parts * stream)
      add('reduce-scatter', rules['experts'], parts * stream)
  return [{'kind': kind, 'axes': over, 'bytes': size} for (kind, over), size in sent.items()]


def part_of_one_device(experiment: Experiment, mesh: Mesh | AbstractMesh) -> Experiment:
  """Return a run of the sizes that one device computes of this one."""
  rules, config = dict(experiment.mesh.rules), experiment.decoder

  def cut(size: int, axis: str) -> int:
    return max(1, size // math.prod(mesh.shape[one] for one in rules[axis]))

  training, vocab = experiment.training, {}
  # A teacher has the same vocabulary.
  if cut(2**30, 'vocab') < 2**30 and not experiment.objective_record.teacher:
    vocab = {'vocab_size': cut(config.padded_vocab_size, 'vocab'), 'vocab_multiple': 1}
  model = config.model_copy(update={
    'num_heads': cut(config.num_heads, 'heads'), 'num_kv_heads': cut(config.kv_heads, 'kv_heads'),
    'head_dim': config.head_size, 'mlp_dim': cut(config.mlp_dim, 'mlp'), **vocab})
  rows = cut(training.batch_size // training.microbatches, 'batch') * training.microbatches
  data = DataConfig.model_construct(context_length=cut(experiment.data.context_length, 'length'))
  # The rest of the run changes nothing about its gradients, so that traces are shared.
  return Experiment.model_construct(
    name='part', model=model, mesh=sharding.MeshConfig(data=1), data=data,
    objective=experiment.objective, finetune=experiment.finetune, privacy=experiment.privacy,
    training=TrainingConfig(num_steps=1, batch_size=rows, microbatches=training.microbatches))


def _placement(chip: Chip) -> Any:
  """Return one such device, for what is traced."""
  platform = {'TPU': 'tpu', 'NVI': 'gpu'}.get(chip.kind[:3], 'cpu')
  alone = sharding.MeshConfig(data=1)
  return sharding.Placement(sharding.abstract_mesh(  # type: ignore[arg-type]
    alone, 1, AbstractDevice(chip.kind, None, platform)), alone)


@functools.lru_cache(maxsize=256)
def _traced_gradients(part: Experiment, kind: str) -> Any:
  """Return the jaxpr of the gradients of a step on an active `kind`, and the parameters' shapes."""
  alone: Any = sharding.abstract_mesh(part.mesh, 1)
  state = state_lib.abstract_state(part, optax.identity(), alone)
  arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                           (state, step.abstract_batch(part, alone)))
  traced = jax.make_jaxpr(functools.partial(step.accumulate_gradients, part))(
    *arguments, jax.eval_shape(lambda: jax.random.key(0)))
  return traced.jaxpr, [leaf.shape for leaf in jax.tree.leaves(state.params)]


def line(plan: Plan) -> str:
  """Return a sentence about the memory and the time of a plan."""
  gib, ceiling = plan['gib'], plan['ceiling']
  time = f', at least {ceiling["seconds"]:.3g} s ({ceiling["bound"]})' if ceiling else ''
  return (f'{gib["total"]:.2f} of {gib["memory"]:.1f} GiB per device ({_parts(gib)}); a step takes '
          f'{plan["flops"]:.3g} FLOPs{time}')


def _parts(gib: Mapping[str, float]) -> str:
  return ', '.join(f'{name} {size:.2f}' for name, size in gib.items()
                   if name not in ('total', 'memory'))


def page(plan: Plan) -> str:
  """Return a plan as a page of text."""
  gib, seconds, ceiling = plan['gib'], plan['seconds'], plan['ceiling']
  mesh = ', '.join(f'{axis}={size}' for axis, size in plan['mesh'].items()) or 'one device'
  known = ', '.join(f'{name} {version}' for name, version in plan['versions'].items())
  took = plan['compile_seconds']
  rows = [
    ('run', f'{plan["name"]}, {plan["program"]}, on {plan["devices"]} x {plan["device"]} ({mesh})'),
    ('source', f'estimated ({known})' if took is None else f'compiled in {took:.0f} s ({known})'),
    ('size', f'{plan["parameters"]:,} parameters, {plan["tokens_per_step"]:,} tokens a step'),
    ('GiB per device', f'{gib["total"]:.2f} of {gib["memory"]:.2f}: {_parts(gib)}'),
    ('FLOPs', f'{plan["flops"]:.4g} a step; {plan["executed"]:.4g} by each device, with what it '
              'computes again'),
    *(('sent', f'{one["bytes"] / 1e9:.3g} GB by {one["kind"]} over {one["axes"] or "no axis"}')
      for one in plan['exchanged'] if one['bytes'] >= 1e6),
    ('seconds', ', '.join(f'{name} {size:.4g}' for name, size in seconds.items())
                or f'unknown: no peak of {plan["device"]} is known')]
  if ceiling:
    rows.append(('ceiling', f'{ceiling["tokens_per_second"]:,.0f} tokens/s, MFU '
                 f'{ceiling["mfu"]:.0%}, bound by {ceiling["bound"]}'))
    if 'days' in ceiling:
      rows.append(('the run', f'at least {ceiling["days"]:.2f} days, {ceiling["chip_hours"]:,.0f} '
                   'chip-hours'))
  rows += [('replicated', one) for one in plan['replicated']]
  rows += [('problem', one) for one in plan['problems']]
  return '\n'.join(f'{name:<16}{text}' for name, text in rows)
