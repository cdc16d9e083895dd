"""A model doing tasks: batched equals alone, likelihoods equal a loop, long texts are windowed."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import loading
from jaxllm.data import tokenizers
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation import decode
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.model import ChatFormat
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.linear import InitializerConfig
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.tasks import TASKS
from jaxllm.tasks import predict as predict_lib
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.encoding import Tokens
from jaxllm.tasks.language_modeling import LanguageModeling
from jaxllm.tasks.multiple_choice import MultipleChoice
from jaxllm.tasks.predict import predict
from jaxllm.tasks.question_answering import QuestionAnswering
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.tasks.summarization import Summarization
from jaxllm.tasks.translation import Translation

BYTES = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
apply = jax.jit(Decoder.apply, static_argnums=0)
MODEL = DecoderConfig(
  vocab_size=BYTES.vocab_size, vocab_multiple=1, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=12,
  max_length=64, scan_layers=False, initializer=InitializerConfig(stddev=0.4),
)


@pytest.fixture(scope='module')
def model():
  variables = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
  return loading.make_model(MODEL, variables, BYTES, SimpleNamespace(
    task=Sentiment(), classifier=None, data=DataConfig(context_length=8)))


def _loop(model, tokens):
  """Sum log-probabilities token by token, from one full forward pass."""
  ids = jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens.ids)].set(jnp.asarray(tokens.ids))
  log_probs = jax.nn.log_softmax(apply(model.decoder, model.variables, ids))[0]
  pairs = enumerate(zip(tokens.ids[1:], tokens.weights[1:], strict=True))
  return sum(float(log_probs[i, token]) * weight for i, (token, weight) in pairs)


def _examples(config, rows):
  return [TASKS[config.kind].example(config, row) for row in rows]


def test_log_likelihoods_equal_a_loop(model):
  rng = np.random.default_rng(0)
  sequences = [
    Tokens(rng.integers(0, 256, n).tolist(), (rng.random(n) < 0.5).astype(float).tolist())
    for n in (5, 60, 2, 33, 40, 7)
  ]
  found = predict_lib.log_likelihoods(model, sequences)
  np.testing.assert_allclose(found, [_loop(model, s) for s in sequences], rtol=1e-4, atol=1e-4)


def test_choices_are_ranked_by_their_likelihood(model):
  config = Sentiment(prompt='R: {text}\nS:', neutral_text='N/A')
  rows = [{'text': text, 'label': 'positive'} for text in ('good', 'so bad', 'x', 'good', 'fine')]
  examples = _examples(config, rows)
  found = predict(config, examples, model)
  for row, prediction in zip(rows, found, strict=True):
    shares = {}
    for label in ('negative', 'positive'):
      values = []
      for text in (row['text'], 'N/A'):
        prompt = [BYTES.bos_id, *f'R: {text}\nS:'.encode()]
        said = list(f' {label}'.encode())
        values.append(_loop(model, Tokens(prompt + said, [0] * len(prompt) + [1] * len(said))))
      shares[label] = np.exp(values[0] - values[1])
    expected = shares['positive'] / sum(shares.values())
    assert prediction['scores']['positive'] == pytest.approx(expected, rel=1e-3)
  alone = [predict(config, [example], model)[0] for example in examples]
  for one, batched in zip(alone, found, strict=True):
    assert one['label'] == batched['label']
    assert one['score'] == pytest.approx(batched['score'], rel=1e-4)


def test_records_may_have_choices_of_their_own(model):
  config = MultipleChoice()
  rows = [{'question': 'q', 'choices': ['a', 'bb', 'ccc'], 'answer': 0},
          {'question': 'r', 'choices': ['d', 'e'], 'answer': 1}]
  found = predict(config, _examples(config, rows), model)
  assert [p['choice'] in range(3) for p in found] == [True, True]


def test_who_was_not_fine_tuned_is_told_that_there_may_be_no_answer(model, monkeypatch, tmp_path):
  config = QuestionAnswering(prompt='{context} {question}')

  def asked(answers, **fields):
    rows = [{'context': 'c', 'question': f'q{i}', 'answers': one} for i, one in enumerate(answers)]
    (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    source = RecordSource(location=str(tmp_path / 'r.jsonl'), split='test')
    data = RecordsConfig(sources=(source,))
    prompts = []

    def complete(decoder, variables, tokenizer, some, *_, **__):
      prompts.extend(bytes(i for i in ids if i < 256).decode() for ids in some)
      return [decode.Completion('"Unanswerable."')] * len(some)

    monkeypatch.setattr(predict_lib.text, 'complete', complete)
    examples = predict_lib.examples(config.replace(data=data, **fields), 'test')
    roomy = dataclasses.replace(model, config=MODEL.replace(max_length=400))
    found = predict(config, examples, dataclasses.replace(roomy, experiment=None))
    assert [one['answer'] for one in found] == [''] * len(rows)
    plain = len(prompts)
    predict(config, examples, roomy)
    return prompts[:plain], prompts[plain:]

  told = 'Where the text does not say, the answer is "unanswerable".'
  plain = ['c q0', 'c q1']
  assert asked([['a'], []]) == ([f'{told}\n{one}' for one in plain], plain)
  assert asked([['a'], ['b']]) == (plain, plain)
  chat = ChatFormat(lambda chats: [list(one[0]['content'].encode()) for one in chats], (), tuple)
  model = dataclasses.replace(model, chat_format=chat)
  assert asked([['a'], []], request='{question}?')[0] == [f'q0? {told}', f'q1? {told}']


def test_generated_batch_equals_one_at_a_time(model):
  config = Translation(max_new_tokens=6, stop='q')
  rows = [{'source': text} for text in ('a' * 20, 'longer text, here', 'x' * 90)]
  examples = _examples(config, rows)
  together = predict(config, examples, model)
  assert [predict(config, [example], model)[0] for example in examples] == together
  assert all('q' not in p['translation_text'] for p in together)


def test_the_score_is_that_of_the_answer_alone(model):
  prompt = [BYTES.bos_id, *b'hello']
  def answer(stop):
    config = Summarization(max_new_tokens=12, prompt='{document}', stop=stop)
    found, = predict_lib._generate(
      config, _examples(config, [{'document': 'hello'}]), model, 1, None, None)
    return found

  whole = answer(None)
  stop = whole.text[3]
  cut = answer(stop)
  assert whole.text.startswith(cut.text) and stop not in cut.text
  sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
  found, = decode.generate(model.decoder, model.variables, [prompt], sampling, [BYTES.eos_id])
  used = next(i for i in range(13) if stop in BYTES.decode(found.tokens[:i]))
  assert used < len(found.tokens)
  assert cut.score == pytest.approx(np.exp(np.mean(found.logprobs[:used])), rel=1e-5)


def test_a_text_is_measured_whole(model):
  config = LanguageModeling()
  texts = ['short', 'x' * 63, 'long ' * 40, '']
  found = predict(config, _examples(config, [{'text': text} for text in texts]), model)
  assert [p['tokens'] for p in found] == [p['bytes'] for p in found] == list(map(len, texts))
  for text, prediction in zip(texts[:2], found, strict=False):
    ids = [BYTES.bos_id, *text.encode()]
    expected = _loop(model, Tokens(ids, [1] * len(ids)))
    assert prediction['log_likelihood'] == pytest.approx(expected, rel=1e-4)
  # Every window of the long text has context: its mean loss is like that of a full one.
  assert found[2]['log_likelihood'] < 0 == found[3]['log_likelihood']


def test_examples_are_read_from_the_data_of_the_task(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"document": "d", "summary": "s"}\n')
  config = TASKS['summarization'].config(
    data={'sources': [{'location': str(path), 'split': 'test'}]})
  example, = predict_lib.examples(config, 'test')
  assert example.reference == 's'


def test_a_short_context_is_shared_by_prompt_and_answer(model):
  length = model.config.max_length
  config = Summarization(max_new_tokens=10 * length, stop=None)
  texts = ['a' * 2 * length + end for end in ('x', 'yz')]
  rows = [{'document': text} for text in texts]
  first, second = predict(config, _examples(config, rows), model)
  # What is said depends on the end of the prompt, of which half a context is left.
  assert first != second
  assert all(len(one['summary_text'].encode()) <= 3 * length for one in (first, second))


def test_a_head_answers_only_for_its_own_labels(model):
  other = ('a', 'b'), ('c', 'd')
  head = dataclasses.replace(model, experiment=SimpleNamespace(
    task=Sentiment(labels=other), classifier=ClassifierConfig(num_classes=2)))
  config = Sentiment(prompt='R: {text}\nS:')
  rows = _examples(config, [{'text': 'good', 'label': 'positive'}])
  assert predict(config, rows, head) == predict(config, rows, model)
