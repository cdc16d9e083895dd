"""Name the texts that a step of a run has read, or the steps that have read a text.

  python -m jaxllm.tools.which_docs --workdir=runs/x --step=120
  python -m jaxllm.tools.which_docs --workdir=runs/x --text='to be or not to be'

- --step: for each run of tokens of each record the file and row of its document, its characters in
  the text that cleaning left of it, and how it begins and ends. Sources are read up to the last of
  these documents; each is told that is not as it was.
- --text: all records are searched for the bytes of the text, also where it goes on in another.
"""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm import config, storage

FLAGS = config.Flags()
WORKDIR = FLAGS.string('workdir', None, 'The working directory of a run.', required=True)
STEP = FLAGS.integer('step', None, 'A step, as metrics.jsonl counts them.', 1)
TEXT = FLAGS.string('text', None, 'A text that may have been trained on.')

_SHOWN = 30


def main(_) -> None:  # noqa: D103
  if (STEP.value is None) == (TEXT.value is None) or TEXT.value == '':
    raise ValueError('give one of --step and --text')
  run = open_run(WORKDIR.value)
  if TEXT.value:
    found = records_with(TEXT.value.encode(), run)
    steps = [step + 1 for step in range(run.steps)
             if not found.isdisjoint(run.batches.numbers(step))]
    print(f'{TEXT.value!r} is in {len(found)} of {len(run.batches.stored.rows)} training records, '
          f'read by {len(steps)} of the {run.steps} steps: '
          f'{", ".join(map(str, steps)) or "none"}')
    return
  if STEP.value > run.steps:
    raise ValueError(f'--step={STEP.value}: the run has taken {run.steps} steps')
  numbers = run.batches.numbers(STEP.value - 1)
  for row, (number, spans) in enumerate(zip(numbers, originals(numbers, run), strict=True)):
    print(f'row {row}, record {number}:')
    for span in spans:
      shown = span.text if len(span.text) <= 2 * _SHOWN else (
        f'{span.text[:_SHOWN]} ... {span.text[-_SHOWN:]}')
      print(f'  tokens {span.start}-{span.stop - 1}: {span.where}: {shown!r}')


class Run(NamedTuple):
  """What a run has read: the steps taken, their batches from number 0 on, and the lineage.

  Of a task, `lineage` is the place of the first example that gives these tokens of a record.
  """

  steps: int
  manifest: Any
  tokenizer: Any
  batches: Any
  lineage: Any


def open_run(workdir: str) -> Run:
  """Open what the run in a directory has read.

  Raises:
    ValueError: there is no run, its records are not there, or they have no lineage.
  """
  from jaxllm.checkpoints import store
  from jaxllm.data import records
  from jaxllm.training import dataset, metrics, passed_over
  from jaxllm.training import workdir as workdir_lib

  path = storage.path(workdir, '--workdir=')
  experiment, fingerprint = workdir_lib.begun_as(path), workdir_lib.begun_with(path)
  if experiment is None:
    raise ValueError(f'--workdir={path}: there is no run')
  folder = records.find(experiment.records_path, fingerprint)
  if experiment.task is not None:
    found = dataset.of_task(experiment, None, reference=False)
    if found.manifest.fingerprint != fingerprint:
      raise ValueError(f'--workdir={path}: the data of the task are not what they were')
    lineage: Any = _examples(experiment, found)
  elif folder is None:
    raise ValueError(f'the records of the run, {str(fingerprint)[:16]}, are not in '
                     f'{experiment.records_path}; python -m jaxllm.prepare --config={path} '
                     'prepares them again')
  else:
    found, lineage = dataset.prepared(experiment, folder), records.open_lineage(folder, 'train')
  latest = max(store.committed_steps(path / store.DIRECTORY), default=0)
  batches = passed_over.batches(path, latest, experiment, found, alone=True)
  logged = [record['step'] for record in metrics.read(path / 'metrics.jsonl')]
  return Run(max([latest, *logged]), found.manifest, found.tokenizer, batches, lineage)


def _examples(experiment: Any, dataset: Any) -> dict[bytes, str]:
  from jaxllm import loading
  from jaxllm.tasks import records
  from jaxllm.training import examples as encoded

  too_long = functools.partial(encoded.too_long, experiment, dataset.tokenizer)
  examples = loading.task_examples(experiment.task, 'train', dataset.tokenizer, too_long)
  rows, found = records.rows(experiment.task.data, 'train'), dict[bytes, str]()
  for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
    made, _ = encoded.of(experiment).make(experiment, [example], dataset.tokenizer)
    for _, tokens in (one for record in made for one in _segments(record)):
      found.setdefault(tokens.tobytes(), f'{row.where}, example {number}')
  return found


def _segments(record: Any) -> Iterator[tuple[int, np.ndarray]]:
  """Yield where the segments of a record of a task, or of a pair, begin, and their tokens."""
  names = [name for name in ('chosen', 'rejected', 'prompt') if name in record.dtype.names]
  for row in [record[name] for name in names] or [record]:
    for segment in range(1, int(row['segment_ids'].max()) + 1):
      places = np.flatnonzero(row['segment_ids'] == segment)
      yield int(places[0]), row['tokens'][places]


class Span(NamedTuple):
  """Tokens of a record, from `start` to before `stop`, that follow each other in a document too.

  `where` names file, row and characters; `characters`, in the cleaned text, may be None: not known.
  """

  start: int
  stop: int
  document: int
  where: str
  text: str
  characters: tuple[int, int] | None


