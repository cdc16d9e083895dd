"""The parameters that a run trains, and those that it keeps frozen beside them.

`state.params` holds what gradients and the optimizer see: the decoder's parameters, or adapters to
them. `state.frozen` holds the rest that a step reads; no checkpoint stores it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters import rules
from jaxllm.adapters.quantization import quantize
from jaxllm.experiment import Experiment
from jaxllm.loading import HEAD, abstract
from jaxllm.models import decoder
from jaxllm.models.linear import is_quantized
from jaxllm.optim import optimizers

Tree = dict[str, Any]

# Keys of `state.frozen`.
BASE, TEACHER = 'base', 'teacher'


def init(experiment: Experiment, key: jax.Array, base: Any = None) -> Tree:
  """Return the trained parameters before the first step; pure.

  Args:
    experiment: the run.
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


def abstract_frozen(experiment: Experiment) -> tuple[Tree, Tree]:
  """Return the shapes and the logical axes of the frozen parameters, which may be empty."""
  shapes: Tree = {}
  axes: Tree = {}
  full, full_axes = decoder.abstract(experiment.decoder)
  if experiment.finetune.lora is not None:
    base = jax.eval_shape(functools.partial(freeze, experiment), full['params'])[BASE]
    shapes[BASE], axes[BASE] = base, _quantized_axes(full_axes['params'], base)
  if experiment.objective_record.teacher:
    teacher, teacher_axes = decoder.abstract(experiment.objective.decoder)
    shapes[TEACHER], axes[TEACHER] = teacher['params'], teacher_axes['params']
  return shapes, axes


def freeze(experiment: Experiment, params: Any, teacher: Any = None) -> Tree:
  """Return the frozen parameters, from those of `init_from` and of a teacher; pure."""
  frozen = {} if teacher is None else {TEACHER: teacher}
  if experiment.finetune.lora is not None:
    config = experiment.finetune.base
    frozen[BASE] = params if config is None else quantize({'params': params}, config)['params']
  return frozen


def variables(
  experiment: Experiment, params: Any, frozen: Mapping[str, Any], key: jax.Array | None = None
) -> Tree:
  """Return the variables of the model: trained and frozen parameters together.

  Args:
    experiment: the run.
    params: the trained parameters.
    frozen: the frozen ones.
    key: of the adapters' dropout; None turns it off.
  """
  config = experiment.finetune
  if config.rules:
    # No gradient is computed for what is frozen, nor for what only leads to it.
    params = jax.tree.map(
      lambda leaf, factor: leaf if factor else jax.lax.stop_gradient(leaf),
      params, rules.factors(config.rules, params),
    )
  if config.lora is None:
    return {'params': params}
  head = {name: tree for name, tree in params.items() if name == HEAD}
  adapters = {name: tree for name, tree in params.items() if name != HEAD}
  if key is not None:
    adapters = lora_lib.drop(adapters, config.lora.dropout_rate, key)
  return {'params': {**frozen[BASE], **head}, 'lora': adapters}


def trained_count(experiment: Experiment) -> int:
  """Return the number of trained parameters; the adapters' scales are constants."""
  shapes, _ = abstract(experiment)
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  factors = jax.tree.leaves(rules.factors(experiment.finetune.rules, shapes))
  constant = experiment.finetune.lora is not None
  return sum(
    leaf.size for (path, leaf), factor in zip(paths, factors, strict=True)
    if factor and not (constant and path[-1].key == 'scale')
  )


def make_optimizer(
  experiment: Experiment, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Return the optimizer of the trained parameters.

  Adapters have no kernels; unless `decay_names` names something else, their matrices decay
  instead, towards a model that is what it was.

  Raises:
    ValueError: a rule or a name matches nothing, or nothing is trained.
  """
  config, (shapes, _) = experiment.optimizer, abstract(experiment)
  if not trained_count(experiment):
    patterns = ', '.join(repr(rule.pattern) for rule in experiment.finetune.rules)
    raise ValueError(f'config.finetune.rules: {patterns} freeze all parameters, so that nothing is '
                     'trained; leave some of them out')
  unset = type(config).model_fields['decay_names'].default
  if experiment.finetune.lora is not None and config.decay_names == unset:
    config = config.replace(decay_names=('a', 'b', *(['kernel'] if HEAD in shapes else [])))
  tx = optimizers.make_optimizer(config, schedule, shapes)
  return rules.apply_rules(experiment.finetune.rules, tx, shapes)


def _quantized_axes(axes: Any, shapes: Any) -> Any:
  """Give each array of a quantised kernel the axes of the kernel; an axis of size 1 has none."""
  if isinstance(axes, Mapping):
    return {name: _quantized_axes(axes[name], shapes[name]) for name in axes}
  if not is_quantized(shapes):
    return axes
  return {
    name: tuple(axis if size > 1 else None for axis, size in zip(axes, leaf.shape, strict=True))
    for name, leaf in shapes.items()
  }
