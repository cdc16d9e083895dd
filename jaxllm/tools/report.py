"""Write one page about runs: `jaxllm report runs/a runs/b`.

Of one run it is WORKDIR/report.html, as `train` writes it at the end; of several it is report.html
here, with their curves over each other and what differs in their configs. The page needs no other
file and no network. With --text each model reads a text: its loss token by token, what its layers
would say next, what it attends to (the extra `plots`).
"""

import base64
import io
from collections.abc import Sequence

from jaxllm import config, mistakes

FLAGS = config.Flags(arguments=True)
OUTPUT = FLAGS.string('output', None, 'The page; by default WORKDIR/report.html or report.html.')
TEXT = FLAGS.string('text', None, 'A text that each model reads.')


def main(argv: Sequence[str]) -> None:  # noqa: D103
  from jaxllm import inspect, loading, storage
  from jaxllm.training import report

  paths = [storage.path(argument) for argument in argv[1:]]
  if not paths:
    raise ValueError('name the workdir of a run, as in: jaxllm report runs/a runs/b')
  for index, path in enumerate(paths):
    if not path.is_dir():
      raise ValueError(f'{path} is no directory: name that of a run' if path.exists() else
                       mistakes.no_such_path(path))
    if not (path / 'metrics.jsonl').exists():
      raise ValueError(f'{path} holds no metrics.jsonl: no run has begun there')
    if path.resolve() in [other.resolve() for other in paths[:index]]:
      raise ValueError(f'{path} is named twice; name each run once')
  seen = []
  for path in paths if TEXT.value else ():
    model, picture = loading.load(path), io.BytesIO()
    found = inspect.look(model, TEXT.value)
    found.plot_attention().savefig(picture)
    seen.append({
      'name': str(path), 'losses': found.losses_html(), 'lens': found.lens()._repr_html_(),
      'attention': base64.b64encode(picture.getvalue()).decode(),
      'parameters': inspect.parameters(model)._repr_html_()})
  given = OUTPUT.value or ('report.html' if len(paths) > 1 else None)
  target = storage.path(given) if given else None
  print(f'report: {report.write_report(*paths, target=target, seen=seen)}')


if __name__ == '__main__':
  config.run_program(main, FLAGS)