def originals(numbers: Sequence[int], run: Run) -> list[list[Span]]:
  """Return the spans of records, by their numbers among the training records of a run."""
  rows = [np.frombuffer(run.batches.stored.rows[number], run.batches.stored.dtype)[0]
          for number in numbers]
  if isinstance(run.lineage, dict):
    return [[Span(start, start + len(tokens), 0, run.lineage[tokens.tobytes()],
                  run.tokenizer.decode(tokens.tolist()), None)
             for start, tokens in _segments(row)] for row in rows]
  pieces = [run.lineage.pieces(number) for number in numbers]
  read = _read(run, [(int(one['source']), int(one['document'])) for some in pieces for one in some])
  return [[_span(run, read, row, piece, stop) for piece, stop in _stops(row, some)]
          for row, some in zip(rows, pieces, strict=True)]


def _stops(row: np.ndarray, pieces: np.ndarray) -> Iterator[tuple[Any, int]]:
  ends = [*pieces['start'][1:].tolist(), int((row['segment_ids'] > 0).sum())]
  return zip(pieces, ends, strict=True)


def _read(
  run: Run, wanted: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], tuple[str, Any, bytes]]:
  """Return place, tokens and text of documents, or the reason why they are not known."""
  from jaxllm.data import documents, shards
  from jaxllm.data import texts as texts_lib
  from jaxllm.data.cleaning import clean

  data, tokenizer = run.manifest.data, run.tokenizer
  prefix, suffix = shards.borders(tokenizer, data)
  found: dict[tuple[int, int], tuple[str, Any, bytes]] = {}
  for number in {source for source, _ in wanted}:
    source, last = data.sources[number], max(one for of, one in wanted if of == number)
    try:
      for place, (document, row) in enumerate(documents.located(source)):
        if (number, place) in wanted and (text := clean(document, data.cleaning)):
          part = next(part for part in texts_lib.parts(
            data, shards.Text('train', text, number, place), run.manifest.ends))
          ids = [*prefix, *tokenizer.encode_batch([part.text])[0], *suffix]
          found[number, place] = row.where, ids, part.text.encode()
        if place == last:
          break
    except (OSError, ValueError, ImportError) as error:
      reason = f'{source.location} cannot be read any more ({error})'
      found |= {one: (reason, None, b'') for one in wanted if one[0] == number and one not in found}
  return found


def _span(run: Run, read: Mapping[Any, Any], row: Any, piece: Any, stop: int) -> Span:
  start, source, document, token = (
    int(piece[name]) for name in ('start', 'source', 'document', 'token'))
  tokens, id_bytes = row['tokens'][start:stop].tolist(), run.tokenizer.id_bytes
  own = b''.join(id_bytes[i] for i in tokens)
  where, ids, text = read.get((source, document), ('', (), b''))
  if ids is not None and [*ids[token : token + len(tokens)]] != tokens:
    where, ids = f'{run.manifest.data.sources[source].location} is not as it was', None
  where, characters = f'{where}, document {document} of source {source}', None
  before = b''.join(id_bytes[i] for i in ids[:token]) if ids else b''
  # Where the tokenizer changes a text before it cuts it, its characters cannot be counted so.
  if ids and text.startswith(before + own):
    characters = len(before.decode(errors='ignore')), len((before + own).decode(errors='ignore'))
    where += f', characters {characters[0]}-{characters[1]}'
  return Span(start, stop, document, where, own.decode(errors='replace'), characters)


def records_with(text: bytes, run: Run) -> set[int]:
  """Return the numbers of the training records that hold a text, or a part of one that goes on."""
  found: set[int] = set()
  stored, id_bytes = run.batches.stored, run.tokenizer.id_bytes
  if isinstance(run.lineage, dict):
    return {number for number, spans in enumerate(originals(range(len(stored.rows)), run))
            if any(text in span.text.encode() for span in spans)}
  end = run.tokenizer.eos_id if run.manifest.data.add_eos else None
  # Of documents that go on in another record: their last bytes, with the record of each.
  tails: dict[tuple[int, int, int], list[tuple[int, bytes]]] = collections.defaultdict(list)
  for number, content in enumerate(stored.rows):
    row = np.frombuffer(content, stored.dtype)[0]
    for piece, stop in _stops(row, run.lineage.pieces(number)):
      source, document, token = (int(piece[name]) for name in ('source', 'document', 'token'))
      tokens = row['tokens'][piece['start'] : stop].tolist()
      parts = tails.pop((source, document, token), [])
      parts.append((number, b''.join(id_bytes[i] for i in tokens[bool(parts):])))
      whole = b''.join(part for _, part in parts)
      at = whole.find(text)
      while at >= 0:
        place = 0
        for other, part in parts:
          if place < at + len(text) and at < place + len(part):
            found.add(other)
          place += len(part)
        at = whole.find(text, at + 1)
      if stop == len(row['tokens']) and tokens[-1] != end:
        kept = len(text) - 1
        for i, (other, part) in reversed([*enumerate(parts)]):
          parts[i] = other, part[-kept:] if kept else b''
          kept -= len(parts[i][1])
        tails[source, document, token + len(tokens) - 1] = parts
  return found


if __name__ == '__main__':
  config.run_program(main, FLAGS)
