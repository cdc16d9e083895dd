"""Each task: record to prompt and target, answer to prediction, and the score of that."""

import math

import pytest
import tokenizers as library

from jaxllm.data import tokenizers
from jaxllm.evaluation import scores
from jaxllm.tasks import TASKS, base, encoding, question_answering
from jaxllm.tasks.base import Answer, Segment
from jaxllm.tasks.classification import CHINESE, Classification, Sentiment
from jaxllm.tasks.language_modeling import LanguageModeling
from jaxllm.tasks.multiple_choice import MultipleChoice
from jaxllm.tasks.question_answering import ExtractiveQuestionAnswering, QuestionAnswering
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.tasks.summarization import Summarization
from jaxllm.tasks.translation import Translation

DATA = RecordsConfig(sources=(RecordSource(location='x.jsonl'),))
BOS, EOS = base.BOS, base.EOS


def _example(config, **record):
  return TASKS[config.kind].example(config, record)


def _read(config, example, answer):
  return TASKS[config.kind].read(config, example, answer)


@pytest.mark.parametrize('kind', TASKS)
def test_every_task_is_consistent(kind):
  task = TASKS[kind]
  assert task.config.model_fields['kind'].default == kind
  assert set(task.metrics) <= set(scores.METRICS)
  assert task.kind in ('generate', 'choose', 'measure')


def test_configs_reload_from_json():
  for config in (Translation(target_language='fr'), CHINESE, MultipleChoice()):
    assert type(config).from_json(config.to_json()) == config


def test_translation():
  config = Translation()
  record = {'source': 'A dog.', 'target': 'Ein Hund.'}
  example = _example(config, **record)
  assert example.segments == (
    BOS, Segment('English: A dog.\nGerman:'), Segment(' Ein Hund.', 1.0), EOS)
  assert example.reference == 'Ein Hund.'
  assert base.prompt_of(example.segments) == example.segments[:2]
  other = _example(config, **record, source_language='de', target_language='Klingon')
  assert other.segments[1].text == 'German: A dog.\nKlingon:'
  assert _read(config, example, Answer(' Ein Hund. ')) == {'translation_text': 'Ein Hund.'}
  unanswered = _example(config, source='A dog.')
  assert unanswered.reference is None
  assert base.prompt_of(unanswered.segments) == example.segments[:2]


def test_summarization():
  config = Summarization(prompt='{document}\n\nTL;DR:')
  example = _example(config, document='Long {text}', summary='Short')
  assert [s.text for s in example.segments[1:3]] == ['Long {text}\n\nTL;DR:', ' Short']
  assert _read(config, example, Answer(' Short')) == {'summary_text': 'Short'}


def test_classification_by_likelihood():
  config = Classification(data=DATA, labels=(('0', 'bad'), ('1', 'good')))
  example = _example(config, text='Nice', label=1)
  assert example.segments[1:3] == (Segment('Nice\nLabel:'), Segment(' good', 1.0))
  assert example.choices == (' bad', ' good') and example.reference == '1'
  answer = Answer(log_likelihoods=(math.log(0.2), math.log(0.6)))
  prediction = _read(config, example, answer)
  assert prediction['label'] == '1' and prediction['score'] == pytest.approx(0.75)
  assert prediction['scores'] == pytest.approx({'0': 0.25, '1': 0.75})


def test_the_prior_of_labels_is_divided_out():
  config = Classification(data=DATA, labels=(('0', 'bad'), ('1', 'good')), neutral_text='N/A')
  example = _example(config, text='Nice', label=0)
  assert example.neutral is not None and example.neutral[1].text == 'N/A\nLabel:'
  answer = Answer(
    log_likelihoods=(math.log(0.2), math.log(0.6)),
    neutral_log_likelihoods=(math.log(0.1), math.log(0.9)),
  )
  prediction = _read(config, example, answer)
  assert prediction['label'] == '0' and prediction['score'] == pytest.approx(2 / (2 + 2 / 3))


def test_sentiment_predictions_are_scored():
  config, task = Sentiment(), TASKS['sentiment']
  examples = [_example(config, text='t', label=label) for label in ('positive', 'negative')]
  predictions = [_read(config, e, Answer(log_likelihoods=(-2.0, -1.0))) for e in examples]
  found = {}
  for name, take in task.metrics.items():
    found |= scores.score(name, list(map(take, predictions)), [e.reference for e in examples])
  assert found['accuracy'] == 0.5 and found['macro_recall'] == 0.5
  assert found['ece'] == pytest.approx(1 / (1 + math.exp(-1)) - 0.5)


def test_generative_question_answering():
  config = QuestionAnswering()
  record = {'context': 'Ann met Bob in Rome.', 'question': 'Who?', 'answers': ['Bob', 'bob']}
  example = _example(config, **record)
  assert example.segments[1:3] == (
    Segment('Ann met Bob in Rome.\nQuestion: Who?\nAnswer:'), Segment(' Bob', 1.0))
  assert example.reference == ['Bob', 'bob']
  found = _read(config, example, Answer(' bob', score=0.5))
  assert found == {'answer': 'bob', 'score': 0.5, 'start': 8, 'end': 11}
  assert _read(config, example, Answer('Eve'))['start'] is None
  assert _example(config, question='Who?', answers='Bob').segments[1].text == (
    'Question: Who?\nAnswer:')


