"""Scores equal the published implementations, on literal, random and adversarial input."""

import math
import random

import numpy as np
import pytest

from jaxllm.evaluation import scores

ADVERSARIAL = [
  '', ' ', 'a', 'the', 'The the THE', '...', 'A.', "it's", 'x' * 500, 'a b c d e f g', '\n\t',
  'naïve café', '猫坐在垫子上', '🙂 🙂', 'İstanbul', 'ß SS', '1,000.50 $',
  'a\u00a0b', '\u2581x', 'an apple',
]


def _sentences(seed, count, words=('the', 'cat', 'sat', 'on', 'a', 'mat', '.', 'Dogs', 'ran', ',')):
  rng = random.Random(seed)
  made = [' '.join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(count)]
  return made + rng.sample(ADVERSARIAL, len(ADVERSARIAL))


def test_classification_literals():
  predictions, references = ['a', 'b', 'b', None], ['a', 'a', 'b', 'b']
  found = scores.score('classification', predictions, references)
  assert found == pytest.approx({
    'accuracy': 2 / 4,
    'macro_precision': (1 + 1 / 2) / 2, 'micro_precision': 2 / 3,
    'macro_recall': 1 / 2, 'micro_recall': 2 / 4,
    'macro_f1': (2 / 3 + 2 / 4) / 2, 'micro_f1': 2 * 2 / (3 + 4),
  })
  assert scores.score('accuracy', predictions, references) == {'accuracy': 0.5}


def test_calibration_literals():
  # Two bins hold something: 0.2 with one wrong answer, 0.9 with one right of two.
  predictions = [('a', 0.2), ('a', 0.9), ('b', 0.9)]
  found = scores.score('calibration', predictions, ['b', 'a', 'a'])
  assert found['ece'] == pytest.approx((0.2 + abs(1 - 1.8)) / 3)
  assert scores.score('calibration', [('a', 1.0), ('a', 0.0)], ['a', 'b']) == {'ece': 0.0}
  with pytest.raises(ValueError, match='between 0 and 1'):
    scores.score('calibration', [('a', 1.2)], ['a'])


@pytest.mark.parametrize(
  'prediction, references, exact, f1',
  [
    ('The Cat!', ['a cat'], 1, 1),
    ('the cat sat', ['cat', 'cat sat down'], 0, 4 / 5),
    ('', [], 1, 1),
    ('a', [], 1, 1),
    ('cat', [], 0, 0),
    ('', ['cat'], 0, 0),
    ('', ['the', 'cat'], 0, 0),
    ('cat cat', ['cat'], 0, 2 / 3),
    ('theatre', ['atre'], 0, 0),
    ('cat', 'the cat', 1, 1),
    ('U.S.', ['us'], 1, 1),
  ],
)
def test_squad_literals(prediction, references, exact, f1):
  assert scores.score('squad', [prediction], [references]) == pytest.approx(
    {'exact_match': exact, 'f1': f1}
  )


def test_perplexity_literals():
  predictions = [(-4.0, 2, 8), (-2.0, 1, 4)]
  assert scores.score('perplexity', predictions, [None, None]) == pytest.approx(
    {'loss': 2.0, 'perplexity': math.e**2})
  assert scores.score('bits_per_byte', predictions, [None, None]) == pytest.approx(
    {'bits_per_byte': 0.5 / math.log(2)})


@pytest.mark.parametrize(
  'name, predictions, references, message',
  [
    ('blue', ['a'], ['a'], "metric 'blue': one of accuracy"),
    ('accuracy', [], [], 'at least one'),
    ('accuracy', ['a'], ['a', 'b'], '1 predictions for 2 references'),
    ('squad', ['a'], [None], 'reference None: a text is needed, or a list of texts'),
    ('squad', ['a'], [['a', 3]], r"reference \['a', 3\]: a text is needed"),
  ],
)
def test_bad_input_is_named(name, predictions, references, message):
  with pytest.raises(ValueError, match=message):
    scores.score(name, predictions, references)


