"""The best checkpoint of a run, and when to stop looking for a better one.

All is read from metrics.jsonl, so that a resumed run decides as one that was never stopped.
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.experiment import BestConfig, Experiment
from jaxllm.training import metrics


class Selection(NamedTuple):
  """What has been measured so far.

  Attributes:
    config: what tells the best; None: nothing is selected.
    smaller_is_better: whether its metric should be small.
    history: (step, value) pairs, as they came.
  """

  config: BestConfig | None
  smaller_is_better: bool = False
  history: tuple[tuple[int, float], ...] = ()

  @property
  def best(self) -> tuple[int, float] | None:
    """(step, value) of the best measurement, the first of equals; None: there is none."""
    if self.config is None or not self.history:
      return None
    sign = 1 if self.smaller_is_better else -1
    return min(self.history, key=lambda pair: sign * pair[1])

  @property
  def facts(self) -> dict[str, Any]:
    """The metric and value of the best measurement; empty where there is none."""
    if self.config is None or self.best is None:
      return {}
    return {'metric': self.config.metric, 'value': self.best[1]}

  @property
  def exhausted(self) -> bool:
    """Whether the run's patience is at an end."""
    if self.config is None or self.config.patience is None or self.best is None:
      return False
    since = [step for step, _ in self.history if step > self.best[0]]
    return len(since) >= self.config.patience


def add(selection: Selection, step: int, scores: Mapping[str, float]) -> Selection:
  """Return the selection after the scores of a step, which may lack the metric."""
  value = math.nan if selection.config is None else scores.get(selection.config.metric, math.nan)
  if not math.isfinite(value):
    return selection
  return selection._replace(history=(*selection.history, (step, value)))


def restore(experiment: Experiment, workdir: str | os.PathLike[str], step: int) -> Selection:
  """Return the selection of a run that continues after `step` steps."""
  config = experiment.best
  if config is None:
    return Selection(None)
  records = metrics.read(pathlib.Path(workdir) / 'metrics.jsonl')
  return Selection(config, experiment.measured[config.metric], tuple(
    (record['step'], record[config.metric]) for record in records
    if record['step'] <= step and record.get(config.metric) is not None
  ))
