"""What a run trains, and what stays as it is beside it.

`state.params` is all that gradients and the optimizer see: the decoder's parameters, or adapters to
them. `state.frozen` is the rest that the step reads; it is in no checkpoint.

- `resolve` reads what the config leaves to `init_from`; `check_start` sees that it fits.
- `abstract`, `init`: what is trained. `abstract_frozen`, `freeze`: what is not.
- `variables` puts both together.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxllm import loading
from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters import rules
from jaxllm.adapters.quantization import QuantizationConfig, quantize
from jaxllm.checkpoints import tree
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig
from jaxllm.experiment import Distillation, Experiment
from jaxllm.interop import sources
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.linear import is_quantized
from jaxllm.objectives import classification
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.optim import optimizers

Tree = dict[str, Any]

BASE, TEACHER, HEAD = 'base', 'teacher', 'classifier'


def resolve(experiment: Experiment, begun: Experiment | None = None) -> Experiment:
  """Return the experiment with what it leaves to `init_from` and to a teacher.

  The tokenizer's files are written beside the run's records. Where `init_from` is not there any
  more, a run that has `begun` with it goes on as it is.

  Raises:
    ValueError: there is no such model, or the rest of the config does not fit it.
  """
  changes: dict[str, Any] = {}
  objective = experiment.objective
  if isinstance(objective, Distillation) and objective.teacher_model is None:
    teacher = loading.describe(objective.teacher).config
    changes['objective'] = objective.replace(teacher_model=teacher)
  if experiment.init_from is None or (experiment.model and experiment.tokenizer):
    return experiment.replace(**changes)
  try:
    sources.check_exists(experiment.init_from, field='config.init_from: ')
    found = loading.describe(experiment.init_from)
  except ValueError:
    if begun is None or begun.init_from != experiment.init_from:
      raise
    if experiment.tokenizer is None:
      changes['tokenizer'] = begun.tokenizer
      changes['data'] = experiment.data.replace(add_bos=begun.data.add_bos)
    return experiment.replace(**changes, model=experiment.model or begun.model)
  if experiment.model is None:
    changes['model'] = found.config
  if experiment.tokenizer is None:
    directory = pathlib.Path(experiment.records_dir) / experiment.name / 'tokenizer'
    changes['tokenizer'] = _write_tokenizer(found.files, directory)
    changes['data'] = experiment.data.replace(add_bos=found.add_bos)
  return experiment.replace(**changes)


def check_start(experiment: Experiment) -> None:
  """Check, before data and without weights, that the models of a new run are there and fit.

  Raises:
    ValueError: `init_from` or the teacher is not there, or has other parameters.
  """
  if experiment.init_from is not None:
    sources.check_exists(experiment.init_from, field='config.init_from: ')
    found, ours = loading.describe(experiment.init_from), experiment.tokenizer
    check_parameters(experiment, decoder.abstract(found.config)[0]['params'])
    if ours is not None and not ours.trained:
      check_vocabulary('init_from', experiment.init_from, tokenizers.from_files(found.files),
                       tokenizers.train_or_load(ours, ()))
  if isinstance(experiment.objective, Distillation):
    sources.check_exists(experiment.objective.teacher, field='config.objective.teacher: ')


def check_vocabulary(field: str, path: str, theirs: Tokenizer, ours: Tokenizer) -> None:
  """Raise a ValueError where a model was trained with another tokenizer than the run has."""
  if not tokenizers.same_vocabulary(theirs, ours):
    raise ValueError(f'config.{field}={path} was trained with another tokenizer than '
                     'config.tokenizer gives; point config.tokenizer at its files, or leave it out')


def check_parameters(experiment: Experiment, found: Tree) -> None:
  """Raise a ValueError that lists paths where parameters of `init_from` are not config.model's."""
  wanted = tree.flatten(decoder.abstract(experiment.decoder)[0]['params'])
  given = {path: jax.ShapeDtypeStruct(leaf.shape, wanted.get(path, leaf).dtype)
           for path, leaf in tree.flatten(found).items()}
  if lines := tree.differences(wanted, given):
    raise ValueError(f'config.init_from={experiment.init_from} does not fit config.model: '
                     f'{len(lines)} parameters differ\n{tree.listing(lines)}')


