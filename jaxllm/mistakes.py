"""What a user is told: the nearest name to a misspelt one."""

import difflib
import os
import pathlib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
  """Return the name that another one was meant to be; None: none is near."""
  return next(iter(difflib.get_close_matches(name, list(names), 1, cutoff)), None)


def no_such_path(path: str | os.PathLike[str]) -> str:
  """Return the sentence about a path that does not exist, with the nearest one that does."""
  text = os.fspath(path)
  given = pathlib.Path(text).expanduser()
  parent = given.parent
  while not parent.is_dir() and parent != parent.parent:
    given, parent = parent, parent.parent
  try:
    near = nearest(given.name, sorted(os.listdir(parent)))
  except OSError:
    near = None
  return f'no such file or directory: {text!r}' + (
    f'; did you mean {str(parent / near)!r}?' if near else '')
