"""The models that a run starts from or learns from: `init_from`, and the teacher of a distillation.

- `resolve` fills in the parts of a config that `init_from` and the teacher decide.
- `check_start` checks, without weights, that both fit.
- `load` reads their parameters.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm import distributed, loading, sharding
from jaxllm.checkpoints import tree
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import Tokenizer, TokenizerConfig
from jaxllm.experiment import HEAD, Experiment
from jaxllm.interop import sources
from jaxllm.models import decoder


def resolve(experiment: Experiment, begun: Experiment | None = None) -> Experiment:
  """Return the experiment with its model, tokenizer and teacher's decoder filled in.

  The tokenizer's files are written beside the run's records. A run that has `begun` continues where
  `init_from` is no longer there.

  Raises:
    ValueError: there is no such model, or the rest of the config does not fit it.
  """
  changes: dict[str, Any] = {}
  objective = experiment.objective
  if experiment.objective_record.teacher and objective.teacher_model is None:
    teacher = loading.describe(objective.teacher).config
    changes['objective'] = objective.replace(teacher_model=teacher)
  if experiment.init_from is None or (experiment.model and experiment.tokenizer):
    return experiment.replace(**changes)
  tokenizer = None
  try:
    sources.check_exists(experiment.init_from, field='config.init_from: ')
    found = loading.describe(experiment.init_from)
    model, add_bos = found.config, found.add_bos
  except ValueError:
    if begun is None or begun.init_from != experiment.init_from:
      raise
    model, add_bos, tokenizer = begun.decoder, begun.data.add_bos, begun.tokenizer
  if experiment.tokenizer is None:
    changes['tokenizer'] = tokenizer or _write_tokenizer(found.tokenizer, experiment.records_path)
    changes['data'] = experiment.data.replace(add_bos=add_bos)
  return experiment.replace(**changes, model=experiment.model or model)


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
      _check_vocabulary('init_from', experiment.init_from, found.tokenizer,
                        tokenizers.train_or_load(ours, ()))
  if experiment.objective_record.teacher:
    sources.check_exists(experiment.objective.teacher, field='config.objective.teacher: ')


def check_parameters(experiment: Experiment, found: Mapping[str, Any]) -> None:
  """Raise a ValueError that lists paths where parameters of `init_from` are not config.model's."""
  wanted = tree.flatten(decoder.abstract(experiment.decoder)[0]['params'])
  given = {path: jax.ShapeDtypeStruct(leaf.shape, wanted.get(path, leaf).dtype)
           for path, leaf in tree.flatten(found).items()}
  if lines := tree.differences(wanted, given):
    raise ValueError(f'config.init_from={experiment.init_from} does not fit config.model: '
                     f'{len(lines)} parameters differ\n{tree.listing(lines)}')


def load(
  experiment: Experiment, tokenizer: Tokenizer, manifest: Mapping[str, Any], begun: bool, mesh: Mesh
) -> tuple[Any, Any, dict[str, Any]]:
  """Load the model that a run starts from, and its teacher, straight into the run's shardings.

  Args:
    tokenizer: of its records, which must be that of these models.
    manifest: of its records or its checkpoint.
    begun: whether it has taken its first step; then `init_from` is read if every step needs it.
    mesh: the devices of the run.

  Returns:
    The parameters of `init_from` and those of the teacher, None where they are not read; the
    manifest with the fingerprints of those that every step depends on.

  Raises:
    ValueError: a model cannot be loaded, does not fit the config, or the run began with another.
  """
  found, fingerprints = [], {}
  teacher = getattr(experiment.objective, 'teacher', None)
  for key, field, path, lasting in (
    (loading.BASE, 'init_from', experiment.init_from, experiment.reads_base),
    (loading.TEACHER, 'objective.teacher', teacher, True),
  ):
    params = None
    if path is not None and (lasting or not begun):
      model = loading.load(path, sharding.Placement(mesh, experiment.mesh), 'float32')
      _check_vocabulary(field, path, model.tokenizer, tokenizer)
      params = model.variables['params']
      if lasting:
        fingerprints[key] = loading.check_model(field, path, params, manifest.get(key))
      # A classifier of its own is left out.
      params = {name: tree for name, tree in params.items() if name != HEAD}
      if field == 'init_from':
        check_parameters(experiment, params)
    found.append(params)
  return found[0], found[1], {**manifest, **fingerprints}


def _check_vocabulary(field: str, path: str, theirs: Tokenizer, ours: Tokenizer) -> None:
  if not tokenizers.same_vocabulary(theirs, ours):
    raise ValueError(f'config.{field}={path} was trained with another tokenizer than '
                     'config.tokenizer gives; point config.tokenizer at its files, or leave it out')


def _write_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path) -> TokenizerConfig:
  """Write the files of a tokenizer, by its fingerprint, and return the config that reads them."""
  files = tokenizer.files()
  kinds: dict[str, Any] = {
    'tokenizer.json': 'json', 'tokenizer.model': 'sentencepiece', 'vocab.json': 'gpt2'}
  kind = next((kinds[name] for name in tokenizers.BUILDERS if name in files.keys() & kinds), None)
  if kind is None:
    return TokenizerConfig(kind='bytes')
  path = directory / f'tokenizer-{tokenizer.fingerprint[:16]}'
  if jax.process_index() == 0:
    tokenizers.save(tokenizer, path)
  distributed.barrier('the tokenizer is written')
  return TokenizerConfig(kind=kind, path=str(path))
