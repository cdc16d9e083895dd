"""Pipelines: the shapes of their results, a batch equals one at a time, offsets point right."""

import dataclasses

import jax
import pytest

import jaxllm
from jaxllm import loading, pipelines
from jaxllm.data import tokenizers
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.generation import text as texts
from jaxllm.generation.beam import BeamConfig, beam_search
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.linear import InitializerConfig
from jaxllm.tasks import base
from jaxllm.tasks.chat import PLAIN, Chat, ChatTemplate
from jaxllm.tasks.classification import Classification
from jaxllm.tasks.question_answering import QuestionAnswering
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.tasks.translation import Translation

BYTES = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
MODEL = DecoderConfig(
  vocab_size=BYTES.vocab_size, vocab_multiple=1, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=12,
  max_length=96, scan_layers=False, initializer=InitializerConfig(stddev=0.4),
)
TEXTS = ['a' * 20, 'some longer text', 'x']


class Run:
  """Stands for the experiment of a run that was fine-tuned on a task."""

  classifier = None
  data = DataConfig(context_length=8)

  def __init__(self, task):
    self.task = task


def tuned(model, task):
  return loading.make_model(model.config, model.variables, BYTES, Run(task))


@pytest.fixture(scope='module')
def model():
  variables = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
  return dataclasses.replace(loading.make_model(MODEL, variables, BYTES), add_bos=True)


@pytest.mark.parametrize('task, key', [
  ('translation', 'translation_text'), ('text-generation', 'generated_text'),
])
def test_a_batch_of_texts_equals_one_at_a_time(model, task, key):
  run = jaxllm.pipeline(task, model, batch_size=2, max_new_tokens=5)
  together = run(TEXTS)
  assert together == [run(text) if task == 'text-generation' else run(text)[0] for text in TEXTS]
  flat = [one for row in together for one in row] if task == 'text-generation' else together
  assert all(set(one) == {key} and isinstance(one[key], str) for one in flat)
  assert run([]) == []


def test_beams_and_speculation_everywhere(model):
  options = {'max_new_tokens': 6, 'temperature': 0.0}
  plain = jaxllm.generate(model, TEXTS, **options)
  assert jaxllm.generate(model, TEXTS, num_drafted=2, **options) == plain
  assert jaxllm.generate(model, TEXTS, draft=model, **options) == plain
  twice = jaxllm.generate(model, TEXTS[:1], num_return_sequences=2, **options)
  assert twice == plain[:1] * 2
  beams = jaxllm.generate(
    model, TEXTS, num_beams=3, num_return_sequences=2, max_new_tokens=6)
  want = [texts.text_of(BYTES, beam.tokens, ids)
          for ids, found in zip(map(model.encode_prompt, TEXTS), beam_search(
            model.decoder, model.unstacked, [*map(model.encode_prompt, TEXTS)],
            BeamConfig(num_beams=3, num_return=2), SamplingConfig(max_new_tokens=6),
            model.eos_token_ids), strict=True) for beam in found]
  assert beams == want
  run = jaxllm.pipeline('text-generation', model, max_new_tokens=6, num_beams=3)
  assert [row[0]['generated_text'] for row in run(TEXTS, return_full_text=False)] == beams[::2]
  for task in ('translation', 'summarization'):
    greedy, guessed, best = (jaxllm.pipeline(task, model, max_new_tokens=6, **way)(TEXTS)
                             for way in ({}, {'num_drafted': 2}, {'num_beams': 3}))
    assert greedy == guessed and len(best) == 3


@pytest.mark.parametrize('options, message', [
  ({'num_beams': 2, 'num_drafted': 2}, 'different ways to decode'),
  ({'num_beams': 2, 'top_k': 3}, 'top_k works without num_beams only'),
  ({'length_penalty': 2.0}, 'length_penalty works with num_beams above 1 only'),
  ({'num_beams': 2, 'cache_dtype': 'int8'}, 'cache_dtype: not with beams'),
  ({'num_return_sequences': 2}, 'give a list of prompts'),
  ({'num_return_sequences': 0}, 'num_return_sequences=0'),
])
def test_options_that_exclude_each_other_are_refused(model, options, message):
  with pytest.raises(ValueError, match=message):
    jaxllm.generate(model, 'a', **options)


