"""Frozen, typed configs: one base class, overriding from flags, JSON that reloads bit for bit.

`Config` is the base of every config class; each room defines its own next to the code that reads
it. `load` executes an experiment file, `override` changes fields by dotted path, `diff` lists
differences, `Flags`, `from_flags` and `run_program` wire a config to absl flags, as
`--config=FILE.py[:variant]` and `--config.a.b=value`.
"""

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import pkgutil
import re
import shutil
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import pydantic
from absl import app, flags, logging

from jaxllm import help_page, mistakes, validation, versions
from jaxllm.validation import ConfigError

COMPILATION_CACHE = '~/.cache/jaxllm/compiled'
FLAG_HELP = 'Experiment file, FILE.py[:variant]. --config.a.b=value changes any field.'
DRY_RUN_HELP = 'Print the whole config, as --config reads it, and what it comes to; do nothing.'
LOADING = 'How the model is loaded'
# The class in the config.json of a run. It lies above this file, and is imported when one is read.
_SAVED = 'jaxllm.experiment:Experiment'


class Config(pydantic.BaseModel):
  """Base of all configs: frozen, hashable, no unknown fields, no NaN.

  Sequences are tuples, so that a config is hashable and can be a static argument of `jax.jit`.
  """

  model_config = pydantic.ConfigDict(
    frozen=True,
    extra='forbid',
    allow_inf_nan=False,
    validate_default=True,
    protected_namespaces=(),
    use_attribute_docstrings=True,
  )

  def __init__(self, **fields: Any):
    try:
      super().__init__(**fields)
    except pydantic.ValidationError as error:
      raise ConfigError(validation.readable(type(self), error)) from None

  def replace(self, **changes: Any) -> Self:
    """Return a copy with `changes` applied, validated again; a ConfigError names a bad field."""
    return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

  def follow(self, updates: dict[str, Any], changed: Collection[str]) -> dict[str, Any]:
    """Return `updates` by `override` with what follows from them; `changed` are dotted paths."""
    return updates

  def to_json(self) -> str:
    """Return indented JSON from which `from_json` rebuilds an equal config."""
    return json.dumps(self.model_dump(mode='json'), indent=2, allow_nan=False) + '\n'

  @classmethod
  def from_json(cls, text: str) -> Self:
    """Rebuild a config from `to_json`; a ConfigError says what the text is instead."""
    try:
      fields = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise ConfigError(f'{cls.__name__}: not valid JSON: {error}') from None
    if not isinstance(fields, dict):
      raise ConfigError(f'{cls.__name__}: expected a JSON object, got {type(fields).__name__}')
    return cls(**fields)


def override(config: Config, changes: Mapping[str, Any]) -> Any:
  """Return a copy of `config` with dotted fields replaced, in the order given.

  Args:
    changes: dotted path -> value, applied together. Text is read as JSON or a Python literal where
      the field accepts it (`1e-3`, `true`, `None`, `(1, 2)`, `{"num_layers": 4}`), else as itself.

  Raises:
    ConfigError: unknown field (with the nearest name) or a value that is not accepted.
  """
  return _override(config, [(path, path.split('.'), value) for path, value in changes.items()])


def diff(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """Return (dotted path, old value, new value) of every leaf that differs."""
  old_leaves, new_leaves = dict(leaves(old)), dict(leaves(new))
  rows = ((path, old_leaves.get(path, '<absent>'), new_leaves.get(path, '<absent>'))
          for path in {**old_leaves, **new_leaves})
  return [row for row in rows if row[1] != row[2]]


def load(location: str) -> Any:
  """Execute `get_config()` of an experiment file and return its config.

  Args:
    location: `path/to/file.py` or `path/to/file.py:variant` (`experiments/*.py` of the project are
      installed too); or a run or its config.json, whose experiment is repeated.

  Raises:
    ConfigError: the file is missing, fails (with its line), or has no `get_config` of this variant.
  """
  if '://' in location:
    raise ConfigError(f'--config={location}: a config is a local file; copy it to this machine')
  name, _, variant = location.partition(':')
  if pathlib.Path(location).is_dir() or location.endswith('.json'):
    return _load_saved(pathlib.Path(location))
  module = load_module(name)
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'--config: {name!r} defines no get_config()')
  variants = getattr(module, 'VARIANTS', {variant: None})
  if variant and variant not in variants:
    raise ConfigError(f'--config: {name!r} has no variant {variant!r}; one of '
                      f'{", ".join(variants)}{mistakes.hint(variant, variants)}')
  given = [variant] if variant else []
  try:
    inspect.signature(module.get_config).bind(*given)
  except TypeError:
    fault = f'takes no variant, but {variant!r} is given' if variant else 'needs a variant'
    raise ConfigError(f'--config: get_config() of {name!r} {fault}') from None
  with _blamed_on(name):
    config = module.get_config(*given)
  if not isinstance(config, Config):
    raise ConfigError(f'--config: get_config() of {name!r} returned {type(config).__name__}, '
                      'expected a jaxllm config')
  return config


