"""What a run tells while it lasts: metrics.jsonl, TensorBoard, a progress bar, and utilisation.

- `open_writer` -> `MetricsWriter`: one record per call, on disk at once; survives a resume. `read`.
- `Progress`: a bar on a terminal, plain lines elsewhere.
- `device_peak_flops`, `mfu`, `device_memory_bytes`: how well the devices are used.
"""

import json
import math
import os
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import tqdm

# Dense peak per JAX device in FLOP/s, (bfloat16, float32), by `device_kind`; None: no such figure.
# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "Peak compute per chip (bf16)"; a TPU7x
# chip is two devices. A float32 product there runs as bfloat16 passes, for which no peak is given.
# NVIDIA: half of the data sheets' "with sparsity" Tensor Core figures, BFLOAT16 and TF32; XLA's
# default precision runs float32 products in TF32. A100: A100 datasheet (June 2021). H100: H100
# datasheet (SXM, PCIe, NVL). H200: H200 datasheet (SXM, NVL). B200: Blackwell architecture brief
# (HGX B200). L4, L40S: their datasheets.
_PEAK_FLOPS: Mapping[str, tuple[float, float | None]] = {
  'TPU v4': (275e12, None),
  'TPU v5 lite': (197e12, None),
  'TPU v5e': (197e12, None),
  'TPU v5': (459e12, None),
  'TPU v5p': (459e12, None),
  'TPU v6 lite': (918e12, None),
  'TPU v6e': (918e12, None),
  'TPU7x': (2307e12 / 2, None),
  'NVIDIA A100-SXM4-40GB': (312e12, 156e12),
  'NVIDIA A100-SXM4-80GB': (312e12, 156e12),
  'NVIDIA A100-PCIE-40GB': (312e12, 156e12),
  'NVIDIA A100 80GB PCIe': (312e12, 156e12),
  'NVIDIA H100 80GB HBM3': (1979e12 / 2, 989e12 / 2),
  'NVIDIA H100 PCIe': (1513e12 / 2, 756e12 / 2),
  'NVIDIA H100 NVL': (1671e12 / 2, 835e12 / 2),
  'NVIDIA H200': (1979e12 / 2, 989e12 / 2),
  'NVIDIA H200 NVL': (1671e12 / 2, 835e12 / 2),
  'NVIDIA B200': (4500e12 / 2, 2200e12 / 2),
  'NVIDIA L4': (242e12 / 2, 120e12 / 2),
  'NVIDIA L40S': (733e12 / 2, 366e12 / 2),
}


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
  """Return the vendor's dense peak of one JAX device in FLOP/s, None where there is no figure.

  Args:
    device_kind: as `jax.Device.device_kind` gives it.
    dtype: of the matrix products, 'bfloat16' or 'float32'.
  """
  if device_kind not in _PEAK_FLOPS or dtype not in ('bfloat16', 'float32'):
    return None
  return _PEAK_FLOPS[device_kind][dtype == 'float32']


def mfu(flops_per_second: float, num_devices: int, peak_flops: float | None) -> float | None:
  """Return the model FLOPs utilisation in [0, 1], None where the peak is unknown.

  Args:
    flops_per_second: what the model needs, recomputation not counted, over all devices.
    num_devices: all devices of the run.
    peak_flops: of one device, from `device_peak_flops`.

  Reference:
    Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
  """
  return None if peak_flops is None else flops_per_second / (num_devices * peak_flops)


