"""Records of a task: the rows of sources of data, divided into splits.

`load` is deterministic: which split a record belongs to, and which records a limit keeps, depends
on what the records say, not on their order.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pydantic
from absl import logging

from jaxllm import storage
from jaxllm.config import Config
from jaxllm.data import documents, files
from jaxllm.data.documents import SourceConfig
from jaxllm.data.files import TextFile
from jaxllm.data.readers import Row

Pair = tuple[str, str]
_NUMBERS = ('', 'id', '_id', 'idx', 'index', 'guid', 'uid', 'uuid', 'qid', 'unnamed: 0')


class RecordSource(SourceConfig):
  """Where rows come from.

  A file of text gives a row for each line, or for each text where there is a `separator`; a .json
  may have the form of SQuAD.
  """

  location: str | None = None  # type: ignore[assignment]
  """As for `SourceConfig`; None where there are `columns`."""
  columns: tuple[Pair, ...] = ()
  """Instead of a location: (field, text file) pairs; line i of every file makes row i."""
  split: str | None = None
  """The split that all rows belong to; None divides them by `fractions`."""
  constants: tuple[Pair, ...] = ()
  """(field, value) pairs that every row gets, such as the label that a whole file has."""

  only_text: ClassVar[bool] = False
  plain_text: ClassVar[str] = 'lines'

  @pydantic.model_validator(mode='after')
  def _check_columns(self) -> 'RecordSource':
    if (self.location is None) == (not self.columns):
      raise ValueError(f'location={self.location!r} and columns={self.columns!r}: set one of them')
    return self


class RecordsConfig(Config):
  """Which records a task has."""

  sources: tuple[RecordSource, ...]
  """Where rows come from, one after the other."""
  fields: tuple[Pair, ...] = ()
  """(the task's name, the data's name) pairs of fields; the data's may be a path, as
  'answers.text'. Other fields keep their names."""
  fractions: tuple[tuple[str, float], ...] = (('train', 0.8), ('validation', 0.1), ('test', 0.1))
  """How rows without a split of their own are divided, by a hash of what they say (no `id`);
  equal rows count once."""
  group: str | None = None
  """A field whose rows of equal value stay in one split, such as the article of a question."""
  seed: int = 0
  """Another seed divides otherwise."""
  limit: int | None = pydantic.Field(default=None, gt=0)
  """Most records per split, chosen by hash, in their order; None takes all."""

  @property
  def splits(self) -> set[str]:
    """Names of the splits."""
    named = {source.split for source in self.sources}
    shared = {name for name, share in self.fractions if share} if None in named else set()
    return {name for name in named if name} | shared

  @property
  def training(self) -> tuple[RecordSource, ...]:
    """The sources of the training records."""
    return tuple(source for source in self.sources if source.split in (None, 'train'))

  @property
  def mixed(self) -> bool:
    """Whether sources have weights or epochs, so that each record is of one of them alone."""
    return documents.mixed(self.training)

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'RecordsConfig':
    if not self.sources:
      raise ValueError('sources=(): at least one source is needed')
    documents.mixed(self.training)
    if any(source.weight or source.epochs for source in {*self.sources} - {*self.training}):
      raise ValueError('sources: only what is trained on is mixed; leave weight and epochs away')
    shares = [share for _, share in self.fractions]
    if min(shares, default=0) < 0 or sum(shares) > 1 + 1e-9:
      raise ValueError(f'fractions={self.fractions}: shares of at least 0 that add up to at most 1')
    return self


def load(config: RecordsConfig, split: str) -> list[dict[str, Any]]:
  """Return the fields of `rows`."""
  return [row.fields for row in rows(config, split)]


def rows(config: RecordsConfig, split: str) -> list[Row]:
  """Return the records of a split in the order of the data.

  Args:
    config: sources and how to divide them.
    split: name of a source's split or of one in `fractions`.

  Raises:
    ValueError: a file is missing or damaged, or the split has no record.
  """
  found: list[Row] = []
  undivided: list[Row] = []
  for number, source in enumerate(one for one in config.sources if one.split in (None, split)):
    named = (_named(row, config, source)._replace(number=number) for row in _read(source))
    (undivided if source.split is None else found).extend(named)
  if split == 'train':
    found = _not_held_out(found, config)
  found += _part(undivided, config, split)
  if not found:
    raise ValueError(f'split {split!r} has no records; splits: {", ".join(sorted(config.splits))}')
  if config.limit is not None and len(found) > config.limit:
    ranked = sorted(range(len(found)), key=lambda i: _digest(found[i].fields, config.seed))
    found = [found[i] for i in sorted(ranked[: config.limit])]
  return found


def _part(rows: Sequence[Row], config: RecordsConfig, split: str) -> list[Row]:
  """Return the distinct rows whose groups, ranked by hash, lie in the split's exact share."""
  distinct = list({_digest(row.fields, config.seed): row for row in rows}.values())
  keys = [_key(row, config) for row in distinct]
  ranked = sorted(set(keys))
  start = 0.0
  for name, share in config.fractions:
    stop = start + share
    if name == split:
      chosen = set(ranked[round(start * len(ranked)) : round(stop * len(ranked))])
      return [row for row, key in zip(distinct, keys, strict=True) if key in chosen]
    start = stop
  return []


