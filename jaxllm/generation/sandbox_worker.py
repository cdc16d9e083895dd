"""The process in which programs from outside are run: chat templates, grammars of schemas.

Jinja's sandbox keeps a template from reaching anything, but not from looping or filling memory. So
each request is answered by a fork with limits; what is imported stays for the next. Imports nothing
of jaxllm. Lines are JSON: {"task", "cpu_seconds", "memory_bytes", ...} -> {"result": ...},
{"error": text}, or {} where the fork ended before it could answer.
"""

import datetime
import json
import os
import resource
import signal
import sys


def _render(request):
  """Return the texts that a template makes of several sets of variables."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the text of the assistant; here it changes nothing."""

    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
      return jinja2.nodes.Scope(body).set_lineno(line)

  def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  # Jinja's own filter escapes the characters that HTML reserves.
  environment.filters['tojson'] = (
    lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda format: datetime.datetime.now().strftime(format)
  template = environment.from_string(request['template'])
  texts = [template.render(**variables) for variables in request['variables']]
  if any(len(text) > request['max_characters'] for text in texts):
    raise ValueError(f'the result is longer than {request["max_characters"]} characters')
  return texts


def _compile(request):
  """Return what llguidance says against a grammar; '': nothing."""
  import llguidance

  tokenizer = llguidance.LLTokenizer('byte')
  return llguidance.LLMatcher(tokenizer, request['grammar'], log_level=0).get_error()


_TASKS = {'render': _render, 'compile': _compile}
# Imported before the limits, which are for what comes from outside.
_MODULES = {'render': ('jinja2.ext', 'jinja2.sandbox'), 'compile': ('llguidance',)}


def _answer(request):
  seconds = request['cpu_seconds']
  signal.alarm(20 * seconds)
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  if sys.platform != 'darwin':  # Which refuses to limit memory.
    resource.setrlimit(resource.RLIMIT_AS, (request['memory_bytes'],) * 2)
  # No file is written, and by a template no process started.
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  if request['task'] == 'render':
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
  try:
    answer = {'result': _TASKS[request['task']](request)}
  except MemoryError:
    answer = {'error': 'it takes more memory than is allowed'}
  # The caller reads any error of the template; the process ends here.
  except Exception as error:  # noqa: BLE001
    answer = {'error': f'{type(error).__name__}: {error}'}
  return json.dumps(answer).encode()


def main() -> None:
  """Answer requests until there are no more."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  for line in sys.stdin.buffer:
    request = json.loads(line)
    for module in _MODULES[request['task']]:
      __import__(module)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
      for number in (0, 1, reading):
        os.close(number)
      with open(writing, 'wb') as pipe:
        pipe.write(_answer(request))
      os._exit(0)
    os.close(writing)
    with open(reading, 'rb') as pipe:
      answer = pipe.read()
    _, status = os.waitpid(child, 0)
    sys.stdout.buffer.write((b'{}' if status else answer) + b'\n')
    sys.stdout.buffer.flush()


if __name__ == '__main__':
  main()
