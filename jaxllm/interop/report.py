"""The proof of a conversion: what became of every tensor, and that the logits are the same.

The logits of a fixed prompt come twice: from `reference`, which reads the tensors as they are
stored, and from the converted model. Where they differ by more than rounding, the conversion fails.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.interop import layout
from jaxllm.interop.weights import Source
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.sharding import Placement

NAME = 'conversion_report.json'
# Of the largest logit, or of 1 where that is larger: rounding of float32 sums through all layers.
BOUND = 2e-4
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
  reference_TV: np.ndarray, config: DecoderConfig, variables: Mapping[str, Any], ids: list[int],
  placement: Placement | None = None,
) -> dict[str, Any]:
  """Compare a model's logits with the reference's.

  Args:
    reference_TV: from `Source.reference`, for `ids`.
    config: of the converted model.
    variables: its variables.
    ids: the prompt.
    placement: where the variables lie.

  Returns:
    The figures, for the report.

  Raises:
    ConversionError: they differ by more than the bound.
  """
  ours_TV = logits(config, variables, ids, placement).astype(np.float64)
  theirs_TV = reference_TV.astype(np.float64)
  error = float(np.abs(ours_TV - theirs_TV).max())
  bound = BOUND * max(1.0, float(np.abs(theirs_TV).max()))
  logp_TV, logq_TV = _log_softmax(theirs_TV), _log_softmax(ours_TV)
  best_T2 = np.sort(theirs_TV, axis=-1)[:, -2:]
  # Where the two best are closer than rounding, either may come first.
  tied_T = best_T2[:, -1] - best_T2[:, 0] <= 2 * bound
  same_T = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)) | tied_T
  figures = {
    'prompt_ids': ids,
    'max_abs_error': error,
    'bound': bound,
    'max_abs_logit': float(np.abs(theirs_TV).max()),
    'kl_divergence': float((np.exp(logp_TV) * (logp_TV - logq_TV)).sum(-1).max()),
    'top1_agreement': float(same_T.mean()),
  }
  if not np.isfinite(error) or error > bound or not same_T.all():
    raise ConversionError(
      f'the converted model does not compute what its source does: logits differ by {error:.3g} '
      f'(bound {bound:.3g}), top-1 agreement {100 * same_T.mean():.1f}%'
    )
  return figures


def describe(source: Source, dtype: str | None, proof: Mapping[str, Any]) -> dict[str, Any]:
  """Return the report of an import, JSON-able.

  Args:
    source: what was read.
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
       'targets': list(slot.targets), 'layer': slot.layer}
      for slot in source.slots for tensor in [source.tensors[slot.name]]
    ],
    'parameters': {
      path: list(shape) for path, shape in layout.parameter_shapes(source.config).items()
    },
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