def load_module(name: str) -> types.ModuleType:
  """Execute an experiment file; its dict `VARIANTS`, where it has one, lists its variants.

  Raises:
    ConfigError: there is no such Python file, or it fails; the message has its line.
  """
  path = pathlib.Path(name) if os.path.exists(name) else pathlib.Path(__file__).parent / name
  if not path.exists():
    raise ConfigError(f'--config: {mistakes.no_such_path(name)}')
  spec = importlib.util.spec_from_file_location(f'jaxllm_experiment_{path.stem}', path)
  if spec is None or spec.loader is None or not path.is_file():
    raise ConfigError(f'--config: {name!r} is neither a Python file nor a run')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Pydantic looks there for the descriptions of fields.
  with _blamed_on(name):
    spec.loader.exec_module(module)
  return module


@contextlib.contextmanager
def _blamed_on(name: str) -> Iterator[None]:
  """Turn an error inside a user's file into a sentence that names the line."""
  try:
    yield
  except Exception as error:
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    said, kind = str(error), f'{type(error).__name__}: '
    if isinstance(error, SyntaxError):
      lines, said = [(error.filename or os.path.abspath(name), error.lineno)], error.msg
    own = [line for path, line in lines if path == os.path.abspath(name)]
    if not own:
      raise
    where = f'{name}, line {own[-1]}' if own[-1] else name
    raise ConfigError(f'{where}: {"" if isinstance(error, ConfigError) else kind}{said}') from error


def _load_saved(path: pathlib.Path) -> Any:
  """Return the experiment of a run that is there, from its directory or its config.json."""
  written = path / 'config.json' if path.is_dir() else path
  if not written.exists():
    raise ConfigError(f'--config: {mistakes.no_such_path(written)}')
  try:
    return pkgutil.resolve_name(_SAVED).from_json(written.read_text(encoding='utf-8'))
  except (ConfigError, UnicodeError) as error:
    raise ConfigError(f'{written} cannot be read as the config of a run: {error}') from error


class Flags:
  """The flags of one program, apart from those of others that are imported beside it.

  FLAGS.string(...) is absl's `DEFINE_string` and so on; FLAGS[name] the flag. `--help` lists them
  in this order, under the title of their `section`. `arguments` says whether the program takes
  arguments that are no flags. Where the flag `passed_on` is given, flags that are unknown are such
  arguments, for another program.
  """

  def __init__(self, arguments: bool = False, passed_on: str = '') -> None:
    self.values, self.arguments, self.passed_on = flags.FlagValues(), arguments, passed_on
    self.sections: dict[str, list[str]] = {'': []}
    self._section = ''

  def __getattr__(self, kind: str) -> Callable[..., Any]:
    def define(name: str, *arguments: Any, **options: Any) -> Any:
      if kind != 'alias':
        self.sections.setdefault(self._section, []).append(name)
      made = getattr(flags, f'DEFINE_{kind}')(name, *arguments, flag_values=self.values, **options)
      if options.get('required'):
        flags.register_validator(
          name, lambda value: value != '', 'a value is missing', flag_values=self.values)
      return made

    return define

  def __getitem__(self, name: str) -> flags.Flag:
    return self.values[name]

  def section(self, title: str) -> None:
    """Let `--help` list the flags that follow under this title, after those without."""
    self._section = title

  def model(self) -> tuple[Any, Any, Any]:
    """Define --model, --mesh and --dtype, the arguments of `jaxllm.load`."""
    model = self.string('model', None, 'A workdir, a checkpoint, a Hugging Face directory or a '
                                       '.gguf file.', required=True)
    self.section(LOADING)
    mesh = self.string(
      'mesh', None, 'Devices to split it over, as in fsdp=4,tensor=2; by default one.')
    dtype = self.enum('dtype', None, ['float32', 'bfloat16'],
                      'Of its parameters; by default as in jaxllm.load.')
    self.section('')
    return model, mesh, dtype


