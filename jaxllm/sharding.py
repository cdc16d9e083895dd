"""The device mesh, and the rules that turn logical axis names into shardings.

Parameters and activations name their axes (`embed`, `heads`, `batch`, ...); a mapping in the config
says which mesh axes each name is split over. A strategy is therefore data: data parallel, FSDP,
tensor parallel and their mixtures differ in `MeshConfig` alone.
"""

import contextlib
import contextvars
import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pydantic
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.config import Config

Axis = Literal['data', 'fsdp', 'tensor', 'context', 'expert']
MESH_AXES: tuple[Axis, ...] = typing.get_args(Axis)
Rules = tuple[tuple[str, tuple[Axis, ...]], ...]

DEFAULT_RULES: Rules = (
  # Activations.
  ('batch', ('data', 'fsdp', 'expert')),
  ('length', ('context',)),
  ('activation_embed', ()),
  # The batch where an activation is split by `embed` too: the remaining axes of the batch.
  ('lookup_batch', ('data', 'expert')),
  # Parameters, and activations that follow them.
  ('vocab', ('tensor',)),
  ('embed', ('fsdp',)),
  ('heads', ('tensor',)),
  ('kv_heads', ('tensor',)),
  ('head_dim', ()),
  ('mlp', ('tensor',)),
  ('experts', ('expert',)),
  ('layers', ()),
  ('positions', ()),
  ('rank', ()),
)


