"""Scores of predictions against references.

A `Metric` is a pair of pure functions: the first turns each example into additive statistics, the
second turns their sums into named numbers. Whatever is additive can be resampled, so intervals and
significance tests (`tables.py`) are exact for every metric, corpus-level ones included.

`METRICS` lists them: accuracy, classification, calibration, squad, bleu, chrf, rouge, perplexity,
bits_per_byte.
BLEU and chrF are sacrebleu's and ROUGE is rouge-score's, from the extra `tasks`.

Axis letters: I examples, M statistics of one example, C labels, U confidence bins.
"""

import collections
import functools
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm import mistakes

Values = dict[str, np.ndarray]

NUM_BINS = 15


class Metric(NamedTuple):
  """A score in two halves.

  Attributes:
    statistics: (predictions, references) -> float64 (I, M), one row per example.
    values: sums of rows (..., M) -> name -> float64 (...).
    names: the names.
    means: those of them that are means over the examples, of numbers between 0 and 1.
    largest: upper bound of the numbers; None: there is none.
    smaller_is_better: whether it measures errors.
  """

  statistics: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
  values: Callable[[np.ndarray], Values]
  names: tuple[str, ...]
  means: tuple[str, ...] = ()
  largest: float | None = 1.0
  smaller_is_better: bool = False