def parse_flags(argv: Sequence[str], own: Flags, about: str = '') -> list[str]:
  """Parse a program's flags, setting `--config.a.b=value` arguments aside for `from_flags`.

  With `--help` the fields of the given config are listed after the flags.
  """
  known = flags.FlagValues()
  known.append_flag_values(flags.FLAGS)
  known.append_flag_values(own.values)
  for name in own.values:
    own[name].unparse()
  kept, overrides = [argv[0]], {}
  arguments = iter(known.read_flags_from_files(argv[1:], force_gnu=False))
  for argument in arguments:
    if argument == '--':
      kept += [argument, *arguments]
      break
    body = argument.lstrip('-')
    if not argument.startswith('-') or not body.startswith('config.') or (
        'config' not in known):
      kept.append(argument)
      continue
    path, has_value, value = body.removeprefix('config.').partition('=')
    if not has_value:
      value = next(arguments, '--')
      if value.startswith('--'):
        raise flags.Error(f'--config.{path}: a value is missing')
    overrides[path] = value
  _OVERRIDES.clear()
  _OVERRIDES.update(overrides)
  if {'--help', '-help', '--helpfull', '-h'} & set(kept):
    _print_help(kept, own, about)
  passes_on = own.passed_on in {argument.lstrip('-').partition('=')[0] for argument in kept} - {''}
  try:
    rest = known(kept, known_only=passes_on)
  except flags.UnrecognizedFlagError as error:
    location = _location(kept)
    near = _same_field(error.flagname, load(location)) if location else ''
    raise flags.Error(
      f'--{error.flagname}: there is no such flag{near}') if near else error from None
  for values in (own.values, flags.FLAGS):
    values.mark_as_parsed()
  return rest


def run_program(main: Callable[[Sequence[str]], Any], own: Flags) -> None:
  """Run an absl main; a mistake of the user is one sentence and exit code 2, not a traceback.

  `mistakes.sentence` tells which exceptions these are; `--verbosity=1` shows where they were
  raised, and what other packages log. Everything else is a fault of ours, with its traceback.

  Compiled programs are kept in ~/.cache/jaxllm/compiled, or where JAX_COMPILATION_CACHE_DIR says;
  empty: nowhere. JAX reads that when it is imported, which is for `main` to do.
  """
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.expanduser(COMPILATION_CACHE))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  # Of JAX all frames, for `mistakes.sentence`; of C++ errors alone.
  os.environ.setdefault('JAX_TRACEBACK_FILTERING', 'off')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

  def guarded(argv: Sequence[str]) -> Any:
    if len(argv) > 1 and not (own.arguments or own.passed_on and own[own.passed_on].value):
      raise flags.Error(f'unexpected argument {argv[1]!r}; flags are written --name=value')
    if (flags.FLAGS['verbosity'].value or 0) <= 0:
      mistakes.speak_plainly()
      # JAX would go on without the accelerator.
      if wrong := versions.mismatch(os.environ.get('JAX_PLATFORMS') != 'cpu'):
        logging.warning(wrong)
    return main(argv)

  try:
    about = inspect.getdoc(inspect.getmodule(main)) or ''
    app.run(guarded, flags_parser=functools.partial(parse_flags, own=own, about=about))
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:  # As of `jaxllm train --help | head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
  except Exception as error:
    text = mistakes.sentence(error, own.values)
    if text is None or (flags.FLAGS['verbosity'].value or 0) > 0:
      raise
    print(f'{mistakes.paint("error:", "red", sys.stderr)} {text}', file=sys.stderr)
    sys.exit(getattr(error, 'exit_code', 2))  # 1: the same call may succeed later.


