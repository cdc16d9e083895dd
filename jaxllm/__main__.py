"""`jaxllm PROGRAM ...` is the same as `python -m jaxllm.PROGRAM ...`, of tools `jaxllm.tools`."""

import importlib.metadata
import platform
import runpy
import sys

from jaxllm import mistakes

PROGRAMS = {
  'prepare': 'clean and tokenise text into packed records',
  'train': 'train a model from a config; the same command resumes',
  'evaluate': 'score a model on held-out text',
  'sample': 'continue a prompt, or chat',
  'serve': 'answer over HTTP, as OpenAI does',
  'convert': 'bring weights in and out of other formats',
}
TOOLS = {
  'report': 'write a page about one run, or about several over each other',
  'doctor': 'look whether this machine is fit: versions, devices, a tiny run',
  'selfcheck': 'measure the laws on a config or a model of yours, here',
  'models': 'list the presets: their sizes, and where their weights fit',
  'plan': 'compile a run for its devices before they are paid for',
  'launch': 'print how to start a run on many hosts, or rehearse that here',
  'verify_resume': 'kill a run again and again, and certify what comes out',
  'audit': 'measure what a model has learnt by heart',
  'which_docs': 'name the texts that a step has read, and the steps of a text',
  'completion': 'print what lets bash and zsh complete all this',
}


def main() -> None:
  """Run the program that the first argument names."""
  name, *arguments = sys.argv[1:] or ['--help']
  if name == '--version':
    print(f'jaxllm {importlib.metadata.version("jaxllm")} (jax {importlib.metadata.version("jax")},'
          f' Python {platform.python_version()})')
  elif name in ('--help', '-h', 'help'):
    print(usage())
  elif name in PROGRAMS or name in TOOLS:
    sys.argv = [module(name), *arguments]
    runpy.run_module(module(name), run_name='__main__', alter_sys=True)
  else:
    near = mistakes.hint(name, [*PROGRAMS, *TOOLS])
    print(f'error: there is no program {name!r}{near or "; jaxllm --help lists them"}',
          file=sys.stderr)
    sys.exit(2)


def module(name: str) -> str:
  """Return the module of a program."""
  return f'jaxllm.{name}' if name in PROGRAMS else f'jaxllm.tools.{name}'


def usage() -> str:
  """Return the list of all programs."""
  parts = ['Language models in JAX and Flax: jaxllm PROGRAM [--flag=value ...]']
  for title, programs in (('Programs', PROGRAMS), ('Tools', TOOLS)):
    parts.append('\n'.join([f'{title}:', *(f'  {name:<15}{text}'
                                           for name, text in programs.items())]))
  parts.append('jaxllm PROGRAM --help tells how it is called; jaxllm --version, what is here.')
  return '\n\n'.join(parts)


if __name__ == '__main__':
  main()