def _key(row: Row, config: RecordsConfig) -> bytes:
  """Return what rows have in common that stay in one split."""
  return _digest(
    {name: value for name, value in row.fields.items() if name.lower() not in _NUMBERS}
    if config.group is None else _look_up(row, config.group), config.seed)


def _not_held_out(rows: list[Row], config: RecordsConfig) -> list[Row]:
  """Return rows without those that another slice of the same source holds out."""
  trained = {one.location for one in config.sources if one.split == 'train'}
  held_out = {_key(_named(row, config, one), config) for one in config.sources
              if one.split not in (None, 'train') and one.location in trained for row in _read(one)}
  kept = [row for row in rows if not held_out or _key(row, config) not in held_out]
  if len(kept) < len(rows):
    logging.warning('data.sources: %d rows are held out too, and not trained on',
                    len(rows) - len(kept))
  return kept


def _digest(value: Any, seed: int) -> bytes:
  text = json.dumps([seed, value], sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _named(row: Row, config: RecordsConfig, source: RecordSource) -> Row:
  """Return a row under the task's names."""
  renamed = {ours: _look_up(row, theirs) for ours, theirs in config.fields}
  return row._replace(fields={**row.fields, **renamed, **dict(source.constants)})


def _look_up(row: Row, path: str) -> Any:
  value: Any = row.fields
  for key in path.split('.'):
    if not isinstance(value, Mapping) or key not in value:
      raise ValueError(f'{row.where}: there is no field {path!r} (fields: '
                       f'{", ".join(map(str, row.fields))})')
    value = value[key]
  return value


def _read(source: RecordSource) -> Iterator[Row]:
  if source.location is None:
    yield from _aligned(source)
  else:
    for row in documents.find(source).rows:
      yield from _unnested(row)


def _unnested(row: Row) -> Iterator[Row]:
  """Yield the row, or the rows that it holds as 'data', as SQuAD does."""
  items = row.fields.get('data')
  if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
    items = [row.fields]
  for number, item in enumerate(items):
    place = row.place if item is row.fields else f'{row.place}, data[{number}]'
    inner = row._replace(place=place, fields=item)
    yield from _questions(inner, str(number)) if 'paragraphs' in item else [inner]


def _questions(row: Row, title: str) -> Iterator[Row]:
  """Flatten SQuAD's nesting of article, paragraph and question."""
  try:
    for i, paragraph in enumerate(row.fields['paragraphs']):
      for j, question in enumerate(paragraph['qas']):
        yield row._replace(place=f'{row.place}, paragraphs[{i}].qas[{j}]', fields={
          'id': question['id'],
          'title': row.fields.get('title', title),
          'context': paragraph['context'],
          'question': question['question'],
          'answers': [answer['text'] for answer in question['answers']],
          'answer_starts': [answer['answer_start'] for answer in question['answers']],
        })
  except (KeyError, TypeError) as error:
    raise ValueError(f'{row.where}: not in the format of SQuAD ({error!r})') from None


def _aligned(source: RecordSource) -> Iterator[Row]:
  names, paths = zip(*source.columns, strict=True)
  here = [storage.local(path, 'data.sources: ') for path in paths]
  for path in here:
    if not path.is_file():
      raise ValueError(f'data.sources: no file {str(path)!r}')
  lines = [list(files.lines(TextFile(path, source.encoding))) for path in here]
  counts = dict(zip(paths, map(len, lines), strict=True))
  if len(set(counts.values())) > 1:
    raise ValueError(f'data.sources: columns need equally many lines, but there are {counts}')
  for number, values in enumerate(zip(*lines, strict=True), 1):
    fields = dict(zip(names, map(str.strip, values), strict=True))
    yield Row(' and '.join(paths), f'line {number}', fields)
