"""Records of a task: rows of files, packages, TFDS or Hugging Face datasets, divided into splits.

`load` is deterministic: which split a record belongs to, and which records a limit keeps, depends
on what the records say, not on their order.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pydantic

from jaxllm.config import Config
from jaxllm.data import documents, files, readers
from jaxllm.data.documents import Encoding, SourceConfig
from jaxllm.data.files import TextFile
from jaxllm.tasks import packages

Row = dict[str, Any]
Pair = tuple[str, str]


class RecordSource(Config):
  """Where rows come from."""

  location: str | None = None
  """A file (.jsonl, .json, also SQuAD's, .csv, .tsv, .parquet; of .txt and its like each line is a
  row with the field 'text'; all also as .gz, .bz2, .xz or .zst), 'package:NAME[/PART]' for one of
  `tasks.packages`, 'tfds:NAME[/CONFIG][:VERSION]?split=SPLIT' or 'hf:NAME[:CONFIG]?split=SPLIT'."""
  format: Literal['text', 'jsonl', 'json', 'csv', 'tsv', 'parquet'] | None = None
  """How a file is read; None goes by its name, and refuses unknown endings."""
  encoding: Encoding = 'utf-8'
  """The encoding of files, by its name in Python."""
  columns: tuple[Pair, ...] = ()
  """Instead of a location: (field, text file) pairs; line i of every file makes row i."""
  split: str | None = None
  """The split that all rows belong to; None divides them by `fractions`."""
  constants: tuple[Pair, ...] = ()
  """(field, value) pairs that every row gets, such as the label that a whole file has."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'RecordSource':
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
  """How rows without a split of their own are divided, by a hash of what they say; equal rows count
  once."""
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

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'RecordsConfig':
    if not self.sources:
      raise ValueError('sources=(): at least one source is needed')
    shares = [share for _, share in self.fractions]
    if min(shares, default=0) < 0 or sum(shares) > 1 + 1e-9:
      raise ValueError(f'fractions={self.fractions}: shares of at least 0 that add up to at most 1')
    return self


def load(config: RecordsConfig, split: str, required: Sequence[str] = ()) -> list[Row]:
  """Read the records of a split.

  Args:
    config: sources and how to divide them.
    split: name of a source's split or of one in `fractions`.
    required: fields that every record must have.

  Returns:
    Records in the order of the data.

  Raises:
    ValueError: a file is missing or damaged, a field is missing, or the split has no record.
  """
  rows: list[Row] = []
  undivided: list[Row] = []
  for source in config.sources:
    if source.split in (None, split):
      named = (_named(row, config, source, required) for row in _read(source))
      (undivided if source.split is None else rows).extend(named)
  rows += _part(undivided, config, split)
  if not rows:
    raise ValueError(f'split {split!r} has no records; splits: {", ".join(sorted(config.splits))}')
  if config.limit is not None and len(rows) > config.limit:
    ranked = sorted(range(len(rows)), key=lambda i: _digest(rows[i], config.seed))
    rows = [rows[i] for i in sorted(ranked[: config.limit])]
  return rows


def _part(rows: Sequence[Row], config: RecordsConfig, split: str) -> list[Row]:
  """Return the distinct rows whose groups, ranked by hash, lie in the split's share of them.

  By rank and not by the hash itself, so that the shares are exact.
  """
  distinct = list({_digest(row, config.seed): row for row in rows}.values())
  keys = [
    _digest(row if config.group is None else _look_up(row, config.group), config.seed)
    for row in distinct
  ]
  ranked = sorted(set(keys))
  start = 0.0
  for name, share in config.fractions:
    stop = start + share
    if name == split:
      chosen = set(ranked[round(start * len(ranked)) : round(stop * len(ranked))])
      return [row for row, key in zip(distinct, keys, strict=True) if key in chosen]
    start = stop
  return []