def score(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
  """Return the named numbers of one of `METRICS`, of a prediction and a reference per example.

  What a metric takes as prediction and reference is said at its function.

  Raises:
    ValueError: unknown name, no examples, unequal lengths, or no token to measure.
  """
  summed = rows(name, predictions, references).sum(0)
  return {key: float(value) for key, value in METRICS[name].values(summed).items()}


def rows(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
  """Return the statistics (I, M) of each example, for `score`, as it does, and `tables.py`."""
  if name not in METRICS:
    raise ValueError(f'metric {name!r}: one of {", ".join(METRICS)}')
  if len(predictions) != len(references) or not len(predictions):
    raise ValueError(f'{len(predictions)} predictions for {len(references)} references: there must '
                     'be one prediction per reference, and at least one')
  return METRICS[name].statistics(predictions, references)


# Accuracy and classification: predictions and references are labels; None is an answer that could
# not be read, wrong whatever the reference.


def _classification_statistics(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
  """One, then for each label whether it is right, predicted, and the reference."""
  labels = sorted({*predictions, *references} - {None})
  rows_I3C = np.zeros((len(predictions), 3, len(labels)))
  index = {label: i for i, label in enumerate(labels)}
  for row_3C, prediction, reference in zip(rows_I3C, predictions, references, strict=True):
    row_3C[2, index[reference]] = 1
    if prediction is not None:
      row_3C[1, index[prediction]] = 1
      row_3C[0, index[prediction]] = prediction == reference
  return np.concatenate([np.ones((len(predictions), 1)), rows_I3C.reshape(len(rows_I3C), -1)], 1)


def _classification_values(sums: np.ndarray) -> Values:
  """Macro averages are over the labels that occur; 0 / 0 is 0, as in scikit-learn."""
  parts = sums[..., 1:].reshape(*sums.shape[:-1], 3, -1)
  right_C, predicted_C, actual_C = (parts[..., i, :] for i in range(3))
  occur = (predicted_C + actual_C > 0).sum(-1)
  averages = {'precision': (right_C, predicted_C), 'recall': (right_C, actual_C),
              'f1': (2 * right_C, predicted_C + actual_C)}
  values = {'accuracy': _ratio(right_C.sum(-1), sums[..., 0])}
  for name, (top_C, bottom_C) in averages.items():
    values[f'macro_{name}'] = _ratio(_ratio(top_C, bottom_C).sum(-1), occur)
    values[f'micro_{name}'] = _ratio(top_C.sum(-1), bottom_C.sum(-1))
  return values


# Calibration: a prediction is a (label, confidence in [0, 1]) pair, a reference a label.


def _calibration_statistics(
  predictions: Sequence[tuple[Any, float]], references: Sequence[Any]
) -> np.ndarray:
  """One, then for each bin the examples in it, their confidences, and whether they are right."""
  rows_I3U = np.zeros((len(predictions), 3, NUM_BINS))
  for row_3U, (label, confidence), reference in zip(rows_I3U, predictions, references, strict=True):
    if not 0 <= confidence <= 1:
      raise ValueError(f'confidence {confidence} of {label!r}: a probability between 0 and 1')
    row_3U[:, max(math.ceil(confidence * NUM_BINS) - 1, 0)] = 1, confidence, label == reference
  return rows_I3U.reshape(len(rows_I3U), -1)


def _calibration_values(sums: np.ndarray) -> Values:
  """Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3."""
  parts = sums.reshape(*sums.shape[:-1], 3, NUM_BINS)
  count_U, confidence_U, right_U = (parts[..., i, :] for i in range(3))
  return {'ece': _ratio(np.abs(right_U - confidence_U).sum(-1), count_U.sum(-1))}


# Question answering: a prediction is a text ('' = no answer), a reference the accepted texts
# (none of them = unanswerable).

_ARTICLES = re.compile(r'\b(?:a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize_answer(text: str) -> str:
  """Lower the case and drop ASCII punctuation, English articles and surplus white space."""
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
  """Return 1.0 where the normalised prediction is one of the normalised references, else 0.0."""
  return float(normalize_answer(prediction) in _answers(references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
  """Return the largest F1 of the bags of normalised words, in [0, 1].

  Reference:
    Rajpurkar et al., Know What You Don't Know, arXiv 1806.03822: with no words on either side, F1
    is 1 where both have none, else 0.
  """
  predicted = collections.Counter(normalize_answer(prediction).split())

  def f1(actual: collections.Counter[str]) -> float:
    if not predicted or not actual:
      return float(predicted == actual)
    return 2 * (predicted & actual).total() / (predicted.total() + actual.total())

  return max(f1(collections.Counter(answer.split())) for answer in _answers(references))


def _answers(references: Sequence[str]) -> list[str]:
  return list(filter(None, map(normalize_answer, _texts(references)))) or ['']


# Translation and summarisation: a prediction is a text, a reference a text or several.


def _texts(reference: Any) -> Sequence[str]:
  texts = [reference] if isinstance(reference, str) else reference
  if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f'reference {reference!r}: a text is needed, or a list of texts')
  return texts


@functools.cache
def _sacrebleu(name: str) -> Any:
  return getattr(mistakes.package('sacrebleu.metrics'), name)()


@functools.cache
def _rouge() -> Any:
  scorer = mistakes.package('rouge_score.rouge_scorer')
  return scorer.RougeScorer(ROUGE_TYPES, use_stemmer=True)


def _sacrebleu_metric(class_name: str, key: str) -> Metric:
  """Wrap sacrebleu's corpus score, with its default settings, in [0, 100]."""

  def statistics(predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
    texts = [_texts(reference) for reference in references]
    # sacrebleu wants a stream per reference number; None stands for one that is not there.
    streams = [
      [text[i] if i < len(text) else None for text in texts] for i in range(max(map(len, texts)))]
    # The seam that sacrebleu's own significance tests use.
    rows = _sacrebleu(class_name)._extract_corpus_statistics(predictions, streams)
    return np.asarray(rows, float)

  def values(sums: np.ndarray) -> Values:
    flat = sums.reshape(-1, sums.shape[-1])
    metric = _sacrebleu(class_name)
    scores = [metric._compute_score_from_stats([round(s) for s in row]).score for row in flat]
    return {key: np.reshape(scores, sums.shape[:-1])}

  return Metric(statistics, values, (key,), largest=100.0)


ROUGE_TYPES = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')


def _rouge_scores(prediction: str, reference: str | Sequence[str]) -> list[float]:
  """Return the F-measures; of several references the best one. English words only."""
  found = _rouge().score_multi(_texts(reference), prediction)
  return [found[name].fmeasure for name in ROUGE_TYPES]


# Language modelling: a prediction is (log-likelihood in nats, tokens, UTF-8 bytes of text); the
# reference is not read.


def _perplexity_statistics(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
  rows = np.array(predictions, float)
  if not rows[:, 1:].sum(0).all():
    raise ValueError('no token is predicted in any example, so that there is nothing to measure; '
                     'give longer texts')
  return rows


def _per(log_likelihood: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Divide; NaN where a resample holds no token."""
  with np.errstate(divide='ignore', invalid='ignore'):
    return -log_likelihood / count


def _perplexity_values(sums: np.ndarray) -> Values:
  loss = _per(sums[..., 0], sums[..., 1])
  return {'loss': loss, 'perplexity': np.exp(np.minimum(loss, 700.0))}


def _mean_metric(measure: Callable[[Any, Any], Sequence[float]], *names: str) -> Metric:
  """Return the metric of means over the examples of what one prediction and reference give."""
  return Metric(
    lambda predictions, references: np.array(
      [[1.0, *measure(p, r)] for p, r in zip(predictions, references, strict=True)]),
    lambda sums: {
      name: _ratio(sums[..., i], sums[..., 0]) for i, name in enumerate(names, start=1)},
    names, names)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
  """Divide; 0 where nothing is there to divide by."""
  return np.where(bottom == 0, 0.0, top / np.where(bottom == 0, 1, bottom))


METRICS: Mapping[str, Metric] = {
  'accuracy': _mean_metric(lambda p, r: [p == r], 'accuracy'),
  'normalized_accuracy': _mean_metric(lambda p, r: [p == r], 'normalized_accuracy'),
  'classification': Metric(
    _classification_statistics, _classification_values,
    ('accuracy', *(f'{kind}_{name}' for name in ('precision', 'recall', 'f1')
                   for kind in ('macro', 'micro'))), ('accuracy', 'micro_recall')),
  'calibration': Metric(_calibration_statistics, _calibration_values, ('ece',),
                        smaller_is_better=True),
  'squad': _mean_metric(lambda p, r: (exact_match(p, r), token_f1(p, r)), 'exact_match', 'f1'),
  'bleu': _sacrebleu_metric('BLEU', 'bleu'),
  'chrf': _sacrebleu_metric('CHRF', 'chrf'),
  'rouge': _mean_metric(_rouge_scores, *ROUGE_TYPES),
  'perplexity': Metric(_perplexity_statistics, _perplexity_values, ('loss', 'perplexity'),
                       largest=None, smaller_is_better=True),
  'bits_per_byte': Metric(
    _perplexity_statistics,
    lambda sums: {'bits_per_byte': _per(sums[..., 0], sums[..., 2]) / math.log(2)},
    ('bits_per_byte',), largest=None, smaller_is_better=True),
}
"""name -> metric; one entry may give several numbers."""