def test_values_take_any_leading_axes():
  rows = scores.rows('classification', ['a', 'b', 'c', 'a'], ['a', 'b', 'b', 'c'])
  values = scores.METRICS['classification'].values
  stacked = values(np.stack([rows.sum(0), rows[:2].sum(0)])[None])
  for name, value in stacked.items():
    assert value.shape == (1, 2)
    assert value[0, 1] == pytest.approx(float(values(rows[:2].sum(0))[name]))


@pytest.mark.parity
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('labels', ['ab', 'abcdef'])
def test_classification_equals_scikit_learn(seed, labels):
  sklearn = pytest.importorskip('sklearn.metrics')
  rng = random.Random(seed)
  references = rng.choices(labels[1:], k=30)
  predictions = rng.choices(labels, k=30)
  found = scores.score('classification', predictions, references)
  assert found['accuracy'] == pytest.approx(sklearn.accuracy_score(references, predictions))
  for average in ('macro', 'micro'):
    expected = sklearn.precision_recall_fscore_support(
      references, predictions, average=average, zero_division=0
    )
    for name, value in zip(('precision', 'recall', 'f1'), expected[:3], strict=True):
      assert found[f'{average}_{name}'] == pytest.approx(value), (average, name)


@pytest.mark.parity
@pytest.mark.parametrize('num_references', [1, 3])
def test_bleu_and_chrf_equal_sacrebleu(num_references):
  sacrebleu = pytest.importorskip('sacrebleu')
  for seed in range(5):
    predictions = _sentences(seed, 20)
    streams = [_sentences(seed + 100 * i, 20) for i in range(1, num_references + 1)]
    references = [list(texts) for texts in zip(*streams, strict=True)]
    if num_references == 1:
      references = [text for text, in references]
    bleu = sacrebleu.corpus_bleu(predictions, streams).score
    chrf = sacrebleu.corpus_chrf(predictions, streams).score
    assert scores.score('bleu', predictions, references) == {'bleu': pytest.approx(bleu, abs=1e-9)}
    assert scores.score('chrf', predictions, references) == {'chrf': pytest.approx(chrf, abs=1e-9)}


@pytest.mark.parity
def test_references_may_differ_in_number():
  pytest.importorskip('sacrebleu')
  few = scores.score('bleu', ['a b c d e', 'f g h i j'], [['a b c d e'], ['f g h i j', 'x']])
  assert few == {'bleu': pytest.approx(100)}


@pytest.mark.parity
def test_rouge_equals_rouge_score():
  rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
  reference_scorer = rouge_scorer.RougeScorer(
    ['rouge1', 'rouge2', 'rougeL', 'rougeLsum'], use_stemmer=True
  )
  predictions, references = _sentences(1, 30), _sentences(2, 30)
  references[0] = 'the cat .\nsat on .\na mat'
  expected = [reference_scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
  for name, value in scores.score('rouge', predictions, references).items():
    assert value == pytest.approx(np.mean([e[name].fmeasure for e in expected])), name


@pytest.mark.parity
def test_squad_equals_torchmetrics():
  squad = pytest.importorskip('torchmetrics.functional.text.squad')
  predictions = _sentences(3, 40)
  references = [[a, b] for a, b in zip(_sentences(4, 40), _sentences(5, 40), strict=True)]
  kept = [
    (p, [r for r in rs if scores.normalize_answer(r)]) for p, rs in
    zip(predictions, references, strict=True)
  ]
  # It is version 1.1's script, which knows no unanswerable questions.
  kept = [(p, rs) for p, rs in kept if rs and scores.normalize_answer(p)]
  assert len(kept) > 30
  for prediction, answers in kept:
    got = squad.squad(
      [{'prediction_text': prediction, 'id': '0'}],
      [{'answers': {'answer_start': [0] * len(answers), 'text': answers}, 'id': '0'}],
    )
    assert scores.exact_match(prediction, answers) * 100 == pytest.approx(float(got['exact_match']))
    assert scores.token_f1(prediction, answers) * 100 == pytest.approx(float(got['f1']), rel=1e-5)
