"""What pydantic accepts, from text too, and what it refuses, in sentences that name the field."""

import ast
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pydantic

from jaxllm import mistakes


class ConfigError(ValueError):
  """A config that cannot be used; the message names the field, the value and the fix."""


def readable(cls: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
  """Return what is wrong with the fields of a class, a line each."""
  lines, misspelt = [], set()
  # Unknown fields first: a field that one of them was meant to be is not missing besides.
  for problem in sorted(error.errors(), key=lambda problem: problem['type'] != 'extra_forbidden'):
    # Union members add their own labels to the location; only real fields are worth naming.
    where = '.'.join(str(part) for part in problem['loc'])
    message = _said(problem)
    if problem['type'] == 'extra_forbidden':
      name = str(problem['loc'][-1])
      owner = _owner(cls, problem['loc'][:-1])
      hint = mistakes.hint(name, owner.model_fields, cutoff=0.4)
      misspelt.add(hint)
      lines.append(f'{cls.__name__}.{where}: no such field{hint} '
                   f'(fields: {", ".join(owner.model_fields)})')
    elif problem['type'] == 'value_error' and not where:
      lines.append(f'{cls.__name__}: {message}')
    elif problem['type'] == 'missing':
      if f'; did you mean {problem["loc"][-1]!r}?' in misspelt:
        continue
      lines.append(f'{cls.__name__}.{where}: a value is required')
    else:
      lines.append(f'{cls.__name__}.{where}={problem["input"]!r}: {message}')
  return '\n'.join(lines)


def _said(problem: Any) -> str:
  """Return what pydantic says is wrong; of a choice the names that there are, and the nearest."""
  context = problem.get('ctx', {})
  expected = context.get('expected_tags') or (
    problem['type'] == 'literal_error' and context['expected'])
  if not expected:
    as_json = ', written as JSON: ["a", "b"]' * (problem['type'] == 'tuple_type')
    return problem['msg'].removeprefix('Value error, ') + as_json
  names, given = re.findall(r"'([^']*)'", expected), str(context.get('tag', problem['input']))
  return f'one of {", ".join(names)}{mistakes.hint(given, names)}'


def _owner(cls: type[pydantic.BaseModel], location: tuple[Any, ...]) -> type[pydantic.BaseModel]:
  """Return the class of the config at a place, as far as the names of fields lead there."""
  for part in location:
    field = cls.model_fields.get(part) if isinstance(part, str) else None
    cls = next(classes(field.annotation if field else None), cls)
  return cls


def read_value(cls: type[pydantic.BaseModel], key: str, path: str, value: Any) -> Any:
  """Read text as what the field accepts: a literal where that fits, else the text itself."""
  field = cls.model_fields[key]
  accept: Any = pydantic.TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
  candidates = [value]
  if isinstance(value, str):
    candidates = [literal(value), *([value] if str in _annotations(field.annotation) else []),
                  *([None] if value.lower() == 'none' else [])]
  errors = []
  for candidate in candidates:
    try:
      return accept.validate_python(candidate)
    except ConfigError as error:
      errors.append(f'config.{path}: {error}')
    except pydantic.ValidationError as error:
      problem = error.errors()[0]
      where = '.'.join(str(part) for part in problem['loc'] if not isinstance(part, int))
      message = _said(problem)
      errors.append(f'config.{path}={value}: {f"{where}: " if where else ""}{message}')
  raise ConfigError(errors[0])


def literal(text: str) -> Any:
  """Return the value of JSON or of a Python literal; any other text as it is."""
  for read in (json.loads, ast.literal_eval):
    try:
      return read(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      continue
  return text


def _annotations(annotation: Any) -> Iterator[Any]:
  """Yield an annotation and all that it is made of."""
  yield annotation
  for part in typing.get_args(annotation):
    yield from _annotations(part)


def classes(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
  """Yield the config classes that the annotation of a field speaks of."""
  for one in _annotations(annotation):
    generic = isinstance(one, types.GenericAlias)
    if isinstance(one, type) and not generic and issubclass(one, pydantic.BaseModel):
      yield one
