"""Contamination: runs of words that evaluation texts share with training texts."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.data import batches, duplicates
from jaxllm.data.duplicates import NGRAM_WORDS
from jaxllm.data.tokenizers import Tokenizer


def overlaps(
  evaluation: Sequence[str], training: Iterable[str], num_words: int = NGRAM_WORDS
) -> list[tuple[float, str | None]]:
  """Compare each evaluation text with training texts, which are read once and not kept.

  Words are compared in lower case without punctuation. A text without words overlaps nothing.

  Returns:
    For each text the share of its n-grams that are in the training texts, and the first of them.

  Reference:
    Brown et al., Language Models are Few-Shot Learners, arXiv 2005.14165, appendix C (n = 13).
  """
  # A text that is shorter counts as one n-gram.
  wanted = [list(duplicates.ngrams(words, min(num_words, len(words))))
            for words in map(duplicates.words, evaluation)]
  unseen = {ngram for ngrams in wanted for ngram in ngrams}
  lengths = sorted({len(ngram) for ngram in unseen})
  seen: set[tuple[str, ...]] = set()
  for text in training:
    words = duplicates.words(text)
    for length in lengths:
      seen.update(unseen.intersection(duplicates.ngrams(words, length)))
  shared = [[ngram for ngram in ngrams if ngram in seen] for ngrams in wanted]
  return [(len(own) / len(ngrams), ' '.join(own[0])) if own else (0.0, None)
          for own, ngrams in zip(shared, wanted, strict=True)]


def summary(found: Sequence[tuple[float, str | None]]) -> dict[str, Any]:
  """Return how many texts overlap, and the one that does most, as JSON-able values."""
  shares = [share for share, _ in found]
  return {'texts': len(found), 'overlapping': sum(share > 0 for share in shares),
          'mean_share': sum(shares) / len(shares), 'ngram_words': NGRAM_WORDS,
          'example': max(found, key=lambda one: one[0])[1]}


def longest_text(record: Mapping[str, Any]) -> str:
  """Return the longest text among the fields of a record, lists joined."""
  return max(map(_text, record.values()), key=len, default='')


def _text(value: Any) -> str:
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, list | tuple):
    return ' '.join(filter(None, map(_text, value)))
  return value if isinstance(value, str) else ''


def record_texts(directory: str | os.PathLike[str], tokenizer: Tokenizer) -> Iterator[str]:
  """Yield the training texts of prepared records, cut where the records cut them.

  Args:
    directory: one that `preparing.prepare` wrote.
    tokenizer: that of the records.

  Raises:
    ValueError: nothing is prepared there, or it is damaged.
  """
  special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
  stored = batches.open_records(directory, 'train')
  for _, _, ids in batches.runs(stored, range(len(stored.rows))):
    yield tokenizer.decode([token for token in ids.tolist() if token not in special])


def segments(batch: Mapping[str, np.ndarray]) -> Iterator[list[int]]:
  """Yield the token ids of each segment of a batch of packed records, in their order."""
  for tokens_T, segments_T in zip(batch['tokens'], batch['segment_ids'], strict=True):
    for segment in range(1, segments_T.max(initial=0) + 1):
      yield tokens_T[segments_T == segment].tolist()
