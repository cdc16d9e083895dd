"""The whole road, small: records, prompts, packing, adapters, predictions, scores."""

import jax
import optax
import pytest

from jaxllm.adapters import lora
from jaxllm.adapters.lora import LoraConfig
from jaxllm.data import packing, tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation import scores
from jaxllm.model import Model
from jaxllm.models import decoder
from jaxllm.models.config import ExpertsConfig
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives.next_token import NextToken, next_token_loss
from jaxllm.tasks import TASKS, predict
from jaxllm.tasks.classification import Sentiment
from tests.training.tiny_run import training_records

BYTES = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
MODEL = DecoderConfig(
  vocab_size=BYTES.vocab_size, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_length=64,
)


@pytest.mark.parametrize('experts', [None, ExpertsConfig(num_experts=4, top_k=2)],
                         ids=['dense', 'experts'])
def test_adapters_learn_a_task(experts):
  config = Sentiment(prompt='{text}:', labels=(('negative', 'n'), ('positive', 'p')))
  texts = [(f'{word} {i}', label) for i in range(8)
           for word, label in (('bad', 'negative'), ('good', 'positive'))]
  examples = [TASKS['sentiment'].example(config, {'text': t, 'label': lab}) for t, lab in texts]
  records = training_records(examples, BYTES, context_length=31)
  assert len(records) == 6  # 12 tokens or less each: three or two to a record.
  batch = packing.batch_arrays(records)
  assert batch['weights'].sum() == 16 * len(' p') + 16

  model = Decoder(MODEL.replace(experts=experts))
  params = jax.jit(decoder.init, static_argnums=0)(model.config, jax.random.key(0))['params']
  adapters = lora.init(LoraConfig(targets=('layers/.*', 'head')), params, jax.random.key(1))
  # A constant rate is thrown back at times.
  tx = optax.adam(optax.cosine_decay_schedule(0.01, 150))

  @jax.jit
  def step(carry, _):
    def loss(adapters):
      variables = {'params': params, 'lora': adapters}
      total, count, _ = next_token_loss(NextToken(), model, variables, batch)
      return total / count

    adapters, opt_state = carry
    value, grads = jax.value_and_grad(loss)(adapters)
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return (optax.apply_updates(adapters, updates), opt_state), value

  (adapters, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))(
    (adapters, tx.init(adapters)))
  assert losses[-1] < 0.1 * losses[0]

  found = predict.predict(config, examples, Model(
    model.config, {'params': params, 'lora': adapters}, BYTES))
  labels = [prediction['label'] for prediction in found]
  assert scores.score('accuracy', labels, [e.reference for e in examples]) == {'accuracy': 1.0}