def test_unanswerable_questions():
  config = QuestionAnswering()
  example = _example(config, context='c', question='q', answers=[])
  assert example.segments[2].text == ' unanswerable' and example.reference == []
  found = _read(config, example, Answer(' Unanswerable', score=0.9))
  assert found == {'answer': '', 'score': 0.9, 'start': 0, 'end': 0}
  assert scores.score('squad', [found['answer']], [example.reference])['f1'] == 1


def test_extractive_answers_are_stretches_of_the_context():
  config = ExtractiveQuestionAnswering(data=DATA)
  context = 'The Normans (Norman: Nourmands)\n were in the  10th and 11th centuries.'
  example = _example(config, context=context, question='q', answers=['10th'])
  for said, expected in [
    ('the 10th and 11th centuries', 'the  10th and 11th centuries'),
    ('NOURMANDS', 'Nourmands'),
    ('in the tenth and 11th centuries', 'in the  10th and 11th centuries'),
    ('nothing of it', ''),
    ('', ''),
  ]:
    found = _read(config, example, Answer(said))
    assert found['answer'] == expected, said
    assert context[found['start'] : found['end']] == expected


@pytest.mark.parametrize(
  'answer, context, span',
  [
    ('an', 'a band and an ox', (11, 13)),
    ('and', 'band', (1, 4)),
    ('A.B', 'axb a.b', (4, 7)),
    ('x', 'abc', None),
    (' ', 'abc', None),
    ('猫', '有猫。', (1, 2)),
  ],
)
def test_find(answer, context, span):
  assert question_answering.find(answer, context) == span


def test_multiple_choice():
  config = MultipleChoice()
  record = {'question': 'q', 'choices': ['ab', 'abcd']}
  for answer in (1, 'abcd', 'B'):
    example = _example(config, **record, answer=answer)
    assert example.reference == 1 and example.segments[2].text == ' abcd'
    assert example.choices == (' ab', ' abcd')
  found = _read(config, example, Answer(log_likelihoods=(-3.0, -4.0)))
  assert found['choice'] == 0 and found['normalized_choice'] == 1
  assert found['score'] == pytest.approx(1 / (1 + math.exp(-1)))
  for answer in (2, 'C', 'abc', -1):
    with pytest.raises(ValueError, match="field 'answer'.*of the choices"):
      _example(config, **record, answer=answer)


def test_language_modeling():
  config = LanguageModeling()
  example = _example(config, text='é!')
  assert example.segments == (BOS, Segment('é!', 1.0))
  found = _read(config, example, Answer(log_likelihoods=(-1.0, -2.0), num_tokens=(2, 1)))
  assert found == {'log_likelihood': -3.0, 'tokens': 3, 'bytes': 3}


@pytest.mark.parametrize(
  'build, message',
  [
    (lambda: Summarization(prompt='{document'), 'a literal brace twice'),
    (lambda: Summarization(prompt='{document.x}:'), 'no field name'),
    (lambda: Summarization(prompt='{document!r}:'), 'no field name'),
    (lambda: Summarization(prompt='{document} '), 'ends with white space'),
    (lambda: Classification(data=DATA, labels=(('0', 'a'),)), 'at least two'),
    (lambda: Classification(data=DATA, labels=(('0', 'a'), ('1', 'a'))), 'words that differ'),
    (lambda: _example(Sentiment(), text='x', label='meh'), "label 'meh' is none of"),
    (lambda: _example(Summarization(prompt='{body}:'), document='x'), "no field 'body'"),
  ],
)
def test_bad_input_is_named(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_text_after_text_begins_without_the_space_that_tokenizers_add():
  inner = library.Tokenizer(library.models.BPE(
    vocab={'▁': 0, 'a': 1, 'b': 2, '▁a': 3, '<0x0A>': 4, '▁b': 5, '<s>': 6},
    merges=[('▁', 'a'), ('▁', 'b')], byte_fallback=True))
  inner.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme='first')
  inner.decoder = library.decoders.Sequence([
    library.decoders.Replace('▁', ' '), library.decoders.ByteFallback(), library.decoders.Fuse()])
  inner.add_special_tokens(['<s>'])
  tokenizer = tokenizers.from_files({
    'tokenizer.json': inner.to_str().encode(), 'tokenizer_config.json': b'{"bos_token": "<s>"}'})
  segments = [BOS, Segment('a'), Segment('b', 1.0), Segment(' a', 1.0), BOS, Segment('b')]
  found = encoding.encode(segments, tokenizer)
  assert found.ids == [6, 3, 2, 3, 6, 5] and list(found.weights) == [0, 0, 1, 1, 0, 0]
