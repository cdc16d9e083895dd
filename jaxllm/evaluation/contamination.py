"""Whether a model may have been trained on what it is evaluated on: shared runs of words."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

NGRAM_WORDS = 13


class Overlap(NamedTuple):
  """How much of one evaluation text stands in the training texts.

  Attributes:
    share: of its n-grams, in [0, 1]; of texts shorter than n words, 1 where they stand there whole.
    example: the first shared n-gram, or None.
  """

  share: float
  example: str | None


def overlaps(
  evaluation: Sequence[str], training: Iterable[str], num_words: int = NGRAM_WORDS
) -> list[Overlap]:
  """Compare evaluation texts with training texts, which are read once and not kept.

  Words are compared in lower case without punctuation. A text without words overlaps nothing.

  Args:
    evaluation: texts to look for.
    training: where to look.
    num_words: n, words of an n-gram.

  Returns:
    One overlap per evaluation text.

  Reference:
    Brown et al., Language Models are Few-Shot Learners, arXiv 2005.14165, appendix C (n = 13).
  """
  wanted = [list(_ngrams(_words(text), num_words)) for text in evaluation]
  unseen = {ngram for ngrams in wanted for ngram in ngrams}
  lengths = sorted({len(ngram) for ngram in unseen})
  seen: set[tuple[str, ...]] = set()
  for text in training:
    words = _words(text)
    for length in lengths:
      for start in range(len(words) - length + 1):
        ngram = tuple(words[start : start + length])
        if ngram in unseen:
          seen.add(ngram)
  return [_overlap(ngrams, seen) for ngrams in wanted]


def _overlap(ngrams: Sequence[tuple[str, ...]], seen: set[tuple[str, ...]]) -> Overlap:
  shared = [ngram for ngram in ngrams if ngram in seen]
  if not shared:
    return Overlap(0.0, None)
  return Overlap(len(shared) / len(ngrams), ' '.join(shared[0]))


def _words(text: str) -> list[str]:
  """Return the words; Chinese and Japanese characters count as one each."""
  return re.findall(r'[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+', text.lower())


def _ngrams(words: Sequence[str], num_words: int) -> Iterator[tuple[str, ...]]:
  """Yield the n-grams of a text, or the whole of one that is shorter."""
  if words:
    for start in range(max(1, len(words) - num_words + 1)):
      yield tuple(words[start : start + num_words])
