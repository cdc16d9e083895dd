"""One self-contained page about a run, from nothing but the files of its workdir.

Whatever is missing (an unfinished run has no summary, a new one no metrics) is said in its place.
"""

import datetime
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from jaxllm import storage
from jaxllm.evaluation import tables
from jaxllm.training import charts, metrics
from jaxllm.training.goodput import CAUSES
from jaxllm.training.metrics import format_duration

Record = Mapping[str, Any]
Rows = list[tuple[str, str]]


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Write `report.html` into a workdir and return its path.

  Reads `config.json`, `metrics.jsonl`, `samples.jsonl`, `data.json`, `environment.json` and
  `summary.json`, each of which may be absent or torn.

  Args:
    workdir: the directory of a run, finished or not.
  """
  path = storage.path(workdir)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
  )
  page = environment.get_template('report.html').render(**_describe(path))
  storage.write_file(path / 'report.html', page)
  return path / 'report.html'


def _describe(path: pathlib.Path) -> dict[str, Any]:
  """Return all that the template shows."""
  config, summary, environment, data = (
    storage.read_json(path / f'{name}.json')
    for name in ('config', 'summary', 'environment', 'data'))
  records = metrics.read(path / 'metrics.jsonl')
  train = [r for r in records if 'train/loss' in r]
  validation = [r for r in records if 'validation/loss' in r]
  if summary.get('step', -1) < max((r['step'] for r in records), default=0):
    summary = {}  # Of an earlier end: the run went on.
  result = _result(config, summary, train, validation)
  return {
    'name': config.get('name') or path.name or path.resolve().name,
    'result': result,
    'verdict': _verdict(result),
    'origin': _origin(environment, records),
    'note': _note(config, summary, validation),
    'tiles': _tiles(result),
    'loss_chart': _loss_chart(train, validation),
    'charts': _small_charts(train),
    'task_charts': _task_charts(records),
    'samples': [
      {'prompt': (prompt := str(sample.get('prompt', ''))),
       'text': str(sample.get('text', '')).removeprefix(prompt)}
      for sample in metrics.read_lines(path / 'samples.jsonl')],
    'speed': _speed(train, environment),
    'goodput': _goodput([*records, summary.get('goodput') or {}]),
    'data': _data(data),
    'environment': list(_flatten(environment)),
    'config': _sections(config),
  }


def _result(
  config: Record, summary: Record, train: Sequence[Record], validation: Sequence[Record]
) -> dict[str, Any]:
  """Return how far the run came and how good it is; None where that is not known."""
  training, data = config.get('training') or {}, config.get('data') or {}
  step = summary.get('step') or max((r['step'] for r in train), default=0)
  tokens_per_step = training.get('batch_size', 0) * data.get('context_length', 0)
  scores = dict(summary.get('validation') or {})
  if not scores and validation:
    scores = {key.partition('/')[2]: value for key, value in validation[-1].items()}
  return {
    'complete': bool(summary.get('complete')),
    'step': step,
    'num_steps': training.get('num_steps'),
    'tokens': summary.get('train_tokens') or step * tokens_per_step or None,
    'parameters': summary.get('parameters'),
    'seconds': summary.get('seconds') or _last(train, 'train/elapsed_seconds'),
    'tokens_per_second': _median(train, 'train/tokens_per_second'),
    'train_loss': _last(train, 'train/loss'),
    'loss': scores.get('loss'),
    'loss_step': ((summary.get('best_step') or step) if summary.get('validation') or not validation
                  else validation[-1]['step']),
    'perplexity': scores.get('perplexity'),
    'bits_per_byte': scores.get('bits_per_byte'),
    'accuracy': scores.get('accuracy'),
  }


def _verdict(result: Record) -> str:
  """Say in a few words how far the run came and how good it is."""
  if not result['step']:
    return 'No metrics have been written yet.'
  text = f'{result["step"]:,}'
  if result['num_steps'] and not result['complete']:
    text += f' of {result["num_steps"]:,}'
  text += ' steps'
  if result['tokens']:
    text += f' over {result["tokens"]:,} tokens'
  if result['seconds']:
    text += f' in {format_duration(result["seconds"])}'
  if result['tokens_per_second']:
    text += f', {result["tokens_per_second"]:,.0f} tokens per second'
  if result['loss'] is None:
    return text + '. No held-out score yet.'
  text += f'. Held-out loss {tables.number(result["loss"])} nats per token'
  if result['loss_step'] != result['step']:
    text += f' at step {result["loss_step"]:,}'
  if result['perplexity'] is not None:
    text += f', perplexity {tables.number(result["perplexity"])}'
  if result['bits_per_byte'] is not None:
    text += f', {tables.number(result["bits_per_byte"])} bits per byte'
  return text + '.'


def _known(rows: Sequence[tuple[str, Any, Callable[[Any], str]]]) -> Rows:
  """Return (label, text) of the values that are known."""
  return [(label, text(value)) for label, value, text in rows if value is not None]


def _origin(environment: Record, records: Sequence[Record]) -> Rows:
  """Return the command, date and devices of a run."""
  times = [r['time'] for r in records if isinstance(r.get('time'), int | float)]
  dates = dict.fromkeys(
    f'{datetime.datetime.fromtimestamp(time, datetime.UTC):%Y-%m-%d %H:%M}'
    for time in (min(times, default=None), max(times, default=None)) if time is not None)
  kind, count = environment.get('device_kind'), environment.get('devices')
  return _known([('command', environment.get('command'), str),
                 ('date', ' to '.join(dates) + ' UTC' if dates else None, str),
                 ('device', f'{count} x {kind}' if kind and count else kind, str)])


def _note(config: Record, summary: Record, validation: Sequence[Record]) -> str:
  """Say why the curve of the held-out loss ends at another value than the figure."""
  final = (summary.get('validation') or {}).get('loss')
  curve = validation[-1]['validation/loss'] if validation else None
  if final is None or curve is None or tables.number(final) == tables.number(curve):
    return ''
  batches = (config.get('evaluation') or {}).get('max_batches')
  text = f'The curve of the held-out loss ends at {tables.number(curve)}'
  if batches:
    text += f', which is of a sample of {batches:,} batches, drawn while the run lasted'
  text += f'; {tables.number(final)} is of all held-out records'
  best = summary.get('best_step')
  return text + (f', with the weights of step {best:,}, the best.' if best else ', at the end.')


def _tiles(result: Record) -> Rows:
  """Return the headline figures."""
  rows: list[tuple[str, Any, Callable[[Any], str]]] = [
    ('held-out loss', result['loss'], tables.number),
    ('perplexity', result['perplexity'], tables.number),
    ('bits per byte', result['bits_per_byte'], tables.number),
    ('held-out accuracy', result['accuracy'], lambda value: f'{100 * value:.1f} %'),
    ('parameters', result['parameters'], charts.compact),
    ('training tokens', result['tokens'], charts.compact),
    ('tokens per second', result['tokens_per_second'], '{:,.0f}'.format),
    ('time', result['seconds'], format_duration),
  ]
  if result['loss'] is None:
    rows.insert(0, ('training loss', result['train_loss'], tables.number))
  return _known(rows)


def _loss_chart(train: Sequence[Record], validation: Sequence[Record]) -> dict[str, Any] | None:
  raw = charts.series(train, 'train/loss', '', 'raw')
  mean = charts.smooth(raw, 'training', 'train')
  held_out = charts.series(validation, 'validation/loss', 'held-out', 'validation', points=True)
  return charts.chart('Loss, nats per token', [raw, mean, held_out], '{:.4g}'.format, log=True)


def _small_charts(train: Sequence[Record]) -> list[dict[str, Any]]:
  drawn = []
  for title, name, noisy, log in (
    ('Learning rate', 'train/learning_rate', False, False),
    ('Gradient norm', 'train/grad_norm', True, True),
    ('Tokens per second', 'train/tokens_per_second', True, False),
    ('Training accuracy', 'train/accuracy', True, False),
    ('Parameter norm', 'train/param_norm', False, False),
    ('Seconds waiting for data', 'train/data_wait_seconds', True, False),
  ):
    line = charts.series(train, name, '', 'raw' if noisy else 'train')
    lines = [line, charts.smooth(line, '', 'train')] if noisy else [line]
    drawn.append(charts.chart(title, lines, charts.compact, num_ticks=(4, 5), log=log))
  return [chart for chart in drawn if chart]


def _task_charts(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Draw every score of every task, in the order of metrics.jsonl."""
  names = dict.fromkeys(name for r in records for name in r if name.startswith('task/'))
  drawn = []
  for name in names:
    _, kind, metric = name.split('/', 2)
    line = charts.series(records, name, '', 'validation', points=True)
    title = f'{kind}: {metric}'.replace('_', ' ')
    drawn.append(charts.chart(title, [line], '{:.4g}'.format, num_ticks=(4, 5)))
  return [chart for chart in drawn if chart]


