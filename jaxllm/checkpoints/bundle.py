"""What travels beside the weights, and proves them: a checkpoint alone is enough to sample from."""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm import storage
from jaxllm.mistakes import parse_json
from jaxllm.models.config import DecoderConfig

FORMAT = 2
# Entry of the manifest of a model that was converted, not trained: where it comes from.
CONVERTED = 'converted'


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message says where, why and what is left.

  Attributes:
    step: the directory of the checkpoint that could not be read.
  """

  exit_code = 1
  step: Any = None


class DamagedError(CheckpointError):
  """A checkpoint is not what was saved; the message names the file or the leaf."""

  exit_code = 2


@dataclasses.dataclass(frozen=True)
class Bundle:
  """Everything that a model needs besides its parameters.

  Attributes:
    config_json: the resolved config of the run.
    tokenizer_files: file name -> content, all that rebuilds the tokenizer.
    manifest: the data manifest, JSON-able.
    best: the best step so far, and what it is the best by; empty where none is.
    position: `records` read so far, and in which `phases` of `data.batches`; older versions: empty.
    leaves: path -> shape, dtype and fingerprint of each array; None of older versions.
  """

  config_json: str
  tokenizer_files: Mapping[str, bytes]
  manifest: Mapping[str, Any]
  best: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  position: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  leaves: Mapping[str, str] | None = None


def to_dict(bundle: Bundle) -> dict[str, Any]:
  """Return a JSON-able dict from which `from_dict` rebuilds an equal bundle."""
  files = {name: base64.b64encode(content).decode('ascii')
           for name, content in bundle.tokenizer_files.items()}
  fields = {**dataclasses.asdict(bundle), 'format': FORMAT, 'tokenizer_files': files}
  return {**fields, 'sha256': _digests(fields)}


def _digests(fields: Mapping[str, Any]) -> dict[str, str]:
  """Return the SHA-256 of each part of a bundle, of the tokenizer's files one by one."""
  parts = {name: value for name, value in fields.items() if name not in ('sha256',
                                                                         'tokenizer_files')}
  parts |= {f'tokenizer/{name}': text for name, text in fields['tokenizer_files'].items()}
  return {name: storage.digest(value) for name, value in parts.items()}


def from_dict(fields: Mapping[str, Any]) -> Bundle:
  """Rebuild a bundle from `to_dict`; a ValueError names the parts that changed."""
  try:
    stored, found = fields.get('sha256'), _digests(fields)
    if stored is None and fields['format'] != 1:
      raise ValueError('its digests are missing')
    if stored not in (None, found):
      differ = [name for name in found | stored if found.get(name) != stored.get(name)]
      raise ValueError(f'{", ".join(differ)} changed after it was saved')
    files = {str(name): base64.b64decode(text, validate=True)
             for name, text in fields['tokenizer_files'].items()}
    bundle = Bundle(str(fields['config_json']), files, dict(fields['manifest']),
                    dict(fields.get('best') or {}), dict(fields.get('position') or {}),
                    fields.get('leaves'))
    if fields['format'] not in (1, FORMAT):
      raise CheckpointError(
        f'the bundle of this checkpoint has format {fields["format"]!r}, this version of jaxllm '
        f'reads format {FORMAT}; use the version that wrote it')
    if not all(isinstance(one, dict) for one in (
        bundle.leaves or {}, bundle.manifest.get(CONVERTED, {}))):
      raise TypeError('an object is needed')
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'a part is missing or of another kind: {error!r}') from error
  return bundle


def model_config(bundle: Bundle) -> DecoderConfig:
  """Return the model of a checkpoint, converted or trained; refuse a bundle without one."""
  fields = parse_json(bundle.config_json.encode(), 'the config of this checkpoint')
  if not isinstance(fields, dict) or not isinstance(fields.get('model'), dict):
    raise ValueError('the config of this checkpoint has no model')
  return DecoderConfig(**fields['model'])
