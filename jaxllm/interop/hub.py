"""Models by their name on the Hugging Face hub: weights as safetensors, pinned to a commit."""

import logging
import pathlib
import re
from typing import Any

from jaxllm.interop import tokenizer_files

# Of a repository only this is fetched: no pickles, no code, no second copy of the weights.
PATTERNS = ('config.json', 'model*.safetensors', 'model.safetensors.index.json',
            tokenizer_files.MORE_CHATS, *tokenizer_files.FILE_NAMES)

_NAME = re.compile(r'[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?')


def is_name(text: str) -> bool:
  """Return whether a text can be the name of a model on the hub, such as 'gpt2' or 'org/model'."""
  return bool(_NAME.fullmatch(text)) and '..' not in text and not text.endswith('.gguf')


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
  """Return the directory of a model of the hub, fetched where it is not in the local cache.

  Args:
    name: 'model' or 'organisation/model'.
    revision: a commit, tag or branch; None: the newest commit. Whatever is given is turned into a
      commit first, so that all files are of the same one; the log says which.

  Raises:
    ValueError: the name is malformed, there is no such model, or no network and no local copy.
  """
  if not is_name(name):
    raise ValueError(f'hf:{name} is no name of a model on the Hugging Face hub: it is written '
                     'hf:MODEL or hf:ORGANISATION/MODEL')
  hub = _library()
  logging.info('Asking the Hugging Face hub for %s.', name)
  try:
    commit = hub.HfApi().model_info(name, revision=revision).sha
    directory = hub.snapshot_download(name, revision=commit, allow_patterns=list(PATTERNS))
  except Exception as error:
    # Many classes of several libraries say that there is no network, no model or no permission.
    return _cached(hub, name, revision, error)
  logging.info('%s is at commit %s; give it as revision to get the same again.', name, commit)
  return pathlib.Path(directory)


def _cached(hub: Any, name: str, revision: str | None, reason: Exception) -> pathlib.Path:
  """Return the local copy of a model that could not be asked for."""
  try:
    directory = hub.snapshot_download(
      name, revision=revision, allow_patterns=list(PATTERNS), local_files_only=True
    )
  except Exception:
    text = ' '.join(str(reason).split())[:300]
    raise ValueError(
      f'hf:{name} cannot be fetched from the Hugging Face hub: '
      f'{type(reason).__name__}: {text}\nWithout a network, give the path of a directory with '
      'config.json and model.safetensors, or of a .gguf file.'
    ) from reason
  logging.warning('%s cannot be looked up; the local copy is used.', name)
  return pathlib.Path(directory)


def _library() -> Any:
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError('names of the Hugging Face hub need the package huggingface_hub: '
                     'pip install "jaxllm[hub]"') from None
  return huggingface_hub