def _speed(train: Sequence[Record], environment: Record) -> Rows:
  """Return the time, memory and utilisation of the run."""
  utilisation, kind = _median(train, 'train/mfu'), environment.get('device_kind', 'this device')
  unknown = f'unknown: no published peak for {kind}' if train else None
  return _known([
    ('seconds per step', _median(train, 'train/step_seconds'), '{:.4g}'.format),
    ('seconds per step waiting for data', _median(train, 'train/data_wait_seconds'),
     '{:.2g}'.format),
    ('seconds per step waiting for the device', _median(train, 'train/device_wait_seconds'),
     '{:.2g}'.format),
    ('peak memory', _last(train, 'train/memory_bytes'), lambda size: f'{size / 2**30:.2f} GiB'),
    ('programs compiled', _last(train, 'train/compilations'), '{:.0f}'.format),
    *((f'compiled again: {name.partition("/")[2]}', train[-1][name], '{:.0f} times'.format)
      for name in (train[-1] if train else ()) if name.startswith('recompilations/')),
    ('steps not applied', _last(train, 'train/skipped'), '{:.0f}'.format),
    ('utilisation (MFU)', f'{100 * utilisation:.1f} %' if utilisation else unknown, str),
  ])


def _goodput(records: Sequence[Record]) -> list[tuple[str, str, float]]:
  """Return (cause, text, per cent) of what the time of the run went into."""
  last = next((one for one in reversed(records) if 'goodput/fraction' in one), {})
  spent = {cause: last.get(f'goodput/{cause}_seconds') or 0.0 for cause in CAUSES}
  shares = {cause: 100 * seconds / (sum(spent.values()) or 1) for cause, seconds in spent.items()}
  return [(CAUSES[cause], f'{format_duration(spent[cause])}, {share:.1f} %', round(share, 2))
          for cause, share in shares.items() if spent[cause]]


