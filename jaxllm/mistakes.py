"""Messages to a user: the nearest name to a misspelt one, the sentence of an exception, log lines.

`parse_json` reads what comes from outside, and says what is wrong with it.

`sentence` knows the exceptions that a user's mistake raises. For any other it returns None: it is
a fault of ours, and a report needs its traceback.
"""

import collections
import contextlib
import difflib
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Hashable, Iterable
from typing import Any

from absl import flags

from jaxllm import versions

_PACKAGE = os.path.join(os.path.dirname(__file__), '')
_BACKENDS = f'{os.sep}jax{os.sep}_src{os.sep}xla_bridge.py'


def hint(name: str, names: Iterable[str], before: str = '', cutoff: float = 0.6) -> str:
  """Return '; did you mean NAME?' with the nearest name and what stands before it; '': none is."""
  near = difflib.get_close_matches(name, list(names), 1, cutoff)
  return f'; did you mean {before + near[0] if before else repr(near[0])}?' if near else ''


def said(error: object, limit: int = 300) -> str:
  """Return what an exception says on one line, or its class where it says nothing."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else f'{text[:limit]} ...'


def twice(items: Iterable[Hashable]) -> Any:
  """Return the first item that stands twice; None: there is none."""
  counts = collections.Counter(items)
  return next((item for item, count in counts.items() if count > 1), None)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Return the object of JSON with these keys; refuse one that stands twice."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    raise ValueError(f'the key {twice(name for name, _ in pairs)!r} stands twice in an object')
  return fields


def parse_json(text: bytes, where: object) -> Any:
  """Parse JSON from outside; refuse damage, absurd nesting, and keys that stand twice."""
  try:
    return json.loads(text.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: {str(error) or type(error).__name__}') from None


def no_such_path(path: str | os.PathLike[str]) -> str:
  """Return the sentence about a path that does not exist, with the nearest one that does."""
  text = os.fspath(path)
  if '://' in text:
    return f'no such file or directory: {text!r}'
  given = pathlib.Path(text).expanduser()
  parent = given.parent
  while not parent.is_dir() and parent != parent.parent:
    given, parent = parent, parent.parent
  try:
    names = sorted(os.listdir(parent))
  except OSError:
    names = []
  before = str(parent / 'x')[:-1]
  return f'no such file or directory: {text!r}{hint(given.name, names, before)}'


def check_writeable(path: str | os.PathLike[str], flag: str) -> None:
  """Raise a ValueError where a file or directory could not be made, before it is computed."""
  parent = pathlib.Path(path).expanduser().absolute().parent
  while not parent.exists():
    parent = parent.parent
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ValueError(f'{flag}={path}: {parent} is no directory that can be written to')


class Voice(logging.Handler):
  """Log records of ours, and errors of others, as lines on stderr; a progress bar stays whole."""

  def emit(self, record: logging.LogRecord) -> None:
    """Write a record; a warning says that it is one."""
    if record.pathname.startswith(_PACKAGE) or record.levelno >= logging.ERROR:
      before = {logging.WARNING: paint('warning: ', 'yellow', sys.stderr),
                logging.ERROR: paint('error: ', 'red', sys.stderr)}.get(record.levelno, '')
      import tqdm

      with contextlib.suppress(OSError):  # A full disk ends no program by what it says of itself.
        tqdm.tqdm.write(before + self.format(record), file=sys.stderr)


def paint(text: str, colour: str, stream: Any = None) -> str:
  """Return a text in red, green or yellow where a terminal shows it and NO_COLOR is not set."""
  shown = (stream or sys.stdout).isatty() and not os.environ.get('NO_COLOR')
  code = {'red': 31, 'green': 32, 'yellow': 33}.get(colour)
  return f'\033[{code}m{text}\033[0m' if shown and code else text


def speak_plainly() -> None:
  """Let a program log by `Voice` alone, and keep the warnings of other packages to themselves."""
  root = logging.getLogger()
  root.handlers = [Voice()]
  for logger in (root, logging.getLogger('absl')):
    logger.setLevel(logging.INFO)
  # Of callbacks that nobody waits for any more, such as those of a save that has failed.
  sys.unraisablehook = lambda unraisable: None
  if not sys.warnoptions:
    warnings.simplefilter('ignore')


def sentence(error: BaseException, known: flags.FlagValues = flags.FLAGS) -> str | None:
  """Return the sentence of an exception about a user's input or machine; None: a fault of ours.

  These are refusals (ValueErrors from a `raise` of jaxllm, and its own classes), subclasses of
  ValueError, which tell of texts that are no JSON or no UTF-8 and the like, bad flags, what the
  system refuses (OSError), packages that are not installed or do not fit each other, and
  accelerators that do not start.

  Args:
    known: the flags of the program.
  """
  frames = traceback.extract_tb(error.__traceback__)
  where, line = (frames[-1].filename, frames[-1].line or '') if frames else ('', '')
  if isinstance(error, flags.Error):
    return _flag_sentence(error, known)
  if where.endswith(_BACKENDS) and isinstance(error, RuntimeError | AssertionError):
    return versions.mismatch() or (
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: JAX cannot start this backend here '
      f'({said(error)}); install what it needs (the extra cuda12, cuda13 or tpu of jaxllm), or set '
      'JAX_PLATFORMS=cpu')
  if isinstance(error, ImportError):
    return versions.mismatch() or (_not_installed(error.name) if error.name else str(error))
  if type(error).__module__.startswith(('aiohttp', 'botocore', 'gcsfs', 'google.a')):
    return f'the bucket cannot be used: {said(error)}'
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f'{error.filename}: {error.strerror}'
  refused = where.startswith(_PACKAGE) and line.startswith('raise')
  told = isinstance(error, OSError) or type(error).__module__.startswith('jaxllm.') or (
    isinstance(error, ValueError) and (refused or type(error) is not ValueError))
  if told:
    return str(error) or type(error).__name__
  return versions.mismatch(os.environ.get('JAX_PLATFORMS') != 'cpu')


def _flag_sentence(error: flags.Error, known: flags.FlagValues) -> str:
  """Return an error of absl's flags with the flag as it is typed, and the nearest one."""
  if isinstance(error, flags.UnrecognizedFlagError):
    near = hint(error.flagname.replace('-', '_'), known, '--') or '; --help lists them'
    return f'--{error.flagname}: there is no such flag{near}'
  text = str(error)
  if missing := re.match(r'flag --(\w+)=None: Flag --\w+ must have a value other than None', text):
    return f'--{missing[1]}=... is missing: {known[missing[1]].help}'
  if missing := re.match(r'Missing value for flag (\S+)', text):
    return f'{missing[1]}: a value is missing'
  for pattern, said in ((r'invalid literal for int\(\).*', 'a whole number is needed'),
                        (r'could not convert string to float.*', 'a number is needed'),
                        (r"\('Non-boolean argument.*", 'true or false is needed'),
                        ('is not integer', 'is not an integer'),
                        (r'^flag |^ERROR:: ', '')):
    text = re.sub(pattern, said, text)
  if choice := re.match(r'(--\w+=(.*)): value should be one of <(.*)>', text):
    names = choice[3].split('|')
    return f'{choice[1]}: one of {", ".join(names)}{hint(choice[2], names)}'
  return text


def package(name: str) -> Any:
  """Import a module of a package that only an extra installs; an ImportError says how to get it."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(_not_installed(error.name or name)) from error


def _not_installed(module: str) -> str | None:
  """Return which package is missing and how to get it; None where a module of ours is."""
  name = module.partition('.')[0]
  if name == 'jaxllm':
    return None
  needs = [re.fullmatch(r"([\w.-]+).*?(?:extra == ['\"](.*)['\"])?", line)
           for line in importlib.metadata.requires('jaxllm') or ()]
  extras = [need[2] for need in needs if need and need[1].replace('-', '_') == name]
  wanted = f"'jaxllm[{extras[0]}]'" if extras and extras[0] else name
  return f'the package {name} is not installed: pip install {wanted}'
