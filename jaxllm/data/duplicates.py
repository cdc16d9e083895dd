"""Steps of cleaning that look across documents: duplicates, and texts of evaluation sets.

Each function makes a step with a memory of its own, which keeps the first of what is alike, so
that the documents that it drops follow from their order alone.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Filtered = tuple[str | None, Mapping[str, int]]
"""The text, or None where it is dropped, and how often what was found in it."""
Step = Callable[[str], Filtered]

NGRAM_WORDS = 13
# Shorter texts of an evaluation set would drop what anyone may write.
_LEAST_WORDS = 8
_SHINGLE_WORDS = 5
_NUM_HASHES = 128
_NUM_BANDS = 16


def words(text: str) -> list[str]:
  """Return the words in lower case; Chinese and Japanese characters count as one each."""
  return re.findall(r'[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+', text.lower())


def ngrams(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
  """Yield the runs of so many words."""
  return zip(*(words[start:] for start in range(length)), strict=False)


def exact() -> Step:
  """Return a step that drops texts that were there before; it holds about 110 bytes a document."""
  seen: set[bytes] = set()

  def step(text: str) -> Filtered:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
      return None, {}
    seen.add(digest)
    return text, {}

  return step


def near(similarity: float) -> Step:
  """Return a step that drops texts that are near those before; it holds about 3 kB a document.

  The similarity is that of Jaccard between sets of 5 words in a row, estimated by 128 hashes
  (MinHash) for texts that share one of 16 bands of them (LSH). At 0.8 all pairs of 0.9 and nine in
  ten of 0.85 are found, and none of 0.7.

  Reference:
    Broder, On the Resemblance and Containment of Documents, 1997.
  """
  import rensa

  found = rensa.RMinHashDeduplicator(similarity, _NUM_HASHES, True, _NUM_BANDS)
  number = 0

  def step(text: str) -> Filtered:
    nonlocal number
    number += 1
    own = words(text)
    shingles = [' '.join(run) for run in ngrams(own, min(_SHINGLE_WORDS, len(own)))]
    # What has no words is like nothing.
    new = not shingles or found.add_pairs([(str(number), shingles)])[0]
    return text if new else None, {}

  return step


def not_in(evaluation: Iterable[str]) -> Step:
  """Return a step that drops texts that share 13 words in a row with an evaluation set.

  Words are compared in lower case without punctuation. Of an evaluation text of 8 to 12 words all
  are compared; a shorter one is not looked for.

  Reference:
    Brown et al., Language Models are Few-Shot Learners, arXiv 2005.14165, appendix C, where 200
    characters around the words are cut out of a document instead.
  """
  wanted: set[tuple[str, ...]] = set()
  for own in map(words, evaluation):
    if len(own) >= _LEAST_WORDS:
      wanted.update(ngrams(own, min(NGRAM_WORDS, len(own))))
  lengths = sorted({len(run) for run in wanted})

  def step(text: str) -> Filtered:
    own = words(text)
    return (text if all(wanted.isdisjoint(ngrams(own, n)) for n in lengths) else None), {}

  return step