def abstract(experiment: Experiment) -> tuple[Tree, Tree]:
  """Return the shapes and the logical axes of what is trained."""
  full, full_axes = decoder.abstract(experiment.decoder)
  shapes, axes = full['params'], full_axes['params']
  if experiment.finetune.lora is not None:
    shapes, axes = lora_lib.abstract(experiment.finetune.lora, shapes, axes)
  if isinstance(experiment.objective, ClassifierConfig):
    head = jax.eval_shape(
      functools.partial(_init_head, experiment, experiment.objective), jax.random.key(0))
    shapes, axes = {**shapes, HEAD: head}, {**axes, HEAD: classification.AXES}
  return shapes, axes


def init(experiment: Experiment, key: jax.Array, base: Any = None) -> Tree:
  """Return what is trained as it begins; pure.

  Args:
    experiment: the run.
    key: for what is drawn.
    base: parameters of `init_from`, where they are trained themselves.
  """
  if experiment.finetune.lora is not None:
    shapes, _ = decoder.abstract(experiment.decoder)
    params = lora_lib.init(experiment.finetune.lora, shapes['params'], key)
  else:
    params = decoder.init(experiment.decoder, key)['params'] if base is None else base
  if isinstance(experiment.objective, ClassifierConfig):
    params = {HEAD: _init_head(experiment, experiment.objective, key), **params}
  return params


def abstract_frozen(experiment: Experiment) -> tuple[Tree, Tree]:
  """Return the shapes and the logical axes of what is not trained; empty where there is none."""
  shapes: Tree = {}
  axes: Tree = {}
  full, full_axes = decoder.abstract(experiment.decoder)
  if experiment.finetune.lora is not None:
    base = jax.eval_shape(functools.partial(freeze, experiment), full['params'])[BASE]
    shapes[BASE], axes[BASE] = base, _quantized_axes(full_axes['params'], base)
  if isinstance(experiment.objective, Distillation):
    teacher, teacher_axes = decoder.abstract(teacher_config(experiment.objective))
    shapes[TEACHER], axes[TEACHER] = teacher['params'], teacher_axes['params']
  return shapes, axes


def freeze(experiment: Experiment, params: Any, teacher: Any = None) -> Tree:
  """Return what is kept and not trained; pure.

  Args:
    experiment: the run.
    params: of `init_from`.
    teacher: parameters of the teacher, where there is one.
  """
  frozen = {} if teacher is None else {TEACHER: teacher}
  if experiment.finetune.lora is not None:
    config: QuantizationConfig | None = experiment.finetune.base
    quantized = params if config is None else quantize({'params': params}, config)['params']
    frozen[BASE] = quantized
  return frozen


def teacher_config(objective: Distillation) -> DecoderConfig:
  """Return the decoder of a teacher, once it is known."""
  if objective.teacher_model is None:
    raise ValueError('config.objective.teacher_model=None: it is read from the teacher when '
                     'training starts')
  return objective.teacher_model


def variables(
  experiment: Experiment, params: Any, frozen: Mapping[str, Any], key: jax.Array | None = None
) -> Tree:
  """Return the variables of the model.

  Args:
    experiment: the run.
    params: what is trained.
    frozen: what is not.
    key: of the adapters' dropout; None: there is none.
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
  """Return how many numbers are trained; the adapters' scales are constants."""
  paths = jax.tree_util.tree_leaves_with_path(abstract(experiment)[0])
  factors = jax.tree.leaves(rules.factors(experiment.finetune.rules, abstract(experiment)[0]))
  constant = experiment.finetune.lora is not None
  return sum(
    leaf.size for (path, leaf), factor in zip(paths, factors, strict=True)
    if factor and not (constant and path[-1].key == 'scale')
  )


def make_optimizer(
  experiment: Experiment, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Return the optimizer of what is trained.

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


def _init_head(experiment: Experiment, config: ClassifierConfig, key: jax.Array) -> Tree:
  return classification.init(config, experiment.decoder, jax.random.fold_in(key, 1))


def _write_tokenizer(files: Mapping[str, bytes], directory: pathlib.Path) -> TokenizerConfig:
  """Write the files of a tokenizer, and return the config that reads them."""
  kinds: dict[str, Any] = {
    'tokenizer.json': 'json', 'tokenizer.model': 'sentencepiece', 'vocab.json': 'gpt2',
  }
  kind = next((kinds[name] for name in tokenizers.BUILDERS if name in files and name in kinds),
              'bytes')
  if kind == 'bytes':
    return TokenizerConfig(kind='bytes')
  if jax.process_index() == 0:
    tokenizers.save(tokenizers.from_files(files), directory)
  return TokenizerConfig(kind=kind, path=str(directory))


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
