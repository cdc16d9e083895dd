"""The classification head and distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data import packing
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives import classification
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.objectives.distillation import Distillation, distillation_loss
from jaxllm.objectives.next_token import NextToken, next_token_loss
from jaxllm.tasks.encoding import Tokens

apply = jax.jit(Decoder.apply, static_argnums=0, static_argnames='method')
distill = jax.jit(distillation_loss, static_argnums=(0, 1))
next_token = jax.jit(next_token_loss, static_argnums=(0, 1))
class_logits = jax.jit(classification.class_logits, static_argnums=(0, 1))
init = jax.jit(decoder.init, static_argnums=0)
MODEL = DecoderConfig(
  vocab_size=30, vocab_multiple=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=12,
  max_length=16, scan_layers=False,
)
TAUGHT = Distillation(teacher='it', teacher_model=MODEL)
TEXTS = [[1, 2, 3, 4], [1, 5], [1, 6, 7]]


def _batch(length=6):
  records = packing.pack([Tokens(t, [1] * len(t)) for t in TEXTS], length, 30, together=False)
  return {**packing.batch_arrays(records), 'labels': np.array([[2], [0], [-1]])}


def _variables(config, seed=0):
  variables = init(MODEL, jax.random.key(seed))
  head = classification.init(config, MODEL, jax.random.key(seed + 1))
  return {'params': {**variables['params'], 'classifier': head}}


@pytest.mark.parametrize('pooling', ['last', 'mean'])
def test_logits_do_not_depend_on_padding(pooling):
  config = ClassifierConfig(num_classes=3, pooling=pooling)
  variables = _variables(config)
  found, _ = class_logits(config, Decoder(MODEL), variables, _batch())
  for row, text in enumerate(TEXTS):
    hidden_TD = apply(Decoder(MODEL), variables, jnp.asarray([text]), method='hidden')[0][0]
    pooled_D = hidden_TD[-1] if pooling == 'last' else hidden_TD.mean(0)
    head = variables['params']['classifier']
    np.testing.assert_allclose(found[row], pooled_D @ head['kernel'] + head['bias'], atol=1e-5)
  wider, _ = class_logits(config, Decoder(MODEL), variables, _batch(12))
  np.testing.assert_allclose(found, wider, atol=1e-5)


def test_classification_loss_literals():
  config = ClassifierConfig(num_classes=3, label_smoothing=0.3)
  variables = _variables(config)
  logits, _ = class_logits(config, Decoder(MODEL), variables, _batch())
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  loss = jax.jit(classification.classification_loss, static_argnums=(0, 1))
  total, count, aux = loss(config, Decoder(MODEL), variables, _batch())
  assert count == 2
  expected = -sum(0.7 * log_probs[r, c] + 0.1 * log_probs[r].sum() for r, c in ((0, 2), (1, 0)))
  assert float(total) == pytest.approx(expected, rel=1e-5)
  assert float(aux['cross_entropy_sum']) == pytest.approx(-log_probs[0, 2] - log_probs[1, 0])
  assert float(aux['correct_sum']) == sum((log_probs.argmax(1) == [2, 0, -1]).tolist())


def test_the_axes_of_the_head_match_its_shapes():
  config = ClassifierConfig(num_classes=3)
  head = classification.init(config, MODEL, jax.random.key(0))
  assert {name: len(axes) for name, axes in classification.AXES.items()} == {
    name: leaf.ndim for name, leaf in head.items()}


def test_a_student_like_its_teacher_has_no_divergence():
  variables = init(MODEL, jax.random.key(0))
  model = Decoder(MODEL)
  total, count, aux = distill(
    TAUGHT.replace(temperature=2.0), model, variables, _batch(), teacher=variables)
  assert float(total) == pytest.approx(0, abs=1e-6) and count == 6
  plain = next_token(NextToken(), model, variables, _batch())
  assert float(aux['cross_entropy_sum']) == pytest.approx(float(plain[0]), rel=1e-6)


def test_distillation_equals_its_formula_and_spares_the_teacher():
  student, teacher = (init(MODEL, jax.random.key(i)) for i in range(2))
  model, batch = Decoder(MODEL), _batch()
  config = TAUGHT.replace(temperature=3.0, weight=0.25)

  def loss(student, teacher):
    return distill(config, model, student, batch, teacher=teacher)[0]

  def softened(variables):
    logits = apply(model, variables, batch['tokens'], batch['segment_ids'])
    return np.asarray(jax.nn.log_softmax(logits[..., :30] / 3))

  p, q = softened(teacher), softened(student)
  divergence = ((np.exp(p) * (p - q)).sum(-1) * batch['weights']).sum()
  plain = float(next_token(NextToken(), model, student, batch)[0])
  expected = 0.25 * 9 * divergence + 0.75 * plain
  assert float(loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
  grads = jax.grad(loss, argnums=1)(student, teacher)
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_other_vocabularies_are_refused():
  other = MODEL.replace(vocab_size=31)
  with pytest.raises(ValueError, match='vocabulary of 31 tokens'):
    distillation_loss(TAUGHT.replace(teacher_model=other), Decoder(MODEL), None, _batch())