def make_callable(program: str, function: str) -> None:
  """Let the module of a program be called as the public function of the same name.

  Args:
    program: name of the module.
    function: 'module:name'; imported when it is needed.
  """
  class Program(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
      return pkgutil.resolve_name(function)(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
      return inspect.signature(pkgutil.resolve_name(function))

  sys.modules[program].__class__ = Program


def from_flags(location: str) -> Any:
  """Return the config at `location` with the overrides that `parse_flags` set aside."""
  return override(load(location), _OVERRIDES)


def overrides() -> dict[str, str]:
  """Return the `--config.a.b=value` of the command line: dotted path -> value."""
  return dict(_OVERRIDES)


# absl keeps parsed flags in a process-wide object; the overrides of the same command line sit
# beside it.
_OVERRIDES: dict[str, str] = {}


def _print_help(argv: Sequence[str], own: Flags, about: str) -> None:
  location, width = _location(argv), min(shutil.get_terminal_size((100, 24)).columns, 100)
  print(help_page.page(about, own.sections, own.values, width))
  if location:
    print(f'\nFields of {location}:\n{help_page.fields(from_flags(location), width)}')
  elif 'config' in own.values:
    print('\nAdd --config=FILE.py to list the fields of that config.')
  sys.exit(0)


def _location(argv: Sequence[str]) -> str | None:
  return next((a.partition('=')[2] for a in argv if a.startswith('--config=')), None)


def _same_field(name: str, config: Config) -> str:
  """Return '; did you mean ...?' with all fields whose own name is the last part of `name`."""
  last = name.replace('-', '_').split('.')[-1]
  # A tuple of configs is one field.
  fields = dict.fromkeys(re.split(r'\.\d', path)[0] for path, _ in leaves(config))
  paths = [f'--config.{path}' for path in fields
           if path.split('.')[-1] in (last, f'num_{last}')]
  return f'; did you mean {" or ".join(paths)}?' if paths else ''


def _override(config: Any, changes: Sequence[tuple[str, list[str], Any]]) -> Any:
  """Apply (whole path, rest of the path, value) together, so that they are checked together."""
  updates: dict[str, Any] = {}
  nested: dict[str, list[tuple[str, list[str], Any]]] = {}
  for path, (key, *rest), value in changes:
    _check_field(config, path, key, len(rest))
    if rest:
      nested.setdefault(key, []).append((path, rest, value))
    else:
      updates[key] = validation.read_value(type(config), key, path, value)
  for key, parts in nested.items():
    child = updates.get(key, getattr(config, key))
    fields = {rest[0]: value for _, rest, value in parts if len(rest) == 1}
    if len(fields) == len(parts) and fields.get('kind', '') not in ('', getattr(child, 'kind', '')):
      # Another kind has other fields: nothing is left of the old one.
      fields = {name: validation.literal(value) if isinstance(value, str) else value
                for name, value in fields.items()}
      updates[key] = validation.read_value(type(config), key, f'{key}.kind', fields)
      continue
    if not isinstance(child, Config):
      raise ConfigError(
        f'config.{parts[0][0]}: {key} is {child!r}, which has no fields; set {key} itself as JSON')
    updates[key] = _override(child, parts)
  changed = {'.'.join([key, *rest]) for _, (key, *rest), _ in changes}
  return config.replace(**config.follow(updates, changed))


def _check_field(config: Config, path: str, key: str, depth: int) -> None:
  fields = type(config).model_fields
  if key not in fields:
    parents = path.split('.')[: path.count('.') - depth]
    same = '' if parents or depth else _same_field(key, config)
    hint = same or mistakes.hint(key, fields, '.'.join(['config', *parents, '']), 0.4)
    raise ConfigError(
      f'config.{path}: {type(config).__name__} has no field {key!r}{hint} '
      f'(fields: {", ".join(fields)})')


def leaves(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yield (dotted path, value) of every leaf of a config."""
  if isinstance(value, Config):
    for name in type(value).model_fields:
      yield from leaves(getattr(value, name), f'{path}.{name}' if path else name)
  elif isinstance(value, tuple) and any(isinstance(item, Config) for item in value):
    for index, item in enumerate(value):
      yield from leaves(item, f'{path}.{index}')
  else:
    yield path, value
