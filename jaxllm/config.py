"""Frozen, typed configs: one base class, overriding from flags, JSON that reloads bit for bit.

`Config` is the base of every config class; each room defines its own next to the code that reads
it. `load` executes an experiment file, `override` changes fields by dotted path, `diff` names what
differs, `define_flag`, `from_flags` and `run_program` wire a config to absl flags, as
`--config=FILE.py[:variant]` and `--config.a.b=value`.
"""

import ast
import difflib
import importlib.util
import json
import logging
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

import pydantic
from absl import app, flags

COMPILATION_CACHE = '~/.cache/jaxllm/compiled'


class ConfigError(ValueError):
  """A config that cannot be used; the message names the field, the value and the fix."""


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
      raise ConfigError(_readable(type(self), error)) from None

  def replace(self, **changes: Any) -> Self:
    """Return a copy with `changes` applied and everything validated again.

    Raises:
      ConfigError: a field does not exist or its value is not accepted.
    """
    return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

  def to_json(self) -> str:
    """Return indented JSON from which `from_json` rebuilds an equal config."""
    return json.dumps(self.model_dump(mode='json'), indent=2, allow_nan=False) + '\n'

  @classmethod
  def from_json(cls, text: str) -> Self:
    """Rebuild a config from `to_json`.

    Raises:
      ConfigError: the text is not JSON or does not describe this class.
    """
    try:
      fields = json.loads(text)
    except json.JSONDecodeError as error:
      raise ConfigError(f'{cls.__name__}: not valid JSON: {error}') from None
    if not isinstance(fields, dict):
      raise ConfigError(f'{cls.__name__}: expected a JSON object, got {type(fields).__name__}')
    return cls(**fields)


def override(config: Config, changes: Mapping[str, Any]) -> Any:
  """Return `config` with dotted fields replaced, in the order given.

  Args:
    config: any config.
    changes: dotted path -> value, applied together. Text is read as JSON or a Python literal where
      the field accepts it (`1e-3`, `true`, `None`, `(1, 2)`, `{"num_layers": 4}`), else as itself.

  Returns:
    A new config of the same class.

  Raises:
    ConfigError: unknown field (with the nearest name) or a value that is not accepted.
  """
  return _override(config, [(path, path.split('.'), value) for path, value in changes.items()])


def diff(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """Return (dotted path, old value, new value) of every leaf that differs."""
  old_leaves, new_leaves = dict(_leaves(old)), dict(_leaves(new))
  missing = '<absent>'
  return [
    (path, old_leaves.get(path, missing), new_leaves.get(path, missing))
    for path in dict.fromkeys([*old_leaves, *new_leaves])
    if old_leaves.get(path, missing) != new_leaves.get(path, missing)
  ]


def describe(config: Config) -> str:
  """Return one line per field: dotted path, current value, description."""
  lines = []
  for path, owner, name in _fields(config):
    text = type(owner).model_fields[name].description or ''
    lines.append(f'  --config.{path}={getattr(owner, name)!r}\n      {" ".join(text.split())}')
  return '\n'.join(lines)


def load(location: str) -> Any:
  """Execute `get_config()` of an experiment file and return its config.

  Args:
    location: `path/to/file.py` or `path/to/file.py:variant`; the variant is passed to
      `get_config(variant)`. A `.json` file is only for `Config.from_json`.

  Raises:
    ConfigError: the file is missing, has no `get_config`, or refuses the variant.
  """
  name, _, variant = location.partition(':')
  module = load_module(name)
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'--config: {name!r} defines no get_config()')
  variants = getattr(module, 'VARIANTS', {variant: None})
  if variant and variant not in variants:
    raise ConfigError(f'--config: {name!r} has no variant {variant!r}; '
                      f'one of {", ".join(variants)}')
  config = module.get_config(variant) if variant else module.get_config()
  if not isinstance(config, Config):
    raise ConfigError(f'--config: get_config() of {name!r} returned {type(config).__name__}, '
                      'expected a jaxllm config')
  return config