def device_memory_bytes() -> int:
  """Return the peak memory of this process's fullest device; on CPU, of the whole process."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max(stat.get('peak_bytes_in_use', 0) for stat in stats)
  if peak:
    return peak
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsWriter:
  """Appends records to metrics.jsonl and TensorBoard; close it, or use it in a `with`."""

  def __init__(self, lines: TextIO | None, tensorboard: Any | None):
    self._lines = lines
    self._tensorboard = tensorboard

  def write(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Write one record, on disk when this returns.

    Args:
      step: steps taken so far.
      scalars: name -> number; None is left out, what is not finite becomes null in the JSON.
    """
    if self._lines is None or self._tensorboard is None:
      return
    values = {name: float(value) for name, value in scalars.items() if value is not None}
    record: dict[str, Any] = {'step': int(step), 'time': time.time()}
    for name, value in values.items():
      record[name] = value if math.isfinite(value) else None
    self._lines.write(json.dumps(record, allow_nan=False) + '\n')
    self._lines.flush()
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step, walltime=record['time'])

  def close(self) -> None:
    """Flush and close both files."""
    for file in (self._lines, self._tensorboard):
      if file is not None:
        file.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def open_writer(workdir: str | os.PathLike[str], step: int = 0) -> MetricsWriter:
  """Open the metrics of a run, which continues after `step` steps.

  Records of later steps, from a run that ended before its next checkpoint, are dropped: from
  metrics.jsonl in one atomic replacement, from TensorBoard by its purge event. Processes other
  than the first get a writer that writes nothing.

  Args:
    workdir: an existing directory.
    step: the step that the run was restored to; 0 for a new one.
  """
  if jax.process_index() != 0:
    return MetricsWriter(None, None)
  from tensorboardX import SummaryWriter  # Takes a tenth of a second.

  path = pathlib.Path(workdir) / 'metrics.jsonl'
  _drop_later(path, step)
  tensorboard = SummaryWriter(
    str(path.with_name('tensorboard')), purge_step=step + 1, flush_secs=30,
    # Two files of the same second would otherwise have the same name.
    filename_suffix=f'.{time.time_ns()}',
  )
  return MetricsWriter(path.open('a', encoding='utf-8'), tensorboard)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Return the records of a metrics.jsonl, without a line torn by a crash; none where it is not."""
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8', errors='replace').split('\n')
  except FileNotFoundError:
    return []
  return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _drop_later(path: pathlib.Path, step: int) -> None:
  """Keep the whole records of a metrics.jsonl up to `step`."""
  if not path.exists():
    return
  text = path.read_text(encoding='utf-8', errors='replace')
  lines = [f'{line}\n' for line in text.split('\n')[:-1]]
  kept = [line for line in lines if _step_of(line) <= step]
  if ''.join(kept) != text:
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(''.join(kept), encoding='utf-8')
    os.replace(temporary, path)


def _step_of(line: str) -> float:
  """Return the step of a record; infinity for a line torn by a crash."""
  try:
    return json.loads(line)['step']
  except (ValueError, TypeError, KeyError):
    return math.inf


class Progress:
  """Shows steps, loss, tokens/s and time left on stderr.

  A bar where stderr is a terminal; elsewhere a line when `line_seconds` have passed, and at the
  end. Time left is judged by the steps since the first update, which compilation precedes.
  """

  def __init__(
    self, num_steps: int, step: int = 0, enabled: bool = True, line_seconds: float = 10.0
  ):
    """Start at `step` of `num_steps`; where not `enabled` (other processes), show nothing."""
    self._num_steps = num_steps
    self._line_seconds = line_seconds
    self._enabled = enabled
    self._started: tuple[int, float] | None = None
    self._last_line = -math.inf
    self._bar = None
    if enabled and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=num_steps, initial=step, dynamic_ncols=True, file=sys.stderr,
        bar_format='{percentage:3.0f}% |{bar}| {desc}',
      )

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Show that `step` steps are done."""
    if not self._enabled:
      return
    now = time.monotonic()
    self._started = self._started or (step, now)
    text = f'step {step:,}/{self._num_steps:,}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s'
    text += f'  {self._time_left(step, now)}'
    if self._bar is not None:
      self._bar.n = step
      self._bar.set_description_str(text, refresh=False)
      self._bar.update(0)
    elif now - self._last_line >= self._line_seconds or step == self._num_steps:
      self._last_line = now
      print(text, file=sys.stderr, flush=True)

  def message(self, text: str) -> None:
    """Print a line without tearing the bar."""
    if self._enabled:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    """Leave the bar as it stands."""
    if self._bar is not None:
      self._bar.refresh()
      self._bar.close()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _time_left(self, step: int, now: float) -> str:
    if step >= self._num_steps:
      return 'done'
    first_step, first_time = self._started or (step, now)
    if step == first_step:
      return ''
    seconds = (now - first_time) / (step - first_step) * (self._num_steps - step)
    return f'{format_duration(seconds)} left'


def format_duration(seconds: float) -> str:
  """Return a duration as people say it: `42 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60:02d} s'
  minutes = round(seconds / 60)
  if minutes < 24 * 60:
    return f'{minutes // 60} h {minutes % 60:02d} min'
  hours = round(minutes / 60)
  return f'{hours // 24} d {hours % 24:02d} h'
