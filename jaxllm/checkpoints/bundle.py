"""What travels beside the weights, so that a checkpoint alone is enough to sample from."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import DecoderConfig

FORMAT = 1
# Entry of the manifest of a model that was converted, not trained: where it comes from.
CONVERTED = 'converted'


@dataclasses.dataclass(frozen=True)
class Bundle:
  """Everything that a model needs besides its parameters.

  Attributes:
    config_json: the resolved config of the run.
    tokenizer_files: file name -> content, all that rebuilds the tokenizer.
    manifest: the data manifest, JSON-able.
  """

  config_json: str
  tokenizer_files: Mapping[str, bytes]
  manifest: Mapping[str, Any]


def to_dict(bundle: Bundle) -> dict[str, Any]:
  """Return a JSON-able dict from which `from_dict` rebuilds an equal bundle."""
  files = {name: base64.b64encode(content).decode('ascii')
           for name, content in bundle.tokenizer_files.items()}
  return {'format': FORMAT, 'config_json': bundle.config_json, 'tokenizer_files': files,
          'manifest': dict(bundle.manifest)}


def model_config(bundle: Bundle) -> DecoderConfig:
  """Return the model of a checkpoint, converted or trained; refuse a bundle without one."""
  fields = json.loads(bundle.config_json)
  if not isinstance(fields, dict) or not isinstance(fields.get('model'), dict):
    raise ValueError('the config of this checkpoint has no model')
  return DecoderConfig(**fields['model'])


def from_dict(fields: Mapping[str, Any]) -> Bundle:
  """Rebuild a bundle from `to_dict`; refuse one that is damaged or of a later format."""
  if fields.get('format') != FORMAT:
    raise ValueError(
      f'the bundle of this checkpoint has format {fields.get("format")!r}, this version of jaxllm '
      f'reads format {FORMAT}; use the version that wrote it')
  try:
    files = {str(name): base64.b64decode(text, validate=True)
             for name, text in fields['tokenizer_files'].items()}
    return Bundle(str(fields['config_json']), files, dict(fields['manifest']))
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(f'the bundle of this checkpoint is damaged: {error!r}') from error
