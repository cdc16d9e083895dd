"""Which checkpoint of a directory is the best one: a small file beside the steps."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxllm import storage

FILE = 'best.json'


@dataclasses.dataclass
class Kept:
  """A policy of Orbax that never deletes some steps.

  Attributes:
    steps: which; may be changed at any time.
  """

  steps: set[int]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Return for each checkpoint whether it is kept."""
    return [checkpoint.step in self.steps for checkpoint in checkpoints]


def read(directory: epath.Path) -> int | None:
  """Return the step that is marked; None: no step is, or the file is damaged."""
  try:
    step = json.loads((directory / FILE).read_text())['step']
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return step if isinstance(step, int) else None


def write(directory: epath.Path, step: int, facts: Mapping[str, Any]) -> None:
  """Mark a step, with JSON-able facts of why; the file is either whole or as it was."""
  storage.write_file(directory / FILE, json.dumps({'step': step, **facts}) + '\n')
