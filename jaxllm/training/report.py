"""One self-contained page about a run, from nothing but the files of its workdir.

Whatever is missing (an unfinished run has no summary, a new one no metrics) is said in its place.
"""

import datetime
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from jaxllm import storage
from jaxllm.evaluation import tables
from jaxllm.training import charts, metrics
from jaxllm.training.goodput import CAUSES
from jaxllm.training.metrics import format_duration

Record = Mapping[str, Any]
Rows = list[tuple[str, str]]
Chart = dict[str, Any] | None


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
  step = summary.get('step') or max((r['step'] for r in train), default=0)
  return {
    'name': config.get('name') or path.name or path.resolve().name,
    'complete': bool(summary.get('complete')),
    'step': step,
    'num_steps': (config.get('training') or {}).get('num_steps'),
    'origin': _origin(environment, records),
    'tiles': _tiles(step, config, summary, train, validation),
    'loss_chart': _loss_chart(train, validation),
    'charts': _small_charts(train),
    'task_charts': _task_charts(records),
    'samples': [
      {'prompt': (prompt := str(sample.get('prompt', ''))),
       'text': str(sample.get('text', '')).removeprefix(prompt)}
      for sample in metrics.read_lines(path / 'samples.jsonl')],
    'speed': _speed(train, environment),
    'goodput': _goodput([*records, summary.get('goodput') or {}]),
    'files': {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in (
      ('data.json', data), ('config.json', config), ('environment.json', environment)) if content},
  }


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


def _tiles(
  step: int, config: Record, summary: Record, train: Sequence[Record], validation: Sequence[Record]
) -> Rows:
  """Return the headline figures, as far as they are known."""
  training, data = config.get('training') or {}, config.get('data') or {}
  tokens = step * training.get('batch_size', 0) * data.get('context_length', 0)
  scores, scored_step = dict(summary.get('validation') or {}), summary.get('best_step') or step
  if not scores and validation:
    scored_step = validation[-1]['step']
    scores = {key.partition('/')[2]: value for key, value in validation[-1].items()}
  at_step = f' at step {scored_step:,}' if scored_step != step else ''
  return _known([
    ('training loss', None if scores.get('loss') else _last(train, 'train/loss'), tables.number),
    ('held-out loss' + at_step, scores.get('loss'), tables.number),
    ('perplexity', scores.get('perplexity'), tables.number),
    ('bits per byte', scores.get('bits_per_byte'), tables.number),
    ('held-out accuracy', scores.get('accuracy'), lambda value: f'{100 * value:.1f} %'),
    ('parameters', summary.get('parameters'), charts.compact),
    ('training tokens', summary.get('train_tokens') or tokens or None, charts.compact),
    ('tokens per second', _median(train, 'train/tokens_per_second'), '{:,.0f}'.format),
    ('time', summary.get('seconds') or _last(train, 'train/elapsed_seconds'), format_duration),
  ])


def _loss_chart(train: Sequence[Record], validation: Sequence[Record]) -> Chart:
  raw = charts.line(train, 'train/loss', '', 'raw')
  mean = charts.smooth(raw, 'training', 'train')
  held_out = charts.line(validation, 'validation/loss', 'held-out', 'validation')
  return charts.chart('Loss, nats per token', [raw, mean, held_out], '{:.4g}'.format, log=True)


def _small_charts(train: Sequence[Record]) -> list[Chart]:
  drawn = []
  for title, name, noisy in (
    ('Learning rate', 'train/learning_rate', False),
    ('Gradient norm', 'train/grad_norm', True),
    ('Tokens per second', 'train/tokens_per_second', True),
    ('Training accuracy', 'train/accuracy', True),
    ('Parameter norm', 'train/param_norm', False),
    ('Seconds waiting for data', 'train/data_wait_seconds', True),
  ):
    line = charts.line(train, name, '', 'raw' if noisy else 'train')
    lines = [line, charts.smooth(line, '', 'train')] if noisy else [line]
    drawn.append(charts.chart(title, lines, charts.compact, 4, log='norm' in title))
  return drawn


def _task_charts(records: Sequence[Record]) -> list[Chart]:
  """Draw every score of every task, in the order of metrics.jsonl."""
  names = dict.fromkeys(name for r in records for name in r if name.startswith('task/'))
  return [
    charts.chart(': '.join(name.split('/', 2)[1:]).replace('_', ' '),
                 [charts.line(records, name, '', 'validation')], '{:.4g}'.format, 4)
    for name in names]


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


def _last(records: Sequence[Record], name: str) -> float | None:
  return next((r[name] for r in reversed(records) if r.get(name) is not None), None)


def _median(records: Sequence[Record], name: str) -> float | None:
  values = [r[name] for r in records if r.get(name) is not None]
  return statistics.median(values) if values else None
