"""Which tasks a model is scored on: kinds with their default data, configs, or a JSON file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm import mistakes, storage
from jaxllm.config import Config, ConfigError
from jaxllm.tasks import TASKS
from jaxllm.tasks.records import RecordSource

Suite = dict[str, Any]


def select(
  tasks: str | Sequence[Any], split: str, own: Any = None, data: str | None = None,
  limit: int | None = None,
) -> Suite:
  """Return task configs by name.

  Args:
    tasks: kinds separated by commas, or a .json file: the config of one task, a list of them, or an
      object of them by name; or a sequence of kinds and configs.
    split: which split will be scored.
    own: the task that the model was fine-tuned on; its kind then means this config.
    data: where the records of the one task come from, as `RecordSource.location`, all of the split.
    limit: most records of each task.

  Raises:
    ValueError: no such kind or file, a config that is refused, or `data` for several tasks.
  """
  named = named_tasks(tasks)
  if data and len(named) > 1:
    raise ValueError(f'data={data} is for one task, not for {", ".join(named)}; name the data of '
                     'several in a JSON file')
  changes: dict[str, Any] = {} if limit is None else {'limit': limit}
  if data:
    changes |= {'sources': (RecordSource(location=data, split=split),), 'group': None}
  found = {}
  for name, fields in named.items():
    if own is not None and fields == {'kind': own.kind}:
      config = own
    elif isinstance(fields, Config):
      config = fields
    else:
      try:
        config = TASKS[fields['kind']].config(**({'data': changes} if data else {}) | fields)
      except ConfigError as error:
        raise ValueError(f'tasks={tasks}: {name}: {error}') from None
    found[name] = config.replace(data=config.data.replace(**changes))
  return found


def named_tasks(tasks: str | Sequence[Any]) -> dict[str, Any]:
  """Return name -> config of a task or its fields; argument and errors as in `select`."""
  given: Any = tasks
  if isinstance(tasks, str):
    given = _read(tasks) if tasks.endswith('.json') else tasks.split(',')
  def kind_of(task: Any) -> str:
    return str(task.get('kind') if isinstance(task, Mapping) else getattr(task, 'kind', task))

  kinds = [*map(kind_of, given)]
  # Where a kind stands twice, its name has the place.
  named = given if isinstance(given, Mapping) else {
    f'{kind}_{i}' if kinds.count(kind) > 1 else kind: one
    for i, (kind, one) in enumerate(zip(kinds, given, strict=True), start=1)}
  for name, fields in named.items():
    kind = kind_of(fields)
    if kind not in TASKS:
      raise ValueError(f'tasks={tasks}: {name}: kind {kind!r} is no task; one of '
                       f'{", ".join(TASKS)}{mistakes.hint(kind, TASKS)}')
  return {name: {'kind': one} if isinstance(one, str) else one for name, one in named.items()}


def in_format_of(config: Any, own: Any) -> Any:
  """Return a task with the prompt of the task `own` that a model was fine-tuned on.

  A task of another kind, or with other labels, says nothing about `config`, which then stays.
  """
  if own is None or own.kind != config.kind:
    return config
  labels = [{label for label, _ in getattr(one, 'labels', ())} for one in (own, config)]
  return own.replace(data=config.data) if labels[0] == labels[1] else config


def _read(location: str) -> Any:
  try:
    content = json.loads(storage.local(location, '--tasks=').read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'tasks={location} cannot be read as JSON: {error}') from None
  if not isinstance(content, dict | list) or not content:
    raise ValueError(f'tasks={location}: expected the config of a task, a list of them, or an '
                     'object of them by name')
  return [content] if 'kind' in content and isinstance(content, dict) else content
