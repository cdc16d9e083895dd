"""What `--help` of a program prints."""

import re
import textwrap
from collections.abc import Mapping, Sequence

import pydantic
from absl import flags

_SHARED = {
  '--flagfile=FILE': 'Read flags from a file.',
  '--verbosity=1': 'Show what other packages log, and where an error was raised.',
}


def page(
  about: str, sections: Mapping[str, Sequence[str]], values: flags.FlagValues, width: int
) -> str:
  """Return what `--help` prints: what the program does, its flags, the rest of its docstring."""
  first, *rest = about.strip().split('\n\n')
  lines = textwrap.wrap(first, width)
  if rest and rest[0].startswith(' '):
    lines += ['', rest.pop(0)]  # Commands.
  for title, names in sections.items():
    lines += ['', *([f'{title}:'] if title else [])]
    for name in names:
      lines += _columns(*_written(values[name]), width)
  lines += ['', 'Of every program:']
  for written, text in _SHARED.items():
    lines += _columns(written, text, width)
  for paragraph in rest:
    lines.append('')
    for item in re.split(r'\n(?=- )', paragraph):
      indent = '  ' * item.startswith('- ')
      lines += textwrap.wrap(' '.join(item.split()), width, subsequent_indent=indent)
  return '\n'.join(lines)


def fields(config: pydantic.BaseModel, width: int, path: str = '--config') -> str:
  """Return each field: dotted path and current value, under it the description."""
  lines = []
  for name, field in type(config).model_fields.items():
    value, full = getattr(config, name), f'{path}.{name}'
    lines += [fields(value, width, full)] if isinstance(value, pydantic.BaseModel) else [
      f'  {full}={value!r}', *textwrap.wrap(
        ' '.join((field.description or '').split()), width, initial_indent=' ' * 6,
        subsequent_indent=' ' * 6)]
  return '\n'.join(lines)


def _written(flag: flags.Flag) -> tuple[str, str]:
  """Return a flag as it is typed, with its choices or its default, and what it says."""
  text = flag.help.partition(';\n')[0]  # Where it may be repeated, absl adds a line.
  if any('other than None' in check.message for check in flag.validators):
    text = f'Required. {text}'
  if flag.boolean:
    return f'--{"no" * bool(flag.default)}{flag.name}', text
  if choices := getattr(flag.parser, 'enum_values', ()):
    before = f'<{"|".join(choices)}>: '
    default = f' [{flag.default}]' if flag.default else ''
    if len(before) > 70:
      return f'--{flag.name}=...', text.replace(before, '') + f' One of {", ".join(choices)}.'
    return f'--{flag.name}={"|".join(choices)}', text.replace(before, '') + default
  value = ','.join(flag.default) if isinstance(flag.default, list) else flag.default
  return f'--{flag.name}={"..." if value in (None, "") else value}', text


def _columns(left: str, text: str, width: int, indent: int = 28) -> list[str]:
  """Return the lines of two columns; a left one that is too wide has a line of its own."""
  beside = len(left) < indent - 3
  lines = textwrap.wrap(
    ' '.join(text.split()), width, subsequent_indent=' ' * indent,
    initial_indent=f'  {left:<{indent - 2}}' if beside else ' ' * indent)
  return lines if beside and lines else [f'  {left}', *lines]
