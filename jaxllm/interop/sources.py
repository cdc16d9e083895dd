"""One way to open a model from outside, wherever it comes from."""

import os
import pathlib

from jaxllm.interop import gguf, gguf_file, hub, huggingface
from jaxllm.interop.weights import Source
from jaxllm.mistakes import no_such_path

HUB = 'hf:'
"""What a name of the Hugging Face hub begins with; everything else is a path, and stays here."""


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


def check_exists(
  path: str | os.PathLike[str], revision: str | None = None, field: str = ''
) -> None:
  """Raise a ValueError where a path, which is no `hf:NAME`, does not exist or has a revision."""
  if str(path).startswith(HUB):
    return
  if revision is not None:
    raise ValueError(f'revision={revision!r} is for {HUB}NAME of the hub; {str(path)!r} is a path')
  if not pathlib.Path(path).expanduser().exists():
    raise ValueError(f'{field}{no_such_path(path)} (a model of the Hugging Face hub is {HUB}NAME)')


def named(reference: str) -> str:
  """Return what to load for a model that a file names, where hub names have no `hf:`."""
  local = pathlib.Path(reference).expanduser().exists()
  return HUB + reference if hub.is_name(reference) and not local else reference


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
    local = hub.fetch(str(path).removeprefix(HUB), revision)
  if local.is_dir() and any(local.glob('*.gguf')) and not any(local.glob('*.safetensors')):
    local = gguf_file.find(local)
  if local.is_file():
    return gguf.open_model(local)
  return huggingface.open_model(local, ignore_auto_map)
