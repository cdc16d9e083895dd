"""Run the programs inside this process, one after the other, as a shell would."""

import contextlib
import importlib
import io
import sys
from unittest import mock

from absl import flags

from jaxllm import config


def load(name):
  """Import `jaxllm.NAME`, with the flags of the programs before it taken back."""
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    for flag in list(defined):
      if module.startswith('jaxllm.') and flag.name in flags.FLAGS:
        delattr(flags.FLAGS, flag.name)
  sys.modules.pop(f'jaxllm.{name}', None)
  return importlib.import_module(f'jaxllm.{name}')


def unparse():
  """Forget what flags were given."""
  flags.FLAGS.unparse_flags()
  for defined in flags.FLAGS.flags_by_module_dict().values():
    for flag in defined:
      flag.unparse()


def run(name, *arguments):
  """Run a program; return its exit code, stdout and stderr. What is no mistake is raised."""
  return run_loaded(load(name), *arguments)


def run_loaded(program, *arguments):
  """Run a program that `load` gave."""
  out, err, code = io.StringIO(), io.StringIO(), None
  unparse()
  with (mock.patch.object(sys, 'argv', [program.__name__, *arguments]),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
    try:
      config.run_program(program.main)
    except SystemExit as stopped:
      code = stopped.code
  return code or 0, out.getvalue(), err.getvalue()
