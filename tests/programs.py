"""Run the programs inside this process, one after the other, as a shell would."""

import contextlib
import importlib
import io
import sys
from unittest import mock

from jaxllm import config


def load(name):
  """Import `jaxllm.NAME`."""
  return importlib.import_module(f'jaxllm.{name}')


def run(name, *arguments):
  """Run a program; return its exit code, stdout and stderr. What is no mistake is raised."""
  return run_loaded(load(name), *arguments)


def run_loaded(program, *arguments):
  """Run a program that `load` gave."""
  out, err, code = io.StringIO(), io.StringIO(), None
  with (mock.patch.object(sys, 'argv', [program.__name__, *arguments]),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
    try:
      config.run_program(program.main, program.FLAGS)
    except SystemExit as stopped:
      code = stopped.code
  return code or 0, out.getvalue(), err.getvalue()