def test_labels_of_a_batch_equal_one_at_a_time(model):
  classify = jaxllm.pipeline('sentiment-analysis', model, batch_size=2)
  together = classify(TEXTS)
  for text, found in zip(TEXTS, together, strict=True):
    alone, = classify(text)
    assert set(found) == {'label', 'score'} and found['label'] == alone['label']
    assert found['label'] in ('positive', 'negative') and 0.5 <= found['score'] <= 1
    assert found['score'] == pytest.approx(alone['score'], rel=1e-4)


def test_labels_may_be_ones_own(model):
  labels = (('spam', 'spam'), ('ham', 'ham'), ('egg', 'egg'))
  found = jaxllm.pipeline('text-classification', model, labels=labels)(TEXTS)
  assert {one['label'] for one in found} <= {'spam', 'ham', 'egg'}


def test_offsets_point_at_the_answer(model, monkeypatch):
  said = {}

  def predict(config, examples, *_):
    task = pipelines.TASKS[config.kind]
    answer = base.Answer(text=said['text'], score=0.5)
    return [task.read(config, example, answer) for example in examples]

  monkeypatch.setattr(pipelines.predict, 'predict', predict)
  answer = jaxllm.pipeline('question-answering', model)
  context = 'In the spring, the Ides of March came; Caesar fell.'
  for text, expected in (('ides of  march', 'Ides of March'), ('Great Caesar', 'Caesar'),
                         ('unanswerable', ''), ('Rome', '')):
    said['text'] = text
    found = answer(question='When?', context=context)
    assert found['answer'] == expected == context[found['start'] : found['end']]
    assert found['score'] == 0.5
  assert answer(question='When?')['answer'] == 'Rome'  # Without context, in its own words.


def test_questions_in_a_batch_equal_one_at_a_time(model):
  answer = jaxllm.pipeline('question-answering', model, batch_size=2, max_new_tokens=6)
  contexts = ['abc def', 'xyz ' * 5, 'q']
  together = answer(question=TEXTS, context=contexts)
  for question, context, found in zip(TEXTS, contexts, together, strict=True):
    alone = answer(question=question, context=context)
    assert found == {**alone, 'score': pytest.approx(alone['score'], rel=1e-4)}
  assert set(together[0]) == {'answer', 'score', 'start', 'end'}
  assert answer(question=TEXTS, context=contexts[0])[0] == together[0]
  with pytest.raises(ValueError, match='3 questions and 2 contexts'):
    answer(question=TEXTS, context=contexts[:2])


def test_prompts_continue_in_full_or_not(model):
  generate = jaxllm.pipeline('text-generation', model, max_new_tokens=5, temperature=0.0)
  whole, = generate('abc')
  new, = generate('abc', return_full_text=False)
  assert whole['generated_text'] == 'abc' + new['generated_text'] != 'abc'


def test_a_call_may_change_the_fields_for_itself(model):
  generate = jaxllm.pipeline('text-generation', model, max_new_tokens=5, temperature=0.0)
  short = jaxllm.pipeline('text-generation', model, max_new_tokens=2, temperature=0.0)
  assert generate('abc', max_new_tokens=2, return_full_text=True) == short('abc')
  assert generate('abc') != short('abc')
  with pytest.raises(ValueError, match="did you mean 'max_new_tokens'"):
    generate('abc', max_tokens=2)
  translate = jaxllm.pipeline('translation', model)
  assert translate('ab', max_new_tokens=1) == (
    jaxllm.pipeline('translation', model, max_new_tokens=1)('ab'))


def test_chats_in_a_batch_equal_one_at_a_time(model):
  reply = jaxllm.pipeline('chat', model, batch_size=2, max_new_tokens=6)
  chats = [
    [{'role': 'user', 'content': 'Hi'}],
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'},
     {'role': 'user', 'content': 'c' * 9}],
    [{'role': 'user', 'content': 'bye'}],
  ]
  together = reply(chats)
  assert together == [reply(one) for one in chats]
  assert together == reply(chats, num_drafted=2)
  assert len(reply(chats, num_beams=2)) == len(chats)
  assert together[0] == reply('Hi')
  for messages, (found,) in zip(chats, together, strict=True):
    *before, last = found['generated_text']
    assert before == messages and last['role'] == 'assistant'


