"""The train state: trained parameters, frozen ones beside them, and the sharding of each leaf.

`TrainState.params` are the decoder's parameters, or adapters to them; gradients and the optimizer
see nothing else. `TrainState.frozen` holds the rest that a step reads; no checkpoint stores it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxllm import sharding
from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters import rules
from jaxllm.adapters.quantization import quantize
from jaxllm.checkpoints import tree
from jaxllm.experiment import HEAD, Experiment, abstract_params
from jaxllm.models import decoder
from jaxllm.models.linear import is_quantized
from jaxllm.optim import optimizers

# Keys of `TrainState.frozen`.
BASE, TEACHER = 'base', 'teacher'
HOST = 'pinned_host'


class TrainState(flax.struct.PyTreeNode):
  """All that training changes.

  Attributes:
    step: int32 scalar, steps taken, skipped ones included.
    params: the trained parameters in `training.param_dtype`: the decoder's, layers stacked on
      axis 0, or adapters to them.
    opt_state: state of the optax transform.
    ema: the average of `params` that is evaluated and sampled from, or None: `params` are.
    loss_mean: float32 scalar, running mean of the loss of applied steps.
    loss_variance: float32 scalar, running variance of the same.
    skipped: int32 scalar, steps that were not applied.
    skipped_in_a_row: int32 scalar, of those the ones since the last applied step.
    frozen: parameters that the step reads and never changes: the base of adapters, a teacher.
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
  return optimizers.make_schedule(
    experiment.schedule, experiment.optimizer.learning_rate, experiment.training.num_steps)


def make_optimizer(experiment: Experiment) -> optax.GradientTransformation:
  """Return the optimizer of the run's trained parameters.

  Adapters have no kernels; unless `decay_names` names something else, their matrices decay
  instead, towards the base model.

  Raises:
    ValueError: a rule or a name matches nothing, or nothing is trained.
  """
  config, finetune = experiment.optimizer, experiment.finetune
  shapes, _ = abstract_params(experiment)
  unset = type(config).model_fields['decay_names'].default
  if finetune.lora is not None and config.decay_names == unset:
    config = config.replace(decay_names=('a', 'b', *(['kernel'] if HEAD in shapes else [])))
  tx = optimizers.make_optimizer(config, make_schedule(experiment), shapes)
  if not finetune.rules:
    return tx
  if not trained_count(experiment):
    patterns = ', '.join(repr(rule.pattern) for rule in finetune.rules)
    raise ValueError(f'config.finetune.rules: {patterns} freeze all parameters, so that nothing is '
                     'trained; leave some of them out')
  return rules.apply_rules(finetune.rules, tx, shapes)


def trained_count(experiment: Experiment) -> int:
  """Return the number of trained parameters; the adapters' scales are constants."""
  shapes, _ = abstract_params(experiment)
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  factors = jax.tree.leaves(rules.factors(experiment.finetune.rules, shapes))
  constant = experiment.finetune.lora is not None
  return sum(
    leaf.size for (path, leaf), factor in zip(paths, factors, strict=True)
    if factor and not (constant and path[-1].key == 'scale'))


def init_state(
  experiment: Experiment, tx: optax.GradientTransformation, base: Any | None = None
) -> TrainState:
  """Return the state before the first step, nothing frozen in it; pure, to be jitted.

  Args:
    tx: from `make_optimizer`.
    base: parameters of `init_from`, float32, where they are trained themselves; the other
      parameters are initialised from the run's seed.
  """
  params = init_params(experiment, jax.random.key(experiment.seed), base)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=jax.tree.map(lambda leaf: leaf.astype(experiment.training.param_dtype), params),
    opt_state=tx.init(params),
    # A copy: the step donates the state, and two leaves may not share a buffer.
    ema=jax.tree.map(jnp.copy, params) if experiment.training.ema_decay else None,
    loss_mean=jnp.zeros((), jnp.float32),
    loss_variance=jnp.zeros((), jnp.float32),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
  )


def init_params(experiment: Experiment, key: jax.Array, base: Any = None) -> dict[str, Any]:
  """Return the trained parameters before the first step; pure.

  Args:
    key: of the random initialization.
    base: parameters of `init_from`, where they are trained themselves.
  """
  if experiment.finetune.lora is not None:
    shapes, _ = decoder.abstract(experiment.decoder)
    params = lora_lib.init(experiment.finetune.lora, shapes['params'], key)
  else:
    params = decoder.init(experiment.decoder, key)['params'] if base is None else base
  if head := experiment.objective_record.head:
    own = head.init(experiment.objective, experiment.decoder, jax.random.fold_in(key, 1))
    params = {HEAD: own, **params}
  return params


