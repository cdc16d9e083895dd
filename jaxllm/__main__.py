"""`jaxllm PROGRAM ...` is the same as `python -m jaxllm.PROGRAM ...`."""

import runpy
import sys

from jaxllm import mistakes

PROGRAMS = {
  'prepare': 'clean and tokenise text into packed records',
  'train': 'train a model from a config; the same command resumes',
  'evaluate': 'score a model on held-out text',
  'sample': 'continue a prompt',
  'serve': 'answer over HTTP, as OpenAI does',
  'convert': 'bring weights in and out of other formats',
}


def main() -> None:
  """Run the program that the first argument names."""
  if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
    wanted = sys.argv[1] if len(sys.argv) > 1 else '--help'
    lines = '\n'.join(f'  jaxllm {name:<10}{text}' for name, text in PROGRAMS.items())
    usage = f'{lines}\n\njaxllm PROGRAM --help lists the flags of one.'
    if wanted in ('--help', '-h', 'help'):
      print(usage)
      sys.exit(0)
    near = mistakes.hint(wanted, PROGRAMS)
    print(f'error: there is no program {wanted!r}{near}\n{usage}', file=sys.stderr)
    sys.exit(2)
  program = f'jaxllm.{sys.argv[1]}'
  sys.argv = [program, *sys.argv[2:]]
  runpy.run_module(program, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
