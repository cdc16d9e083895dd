"""The train state: what a step changes, what a checkpoint holds, and where each leaf lives."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import loading, sharding
from jaxllm.checkpoints import tree
from jaxllm.experiment import Experiment
from jaxllm.optim import optimizers, schedules
from jaxllm.training import parameters


class TrainState(flax.struct.PyTreeNode):
  """All that training changes.

  Attributes:
    step: int32 scalar, steps taken, skipped ones included.
    params: what is trained, float32: the decoder's parameters, layers stacked on axis 0, or
      adapters to them.
    opt_state: state of the optax transform.
    ema: the average of `params` that is evaluated and sampled from, or None: `params` are.
    loss_mean: float32 scalar, running mean of the loss of applied steps.
    loss_variance: float32 scalar, running variance of the same.
    skipped: int32 scalar, steps that were not applied.
    skipped_in_a_row: int32 scalar, of those the ones since the last applied step.
    frozen: what the step reads and never changes, see `parameters`; empty where all is trained.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  loss_mean: jax.Array
  loss_variance: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  frozen: Any = flax.struct.field(default_factory=dict)


def make_schedule(experiment: Experiment) -> optax.Schedule:
  """Return the learning-rate schedule of the run."""
  return schedules.make_schedule(
    experiment.schedule, experiment.optimizer.learning_rate, experiment.training.num_steps
  )


def make_optimizer(experiment: Experiment) -> optax.GradientTransformation:
  """Return the optimizer of the run."""
  return parameters.make_optimizer(experiment, make_schedule(experiment))


def init_state(
  experiment: Experiment, tx: optax.GradientTransformation, base: Any | None = None
) -> TrainState:
  """Return the state before the first step, nothing frozen in it; pure, to be jitted.

  Args:
    experiment: the run.
    tx: from `make_optimizer`.
    base: parameters of `init_from`, float32, where they are trained themselves; what is not given
      is drawn from the run's seed.
  """
  params = parameters.init(experiment, jax.random.key(experiment.seed), base)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    # A copy: the step donates the state, and two leaves may not share a buffer.
    ema=jax.tree.map(jnp.copy, params) if averages(experiment) else None,
    loss_mean=jnp.zeros((), jnp.float32),
    loss_variance=jnp.zeros((), jnp.float32),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
  )


def abstract_state(
  experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Return the state's shapes, dtypes and shardings without allocating.

  Every leaf is a ShapeDtypeStruct with a NamedSharding: parameters by the logical names of their
  axes, optimizer state like the parameter it belongs to, the rest replicated.

  Raises:
    ValueError: an axis is not divisible by the mesh axes that its rule names.
  """
  params = _placed(*loading.abstract(experiment), experiment, mesh)
  like = {path: (leaf.shape, leaf.sharding) for path, leaf in tree.flatten(params).items()}
  state = jax.eval_shape(lambda: init_state(experiment, tx))

  def place(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    where = _like_parameter(tree.path_of(keys), leaf.shape, like) or sharding.replicated(mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  state = jax.tree_util.tree_map_with_path(place, state)
  return state.replace(frozen=_placed(*parameters.abstract_frozen(experiment), experiment, mesh))


def create_state(
  experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh, base: Any | None = None,
  teacher: Any | None = None,
) -> TrainState:
  """Return the state before the first step, each leaf where it belongs.

  Args:
    experiment: the run.
    tx: from `make_optimizer`.
    mesh: from `sharding.make_mesh`.
    base: parameters of `init_from` on this mesh, from `pretrained.load`; they become part of the
      state and are the caller's no longer. None: there is none.
    teacher: parameters of the teacher, likewise.
  """
  abstract = abstract_state(experiment, tx, mesh).replace(frozen={})
  start = jax.jit(
    lambda base: init_state(experiment, tx, base),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract), donate_argnums=0,
  )
  state = start(None if experiment.finetune.lora else base)
  return state.replace(frozen=freeze(experiment, mesh, base, teacher))


def freeze(experiment: Experiment, mesh: Mesh, base: Any, teacher: Any | None = None) -> Any:
  """Return `TrainState.frozen`, each leaf where it belongs; arguments as in `create_state`."""
  if experiment.finetune.base is None:
    # Nothing to compute, so nothing is copied.
    return parameters.freeze(experiment, base, teacher)
  shapes, axes = parameters.abstract_frozen(experiment)
  where = sharding.shardings(axes, shapes, mesh, experiment.mesh)
  return jax.jit(
    lambda base, teacher: parameters.freeze(experiment, base, teacher), out_shardings=where
  )(base, teacher)


def _placed(shapes: Any, axes: Any, experiment: Experiment, mesh: Mesh) -> Any:
  """Return shapes with their shardings."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes, sharding.shardings(axes, shapes, mesh, experiment.mesh),
  )


def averages(experiment: Experiment) -> bool:
  """Return whether the run keeps an average beside the parameters that it trains."""
  schedule_free = experiment.optimizer.name == 'schedule_free_adamw'
  return schedule_free or experiment.training.ema_decay is not None


def next_average(experiment: Experiment, ema: Any, opt_state: Any, params: Any) -> Any:
  """Return the average after a step: the optimizer's own, or the moving one."""
  decay = experiment.training.ema_decay
  if decay is None:
    return optimizers.evaluation_params(experiment.optimizer, opt_state, params)
  return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def evaluation_params(state: TrainState) -> Any:
  """Return what is trained, to evaluate and sample with: the average where there is one."""
  return state.params if state.ema is None else state.ema


def _like_parameter(
  path: str, shape: tuple[int, ...], like: dict[str, Any]
) -> NamedSharding | None:
  """Find the parameter whose path ends `path`, and place `shape` as the parameter is placed.

  An optimizer may see a kernel as a matrix, with two of its axes merged, and a factored moment
  lacks one axis of what it sees.
  """
  parts = path.split('/')
  for start in range(len(parts)):
    if (end := '/'.join(parts[start:])) in like:
      full_shape, where = like[end]
      entries = tuple(where.spec) + (None,) * (len(full_shape) - len(where.spec))
      whole = [(full_shape, entries), *_merged(full_shape, entries)]
      factored = [(sizes[:i] + sizes[i + 1 :], spec[:i] + spec[i + 1 :])
                  for sizes, spec in whole for i in range(len(sizes))]
      for seen, spec in whole + factored:
        if seen == shape:
          return NamedSharding(where.mesh, PartitionSpec(*spec))
  return None


def _merged(shape: tuple[int, ...], spec: tuple[Any, ...]) -> list[tuple[Any, Any]]:
  """Merge each pair of neighbouring axes of which only the first may be split."""
  return [
    (shape[:i] + (shape[i] * shape[i + 1],) + shape[i + 2 :], spec[: i + 1] + spec[i + 2 :])
    for i in range(1, len(shape) - 1) if spec[i + 1] is None
  ]
