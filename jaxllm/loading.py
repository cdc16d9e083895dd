"""Loading a model from a path, and generating with it."""

import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax

from jaxllm import sharding, storage
from jaxllm.adapters import lora
from jaxllm.adapters.quantization import dequantize_tree, quantize
from jaxllm.checkpoints import fingerprints, reading
from jaxllm.checkpoints.bundle import CONVERTED, Bundle, model_config
from jaxllm.data import tokenizer_settings, tokenizers
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import HEAD, Experiment, abstract_params
from jaxllm.generation import text
from jaxllm.interop import chat as templates
from jaxllm.interop import peft, sources, tokenizer_files, weights
from jaxllm.interop.weights import Source
from jaxllm.model import ChatFormat, Model, make_placement
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.sharding import Placement
from jaxllm.tasks import TASKS, chat, encoding, predict
from jaxllm.tasks.base import Example
from jaxllm.tasks.chat import ChatTemplate

# Entries of a bundle's manifest: fingerprints of the model that adapters are added to or pairs
# compared with, and of a teacher.
BASE, TEACHER = 'base_fingerprint', 'teacher_fingerprint'


def make_model(
  config: DecoderConfig, variables: Any, tokenizer: Tokenizer, experiment: Experiment | None = None,
  family: str | None = None,
) -> Model:
  """Return a model, the rest of its fields set by its tokenizer and its experiment."""
  add_bos = experiment.data.add_bos if experiment else tokenizer.add_bos
  model = Model(config, variables, tokenizer, experiment, add_bos, family=family)
  return dataclasses.replace(model, chat_format=_chat_format(model))


def chat_format(model: Model, template: ChatTemplate) -> ChatFormat:
  """Return the format of a model that is talked to by this template, which need not be its own."""
  special = model.tokenizer.special_tokens

  def encode_all(
    conversations: Sequence[Sequence[chat.Message]], **variables: Any
  ) -> list[list[int]]:
    if variables.get('tools') or variables.get('documents'):
      raise templates.TemplateError("the model's chat template knows neither tools nor documents")
    prompts = chat.segments(
      [[{**one, 'weight': 0} for one in messages] for messages in conversations], template)
    return [list(encoding.encode(prompt, model.tokenizer, model.add_bos).ids)
            for prompt in prompts]

  end = template.suffix.rstrip() or template.suffix
  ids = [special[text] for text in template.controls if text in special]
  return ChatFormat(encode_all, (end,) if end else (), lambda: (*model.eos_token_ids, *ids))


def _chat_format(model: Model) -> ChatFormat | None:
  """Return the format of the chats that a model was fine-tuned on, or else its tokenizer's."""
  if (own := _own_template(model.experiment)) is not None:
    return chat_format(model, own)
  jinja = model.tokenizer.chat_templates
  if not jinja:
    return None
  # Conversations that jaxllm trains on begin with BOS, whether or not the template writes it.
  bos_id = model.tokenizer.bos_id if model.experiment and model.add_bos else None
  return ChatFormat(
    functools.partial(templates.encode_all, model.tokenizer, jinja, bos_id=bos_id), (),
    lambda: (*model.eos_token_ids, *templates.answer_ends(model.tokenizer, jinja)))


def _own_template(experiment: Experiment | None) -> ChatTemplate | None:
  task = experiment.task if experiment else None
  return task.template if isinstance(task, chat.Chat) else None