def _digest(value: Any, seed: int) -> bytes:
  text = json.dumps([seed, value], sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _named(
  row: Mapping[str, Any], config: RecordsConfig, source: RecordSource, required: Sequence[str]
) -> Row:
  """Return a row under the task's names."""
  renamed = {ours: _look_up(row, theirs) for ours, theirs in config.fields}
  result = {**row, **renamed, **dict(source.constants)}
  for name in required:
    if name not in result:
      raise ValueError(f'a record has no field {name!r} (fields: {", ".join(map(str, row))}); name '
                       f"it in data.fields, as (('{name}', 'its name in the data'),)")
  return result


def _look_up(row: Mapping[str, Any], path: str) -> Any:
  value: Any = row
  for key in path.split('.'):
    if not isinstance(value, Mapping) or key not in value:
      raise ValueError(f'a record has no field {path!r} (fields: {", ".join(map(str, row))})')
    value = value[key]
  return value


def _read(source: RecordSource) -> Iterator[Mapping[str, Any]]:
  if source.location is None:
    return _aligned(source)
  kind, _, rest = source.location.partition(':')
  if kind in LIBRARIES and rest:
    return LIBRARIES[kind](rest)
  path = pathlib.Path(source.location)
  if not path.is_file():
    raise ValueError(f'data.sources: no file {source.location!r}')
  file, format_ = TextFile(path, source.encoding), source.format or readers.format_of(path)
  if format_ == 'json':
    return _json(file)
  if format_ == 'text':
    return ({'text': text} for line in files.lines(file) if (text := line.strip()))
  return (fields for _, fields in readers.ROWS[format_](file, ()))


def _aligned(source: RecordSource) -> Iterator[Row]:
  lines, columns = {}, source.columns
  for field, name in columns:
    if not pathlib.Path(name).is_file():
      raise ValueError(f'data.sources: no file {name!r}')
    lines[field] = list(files.lines(TextFile(pathlib.Path(name), source.encoding)))
  counts = {name: len(lines[field]) for field, name in columns}
  if len(set(counts.values())) > 1:
    raise ValueError(f'data.sources: columns need equally many lines, but there are {counts}')
  for values in zip(*lines.values(), strict=True):
    yield {field: value.strip() for field, value in zip(lines, values, strict=True)}


def _json(file: TextFile) -> Iterator[Row]:
  path = file.path
  try:
    content = json.loads(files.whole(file, files.blocks(file)))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if isinstance(content, dict):
    content = content.get('data')
  if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
    raise ValueError(f"{path}: expected a list of objects, alone or as 'data'")
  if all('paragraphs' in item for item in content):
    return _questions(content, path)
  return iter(content)


def _questions(articles: Sequence[Any], path: pathlib.Path) -> Iterator[Row]:
  """Flatten SQuAD's nesting of article, paragraph and question."""
  try:
    for number, article in enumerate(articles):
      for paragraph in article['paragraphs']:
        for question in paragraph['qas']:
          yield {
            'id': question['id'],
            'title': article.get('title', str(number)),
            'context': paragraph['context'],
            'question': question['question'],
            'answers': [answer['text'] for answer in question['answers']],
            'answer_starts': [answer['answer_start'] for answer in question['answers']],
          }
  except (KeyError, TypeError) as error:
    raise ValueError(f'{path}: not in the format of SQuAD ({error!r})') from None


def _package(rest: str) -> Iterator[Row]:
  name, _, part = rest.partition('/')
  return packages.read(name, part or None)


def _tfds(rest: str) -> Iterator[Row]:
  for row in documents.rows(SourceConfig(location=f'tfds:{rest}')):
    yield {key: _plain(value) for key, value in row.fields.items()}


def _plain(value: Any) -> Any:
  """Turn bytes into text and arrays into lists, at any depth."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return _plain(value.tolist()) if hasattr(value, 'tolist') else value


def _hugging_face(rest: str) -> Iterator[Mapping[str, Any]]:
  try:
    import datasets
  except ImportError as error:
    raise ImportError(f"hf:{rest} needs datasets: pip install 'jaxllm[tasks]'") from error
  name, _, split = rest.partition('?split=')
  name, _, config_name = name.partition(':')
  if not split:
    raise ValueError(f'hf:{rest}: say which split, as in hf:{rest}?split=train')
  return iter(datasets.load_dataset(name, config_name or None, split=split))


LIBRARIES: Mapping[str, Callable[[str], Iterator[Mapping[str, Any]]]] = {
  'package': _package,
  'tfds': _tfds,
  'hf': _hugging_face,
}
"""What a location begins with -> function from the rest of it to rows."""
