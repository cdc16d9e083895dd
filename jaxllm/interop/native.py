"""Converted models as checkpoints of jaxllm: restored, sharded and verified like a run's own.

The directory holds `checkpoints/0` with the parameters, the tokenizer and the model's config, like
a run's workdir; what is missing is the experiment, since there was none.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints import store
from jaxllm.checkpoints.bundle import Bundle
from jaxllm.models.config import DecoderConfig

CONVERTED = 'converted'


def save(
  directory: str | os.PathLike[str], config: DecoderConfig, variables: Mapping[str, Any],
  files: Mapping[str, bytes], origin: Mapping[str, Any],
) -> None:
  """Write a converted model as checkpoint 0 of a directory.

  Args:
    directory: of the new checkpoint.
    config: of the model.
    variables: {'params': ...}.
    files: of the tokenizer, and what tells how to use it.
    origin: JSON-able: where it comes from; `model_type` is used when it is written back.

  Raises:
    ValueError: the directory cannot be written.
    checkpoints.store.CheckpointError: the disk is full.
  """
  bundle = Bundle(
    config_json=json.dumps({'model': json.loads(config.to_json())}, indent=2),
    tokenizer_files=dict(files),
    manifest={CONVERTED: dict(origin)},
  )
  opened = store.open_store(
    os.path.join(directory, store.DIRECTORY), store.CheckpointConfig(asynchronous=False)
  )
  try:
    store.save(opened, 0, {'params': variables['params']}, bundle)
  finally:
    store.close(opened)


def model_config(bundle: Bundle) -> DecoderConfig:
  """Return the model of a checkpoint, converted or trained.

  Raises:
    ValueError: the bundle says nothing of a model.
  """
  fields = json.loads(bundle.config_json)
  if not isinstance(fields, dict) or not isinstance(fields.get('model'), dict):
    raise ValueError('the config of this checkpoint has no model')
  return DecoderConfig(**fields['model'])