class MeshConfig(Config):
  """The size of each mesh axis, and the logical axes that are split over it.

  The sizes multiply to the number of devices; one of them may be -1, which takes the rest.
  """

  data: int = -1
  """Devices that hold a copy of the parameters and split the batch."""
  fsdp: int = 1
  """Devices that split the batch and also the parameters and optimizer state."""
  tensor: int = 1
  """Devices that split heads, the MLP's hidden axis and the vocabulary."""
  context: int = 1
  """Devices that split the sequence."""
  expert: int = 1
  """Devices that split the experts of a mixture-of-experts layer, and the batch elsewhere."""
  slices: int = 1
  """Parts of the devices with a slow network between them, such as TPU slices: `data` alone runs
  over it, and must be a multiple of them."""
  rules: Rules = DEFAULT_RULES
  """Logical axis name -> mesh axes, as pairs. A name may stand once; () replicates."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'MeshConfig':
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
      if size != -1 and size < 1:
        raise ValueError(f'{axis}={size}: a positive number, or -1 for all remaining devices')
    if self.slices < 1 or (self.data != -1 and self.data % self.slices):
      raise ValueError(f'slices={self.slices} with data={self.data}: slices is a positive number '
                       'that divides data, the only axis between slices')
    if list(sizes.values()).count(-1) > 1:
      raise ValueError('at most one mesh axis may be -1')
    names = [name for name, _ in self.rules]
    if twice := [name for name in names if names.count(name) > 1]:
      raise ValueError(f'rules: {twice[0]!r} stands more than once')
    return self


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Return the size of each of MESH_AXES, whose product must be `num_devices`."""
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and num_devices % known == 0:
    sizes[sizes.index(-1)] = num_devices // known
  if math.prod(sizes) != num_devices:
    shape = ', '.join(f'{a}={getattr(config, a)}' for a in MESH_AXES)
    raise ValueError(
      f'config.mesh ({shape}) needs a multiple of {known} devices but there are {num_devices}; '
      'change the sizes so that they multiply to the device count (one may be -1)')
  if sizes[0] % config.slices:
    raise ValueError(f'config.mesh.slices={config.slices} does not divide data={sizes[0]}, what '
                     f'the other axes leave of {num_devices} devices; change one of the sizes')
  return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arrange devices into the mesh that `config` describes.

  Args:
    config: axis sizes.
    devices: the devices to use; all devices of all processes by default.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or to those of each slice.
  """
  devices = list(devices) if devices is not None else jax.devices()
  sizes = mesh_shape(config, len(devices))
  # Unlike jax.make_mesh, split an axis of a TPU's torus where none has the wanted size.
  array = np.concatenate([
    mesh_utils.create_device_mesh(
      (sizes[0] // config.slices, *sizes[1:]), part, allow_split_physical_axes=True)
    for part in slice_devices(config, devices)])
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def slice_devices(config: MeshConfig, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
  """Return the devices of each slice: TPUs say theirs, others are parted in the order given."""
  if devices[0].platform != 'tpu':
    parts = np.array(devices, object).reshape(config.slices, -1)
    return [list(part) for part in parts]
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    slices.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  if len(slices) != config.slices:
    raise ValueError(f'config.mesh.slices={config.slices}, but by their slice_index the devices '
                     f'are of {len(slices)}; set it to that')
  return [slices[index] for index in sorted(slices)]


@dataclasses.dataclass(frozen=True)
class Placement:
  """The devices that a model lies on, and the rules that split it over them."""

  mesh: Mesh
  config: MeshConfig

  def sharding(self, shape: Sequence[int], *axes: str | None) -> NamedSharding:
    """Return the sharding of an array by the logical names of its axes; see `constrain`."""
    return NamedSharding(self.mesh, _dividing(shape, axes, self.mesh, self.config))

  def shardings(self, axes: Any, shapes: Any) -> Any:
    """Return the shardings of a tree of parameters; see `shardings`."""
    return shardings(axes, shapes, self.mesh, self.config)


def make_placement(
  mesh: Placement | Mesh | MeshConfig | Mapping[str, Any] | str | None,
  rules: Rules = DEFAULT_RULES,
) -> Placement | None:
  """Return where a model is to lie; None: on one device.

  Args:
    mesh: sizes of mesh axes, {'fsdp': 4, 'tensor': 2} or 'fsdp=4,tensor=2', those left out being
      1; a config; or a mesh with some of MESH_AXES. A config takes the first devices.
    rules: logical axis -> mesh axes, where `mesh` has no rules of its own.

  Raises:
    ValueError: there are not so many devices, or there is no such axis.
  """
  if mesh is None or isinstance(mesh, Placement):
    return mesh
  if isinstance(mesh, Mesh):
    if unknown := [axis for axis in mesh.axis_names if axis not in MESH_AXES]:
      raise ValueError(f'mesh: {unknown[0]!r} is no mesh axis (mesh axes: {", ".join(MESH_AXES)})')
    own = [axis for axis in MESH_AXES if axis in mesh.axis_names]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in own])
    devices = devices.reshape([mesh.shape.get(axis, 1) for axis in MESH_AXES])
    automatic = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Placement(automatic, MeshConfig(rules=rules))
  if isinstance(mesh, str):
    parts = [part.partition('=') for part in mesh.replace(' ', '').split(',')]
    if not all(size.lstrip('-').isdecimal() for _, _, size in parts):
      raise ValueError(f'mesh={mesh!r}: sizes of mesh axes are needed, as in fsdp=4,tensor=2')
    mesh = {axis: int(size) for axis, _, size in parts}
  config = mesh if isinstance(mesh, MeshConfig) else MeshConfig(
    **{'data': 1, 'rules': rules, **mesh})
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  number = None if -1 in sizes else math.prod(sizes)
  return Placement(make_mesh(config, jax.devices()[:number]), config)


def abstract_mesh(
  config: MeshConfig, num_devices: int, device: AbstractDevice | None = None
) -> AbstractMesh:
  """Return the mesh of `config` without devices, for shapes and shardings; as `mesh_shape`.

  Code that is traced for it with `active` is that of the platform of `device`.
  """
  sizes, types = mesh_shape(config, num_devices), (AxisType.Auto,) * len(MESH_AXES)
  return AbstractMesh(sizes, MESH_AXES, axis_types=types, abstract_device=device)


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
  """Turn logical axis names (None: not split) into a PartitionSpec.

  Raises:
    ValueError: a name has no rule, or two dimensions claim the same mesh axis.
  """
  mapping = dict(rules)
  entries: list[Any] = []
  used: set[str] = set()
  for name in axes:
    if name is not None and name not in mapping:
      raise ValueError(f'config.mesh.rules has no rule for the logical axis {name!r}')
    mesh_axes = mapping[name] if name is not None else ()
    if used & set(mesh_axes):
      raise ValueError(f'config.mesh.rules maps two axes of {tuple(axes)} to {mesh_axes}')
    used |= set(mesh_axes)
    entries.append(mesh_axes)
  return PartitionSpec(*entries)


def _dividing(
  shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, config: MeshConfig
) -> PartitionSpec:
  """Return the spec of an array without the mesh axes that do not divide its dimensions."""
  entries: list[Any] = []
  for size, entry in zip(shape, partition_spec(axes, config.rules), strict=True):
    kept: list[str] = []
    for axis in (entry,) if isinstance(entry, str) else entry or ():
      if size % math.prod(mesh.shape[name] for name in [*kept, axis]):
        break
      kept.append(axis)
    entries.append(tuple(kept))
  return PartitionSpec(*entries)


def shardings(axes: Any, shapes: Any, mesh: Mesh, config: MeshConfig) -> Any:
  """Map a tree of logical axes to a tree of NamedShardings.

  Args:
    axes: nested dict whose leaves are tuples of logical names, one name per dimension.
    shapes: nested dict of the same form whose leaves have a `shape`.
    mesh: from `make_mesh`.
    config: gives the rules.

  Raises:
    ValueError: a dimension is not divisible by the mesh axes that its rule names; the message
      holds the path, the dimension and the sizes.
  """
  def walk(names: Any, leaf: Any, path: str) -> Any:
    if isinstance(names, Mapping):
      return {key: walk(names[key], leaf[key], f'{path}/{key}') for key in names}
    spec = partition_spec(names, config.rules)
    for name, size, entry in zip(names, leaf.shape, spec, strict=True):
      mesh_axes = (entry,) if isinstance(entry, str) else entry or ()
      parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
      if size % parts:
        raise ValueError(
          f'{path.lstrip("/")}: axis {name!r} has size {size}, which {mesh_axes} ({parts} devices) '
          'does not divide; change the mesh sizes, or give the axis another rule in '
          'config.mesh.rules')
    return NamedSharding(mesh, spec)

  return walk(axes, shapes, '')


def batch_sharding(mesh: Mesh, config: MeshConfig) -> NamedSharding:
  """Return the sharding of a (B, T) batch array."""
  return NamedSharding(mesh, partition_spec(('batch', 'length'), config.rules))


def batch_shardings(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, NamedSharding]:
  """Return the sharding of each array of a batch.

  Args:
    batch: name -> (B, T) array or shape; what is narrower (labels) is split by rows alone.
    sharding: from `batch_sharding`.
  """
  length = max(array.shape[1] for array in batch.values())
  rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
  return {name: sharding if array.shape[1] == length else rows for name, array in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def memories(mesh: Mesh) -> list[str]:
  """Return the kinds of memory that the devices of a mesh reach."""
  if isinstance(mesh, AbstractMesh):
    return ['device', 'pinned_host']
  return [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]


def to_host(arrays: Any) -> Any:
  """Return a tree of arrays as NumPy arrays; every process gets all of each."""
  if jax.process_count() == 1:
    return jax.device_get(arrays)
  return jax.tree.map(
    lambda x: np.asarray(x) if x.is_fully_replicated or x.is_fully_addressable
    else multihost_utils.process_allgather(x, tiled=True), arrays)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Return global (rows, T) arrays by name, split over the mesh, from this process's rows.

  Args:
    batch: name -> (local rows, T) host array.
    sharding: from `batch_sharding`.
  """
  return {
    name: jax.make_array_from_process_local_data(where, batch[name])
    for name, where in batch_shardings(batch, sharding).items()}


