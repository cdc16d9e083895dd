"""One self-contained page about a run, or several over each other, from nothing but their files.

Whatever is missing (an unfinished run has no summary, a new one no metrics) is said in its place.
Charts are numbers and SVG paths in a square of 100 units, which the page stretches to any width;
labels stand beside the drawing, so that text keeps its size on a phone.
"""

import datetime
import functools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from jaxllm import storage
from jaxllm.evaluation import tables
from jaxllm.training import metrics
from jaxllm.training.goodput import CAUSES
from jaxllm.training.metrics import format_duration

Record = Mapping[str, Any]
Records = list[dict[str, Any]]
Rows = list[tuple[str, str]]
Chart = dict[str, Any] | None
_MAX_BUCKETS = 400
_MAX_MARKS = 60
_COLOURS = 6
DATA_PAGE = 'data_report.html'


class _Run(NamedTuple):
  """What the files of a workdir say; `style` is the CSS class of its lines among other runs."""

  path: pathlib.Path
  name: str
  style: str
  step: int
  config: Record
  summary: Record
  environment: Record
  data: Record
  records: Records
  train: Records
  validation: Records
  samples: Records


def write_report(
  *workdirs: str | os.PathLike[str], target: pathlib.Path | None = None,
  seen: Sequence[Mapping[str, str]] = (),
) -> pathlib.Path:
  """Write a page about one run, or about several over each other, and return its path.

  Reads `config.json`, `metrics.jsonl`, `samples.jsonl`, `data.json`, `environment.json` and
  `summary.json`, each of which may be absent or torn.

  Args:
    *workdirs: the directories of runs, finished or not.
    target: the page; None: `report.html` in the first workdir.
    seen: how models read a text: `name`, `losses`, `lens`, `parameters` (HTML) and `attention` (a
      PNG in Base64).
  """
  target = target or storage.path(workdirs[0]) / 'report.html'
  runs = [_read(storage.path(workdir), index) for index, workdir in enumerate(workdirs)]
  if len({run.name for run in runs}) < len(runs):
    runs = [run._replace(name=str(path)) for run, path in zip(runs, workdirs, strict=True)]
  page = render(
    'report.html', name=' · '.join(run.name for run in runs), runs=runs, seen=seen,
    data_page=functools.partial(_data_page, target), origin=_origin, tiles=_tiles, speed=_speed,
    goodput=_goodput, manifest=_manifest, merge=_merge, prompts=_prompts(runs),
    differences=_differences(runs), **_charts(runs),
    dumps=functools.partial(json.dumps, indent=2, ensure_ascii=False))
  storage.write_file(target, page)
  return target


