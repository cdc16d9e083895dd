"""What a run trains, and what stays as it is beside it.

`state.params` is all that gradients and the optimizer see: the decoder's parameters, or adapters to
them. `state.frozen` is the rest that the step reads; it is in no checkpoint.

- `resolve` reads what the config leaves to `init_from`.
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
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.experiment import Experiment
from jaxllm.models import decoder
from jaxllm.models.linear import is_quantized
from jaxllm.optim import optimizers

Tree = dict[str, Any]

BASE = 'base'


def resolve(experiment: Experiment) -> Experiment:
  """Return the experiment with the model and the tokenizer that it leaves to `init_from`.

  The tokenizer's files are written beside the run's records.

  Raises:
    ValueError: there is no such model, or the rest of the config does not fit it.
  """
  if experiment.init_from is None or (experiment.model and experiment.tokenizer):
    return experiment
  found = loading.describe(experiment.init_from)
  changes: dict[str, Any] = {}
  if experiment.model is None:
    changes['model'] = found.config
  if experiment.tokenizer is None:
    directory = pathlib.Path(experiment.records_dir) / experiment.name / 'tokenizer'
    changes['tokenizer'] = _write_tokenizer(found.files, directory)
    changes['data'] = experiment.data.replace(add_bos=found.add_bos)
  return experiment.replace(**changes)


def abstract(experiment: Experiment) -> tuple[Tree, Tree]:
  """Return the shapes and the logical axes of what is trained."""
  shapes, axes = decoder.abstract(experiment.decoder)
  if experiment.finetune.lora is None:
    return shapes['params'], axes['params']
  return lora_lib.abstract(experiment.finetune.lora, shapes['params'], axes['params'])


def init(experiment: Experiment, key: jax.Array) -> Tree:
  """Return what is trained as it begins where no model gives it; pure."""
  if experiment.finetune.lora is None:
    return decoder.init(experiment.decoder, key)['params']
  shapes, _ = decoder.abstract(experiment.decoder)
  return lora_lib.init(experiment.finetune.lora, shapes['params'], key)


def abstract_frozen(experiment: Experiment) -> tuple[Tree, Tree]:
  """Return the shapes and the logical axes of what is not trained; empty where there is none."""
  if experiment.finetune.lora is None:
    return {}, {}
  shapes, axes = decoder.abstract(experiment.decoder)
  base = jax.eval_shape(functools.partial(freeze, experiment), shapes['params'])
  return base, {BASE: _quantized_axes(axes['params'], base[BASE])}


def freeze(experiment: Experiment, params: Any) -> Tree:
  """Return what is kept of a model's parameters beside the adapters; pure."""
  if experiment.finetune.lora is None:
    return {}
  config: QuantizationConfig | None = experiment.finetune.base
  return {BASE: params if config is None else quantize({'params': params}, config)['params']}


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
  if key is not None:
    params = lora_lib.drop(params, config.lora.dropout_rate, key)
  return {'params': frozen[BASE], 'lora': params}


def make_optimizer(
  experiment: Experiment, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Return the optimizer of what is trained.

  Adapters have no kernels; unless `decay_names` names something else, their matrices decay
  instead, towards a model that is what it was.

  Raises:
    ValueError: a rule or a name matches nothing.
  """
  config, (shapes, _) = experiment.optimizer, abstract(experiment)
  unset = type(config).model_fields['decay_names'].default
  if experiment.finetune.lora is not None and config.decay_names == unset:
    config = config.replace(decay_names=('a', 'b'))
  tx = optimizers.make_optimizer(config, schedule, shapes)
  return rules.apply_rules(experiment.finetune.rules, tx, shapes)


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