# Where the code being traced runs: a property of the trace, not of the model, so that model code
# stays free of devices.
_ACTIVE: contextvars.ContextVar[Placement | None] = contextvars.ContextVar('active', default=None)


@contextlib.contextmanager
def active(placement: Placement | None) -> Iterator[None]:
  """Make `constrain` effective for code that is traced inside; None: leave things as they are."""
  token = _ACTIVE.set(placement or _ACTIVE.get())
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def split_placement() -> Placement | None:
  """Return the active placement if it has several devices."""
  placement = _ACTIVE.get()
  return placement if placement and placement.mesh.size > 1 else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pin the sharding of an activation by logical axis names; outside `active` return it as is.

  Where the mesh axes of a rule do not divide a dimension, only the first ones that do split it.

  Args:
    x: array of any dtype.
    *axes: one logical name, or None, per dimension.
  """
  placement = split_placement()
  return x if placement is None else jax.lax.with_sharding_constraint(
    x, placement.sharding(x.shape, *axes))


def mesh_axes(axis: str) -> tuple[Axis, ...]:
  """Return the mesh axes that split a logical axis; outside `active` none."""
  placement = split_placement()
  return () if placement is None else dict(placement.config.rules)[axis]


def num_parts(axis: str) -> int:
  """Return into how many parts a logical axis is split; outside `active` 1."""
  placement = split_placement()
  return 1 if placement is None else math.prod(
    placement.mesh.shape[name] for name in mesh_axes(axis))


def map_shards(
  f: Callable[..., jax.Array],
  in_axes: Sequence[Any],
  out_axes: Sequence[str | None],
) -> Callable[..., jax.Array]:
  """Return `f` run by each device on its own part; outside `active` return `f` itself.

  Args:
    f: a function that the compiler cannot split, such as a kernel.
    in_axes: logical axis names, or None for not split, of each argument, which may be a tree.
    out_axes: the same of the result.
  """
  placement = split_placement()
  if placement is None:
    return f
  in_specs, out_specs = jax.tree.map(
    lambda axes: partition_spec(axes, placement.config.rules), (tuple(in_axes), tuple(out_axes)),
    is_leaf=lambda axes: isinstance(axes, tuple) and all(
      isinstance(name, str | None) for name in axes))
  return jax.shard_map(
    f, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
  """Return the platform that the code being traced will run on: 'cpu', 'gpu' or 'tpu'."""
  placement = _ACTIVE.get()
  mesh = placement.mesh if placement else None
  device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh and mesh.devices.flat[0]
  return device.platform if device else jax.default_backend()
