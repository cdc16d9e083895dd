"""What it costs to run a traced function on one device: memory, operations, and bytes that move.

`trace_cost` walks the operations of a jaxpr as XLA would fuse them.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax


class Cost(NamedTuple):
  """Bytes at the peak and of what is saved for the backward pass, operations, bytes moved."""

  peak: float = 0.0
  saved: float = 0.0
  flops: float = 0.0
  moved: float = 0.0


class _Op(NamedTuple):
  """An operation; what it reads and writes are numbers of values."""

  eqn: Any
  name: str
  reads: list[int]
  writes: list[int]


# What reads operands from memory; all else is computed inside whatever reads it, except reductions,
# which are stored but compute their operands.
_STORING = ('dot_general', 'ragged_dot', 'ragged_dot_general', 'conv_general_dilated', 'scan',
            'while', 'cond', 'pallas_call', 'shard_map', 'sort', 'scatter', 'scatter-add', 'top_k',
            'all_to_all', 'psum', 'all_gather', 'ffi_call', 'random_bits')
_REDUCING = ('reduce_', 'arg', 'cum', 'gather')


def trace_cost(
  jaxpr: Any, share: Callable[[tuple[int, ...]], float] = lambda shape: 1.0,
  given: int | None = None,
) -> Cost:
  """Return what it costs to run a jaxpr, its arguments and constants left out of the memory.

  Args:
    jaxpr: of the whole function.
    share: shape of a result -> the part of it that this device keeps.
    given: of a loop's body, the arguments that are no slices; its results are the loop's.
  """
  avals, ops, held, results = _flatten(jaxpr, given)
  last, stored = _lifetimes(ops, set() if given is not None else results, results)

  def size(value: int, kept: bool = True) -> float:
    aval = avals[value]
    if value in held or value not in stored or aval.memory_space == jax.memory.Space.Host:
      return 0.0
    return aval.size * aval.dtype.itemsize * (share(aval.shape) if kept else 1.0)

  live = peak = flops = moved = inner_saved = 0.0
  saved = None
  ends: dict[int, list[int]] = {}
  for index, (eqn, name, reads, writes) in enumerate(ops):
    if all(last.get(value, -1) < 0 for value in writes):
      continue
    if saved is None and eqn and 'transpose' in str(eqn.source_info.name_stack):
      saved = live  # The backward pass begins.
    inner, times = _inner_cost(eqn, name, share) if eqn else (Cost(), 1)
    inner_saved = max(inner_saved, inner.saved)
    flops += _flops(eqn, name) + times * inner.flops
    made = sum(map(size, writes))
    moved += times * inner.moved + made
    if name in _STORING and name not in ('scan', 'while'):
      moved += sum(avals[value].size * avals[value].dtype.itemsize for value in reads)
    for value in writes:
      ends.setdefault(max(last.get(value, index), index), []).append(value)
    dying = sum(map(size, ends.get(index, [])))
    # A result may take the place of an operand that nothing else reads; of a loop only a carry.
    taken = writes[:_whole(eqn.outvars, _open(eqn.params['jaxpr']).outvars)] if (
      name == 'scan') else writes
    reused = 0.0 if name in ('dot_general', 'pallas_call') else min(dying, sum(map(size, taken)))
    # What a product makes is whole before it is split; what a loop or a wider cast makes never is.
    split = name == 'scan' or name == 'convert_element_type' and (
      eqn.outvars[0].aval.dtype.itemsize > eqn.invars[0].aval.dtype.itemsize)
    whole = sum(size(value, split) for value in writes)
    peak = max(peak, live + whole + inner.peak - reused)
    live += made - dying
  return Cost(peak, inner_saved if saved is None else saved, flops, moved)


def _flatten(jaxpr: Any, given: int | None) -> tuple[list[Any], list[_Op], set[int], set[int]]:
  """Return what values are, operations, the values that the caller holds, and the results."""
  avals: list[Any] = [None]  # Numbers begin at 1.

  def new(var: Any) -> int:
    avals.append(var.aval)
    return len(avals) - 1

  def expand(jaxpr: Any, env: dict[int, int]) -> Iterator[_Op]:
    for eqn in jaxpr.eqns:  # Literals have no hash, hence `id`.
      name, reads = eqn.primitive.name, [env[id(var)] for var in eqn.invars if id(var) in env]
      inner = _open(eqn.params.get('jaxpr', eqn.params.get('call_jaxpr')))
      if inner is None or name in _STORING:
        env |= {id(var): new(var) for var in eqn.outvars}
        yield _Op(eqn, name, reads, [env[id(var)] for var in eqn.outvars])
      else:
        called = {id(var): env.get(id(arg)) or new(var) for var, arg in zip(
          (*inner.constvars, *inner.invars), (*inner.constvars, *eqn.invars), strict=True)}
        yield from expand(inner, called)
        env |= {id(var): called.get(id(out)) or new(var)
                for var, out in zip(eqn.outvars, inner.outvars, strict=True)}

  env = {id(var): new(var) for var in (*jaxpr.constvars, *jaxpr.invars)}
  held = {env[id(var)] for var in (*jaxpr.constvars, *jaxpr.invars[:given])}  # By the caller.
  slices = [] if given is None else jaxpr.invars[given:]
  ops = [_Op(None, '', [], [env[id(var)] for var in slices])]
  for op in expand(jaxpr, env):
    ops.append(op)
    if op.name in ('dynamic_update_slice', 'scatter') and held.intersection(op.reads[:1]):
      held |= {*op.writes}  # A cache is donated, and written in place.
  return avals, ops, held, {env[id(var)] for var in jaxpr.outvars if id(var) in env}


def _lifetimes(
  ops: Sequence[_Op], results: set[int], needed: set[int]
) -> tuple[dict[int, int], set[int]]:
  """Return until which operation each value is needed (-1: never), and which are stored."""
  last, stored = dict.fromkeys(needed, len(ops)), set(results)
  readers = collections.Counter(value for op in ops for value in op.reads)
  for index in reversed(range(len(ops))):
    eqn, name, reads, writes = ops[index]
    until = max((last.get(value, -1) for value in writes), default=-1)
    if until < 0 or eqn is None:
      continue
    stores = name in _STORING
    # A stream to which layers add is stored, too; else what they have added would be.
    joins = name == 'add' and len({*reads}) == 2 and readers[writes[0]] > 1 and eqn.outvars[
      0].aval.ndim > 2
    if stores or joins or name.startswith(_REDUCING):
      stored |= {*writes}
    if not reads:  # Zeros and the like are made where they are read.
      stored -= {*writes}
    stored |= {*reads} if stores else set()
    read_at = index if stored & {*writes} else until
    last |= {value: max(last.get(value, -1), read_at) for value in reads}
  return last, stored


def _inner_cost(eqn: Any, name: str, share: Any) -> tuple[Cost, int]:
  """Return the cost of one turn of a loop or of the dearest branch, and the number of turns."""
  params = eqn.params
  if name == 'scan':
    body = _open(params['jaxpr'])
    return trace_cost(body, share, _whole(eqn.invars, body.invars)), params['length']
  bodies = params.get('branches', (params['body_jaxpr'],) if name == 'while' else ())
  costs = [trace_cost(body, share, len(body.invars)) for body in map(_open, bodies)]
  return max(costs, default=Cost(), key=lambda cost: cost.peak), 1


def _whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  """Return how many values of a scan a turn sees whole, all but slices; these are the first."""
  return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _flops(eqn: Any, name: str) -> float:
  """Return the operations of matrix products; of fused attention, half of which is masked."""
  if name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
  if name.startswith('ragged_dot'):
    return 2.0 * eqn.invars[0].aval.size * eqn.invars[1].aval.shape[-1]
  if name == 'pallas_call':  # (B, N, T, H)
    shape = max((var.aval.shape for var in eqn.outvars), key=lambda one: (len(one), math.prod(one)))
    passes = 1.0 if 'fwd' in str(eqn.params.get('name_and_src_info', '')) else 1.5
    return 2.0 * math.prod(shape) * shape[-2] * passes if len(shape) >= 3 else 0.0
  return 0.0


def _open(jaxpr: Any) -> Any:
  """Return a jaxpr without its constants, which newer jax keeps in it."""
  return getattr(jaxpr, 'jaxpr', jaxpr)