def abstract_state(
  experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Return the state's shapes, dtypes and shardings without allocating.

  Every leaf is a ShapeDtypeStruct with a NamedSharding: parameters by the logical names of their
  axes, optimizer state like the parameter it belongs to, the rest replicated.

  Raises:
    ValueError: the mesh axes of a rule do not divide an axis, or there is no such memory.
  """
  params = _placed(*abstract_params(experiment), experiment, mesh)
  like = {(path, leaf.shape): leaf.sharding for path, leaf in tree.flatten(params).items()}
  state = jax.eval_shape(lambda: init_state(experiment, tx))
  on_host = experiment.optimizer.memory == 'host'
  if on_host and HOST not in sharding.memories(mesh):
    raise ValueError("config.optimizer.memory='host': the devices of this mesh reach no memory of "
                     "the host; take 'device'")

  def place(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # The path of what belongs to a parameter ends with the path of the parameter.
    names = tree.path_of(keys).split('/')
    ends = [('/'.join(names[start:]), leaf.shape) for start in range(len(names))]
    where = next((like[end] for end in ends if end in like), sharding.replicated(mesh))
    if on_host and names[0] == 'opt_state' and leaf.ndim:
      where = where.with_memory_kind(HOST)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  state = jax.tree_util.tree_map_with_path(place, state)
  return state.replace(frozen=_placed(*_abstract_frozen(experiment), experiment, mesh))


def moments_in(experiment: Experiment, space: Any, state: TrainState) -> TrainState:
  """Return a state with its moments in a memory, where they lie on the host between updates."""
  if experiment.optimizer.memory == 'device':
    return state
  return state.replace(opt_state=jax.tree.map(
    lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state.opt_state))


def create_state(
  experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh, base: Any | None = None,
  teacher: Any | None = None,
) -> TrainState:
  """Return the state before the first step, each leaf where it belongs.

  Args:
    tx: from `make_optimizer`.
    mesh: from `sharding.make_mesh`.
    base: parameters of `init_from` on this mesh, from `pretrained.load`; they become part of the
      state and are the caller's no longer. None: there is none.
    teacher: parameters of the teacher, likewise.
  """
  abstract = abstract_state(experiment, tx, mesh).replace(frozen={})
  start = jax.jit(
    lambda base: init_state(experiment, tx, base),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract), donate_argnums=0)
  state = start(None if experiment.finetune.lora else base)
  return state.replace(frozen=freeze(experiment, mesh, base, teacher))


def freeze(experiment: Experiment, mesh: Mesh, base: Any, teacher: Any | None = None) -> Any:
  """Return `TrainState.frozen`, each leaf where it belongs; arguments as in `create_state`."""
  frozen = {} if teacher is None else {TEACHER: teacher}
  if experiment.finetune.base is not None:
    shapes, axes = _abstract_frozen(experiment)
    where = sharding.shardings(axes[BASE], shapes[BASE], mesh, experiment.mesh)
    base = jax.jit(functools.partial(_quantized, experiment), out_shardings=where)(base)
  return frozen if experiment.finetune.lora is None else {**frozen, BASE: base}


def _quantized(experiment: Experiment, base: Any) -> Any:
  """Return parameters of `init_from` as they are stored beside their adapters."""
  config: Any = experiment.finetune.base
  return quantize({'params': base}, config)['params']


def _abstract_frozen(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return the shapes and the logical axes of the frozen parameters, which may be empty."""
  shapes: dict[str, Any] = {}
  axes: dict[str, Any] = {}
  if experiment.finetune.lora is not None:
    full, full_axes = (one['params'] for one in decoder.abstract(experiment.decoder))
    if experiment.finetune.base is not None:
      full = jax.eval_shape(functools.partial(_quantized, experiment), full)
    shapes[BASE], axes[BASE] = full, _quantized_axes(full_axes, full)
  if experiment.objective_record.teacher:
    teacher, teacher_axes = decoder.abstract(experiment.objective.decoder)
    shapes[TEACHER], axes[TEACHER] = teacher['params'], teacher_axes['params']
  return shapes, axes


def _quantized_axes(axes: Any, shapes: Any) -> Any:
  """Give each array of a quantised kernel the axes of the kernel; an axis of size 1 has none."""
  if isinstance(axes, Mapping):
    return {name: _quantized_axes(axes[name], shapes[name]) for name in axes}
  if not is_quantized(shapes):
    return axes
  return {
    name: tuple(axis if size > 1 else None for axis, size in zip(axes, leaf.shape, strict=True))
    for name, leaf in shapes.items()}


def _placed(shapes: Any, axes: Any, experiment: Experiment, mesh: Mesh) -> Any:
  """Return shapes with their shardings."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes, sharding.shardings(axes, shapes, mesh, experiment.mesh))


def variables(
  experiment: Experiment, params: Any, frozen: Mapping[str, Any], key: jax.Array | None = None
) -> dict[str, Any]:
  """Return the variables of the model: trained and frozen parameters together.

  Args:
    key: of the adapters' dropout; None turns it off.
  """
  config = experiment.finetune
  if config.rules:
    # No gradient is computed for frozen parameters, nor for anything that only leads to them.
    params = jax.tree.map(
      lambda leaf, factor: leaf if factor else jax.lax.stop_gradient(leaf),
      params, rules.factors(config.rules, params))
  if config.lora is None:
    return {'params': params}
  head = {name: tree for name, tree in params.items() if name == HEAD}
  adapters = {name: tree for name, tree in params.items() if name != HEAD}
  if key is not None:
    adapters = lora_lib.drop(adapters, config.lora.dropout_rate, key)
  return {'params': {**frozen[BASE], **head}, 'lora': adapters}


def evaluation_params(state: TrainState) -> Any:
  """Return the trained parameters to evaluate and sample with: their average where there is one."""
  return state.params if state.ema is None else state.ema