def render(template: str, **fields: Any) -> str:
  """Return a page that needs no other file, by a template beside `page.html`, the look of all."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
  )
  return environment.get_template(template).render(compact=compact, **fields)


def _data_page(target: pathlib.Path, run: _Run) -> str | None:
  """Return the way from a page to that about the records of a run; None: there is none."""
  page = pathlib.Path(*(str(run.config.get(key)) for key in ('records_dir', 'name')),
                      str(run.data.get('fingerprint'))[:16], DATA_PAGE)
  return os.path.relpath(page, target.parent) if page.is_file() else None


def _read(path: pathlib.Path, index: int) -> _Run:
  config, summary, environment, data = (
    storage.read_json(path / f'{name}.json')
    for name in ('config', 'summary', 'environment', 'data'))
  records = metrics.read(path / 'metrics.jsonl')
  train = [r for r in records if 'train/loss' in r]
  if summary.get('step', -1) < max((r['step'] for r in records), default=0):
    summary = {}  # Of an earlier end: the run went on.
  return _Run(
    path, config.get('name') or path.name or path.resolve().name,
    f'run{index % _COLOURS + 1}',
    summary.get('step') or max((r['step'] for r in train), default=0), config, summary,
    environment, data, records, train, [r for r in records if 'validation/loss' in r],
    metrics.read_lines(path / 'samples.jsonl'))


def _known(rows: Sequence[tuple[str, Any, Callable[[Any], str]]]) -> Rows:
  """Return (label, text) of the values that are known."""
  return [(label, text(value)) for label, value, text in rows if value is not None]


def _merge(runs: Sequence[_Run], *tables: Callable[[_Run], Rows]) -> list[tuple[str, list[str]]]:
  """Return tables of runs as one: label, and the text of each run."""
  found = [dict(row for table in tables for row in table(run)) for run in runs]
  labels = dict.fromkeys(label for rows in found for label in rows)
  return [(label, [rows.get(label, '–') for rows in found]) for label in labels]


def _differences(runs: Sequence[_Run]) -> list[tuple[str, list[str]]]:
  """Return the fields of the configs that are not the same in all runs."""
  def fields(node: Any, path: str) -> Rows:
    if isinstance(node, Mapping) and node:
      return [one for key, inner in node.items() for one in fields(inner, f'{path}.{key}')]
    return [(path[1:], json.dumps(node, ensure_ascii=False))]

  merged = _merge(runs, lambda run: fields(run.config, ''))
  return [row for row in merged if len(set(row[1])) > 1]


def _prompts(runs: Sequence[_Run]) -> dict[str, list[tuple[str, str]]]:
  """Return prompt -> (run and step, continuation), step after step."""
  found: dict[str, list[tuple[str, str]]] = {}
  for run in runs:
    steps = {sample.get('step') for sample in run.samples}
    for sample in run.samples:
      labels = [run.name] if len(runs) > 1 else []
      labels += [f'step {sample.get("step")}'] if len(steps) > 1 else []
      prompt = str(sample.get('prompt', ''))
      found.setdefault(prompt, []).append(
        (', '.join(labels), str(sample.get('text', '')).removeprefix(prompt)))
  return found


def _origin(run: _Run) -> Rows:
  """Return the command, date and devices of a run."""
  times = [r['time'] for r in run.records if isinstance(r.get('time'), int | float)]
  dates = dict.fromkeys(
    f'{datetime.datetime.fromtimestamp(time, datetime.UTC):%Y-%m-%d %H:%M}'
    for time in (min(times, default=None), max(times, default=None)) if time is not None)
  kind, count = run.environment.get('device_kind'), run.environment.get('devices')
  return _known([('command', run.environment.get('command'), str),
                 ('date', ' to '.join(dates) + ' UTC' if dates else None, str),
                 ('device', f'{count} x {kind}' if kind and count else kind, str)])


def _tiles(run: _Run) -> Rows:
  """Return the headline figures, as far as they are known."""
  training, data = run.config.get('training') or {}, run.config.get('data') or {}
  step, summary, train, validation = run.step, run.summary, run.train, run.validation
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
    ('parameters', summary.get('parameters'), compact),
    ('training tokens', summary.get('train_tokens') or tokens or None, compact),
    ('tokens per second', _median(train, 'train/tokens_per_second'), '{:,.0f}'.format),
    ('time', summary.get('seconds') or _last(train, 'train/elapsed_seconds'), format_duration),
  ])


def _manifest(run: _Run) -> Rows:
  """Return what the records hold."""
  return _known([
    (f'{label} {name}', (run.data.get(split) or {}).get(field), text)
    for split, label in (('train', 'training'), ('validation', 'held-out'))
    for field, name, text in (
      ('documents', 'documents', '{:,}'.format), ('records', 'records', '{:,}'.format),
      ('tokens', 'tokens', compact), ('text_bytes', 'bytes', compact))
  ] + [('fingerprint', run.data.get('fingerprint'), str)])


def _charts(runs: Sequence[_Run]) -> dict[str, list[Chart]]:
  """Return the charts of losses, other numbers and tasks; several runs lie over each other."""
  alone = len(runs) == 1

  def lines(name: str, noisy: bool, kind: str = 'train', label: str = '') -> list[Line]:
    drawn = []
    for run in runs:
      style, of = (kind, label) if alone else (f'{kind} {run.style}', run.name)
      line = make_line(run.records, name, of, style)
      if noisy and alone:
        drawn.append(line._replace(label='', style='raw'))
      drawn.append(smooth(line, of, style) if noisy else line)
    return drawn

  loss = lines('train/loss', True, label='training')
  held_out = lines('validation/loss', False, 'validation', 'held-out')
  titles = {'Loss, nats per token': loss + held_out} if alone else {
    'Training loss, nats per token': loss, 'Held-out loss, nats per token': held_out,
    'Held-out bits per byte': lines('validation/bits_per_byte', False, 'validation')}
  names = dict.fromkeys(name for run in runs for r in run.records for name in r
                        if name.startswith('task/'))
  return {
    'losses': [make_chart(title, of, '{:.4g}'.format, log=True) for title, of in titles.items()],
    'charts': [
      make_chart(title, lines(name, noisy), compact, 4, log='norm' in title)
      for title, name, noisy in (
        ('Learning rate', 'train/learning_rate', False),
        ('Gradient norm', 'train/grad_norm', True),
        ('Tokens per second', 'train/tokens_per_second', True),
        ('Training accuracy', 'train/accuracy', True),
        ('Parameter norm', 'train/param_norm', False),
        ('Seconds waiting for data', 'train/data_wait_seconds', True))],
    'task_charts': [
      make_chart(': '.join(name.split('/', 2)[1:]).replace('_', ' '),
                 lines(name, False, 'validation'), '{:.4g}'.format, 4) for name in names],
  }


def _speed(run: _Run) -> Rows:
  """Return the time, memory and utilisation of a run."""
  train = run.train
  utilisation, kind = _median(train, 'train/mfu'), run.environment.get('device_kind', 'this device')
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


def _goodput(run: _Run) -> list[tuple[str, str, float]]:
  """Return (cause, text, per cent) of what the time of the run went into."""
  records = [*run.records, run.summary.get('goodput') or {}]
  last: Record = next((one for one in reversed(records) if 'goodput/fraction' in one), {})
  spent = {cause: max(last.get(f'goodput/{cause}_seconds') or 0.0, 0.0) for cause in CAUSES}
  shares = {cause: 100 * seconds / (sum(spent.values()) or 1) for cause, seconds in spent.items()}
  return [(CAUSES[cause], f'{format_duration(spent[cause])}, {share:.1f} %', round(share, 2))
          for cause, share in shares.items() if spent[cause]]


def _last(records: Sequence[Record], name: str) -> float | None:
  return next((r[name] for r in reversed(records) if r.get(name) is not None), None)


def _median(records: Sequence[Record], name: str) -> float | None:
  values = [r[name] for r in records if r.get(name) is not None]
  return statistics.median(values) if values else None


class Line(NamedTuple):
  """A line: its label, '' for none; its CSS classes, of which 'validation' marks the points."""

  label: str
  style: str
  steps: np.ndarray
  values: np.ndarray


def make_line(records: Sequence[Mapping[str, Any]], name: str, label: str, style: str) -> Line:
  """Collect the finite values of a metric from records."""
  found = [(r['step'], r[name]) for r in records
           if isinstance(r.get(name), int | float) and math.isfinite(r[name])]
  steps, values = zip(*found, strict=True) if found else ((), ())
  return Line(label, style, np.array(steps, int), np.array(values, float))


def smooth(noisy: Line, label: str, style: str) -> Line:
  """Return the running mean over about a twentieth of the points, spikes left out.

  The mean is that of each window's middle half. The window narrows towards the first point, where
  metrics fall steeply, and is cut off at the last one, where they are noise.
  """
  count = len(noisy.values)
  centres = np.unique(np.linspace(0, count - 1, min(count, _MAX_BUCKETS)).round().astype(int))
  means = []
  for centre in centres:
    half = min(count // 40, centre)
    window = np.sort(noisy.values[centre - half : centre + half + 1])
    cut = len(window) // 4
    means.append(window[cut : len(window) - cut].mean())
  return Line(label, style, noisy.steps[centres], np.array(means))


def make_chart(
  title: str, lines: Sequence[Line], text: Callable[[float], str], num_ticks: int = 6,
  log: bool = False,
) -> Chart:
  """Lay out a chart for the template; None where there is no point.

  `text` writes a value for a label. With `log` the value axis is logarithmic where all values are
  positive and span more than a factor of 3.
  """
  lines = [line for line in lines if len(line.steps)]
  if not lines:
    return None
  everything = np.concatenate([line.values for line in lines])
  low, high = float(everything.min()), float(everything.max())
  log = log and 0 < 3 * low < high
  if high - low <= 1e-9 * abs(high):
    margin = abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
  scale: Any = np.log if log else np.asarray
  last_step = max(*(line.steps[-1] for line in lines), 1)

  def x(step: Any) -> Any:
    return 100 * step / last_step

  def y(value: Any) -> Any:
    return 100 * (scale(high) - scale(value)) / (scale(high) - scale(low))

  drawn = []
  for label, style, steps, values in lines:
    steps, values = _thin(steps, values)
    places = [f'{a:.2f} {b:.2f}' for a, b in zip(x(steps), y(values), strict=True)]
    marked = len(places) == 1 or ('validation' in style and len(places) <= _MAX_MARKS)
    points = [{'place': place, 'label': f'step {step:,}: {text(value)}'}
              for place, step, value in zip(places, steps, values, strict=True) if marked]
    drawn.append({'label': label, 'style': style, 'latest': text(float(f'{values[-1]:.4g}')),
                  'path': 'M' + 'L'.join(places), 'points': points})
  y_ticks = (_log_ticks if log else _linear_ticks)(low, high, 5)
  return {
    'title': title,
    'lines': drawn,
    'x_ticks': [{'label': compact(tick), 'place': round(x(tick), 2)}
                for tick in _linear_ticks(0, last_step, num_ticks, smallest=1)],
    'y_ticks': [{'label': text(tick), 'place': round(float(y(tick)), 2)} for tick in y_ticks],
  }


def compact(value: float) -> str:
  """Return a number short enough for an axis: 950, 12.5k, 3.1M, 2.5e-4."""
  for limit, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= limit * 0.99995:
      return f'{value / limit:.4g}{unit}'
  if 0 < abs(value) < 0.000995:
    digits, _, power = f'{value:.2e}'.partition('e')
    return f'{float(digits):g}e{int(power)}'
  return f'{value:.4g}'


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Keep each bucket's smallest and largest value, and the ends: spikes stay visible."""
  if len(steps) <= 2 * _MAX_BUCKETS:
    return steps, values
  kept = {0, len(steps) - 1}
  for bucket in np.array_split(np.arange(len(steps)), _MAX_BUCKETS):
    kept |= {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
  index = sorted(kept)
  return steps[index], values[index]


def _linear_ticks(low: float, high: float, count: int, smallest: float = 0) -> list[float]:
  """Return round numbers in [low, high], about `count` of them, at least `smallest` apart."""
  rough = max((high - low) / max(count - 1, 1), smallest) or 1.0
  power = 10.0 ** math.floor(math.log10(rough))
  gap = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
  first = math.ceil(low / gap - 1e-9)
  return [round(i * gap, 12) for i in range(first, math.floor(high / gap + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
  """Return round numbers in [low, high], about `count` of them, evenly over its logarithm."""
  digits = 1 if high > 5 * low else 2
  ticks = {float(f'{tick:.{digits}g}') for tick in np.geomspace(low, high, count)}
  return sorted(tick for tick in ticks if low <= tick <= high)