def _data(manifest: Record) -> list[tuple[str, ...]]:
  """Return a table of figures with one column per split, headings first."""
  splits = {n: manifest[n] for n in ('train', 'validation') if isinstance(manifest.get(n), dict)}
  if not splits:
    return []
  table = [('', *splits)]
  for key in ('documents', 'records', 'tokens', 'text_bytes'):
    counts = [split.get(key) for split in splits.values()]
    row = [f'{count:,}' if isinstance(count, int) else 'unknown' for count in counts]
    table.append((key.replace('_', ' '), *row))
  return table


def _sections(config: Record) -> list[tuple[str, Rows]]:
  """Return (section, rows) with the plain fields of the run first."""
  run = {key: value for key, value in config.items() if not isinstance(value, dict)}
  sections = {'run': run} | {key: v for key, v in config.items() if isinstance(v, dict)}
  return [(name, list(_flatten(fields))) for name, fields in sections.items() if fields]


def _flatten(value: Any, path: str = '') -> Iterator[tuple[str, str]]:
  """Yield (dotted path, text) of every leaf; lists of plain values stay on one line."""
  if isinstance(value, dict) and (value or not path):
    for key, child in value.items():
      yield from _flatten(child, f'{path}.{key}' if path else str(key))
  elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
    for index, child in enumerate(value):
      yield from _flatten(child, f'{path}.{index}')
  else:
    yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _last(records: Sequence[Record], name: str) -> float | None:
  return next((r[name] for r in reversed(records) if r.get(name) is not None), None)


def _median(records: Sequence[Record], name: str) -> float | None:
  values = [r[name] for r in records if r.get(name) is not None]
  return statistics.median(values) if values else None