def test_a_fine_tuned_model_answers_in_its_own_form(model):
  seen = []

  def spy(config, **fields):
    run = jaxllm.pipeline({'classification': 'sentiment-analysis'}.get(config.kind, config.kind),
                          tuned(model, config), **fields)
    found = run(TEXTS[:1])
    seen.append(found)
    return found

  labels = (('0', 'no'), ('1', 'yes'))
  data = RecordsConfig(sources=(RecordSource(location='none.tsv'),))
  config = Classification(data=data, labels=labels, prompt='{text}?')
  assert spy(config)[0]['label'] in ('0', '1')
  german = Translation(prompt='{source} =>', target_language='de', max_new_tokens=3)
  own = spy(german)
  assert own == jaxllm.pipeline('translation', model, prompt='{source} =>', max_new_tokens=3)(
    TEXTS[:1])
  summary = jaxllm.pipeline('summarization', tuned(model, german), max_new_tokens=3)
  found = summary('a')
  assert found == jaxllm.pipeline('summarization', model, max_new_tokens=3)('a')
  assert [set(one) for one in found] == [{'summary_text'}]
  question = QuestionAnswering(prompt_without_context='{question}?', max_new_tokens=3)
  assert jaxllm.pipeline('question-answering', tuned(model, question))('a') == jaxllm.pipeline(
    'question-answering', model, prompt_without_context='{question}?', max_new_tokens=3)('a')


def test_a_chat_follows_the_template_of_the_run(model):
  template = ChatTemplate(prefix='<{role}>', suffix='</>', controls=())
  own = tuned(model, Chat(template=template)).chat_format
  messages = [{'role': 'user', 'content': 'Hi'}]
  assert own.encode(messages) == [BYTES.bos_id, *b'<user>Hi</><assistant>'] and own.stop == ('</>',)
  silent = tuned(model, Chat(template=template.replace(suffix=''))).chat_format
  assert silent.encode(messages) == [BYTES.bos_id, *b'<user>Hi<assistant>'] and silent.stop == ()
  # By the tokenizer's own template, with the BOS that it was trained with.
  by_own = loading.make_model(
    model.config, model.variables, chat_bytes(), Run(Chat(template=None)))
  assert by_own.chat_format.encode(messages) == [BYTES.bos_id, *b'<user>Hi<assistant>']
  plain = loading.chat_format(model, PLAIN)
  assert plain.encode(messages) == [BYTES.bos_id, *b'User:\nHi\n\nAssistant:\n']
  assert plain.stop == ('\n\n',)


def test_what_is_asked_wrongly_is_said(model):
  with pytest.raises(ValueError, match="task='translate': one of translation, "):
    jaxllm.pipeline('translate', model)
  with pytest.raises(ValueError, match="no such field; did you mean 'max_new_tokens'"):
    jaxllm.pipeline('translation', model, max_tokens=3)
  with pytest.raises(ValueError, match='input 1 is 3'):
    jaxllm.pipeline('summarization', model)(['a', 3])


def chat_bytes():
  """Return the bytes tokenizer of a model with a chat template."""
  template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
  return tokenizers.from_files({**BYTES.files(), 'chat_template.jinja': template.encode()})


def test_a_chat_model_is_asked_by_its_template_unless_it_was_tuned(model):
  chat = dataclasses.replace(
    loading.make_model(model.config, model.variables, chat_bytes()), add_bos=True)
  asked = jaxllm.pipeline('translation', chat, max_new_tokens=5)('Hi {there}', target='fr')
  request = '<user>Translate from {source_language} to {target_language}: {source}<assistant>'
  assert asked == jaxllm.pipeline(
    'translation', model, prompt=request, max_new_tokens=5)('Hi {there}', target='fr')
  # A prompt of one's own, and the form of a fine-tuned run, take the place of the template.
  prompted = jaxllm.pipeline('translation', model, prompt='{source}=', max_new_tokens=5)('Hi')
  assert prompted != jaxllm.pipeline('translation', chat, max_new_tokens=5)('Hi')
  assert prompted == jaxllm.pipeline(
    'translation', chat, prompt='{source}=', max_new_tokens=5)('Hi')
  task = Translation(prompt='{source}=', request='{source}', max_new_tokens=5)
  run = loading.make_model(model.config, model.variables, chat_bytes(), Run(task))
  assert prompted == jaxllm.pipeline('translation', run)('Hi')


def test_a_language_that_the_prompt_does_not_name_is_refused(model):
  translate = jaxllm.pipeline('translation', tuned(model, Translation(prompt='{source}=')))
  assert len(translate('Hi', source='en', target='de')) == 1
  with pytest.raises(ValueError, match="target_language='fr': this model always translates"):
    translate('Hi', target='fr')
