"""Conversions: written beside the target, read back, proven, and only then put in its place.

The proof says what became of every tensor, and that the logits are the same: those of a fixed
prompt come twice, from `reference`, which reads the tensors as they are stored, and from the
converted model. Where they differ by more than rounding, the conversion fails.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import mistakes, storage
from jaxllm.checkpoints import reading, store
from jaxllm.checkpoints.bundle import model_config
from jaxllm.interop import (
  exported,
  exported_runner,
  huggingface,
  tokenizer_export,
  weights,
)
from jaxllm.interop.weights import Source
from jaxllm.model import Model, make_placement
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.sharding import Placement

NAME = 'conversion_report.json'
# How far the logits of a position may be off. BOUND times the largest of all, or 1 where that is
# larger, is what rounding of float32 sums adds up to through all layers of most models. Positions
# of some models magnify it: one of SmolLM2's is off by 50 times as much as the others. How much is
# measured where BOUND does not suffice, by the reference in float32 against itself in float64. Ours
# rounds as often, in another order, so that its error is of the same size: 3.4 times as large at
# that position of SmolLM2, 1 to 5 times at the others; GROWTH leaves some room. A wrong weight,
# scale or position moves both runs of the reference alike, and stays an error.
BOUND, GROWTH = 2e-4, 8
PROMPT_LENGTH = 24


class ConversionError(ValueError):
  """A converted model does not compute what its source does."""


def fixed_prompt(config: DecoderConfig) -> list[int]:
  """Return token ids spread over the vocabulary, the last one included."""
  length = min(PROMPT_LENGTH, config.max_length)
  return [(config.vocab_size - 1 + 7919 * i * i) % config.vocab_size for i in range(length)]


def logits(
  config: DecoderConfig, variables: Mapping[str, Any], ids: list[int],
  placement: Placement | None = None,
) -> np.ndarray:
  """Return our logits (T, V), computed in float32 whatever the config says."""
  plain = config.replace(dtype='float32', attention='xla', remat='none')
  with jax.default_matmul_precision('highest'):
    logits_BTV = _logits(Decoder(plain, placement), variables, jnp.asarray([ids], jnp.int32))
  return np.asarray(logits_BTV)[0, :, : config.vocab_size]


def prove(
  reference: Callable[..., np.ndarray], config: DecoderConfig, variables: Mapping[str, Any],
  ids: list[int], placement: Placement | None = None,
) -> dict[str, Any]:
  """Compare a model's logits with the reference's; return the figures for the report.

  Args:
    reference: returns logits of `ids`, computed in the dtype of its argument `dtype`.
    placement: where the variables lie.

  Raises:
    ConversionError: they differ by more than the bound.
  """
  ours_TV = logits(config, variables, ids, placement).astype(np.float64)
  theirs_TV = reference(dtype=np.float32).astype(np.float64)
  bound_T = np.full(len(ids), BOUND * max(1.0, float(np.abs(theirs_TV).max())))
  if not (np.abs(ours_TV - theirs_TV).max(-1) <= bound_T).all():
    exact_TV = reference(dtype=np.float64)
    bound_T = np.maximum(bound_T, GROWTH * np.abs(theirs_TV - exact_TV).max(-1))
    theirs_TV = exact_TV
  error_T = np.abs(ours_TV - theirs_TV).max(-1)
  worst = int((error_T / bound_T).argmax())
  logp_TV, logq_TV = _log_softmax(theirs_TV), _log_softmax(ours_TV)
  best_T2 = np.sort(theirs_TV, axis=-1)[:, -2:]
  # Where the two best are closer than rounding, either may come first.
  tied_T = best_T2[:, -1] - best_T2[:, 0] <= 2 * bound_T
  same_T = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)) | tied_T
  figures = {
    'prompt_ids': ids,
    'max_abs_error': float(error_T[worst]),
    'bound': float(bound_T[worst]),
    'max_abs_logit': float(np.abs(theirs_TV).max()),
    'kl_divergence': float((np.exp(logp_TV) * (logp_TV - logq_TV)).sum(-1).max()),
    'top1_agreement': float(same_T.mean()),
  }
  if not (error_T <= bound_T).all() or not same_T.all():
    raise ConversionError(
      'the converted model does not compute what its source does: logits differ by '
      f'{error_T[worst]:.3g} (bound {bound_T[worst]:.3g}), top-1 agreement '
      f'{100 * same_T.mean():.1f}%')
  return figures


def describe(source: Source, dtype: str | None, proof: Mapping[str, Any]) -> dict[str, Any]:
  """Return the report of an import, JSON-able.

  Args:
    dtype: of the converted parameters; None: as stored.
    proof: from `prove`.
  """
  return {
    'source': source.path,
    'model_type': source.form.model_type,
    'dtype': dtype or 'as stored',
    'proof': dict(proof),
    'tensors': [
      {'source': tensor.name, 'kind': tensor.kind, 'shape': list(tensor.shape),
       'sha256': hashlib.sha256(np.ascontiguousarray(tensor.raw()).data).hexdigest(),
       'targets': list(slot.targets), 'layer': slot.layer,
       **({} if slot.expert is None else {'expert': slot.expert})}
      for slot in source.slots for tensor in [source.tensors[slot.name]]],
    'parameters': {
      path: list(shape) for path, shape in weights.parameter_shapes(source.config).items()},
    'missing': [],
    'not_needed': dict(source.ignored),
    'config_keys_without_effect': list(source.unread),
    'files': sorted(source.files),
  }


@functools.partial(jax.jit, static_argnames='model')
def _logits(model: Decoder, variables: Any, tokens_BT: jax.Array) -> Any:
  return model.apply(variables, tokens_BT)


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


FORMATS = ('huggingface', 'jaxllm', 'exported')


def from_source(
  source: Source, target: str | os.PathLike[str], form: str, dtype: str | None = None,
  buckets: Sequence[int] = exported.BUCKETS, mesh: Any = None,
) -> dict[str, Any]:
  """Convert a model from outside; return the report, which also lies in the target.

  Args:
    source: from `sources.open_model`.
    target: a directory that does not exist, or is empty.
    form: one of FORMATS.
    dtype: of the written parameters, 'float32' or 'bfloat16'; None: as they are stored.
    buckets: of an exported program, see `exported.save`.
    mesh: the devices that the model is split over meanwhile, as in `jaxllm.load`.

  Raises:
    ValueError: the target is in use, a number is not finite, or the result does not compute what
      the source does; nothing is left behind.
  """
  path = check_target(target, form)
  tokenizer: Any = None  # Its files go into the target unread.
  where = make_placement(mesh, source.config)
  model = Model(source.config, weights.load(source, dtype, where), tokenizer,
                family=source.form.model_type, placement=where)
  ids = fixed_prompt(model.config)
  # The reference sees the numbers as rounded as the result will have them.
  reference = functools.partial(source.reference, ids, weights.DTYPES[dtype or 'float32'])
  with storage.replaced(path) as partial:
    result = _write(model, source.files, None, partial, form, buckets, source.path)
    proof = prove(reference, result.config, result.variables, ids, where)
    if form == 'exported':
      _check_program(partial, ids, result)
    summary = describe(source, dtype, proof) | {'format': form}
    (partial / NAME).write_bytes(tokenizer_export.json_bytes(summary))
  return summary


def from_model(
  model: Model, target: str | os.PathLike[str], form: str, dtype: str | None = None,
  buckets: Sequence[int] = exported.BUCKETS, origin: str | None = None,
) -> dict[str, Any]:
  """Write a model of ours for others: as a Hugging Face directory, or as exported programs.

  The proof of a Hugging Face directory is the independent reading of what was written; `origin` is
  the path of the model; other arguments and errors as in `from_source`.
  """
  path = check_target(target, form)
  if form == 'jaxllm':
    raise ValueError('the source is a checkpoint of jaxllm already; choose another --format')
  ids = fixed_prompt(model.config)
  if dtype is not None:
    rounded = jax.tree.map(lambda leaf: leaf.astype(weights.DTYPES[dtype]), model.variables)
    model = dataclasses.replace(model, variables=rounded)
  with storage.replaced(path) as partial:
    again = _write(model, model.tokenizer.files(), model.add_bos, partial, form, buckets,
                   origin)
    summary: dict[str, Any] = {'format': form, 'dtype': dtype or 'as stored'}
    if form == 'huggingface':
      # What was written, read independently, against the model that it was written from; and
      # against what is read back.
      written = huggingface.open_model(partial)
      reference = functools.cache(functools.partial(written.reference, ids, np.float32))
      prove(reference, again.config, again.variables, ids, model.placement)
      proof = prove(reference, model.config, model.variables, ids, model.placement)
      summary |= describe(written, dtype, proof) | {'source': 'a checkpoint of jaxllm'}
    else:
      summary['proof'] = {'prompt_ids': ids, 'next_token': _check_program(partial, ids, model)}
    (partial / NAME).write_bytes(tokenizer_export.json_bytes(summary))
  return summary


def check_target(target: str | os.PathLike[str], form: str) -> pathlib.Path:
  """Return the path of a target that can be written; refuse one in use, or of no format."""
  if form not in FORMATS:
    raise ValueError(f'--format={form!r}: one of {", ".join(FORMATS)} is needed')
  path = storage.path(target, '--target=')
  path = path if storage.is_remote(path) else path.absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'--target={path} is not empty; choose another one')
  if storage.is_remote(path):
    storage.make_writable(path, '--target=')
  else:
    mistakes.check_writeable(path, '--target')
  return path


def _write(
  model: Model, files: Mapping[str, bytes], add_bos: bool | None, directory: pathlib.Path,
  form: str, buckets: Sequence[int], origin: str | None = None,
) -> Model:
  """Write a model, and return what is read back (of an exported program, the model itself)."""
  config, variables = model.config, model.variables
  if form == 'huggingface':
    huggingface.save(
      directory, config, variables, files, model_type=model.family, add_bos=add_bos)
    again = huggingface.open_model(directory)
    variables = weights.load(again, None, model.placement)
    return dataclasses.replace(model, config=again.config, variables=variables)
  if form == 'jaxllm':
    store.save_converted(
      directory, config, variables, files, {'source': origin, 'model_type': model.family})
    where = jax.tree.map(lambda leaf: leaf.sharding, variables['params'])
    params, bundle = reading.restore_params(directory, shardings=where)
    return dataclasses.replace(
      model, config=model_config(bundle), variables={'params': params})
  exported.save(
    directory, config, variables, files, buckets, add_bos=add_bos, source=origin)
  return model


def _check_program(directory: pathlib.Path, ids: list[int], model: Model) -> int:
  """Check that an exported program continues the prompt as its model does; return the token."""
  artefact = exported_runner.load(directory)
  artefact['manifest']['stop_ids'] = []
  ids = ids[: artefact['manifest']['buckets'][-1]]
  best = int(logits(model.config, model.variables, ids, model.placement)[-1].argmax())
  (token,) = exported_runner.generate(artefact, ids, 1)
  if token != best:
    raise ConversionError(f'the exported program continues the fixed prompt with {token}, '
                          f'expected {best}')
  return best
