"""Which tasks a model is scored on: kinds with their default data, or a JSON file of configs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxllm.config import ConfigError
from jaxllm.tasks import TASKS
from jaxllm.tasks.records import RecordSource

Suite = dict[str, Any]


def select(
  names: str, split: str, own: Any = None, data: str | None = None, limit: int | None = None
) -> Suite:
  """Return task configs by name.

  Args:
    names: kinds separated by commas, or a .json file: the config of one task, a list of them, or an
      object of them by name.
    split: which split will be scored.
    own: the task that the model was fine-tuned on; its kind then means this config.
    data: where the records of the one task come from, as `RecordSource.location`; all of them are
      of the split.
    limit: most records of each task.

  Raises:
    ValueError: there is no such kind or file, a config is not accepted, or `data` is given for
      several tasks.
  """
  if names.endswith('.json'):
    listed = {name: (fields, f'{names}: {name}') for name, fields in _read(names).items()}
  else:
    listed = {kind: ({'kind': kind}, f'--tasks={names}') for kind in names.split(',')}
  if data and len(listed) > 1:
    raise ValueError(f'--data={data} is for one task, not for {", ".join(listed)}; name the data '
                     'of several in a JSON file')
  changes: dict[str, Any] = {} if limit is None else {'limit': limit}
  if data:
    changes |= {'sources': (RecordSource(location=data, split=split),), 'group': None}
  found = {}
  for name, (fields, where) in listed.items():
    if own is None or fields != {'kind': own.kind}:
      config = _config({'data': changes, **fields} if data else fields, where)
    else:
      config = own
    found[name] = config.replace(data=config.data.replace(**changes))
  return found


def in_format_of(config: Any, own: Any) -> Any:
  """Return a task with the prompt of the task `own` that a model was fine-tuned on.

  A task of another kind, or with other labels, says nothing about `config`, which then stays.
  """
  if own is None or own.kind != config.kind:
    return config
  labels = [{label for label, _ in getattr(one, 'labels', ())} for one in (own, config)]
  return own.replace(data=config.data) if labels[0] == labels[1] else config


def _config(fields: Any, where: str) -> Any:
  kind = str(fields.get('kind') if isinstance(fields, Mapping) else fields)
  if kind not in TASKS:
    raise ValueError(f'{where}: kind {kind!r} is no task; one of {", ".join(TASKS)}')
  try:
    return TASKS[kind].config(**fields)
  except ConfigError as error:
    raise ValueError(f'{where}: {error}') from None


def _read(location: str) -> dict[str, Any]:
  try:
    content = json.loads(pathlib.Path(location).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'--tasks={location} cannot be read as JSON: {error}') from None
  if isinstance(content, dict) and 'kind' in content:
    content = [content]
  if isinstance(content, list):
    kinds = [str(item.get('kind')) if isinstance(item, dict) else str(item) for item in content]
    content = {
      f'{kind}_{i}' if kinds.count(kind) > 1 else kind: item
      for i, (kind, item) in enumerate(zip(kinds, content, strict=True), start=1)}
  if not isinstance(content, dict) or not content:
    raise ValueError(f'--tasks={location}: expected the config of a task, a list of them, or an '
                     'object of them by name')
  return content
