"""Batches that are passed over after a run has gone back, so that a resumed run does so too."""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxllm import storage

FILE = 'passed_over.json'
Passed = Sequence[Mapping[str, Any]]


def read(workdir: pathlib.Path) -> Passed:
  """Return what a run has passed over: `first` and `last` of batches that follow each other."""
  return storage.read_json(workdir / FILE).get('batches', [])


def indices(passed: Passed, first: int, last: int) -> Iterator[int]:
  """Yield the index of the batch of each step after `first`, up to `last`."""
  kept = (index for index in itertools.count()
          if not any(one['first'] <= index <= one['last'] for one in passed))
  return itertools.islice(kept, first, last)
