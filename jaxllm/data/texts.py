"""Documents of all sources as cleaned texts, each in its split.

- `texts` is one pass over them; `parts` says what of a text is held out.
- `kept` and `kept_before` write a pass down, so that the next one cleans nothing.
"""

import contextlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from jaxllm import storage
from jaxllm.data import cleaning, documents, parallel, readers, shards
from jaxllm.data.documents import SourceConfig
from jaxllm.data.duplicates import digest
from jaxllm.data.files import ending
from jaxllm.data.records import DataConfig
from jaxllm.data.shards import Text

CLEANED = 'cleaned.jsonl'
Counters = Sequence[Counter[str]]
Run = Callable[[Iterable[cleaning.Chunk]], Iterator[Any]]


def texts(
  data: DataConfig, run: Run, ends: bool, counts: Counters | None = None
) -> Iterator[Text]:
  """Yield texts with their splits, holding out the `ends` of documents or whole ones.

  Documents are counted per source. Texts that are held out from files that are trained on too are
  nowhere trained on. `run` is `cleaning.chunk_passer` of many chunks.
  """
  def chunks(sources: Iterable[SourceConfig]) -> Iterator[cleaning.Chunk]:
    for number, source in enumerate(sources):
      first = 0
      for group in parallel.grouped(documents.documents(source), len, shards.GROUP_CHARACTERS):
        yield number, first, group
        first += len(group)

  sources = (*data.sources, *data.own_validation)
  held_out = {digest(passes[-1][0]) for _, _, found in run(chunks(data.own_validation))
              for _, passes in found if passes[-1][0]} if from_same_files(data) else ()
  compare = cleaning.comparer(cleaning.stages(data.cleaning))
  counts = counts or [Counter() for _ in sources]
  for number, first, found in run(chunks(sources)):
    split = 'train' if number < len(data.sources) else 'validation'
    for place, (size, passes) in enumerate(found, first):
      found_out = split == 'train' and dropped_as_held_out(passes, held_out)
      text, steps = (None, found_out) if found_out else compare(passes)
      counts[number].update(steps, documents=1, dropped=not text, characters=size)
      if text:
        yield from parts(data, Text(split, text, number, place), ends)


def dropped_as_held_out(
  passes: Sequence[cleaning.Passed], held_out: Collection[bytes]
) -> Counter[str] | None:
  """Return what drops a text whose digest is held out, and the steps before; None: it is not."""
  if not held_out or not (text := passes[-1][0]) or digest(text) not in held_out:
    return None
  steps = Counter({'held_out.dropped': 1, 'held_out.characters': len(text)})
  for _, counts, _ in passes:
    steps.update(counts)
  return steps


def parts(data: DataConfig, text: Text, ends: bool) -> Iterator[Text]:
  """Yield what is trained on of a text and what is held out, one of them or the other's rest."""
  fraction = data.validation if isinstance(data.validation, float) else 0.0
  if text.split == 'validation' or not ends:
    held_out = text.split == 'validation' or 0 < fraction and _sample(text.text) < fraction
    yield text._replace(split='validation' if held_out else 'train')
    return
  place = len(text.text) - int(len(text.text) * fraction)
  # Where the line before it ends, if that is nearer than the end of the text.
  cut = text.text.rfind('\n', max(0, 2 * place - len(text.text)), place) + 1 or place
  for split, piece in (('train', text.text[:cut]), ('validation', text.text[cut:])):
    if piece:
      yield text._replace(split=split, text=piece)


def too_few(data: DataConfig, run: Run) -> bool:
  """Return whether the documents are too few to be divided: all fall into one split."""
  if not isinstance(data.validation, float):
    return False
  sides: set[str] = set()
  for text in texts(data, run, ends=False):
    sides.add(text.split)
    if len(sides) > 1:
      return False
  return True


def _sample(text: str) -> float:
  """Return a number in [0, 1) that depends on the text alone: duplicates share their split."""
  return int.from_bytes(digest(text, 8)) / 2**64


def from_same_files(data: DataConfig) -> bool:
  """Return whether files of several texts are trained on and held out, in different slices."""
  trained, held_out = ({
    file.path.resolve() for source in sources for file in documents.find(source).files
    if source.separator or (
      source.format or readers.ENDINGS.get(ending(file.path))) not in readers.TEXTS}
    for sources in (data.sources if data.own_validation else (), data.own_validation))
  return bool(trained & held_out)


def kept(texts: Iterator[Text], counts: Counters, staging: pathlib.Path) -> Iterator[Text]:
  """Yield texts and write them down, and their counts at the end, so that none is cleaned twice."""
  with storage.replaced(staging / CLEANED) as partial, contextlib.ExitStack() as stack:
    file = partial.open('w')
    stack.callback(storage.explained(staging)(file.close))
    for text in texts:
      with storage.explained(staging):  # What fails in reading is no fault of this place.
        file.write(json.dumps(text) + '\n')
      yield text
    with storage.explained(staging):
      file.write(json.dumps(counts) + '\n')
      file.flush()
      os.fsync(file.fileno())


def kept_before(staging: pathlib.Path, counts: Counters) -> Iterator[Text]:
  """Yield the texts that `kept` has written, and count as they were counted."""
  with (staging / CLEANED).open() as file:
    for fields in map(json.loads, file):
      if isinstance(fields[0], str):
        yield Text(*fields)
        continue
      for count, kept in zip(counts, fields, strict=True):
        count.update(kept)