def load(
  path: Model | str | os.PathLike[str], mesh: Any = None, dtype: str | None = None,
  verify: str = 'full',
) -> Model:
  """Load a model with its tokenizer; no array of it is ever whole where the mesh splits it.

  Args:
    path: a workdir or its `checkpoints` directory, whose best checkpoint is taken, or else the
      newest that is whole; one checkpoint in it, a Hugging Face directory, a `.gguf` file,
      `hf:NAME` of the Hugging Face hub, or a directory of adapters that PEFT wrote, which are added
      to the model that it names; its tokenizer and chat template, if it has them, take the place of
      that model's. A loaded model is returned as it is.
    mesh: the devices to split it over: sizes of mesh axes, {'fsdp': 4, 'tensor': 2}, a `MeshConfig`
      or a `jax.sharding.Mesh`; None: one device. A run is split by its own rules. Key and value
      heads that `tensor` does not divide lie on all devices.
    dtype: of the parameters, 'float32' or 'bfloat16', which then is the one of activations too.
      None: as it is stored where jaxllm made it, so that its scores are those of the run; a model
      from outside gets bfloat16, for which these models are made, but float32 on CPUs and on GPUs
      before Ampere (T4, V100), which compute fastest with it.
    verify: 'full' compares the arrays of a checkpoint with their fingerprints; 'off' does not.

  Raises:
    ValueError: there is no model, its files do not fit together, or the mesh does not divide it.
    checkpoints.bundle.DamagedError: the checkpoint that the path names is damaged, or all are.
  """
  if isinstance(path, Model):
    if (mesh, dtype) != (None, None):
      raise ValueError('mesh, dtype: the model is loaded already; give them to jaxllm.load')
    return path
  for name, value, known in (('dtype', dtype, (*weights.DTYPES, None)),
                             ('verify', verify, ('full', 'off'))):
    if value not in known:
      raise ValueError(f'{name}={value!r}: one of {", ".join(map(str, known))}')
  path = sources.at_hand(path)
  logging.info('Loading %s.', os.path.basename(os.path.normpath(path)))
  if (base := peft.base_model(path)) is not None:
    return _with_adapters(path, *base, mesh, dtype)
  if sources.is_foreign(path):
    return _read(sources.open_model(path), mesh, dtype)
  return reading.first_whole(path, functools.partial(_load_step, mesh, dtype, verify))


def _load_step(mesh: Any, dtype: str | None, verify: str, step: os.PathLike[str]) -> Model:
  bundle = reading.read_bundle(step)
  config, experiment = _described(bundle, step)
  placement = make_placement(
    mesh, config, experiment.mesh.rules if experiment else sharding.DEFAULT_RULES)
  shapes, axes = abstract_params(experiment) if experiment else (
    tree['params'] for tree in decoder.abstract(config))
  where = placement and placement.shardings(axes, shapes)
  if experiment and experiment.finetune.lora:
    params = _merged(step, bundle, experiment, placement, where, dtype, verify)
  else:
    # A converted model may be stored in bfloat16; a run's parameters are float32.
    params, _ = reading.restore_params(step, shapes if experiment else None, where, dtype, verify)
  return _on(_stored(bundle, {'params': params}, config, experiment), placement, dtype)


def _on(model: Model, placement: Placement | None, dtype: str | None) -> Model:
  """Return a model whose variables are of a dtype on a placement."""
  config = model.config.replace(dtype='bfloat16') if dtype == 'bfloat16' else model.config
  return dataclasses.replace(model, config=config, placement=placement)


def _read(source: Source, mesh: Any, dtype: str | None) -> Model:
  placement = make_placement(mesh, source.config)
  device = placement.mesh.devices.flat[0] if placement else jax.devices()[0]
  dtype = dtype or _default_dtype(device)
  return _on(_foreign(source, weights.load(source, dtype, placement)), placement, dtype)


def _default_dtype(device: jax.Device) -> str:
  """Return the dtype in which a device computes fastest."""
  before_ampere = re.fullmatch(r'[1-7]\.\d', getattr(device, 'compute_capability', ''))
  return 'float32' if device.platform == 'cpu' or before_ampere else 'bfloat16'


def describe(path: str | os.PathLike[str]) -> Model:
  """Read all about a model but its weights; path and errors as in `load`."""
  path = sources.at_hand(path)
  if (base := peft.base_model(path)) is not None:
    source = _base_source(path, *base)
    return _foreign(source, None, _with_files_beside(path, source))
  if sources.is_foreign(path):
    return _foreign(sources.open_model(path), None)
  bundle = reading.read_bundle(path)
  return _stored(bundle, None, *_described(bundle, path))


def _described(
  bundle: Bundle, path: str | os.PathLike[str]
) -> tuple[DecoderConfig, Experiment | None]:
  try:
    if CONVERTED in bundle.manifest:
      return to_use(model_config(bundle)), None
    experiment = Experiment.from_json(bundle.config_json)
    return to_use(experiment.decoder), experiment
  except ValueError as error:
    raise ValueError(f'{path}: the config of this checkpoint cannot be used: {error}') from error


def to_use(config: DecoderConfig) -> DecoderConfig:
  """Return the config of a model that is used, not trained: plain attention, no recomputation."""
  return config.replace(attention='xla', remat='none')


