"""Conversions: written beside the target, read back, proven, and only then put in its place."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm import mistakes, storage
from jaxllm.checkpoints import store
from jaxllm.interop import (
  exported,
  exported_runner,
  huggingface,
  huggingface_writer,
  native,
  report,
  tokenizer_export,
  weights,
)
from jaxllm.interop.report import ConversionError
from jaxllm.interop.weights import Source
from jaxllm.model import Model, make_placement

FORMATS = ('huggingface', 'jaxllm', 'exported')


def from_source(
  source: Source, target: str | os.PathLike[str], form: str, dtype: str | None = None,
  buckets: Sequence[int] = exported.BUCKETS, mesh: Any = None,
) -> dict[str, Any]:
  """Convert a model from outside.

  Args:
    source: from `sources.open_model`.
    target: a directory that does not exist, or is empty.
    form: one of FORMATS.
    dtype: of the written parameters, 'float32' or 'bfloat16'; None: as they are stored.
    buckets: of an exported program, see `exported.save`.
    mesh: the devices that the model is split over meanwhile, as in `jaxllm.load`.

  Returns:
    The report, which also lies in the target.

  Raises:
    ValueError: the target is in use, a number is not finite, or the result does not compute what
      the source does; nothing is left behind.
  """
  path = check_target(target, form)
  tokenizer: Any = None  # Its files go into the target unread.
  where = make_placement(mesh, source.config)
  model = Model(source.config, weights.load(source, dtype, where), tokenizer,
                family=source.form.model_type, placement=where)
  ids = report.fixed_prompt(model.config)
  # The reference sees the numbers as rounded as the result will have them.
  reference_TV = source.reference(ids, weights.DTYPES[dtype or 'float32'])
  with storage.replaced(path) as partial:
    result = _write(model, source.files, None, partial, form, buckets, {'source': source.path})
    proof = report.prove(reference_TV, result.config, result.variables, ids, where)
    if form == 'exported':
      _check_program(partial, ids, reference_TV)
    summary = report.describe(source, dtype, proof) | {'format': form}
    (partial / report.NAME).write_bytes(tokenizer_export.json_bytes(summary))
  return summary


def from_model(
  model: Model, target: str | os.PathLike[str], form: str, dtype: str | None = None,
  buckets: Sequence[int] = exported.BUCKETS,
) -> dict[str, Any]:
  """Write a model of ours for others: as a Hugging Face directory, or as exported programs.

  The proof of a Hugging Face directory is the independent reading of what was written; arguments
  and errors as in `from_source`.
  """
  path = check_target(target, form)
  if form == 'jaxllm':
    raise ValueError('the source is a checkpoint of jaxllm already; choose another --format')
  ids = report.fixed_prompt(model.config)
  if dtype is not None:
    rounded = jax.tree.map(lambda leaf: leaf.astype(weights.DTYPES[dtype]), model.variables)
    model = dataclasses.replace(model, variables=rounded)
  with storage.replaced(path) as partial:
    again = _write(model, model.tokenizer.files(), model.add_bos, partial, form, buckets, {})
    summary: dict[str, Any] = {'format': form, 'dtype': dtype or 'as stored'}
    if form == 'huggingface':
      # What was written, read independently, against the model that it was written from; and
      # against what is read back.
      written = huggingface.open_model(partial)
      reference_TV = written.reference(ids, np.dtype(np.float32))
      report.prove(reference_TV, again.config, again.variables, ids, model.placement)
      proof = report.prove(
        reference_TV, model.config, model.variables, ids, model.placement)
      summary |= report.describe(written, dtype, proof) | {'source': 'a checkpoint of jaxllm'}
    else:
      logits_TV = report.logits(model.config, model.variables, ids, model.placement)
      _check_program(partial, ids, logits_TV)
      summary['proof'] = {'prompt_ids': ids, 'next_token': int(logits_TV[-1].argmax())}
    (partial / report.NAME).write_bytes(tokenizer_export.json_bytes(summary))
  return summary


def check_target(target: str | os.PathLike[str], form: str) -> pathlib.Path:
  """Return the path of a target that can be written.

  Raises:
    ValueError: it is in use, or there is no such format.
  """
  if form not in FORMATS:
    raise ValueError(f'--format={form!r}: one of {", ".join(FORMATS)} is needed')
  path = pathlib.Path(target).expanduser().absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'--target={path} is not empty; choose another one')
  mistakes.check_writeable(path, '--target')
  return path


def _write(
  model: Model, files: Mapping[str, bytes], add_bos: bool | None, directory: pathlib.Path,
  form: str, buckets: Sequence[int], origin: Mapping[str, Any],
) -> Model:
  """Write a model, and return what is read back (of an exported program, the model itself)."""
  config, variables = model.config, model.variables
  if form == 'huggingface':
    huggingface_writer.save(
      directory, config, variables, files, model_type=model.family, add_bos=add_bos)
    again = huggingface.open_model(directory)
    variables = weights.load(again, None, model.placement)
    return dataclasses.replace(model, config=again.config, variables=variables)
  if form == 'jaxllm':
    native.save(directory, config, variables, files, {**origin, 'model_type': model.family})
    where = jax.tree.map(lambda leaf: leaf.sharding, variables['params'])
    params, bundle = store.restore_params(directory, shardings=where)
    return dataclasses.replace(
      model, config=native.model_config(bundle), variables={'params': params}
    )
  exported.save(directory, config, variables, files, buckets, add_bos=add_bos)
  return model


def _check_program(directory: pathlib.Path, ids: list[int], logits_TV: np.ndarray) -> None:
  """Check that an exported program continues the prompt with the likeliest token."""
  artefact = exported_runner.load(directory)
  artefact['manifest']['stop_ids'] = []
  ids = ids[: artefact['manifest']['buckets'][-1]]
  best = int(logits_TV[len(ids) - 1].argmax())
  (token,) = exported_runner.generate(artefact, ids, 1)
  if token != best:
    raise ConversionError(f'the exported program continues the fixed prompt with {token}, '
                          f'expected {best}')
