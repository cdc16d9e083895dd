"""The process in which chat templates are rendered, started by `chat`.

A template is a program from outside. Jinja's sandbox keeps it from reaching anything; it does not
keep it from looping or from filling memory, so that this process takes limits upon itself before it
looks at one. It imports nothing of jaxllm. Request and answer are JSON: {"template", "variables",
"cpu_seconds", "memory_bytes", "max_characters"} -> {"texts": [...]} or {"error": "..."}.
"""

import datetime
import json
import resource
import sys

MAX_REQUEST_BYTES = 64_000_000


def main() -> None:
  """Answer one request."""
  request = json.loads(sys.stdin.buffer.read(MAX_REQUEST_BYTES))
  # Imported before the limits, which are for the template.
  import jinja2.ext
  import jinja2.sandbox

  seconds = request['cpu_seconds']
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  if sys.platform != 'darwin':  # Which refuses to limit memory.
    resource.setrlimit(resource.RLIMIT_AS, (request['memory_bytes'],) * 2)
  # No file is written, no process started.
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
  try:
    texts = _render(jinja2, request)
    answer: dict[str, object] = {'texts': texts}
    if any(len(text) > request['max_characters'] for text in texts):
      answer = {'error': f'the result is longer than {request["max_characters"]} characters'}
  except MemoryError:
    answer = {'error': 'it takes more memory than is allowed'}
  # The caller reads any error of the template; the process ends here.
  except Exception as error:  # noqa: BLE001
    answer = {'error': f'{type(error).__name__}: {error}'}
  sys.stdout.write(json.dumps(answer))
  sys.stdout.flush()


def _render(jinja2, request) -> list[str]:
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
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  # Jinja's own filter escapes the characters that HTML reserves.
  environment.filters['tojson'] = (
    lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda format: datetime.datetime.now().strftime(format)
  template = environment.from_string(request['template'])
  return [template.render(**variables) for variables in request['variables']]


if __name__ == '__main__':
  main()