def _with_adapters(
  directory: str | os.PathLike[str], base: str, revision: str | None, mesh: Any, dtype: str | None
) -> Model:
  source = _base_source(directory, base, revision)
  model = _read(source, mesh, dtype)
  config, params = peft.merge(directory, source.form, model.config, model.variables['params'])
  own = _foreign(source, {'params': params}, _with_files_beside(directory, source))
  return dataclasses.replace(own, config=config, placement=model.placement)


def _base_source(
  directory: str | os.PathLike[str], base: str, revision: str | None
) -> Source:
  name = str(sources.at_hand(sources.named(base)))
  if not sources.is_foreign(name):
    raise ValueError(f'{directory} has adapters to {base!r}, which is no Hugging Face or GGUF '
                     'model')
  return sources.open_model(name, revision if name.startswith(sources.HUB) else None)


def _with_files_beside(directory: str | os.PathLike[str], source: Source) -> dict[str, bytes]:
  """Return the files of a base model; a tokenizer or template beside the adapters wins."""
  rows = source.config.vocab_size
  files = tokenizer_files.read(pathlib.Path(directory).expanduser())
  files = tokenizer_files.check(files, rows, directory)
  files = tokenizer_files.complete(files, {'model_type': source.form.model_type}, rows)
  return tokenizer_files.overlaid(source.files, files)


def _merged(
  step: os.PathLike[str], bundle: Bundle, experiment: Experiment, placement: Placement | None,
  where: Any, dtype: str | None, verify: str,
) -> Any:
  """Return the parameters of the model that the run began with, its adapters added."""
  path = sources.named(experiment.init_from or '')
  try:
    where_from = path
    if path.startswith(sources.HUB):
      where_from = str(sources.find_fetched(path.removeprefix(sources.HUB)))
    elif storage.is_remote(path) and not storage.is_remote(step):
      raise ValueError('a local checkpoint does not reach for a bucket; copy the model')
    base = load(where_from, placement, 'float32').variables['params']
  except (OSError, ValueError) as error:
    raise ValueError(f'{step} holds adapters to {path!r}, which cannot be loaded: {error}') from (
      error)
  check_model('init_from', path, base, bundle.manifest.get(BASE, 'none'))
  adapters, _ = reading.restore_params(step, shardings=where, verify=verify)
  # The adapters were trained beside quantised parameters.
  if experiment.finetune.base is not None:
    base = dequantize_tree(quantize({'params': base}, experiment.finetune.base))['params']
  head = {name: adapters.pop(name) for name in [HEAD] if name in adapters}
  base = {name: params for name, params in base.items() if name != HEAD}
  params = {**lora.merge(base, adapters), **head}
  return params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def adapters(path: str | os.PathLike[str]) -> tuple[Experiment, dict[str, Any]]:
  """Return a run and the adapters that it trained; refuse one without, or with a trained head."""
  _, experiment = _described(reading.read_bundle(path), path)
  if experiment is None or experiment.finetune.lora is None:
    raise ValueError(f'{path} has no adapters: it was not trained with config.finetune.lora')
  found, _ = reading.restore_params(path)
  if HEAD in found:
    raise ValueError(f'{path} has a trained head besides its adapters; only both together are the '
                     'model')
  return experiment, found


def check_model(field: str, path: str, params: Any, expected: str | None) -> str:
  """Return the fingerprint of a model that a run depends on after its first step.

  Raises:
    ValueError: it is not the expected one; the message names the field of the config.
  """
  found = fingerprints.fingerprint(params)
  if expected not in (None, found):
    raise ValueError(
      f'config.{field}={path!r} is not the model that the run began with: its parameters have the '
      f'fingerprint {found}, not {expected}; put the original back')
  return found


def task_examples(
  task: Any, split: str, tokenizer: Tokenizer,
  too_long: Callable[[Example], bool] = lambda example: False,
) -> list[Example]:
  """Return the examples of a split of a task's data.

  Args:
    task: the config of any task; a chat without a template takes the model's, and so do
      preferences with the template 'model'.
    split: of its data.
    tokenizer: of the model, with its chat template.
    too_long: tells of which examples of a chat the oldest exchanges are left out.

  Raises:
    ValueError: the data cannot be read, or the model has no template, or one by which an answer
      cannot be told from the rest.
  """
  by_template = TASKS[task.kind].by_template
  own = getattr(task, 'template', None)
  if by_template is None or (own is None and not isinstance(task, chat.Chat)):
    return predict.examples(task, split)
  template = own if isinstance(own, ChatTemplate) else _models_own(tokenizer, own)
  return by_template(task, predict.records(task, split), template, too_long)


