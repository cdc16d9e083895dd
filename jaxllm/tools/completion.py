"""Print what completes `jaxllm` in bash and zsh: `jaxllm completion > ~/.jaxllm_completion`.

`source ~/.jaxllm_completion` in ~/.bashrc, or in ~/.zshrc after `autoload -U compinit bashcompinit
&& compinit && bashcompinit`, lets Tab complete programs, flags, `--config.` by its fields, and
names of files.
"""

import importlib
from collections.abc import Iterator
from typing import Any

from jaxllm import __main__ as command_line
from jaxllm import config, validation

FLAGS = config.Flags()

_SCRIPT = """\
_jaxllm() {{
  local word="$2" words=""
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then words='{programs}'; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -o default -F _jaxllm jaxllm"""


def main(_) -> None:  # noqa: D103
  from jaxllm.experiment import Experiment

  cases = []
  for name in (*command_line.PROGRAMS, *command_line.TOOLS):
    values = importlib.import_module(command_line.module(name)).FLAGS.values
    words = [f'--{flag}{"" if values[flag].boolean else "="}' for flag in values]
    if 'config' in values:
      words += [f'--config.{path}=' for path in dict.fromkeys(_paths(Experiment, ''))]
    cases.append(f"    {name}) words='{' '.join(words)}' ;;")
  names = ' '.join((*command_line.PROGRAMS, *command_line.TOOLS))
  print(_SCRIPT.format(cases='\n'.join(cases), programs=names))


def _paths(cls: Any, before: str) -> Iterator[str]:
  """Yield the dotted path of every field of a class, and of the configs inside."""
  for name, field in cls.model_fields.items():
    yield before + name
    for inner in validation.classes(field.annotation):
      yield from _paths(inner, f'{before}{name}.')


if __name__ == '__main__':
  config.run_program(main, FLAGS)