def load_module(name: str) -> types.ModuleType:
  """Execute an experiment file; its dict `VARIANTS`, where it has one, lists its variants.

  Raises:
    ConfigError: there is no such Python file.
  """
  path = pathlib.Path(name)
  if not path.is_file():
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob('*.py')], 1)
    hint = f'; did you mean {path.parent / near[0]}?' if near else ''
    raise ConfigError(f'--config: no file {name!r}{hint}')
  spec = importlib.util.spec_from_file_location(f'jaxllm_experiment_{path.stem}', path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'--config: {name!r} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def define_flag(name: str = 'config', required: bool = True) -> flags.FlagHolder:
  """Define `--{name}`, the location of an experiment file; read it with `from_flags`."""
  holder = flags.DEFINE_string(
    name, None, f'Experiment file, FILE.py[:variant]. --{name}.a.b=value changes any field.'
  )
  if required:
    flags.mark_flag_as_required(name)
  return holder


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parse absl flags, setting `--config.a.b=value` arguments aside for `from_flags`.

  With `--help` the fields of the given config are listed after the flags.
  """
  kept, overrides = [], {}
  arguments = iter(argv)
  for argument in arguments:
    if argument == '--':
      kept += [argument, *arguments]
      break
    body = argument.lstrip('-')
    if not argument.startswith('-') or not body.startswith('config.'):
      kept.append(argument)
      continue
    path, has_value, value = body.removeprefix('config.').partition('=')
    if not has_value:
      value = next(arguments, None)  # type: ignore[assignment]
      if value is None:
        raise flags.Error(f'--config.{path}: a value is missing')
    overrides[path] = value
  _OVERRIDES.clear()
  _OVERRIDES.update(overrides)
  if {'--help', '-help', '--helpfull', '-h'} & set(kept):
    _print_help(kept)
  return flags.FLAGS(kept)


def run_program(main: Callable[[Sequence[str]], None]) -> None:
  """Run an absl main; what the user got wrong is printed as a sentence, not as a traceback.

  ValueError and OSError are what jaxllm raises for input that it refuses, ImportError for an extra
  that is not installed. `--verbosity=1` shows where they were raised.

  Compiled programs are kept in ~/.cache/jaxllm/compiled, or where JAX_COMPILATION_CACHE_DIR says;
  empty: nowhere. JAX reads that when it is imported, which is for `main` to do.
  """
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.expanduser(COMPILATION_CACHE))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  # Its INFO tells of every accelerator that is not there.
  logging.getLogger('jax').setLevel(logging.WARNING)

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      sys.exit(f'error: unexpected argument {argv[1]!r}; flags are written --name=value')
    try:
      main(argv)
    except (ValueError, OSError, ImportError) as error:
      if flags.FLAGS.verbosity > 0:
        raise
      sys.exit(f'error: {error}')

  app.run(guarded, flags_parser=parse_flags)


def from_flags(location: str) -> Any:
  """Return the config at `location` with the overrides that `parse_flags` set aside."""
  return override(load(location), _OVERRIDES)


# absl keeps parsed flags in a process-wide object; the overrides of the same command line sit
# beside it.
_OVERRIDES: dict[str, str] = {}


def _print_help(argv: Sequence[str]) -> None:
  location = next((a.partition('=')[2] for a in argv if a.startswith('--config=')), None)
  print(flags.FLAGS.main_module_help())
  if location:
    print(f'Fields of {location}:\n{describe(from_flags(location))}')
  else:
    print('Add --config=FILE.py to list the fields of that config.')
  sys.exit(0)


def _override(config: Any, changes: Sequence[tuple[str, list[str], Any]]) -> Any:
  """Apply (whole path, rest of the path, value) together, so that they are checked together."""
  updates: dict[str, Any] = {}
  nested: dict[str, list[tuple[str, list[str], Any]]] = {}
  for path, (key, *rest), value in changes:
    _check_field(config, path, key, len(rest))
    if rest:
      nested.setdefault(key, []).append((path, rest, value))
    else:
      updates[key] = _read_value(type(config), key, path, value)
  for key, parts in nested.items():
    child = updates.get(key, getattr(config, key))
    if not isinstance(child, Config):
      raise ConfigError(
        f'config.{parts[0][0]}: {key} is {child!r}, which has no fields; set {key} itself as JSON'
      )
    updates[key] = _override(child, parts)
  return config.replace(**updates)


def _check_field(config: Config, path: str, key: str, depth: int) -> None:
  fields = type(config).model_fields
  if key not in fields:
    near = difflib.get_close_matches(key, fields, 1, cutoff=0.4)
    parents = path.split('.')[: path.count('.') - depth]
    hint = f'; did you mean config.{".".join([*parents, near[0]])}?' if near else ''
    raise ConfigError(
      f'config.{path}: {type(config).__name__} has no field {key!r}{hint} '
      f'(fields: {", ".join(fields)})'
    )


def _read_value(cls: type[Config], key: str, path: str, value: Any) -> Any:
  """Read text as what the field accepts: a literal where that fits, else the text itself."""
  field = cls.model_fields[key]
  accept: Any = pydantic.TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
  candidates = [value]
  if isinstance(value, str):
    candidates = [_literal(value), *([value] if _accepts_text(field.annotation) else [])]
  errors = []
  for candidate in candidates:
    try:
      return accept.validate_python(candidate)
    except ConfigError as error:
      errors.append(f'config.{path}: {error}')
    except pydantic.ValidationError as error:
      problem = error.errors()[0]
      where = '.'.join(str(part) for part in problem['loc'] if not isinstance(part, int))
      message = problem['msg'].removeprefix('Value error, ')
      errors.append(f'config.{path}={value}: {f"{where}: " if where else ""}{message}')
  raise ConfigError(errors[0])


def _literal(text: str) -> Any:
  for read in (json.loads, ast.literal_eval):
    try:
      return read(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      continue
  return text


def _accepts_text(annotation: Any) -> bool:
  if annotation is str:
    return True
  return any(_accepts_text(part) for part in typing.get_args(annotation))


def _leaves(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  if isinstance(value, Config):
    for name in type(value).model_fields:
      yield from _leaves(getattr(value, name), f'{path}.{name}' if path else name)
  elif isinstance(value, tuple) and any(isinstance(item, Config) for item in value):
    for index, item in enumerate(value):
      yield from _leaves(item, f'{path}.{index}')
  else:
    yield path, value


def _fields(config: Config, path: str = '') -> Iterator[tuple[str, Config, str]]:
  for name in type(config).model_fields:
    full = f'{path}.{name}' if path else name
    child = getattr(config, name)
    if isinstance(child, Config):
      yield from _fields(child, full)
    else:
      yield full, config, name


def _readable(cls: type[Config], error: pydantic.ValidationError) -> str:
  lines = []
  for problem in error.errors():
    # Union members add their own labels to the location; only real fields are worth naming.
    where = '.'.join(str(part) for part in problem['loc'])
    message = problem['msg'].removeprefix('Value error, ')
    if problem['type'] == 'extra_forbidden':
      name = str(problem['loc'][-1])
      owner = _owner(cls, problem['loc'][:-1])
      near = difflib.get_close_matches(name, owner.model_fields, 1, cutoff=0.4)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      lines.append(f'{cls.__name__}.{where}: no such field{hint} '
                   f'(fields: {", ".join(owner.model_fields)})')
    elif problem['type'] == 'value_error' and not where:
      lines.append(f'{cls.__name__}: {message}')
    elif problem['type'] == 'missing':
      lines.append(f'{cls.__name__}.{where}: a value is required')
    else:
      lines.append(f'{cls.__name__}.{where}={problem["input"]!r}: {message}')
  return '\n'.join(lines)


def _owner(cls: type[Config], location: tuple[Any, ...]) -> type[Config]:
  for part in location:
    field = cls.model_fields.get(part) if isinstance(part, str) else None
    child = _config_class(field.annotation) if field else None
    if child is not None:
      cls = child
  return cls


def _config_class(annotation: Any) -> type[Config] | None:
  if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
    return annotation if issubclass(annotation, Config) else None
  found = (_config_class(part) for part in typing.get_args(annotation))
  return next((c for c in found if c is not None), None)