def _models_own(tokenizer: Tokenizer, name: str | None) -> chat.Template:
  """Return the chat template of a model, with the stops that end its answers."""
  template = tokenizer.chat_template
  if template is None:
    raise ValueError(f'task.template={name!r}: the model has no chat template of its own; name one')
  special = tokenizer.special_tokens
  ends = {*tokenizer.eos_token_ids, *templates.answer_ends(tokenizer, template)}
  stops = {text for text, i in special.items() if i in ends}
  if not stops and tokenizer.eos_id is None:
    raise ValueError(f'task.template={name!r}: the tokenizer of the model has no token that ends '
                     'an answer; name a template')
  render = functools.partial(templates.render, template, **tokenizer.named_tokens)
  return chat.WrittenTemplate(render, tuple(special), stops)


@overload
def generate(
  model: Model | str | os.PathLike[str], prompts: str, *args: Any, **options: Any) -> str: ...
@overload
def generate(
  model: Model | str | os.PathLike[str], prompts: Sequence[str], *args: Any, **options: Any
) -> list[str]: ...
def generate(
  model: Model | str | os.PathLike[str],
  prompts: str | Sequence[str],
  seeds: Sequence[int] | None = None,
  stop: Sequence[str] = (),
  num_return_sequences: int = 1,
  draft: Model | str | os.PathLike[str] | None = None,
  cache_dtype: Any = None,
  **options: Any,
) -> str | list[str]:
  """Return the continuation of a prompt, or a list of those of several, without the prompts.

  Args:
    model: from `load`, or what it takes; load once where you generate often.
    prompts: one text or several; several are decoded as one batch.
    seeds: one per continuation.
    stop: texts that end a continuation, and are no part of it.
    num_return_sequences: continuations of each prompt of a list; those of a prompt stand together.
    draft: a smaller model of the same vocabulary, or its path, that guesses tokens ahead.
    cache_dtype: dtype of keys and values; the model's by default, int8 to quantise them.
    **options: fields of `SamplingConfig`: `max_new_tokens`, `temperature` (0 is greedy), `top_k`,
      `top_p`, `min_p`, `repetition_penalty`, `seed`, ...; for beam search `num_beams`,
      `length_penalty` and `early_stopping`; `num_drafted` tokens that are guessed ahead, which
      changes the time and not the text.

  Raises:
    ValueError: an option is not accepted, or a prompt is longer than the context.
  """
  if isinstance(prompts, str) and num_return_sequences > 1:
    raise ValueError(f'num_return_sequences={num_return_sequences} of one text: give a list of '
                     'prompts, for a list is returned')
  sampling, way = text.read_options(options, num_return_sequences, draft)
  model = load(model)
  texts = [prompts] if isinstance(prompts, str) else list(prompts)
  ids = [model.encode_prompt(prompt) for prompt in texts]
  if not isinstance(way, text.BeamConfig):
    ids = [prompt for prompt in ids for _ in range(num_return_sequences)]
  completions = text.complete(
    model.decoder, model.unstacked, model.tokenizer, ids, sampling, stop, model.eos_token_ids,
    seeds, cache_dtype=cache_dtype, way=way,
    draft=as_draft(draft, model.placement))
  continued = [completion.text for completion in completions]
  return continued[0] if isinstance(prompts, str) else continued


def as_draft(
  model: Model | str | os.PathLike[str] | None, placement: Placement | None
) -> text.Draft | None:
  """Return a model, loaded onto a placement where it is a path, as one that guesses tokens."""
  if model is None:
    return None
  small = model if isinstance(model, Model) else load(model, placement)
  return text.Draft(small.decoder, small.unstacked)


def _foreign(
  source: Source, variables: Any, files: Mapping[str, bytes] | None = None
) -> Model:
  tokenizer = tokenizers.from_files(source.files if files is None else files)
  return make_model(source.config, variables, tokenizer, family=source.form.model_type)


def _stored(
  bundle: Bundle, variables: Any, config: DecoderConfig, experiment: Experiment | None
) -> Model:
  files = dict(bundle.tokenizer_files)
  own = _own_template(experiment)
  if own is not None and experiment is not None:
    files[tokenizer_settings.CHAT] = own.jinja(experiment.data.add_bos).encode()
  family = bundle.manifest.get(CONVERTED, {}).get('model_type')
  model = make_model(config, variables, tokenizers.from_files(files), experiment, family)
  return dataclasses.replace(model, records=bundle.manifest.get('fingerprint'))
