"""Fields of records: the shapes that people have are read, everything else is refused by name."""

import json

import numpy as np
import pytest

from jaxllm.data.readers import plain
from jaxllm.evaluation import scores
from jaxllm.tasks import TASKS, predict, suite
from jaxllm.tasks.base import BOS, CONVERSATION, EOS, Segment, prompt_of
from jaxllm.tasks.chat import PLAIN, Chat, ChatTemplate
from jaxllm.tasks.classification import Classification
from jaxllm.tasks.language_modeling import LanguageModeling
from jaxllm.tasks.multiple_choice import MultipleChoice
from jaxllm.tasks.preference import Preference, rejected
from jaxllm.tasks.question_answering import ExtractiveQuestionAnswering, QuestionAnswering
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.tasks.summarization import Summarization
from jaxllm.tasks.translation import Translation

DATA = RecordsConfig(sources=(RecordSource(location='x.jsonl'),))
CONFIGS = {
  'translation': Translation(), 'summarization': Summarization(),
  'classification': Classification(data=DATA, labels=(('0', 'bad'), ('1', 'good'))),
  'question_answering': QuestionAnswering(),
  'extractive_question_answering': ExtractiveQuestionAnswering(data=DATA),
  'multiple_choice': MultipleChoice(), 'preference': Preference(), 'chat': Chat(),
  'language_modeling': LanguageModeling(),
}
WHOLE = {
  'translation': {'source': 'a', 'target': 'b'},
  'summarization': {'document': 'a', 'summary': 'b'},
  'classification': {'text': 'a', 'label': '1'},
  'question_answering': {'question': 'q', 'answers': ['a']},
  'extractive_question_answering': {'question': 'q', 'answers': ['a'], 'context': 'a b'},
  'multiple_choice': {'question': 'q', 'choices': ['a', 'b'], 'answer': 0},
  'preference': {'prompt': 'p', 'chosen': 'c', 'rejected': 'r'},
  'chat': {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]},
  'language_modeling': {'text': 'a'},
}
REQUIRED = [(kind, name) for kind, record in WHOLE.items() for name in record]
TEXTS = [pair for pair in REQUIRED if pair[1] not in ('answers', 'choices', 'answer', 'messages')]


def user(content, **more):
  return {'role': 'user', 'content': content, **more}


def bot(content, **more):
  return {'role': 'assistant', 'content': content, **more}


def example(kind, config=None, **record):
  return TASKS[kind].example(config or CONFIGS[kind], record)


def from_file(tmp_path, config, *records):
  """Return what is read from a file of records."""
  path = tmp_path / 'r.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  data = RecordsConfig(sources=(RecordSource(location=str(path), split='train'),))
  return predict.examples(config.replace(data=data), 'train')


@pytest.mark.parametrize(('kind', 'name'), REQUIRED)
@pytest.mark.parametrize('value', [None, {}, float('nan'), '\ud800', ['a', None], [['a']]],
                         ids=['null', 'object', 'nan', 'surrogate', 'null-inside', 'list-inside'])
def test_what_a_field_cannot_hold_is_refused_by_file_line_and_field(tmp_path, kind, name, value):
  record = {**WHOLE[kind], name: value}
  with pytest.raises(ValueError, match=rf"r.jsonl, line 2: .*'{name}.* is .*expected"):
    from_file(tmp_path, CONFIGS[kind], WHOLE[kind], record)


@pytest.mark.parametrize(('kind', 'name'), TEXTS)
@pytest.mark.parametrize('value', ['', ' \n', 3.5, True, ['a']], ids=repr)
def test_texts_are_texts_that_say_something(kind, name, value):
  allowed = {('classification', 'label'): (True,), ('summarization', 'summary'): (['a'],),
             ('translation', 'target'): (['a'],), ('language_modeling', 'text'): ('', ' \n')}
  if value in allowed.get((kind, name), ()):
    return
  with pytest.raises(ValueError, match=f"field '{name}.* is .*expected"):
    example(kind, **{**WHOLE[kind], name: value})


@pytest.mark.parametrize(('kind', 'name'), REQUIRED)
def test_what_is_missing_is_said_where_the_records_are_read(tmp_path, kind, name):
  record = {key: value for key, value in WHOLE[kind].items() if key != name}
  message = rf"r.jsonl, line 1: there is no field '{name}'.*data.fields"
  with pytest.raises(ValueError, match=message):
    from_file(tmp_path, CONFIGS[kind], record)


def test_the_same_rules_hold_for_tasks_in_a_file(tmp_path):
  (tmp_path / 'r.jsonl').write_text('{"document": "a", "summary": null}')
  source = {'location': str(tmp_path / 'r.jsonl'), 'split': 'test'}
  (tmp_path / 'tasks.json').write_text(
    json.dumps({'kind': 'summarization', 'data': {'sources': [source]}}))
  config, = suite.select(str(tmp_path / 'tasks.json'), 'test').values()
  with pytest.raises(ValueError, match="r.jsonl, line 1: field 'summary' is null"):
    predict.examples(config, 'test')


def test_other_fields_of_a_template_are_texts_or_numbers():
  config = Summarization(prompt='{title} ({year}): {document}')
  record = {**WHOLE['summarization'], 'title': 't', 'year': 1999}
  assert example('summarization', config, **record).segments[1].text == 't (1999): a'
  for value in (None, ['t'], True, float('inf')):
    with pytest.raises(ValueError, match="field 'title' is .*; expected text"):
      example('summarization', config, **{**record, 'title': value})


def test_values_of_numpy_are_those_of_python():
  found = example('multiple_choice', question=np.str_('q'), choices=np.array(['a', 'b']),
                  answer=np.int64(1))
  assert found.reference == 1 and found.choices == (' a', ' b')
  assert example('classification', text=b'a', label=np.float64(1.0)).reference == '1'
  assert plain({'a': (np.arange(2), b'\xff')}) == {'a': [[0, 1], b'\xff']}


@pytest.mark.parametrize('label, expected', [
  (1, '1'), ('1', '1'), (1.0, '1'), (True, None), (' 1', None), (0.5, None), ([1], None)])
def test_labels(label, expected):
  if expected is None:
    with pytest.raises(ValueError, match='label'):
      example('classification', text='t', label=label)
  else:
    assert example('classification', text='t', label=label).reference == expected
  named = CONFIGS['classification'].replace(labels=(('true', 'yes'), ('false', 'no')))
  assert example('classification', named, text='t', label=True).segments[2].text == ' yes'


@pytest.mark.parametrize('choices, answer, expected', [
  (['no', 'yes'], True, 1), (['no', 'yes'], False, 0), (['Yes', 'No'], True, 0),
  (['true', 'false'], True, 0), (['a', 'b'], True, None), (['yes', 'true'], True, None),
  (['a', 'b'], 1, 1), (['a', 'b'], 1.0, 1), (['a', 'b'], '1', 1), (['a', 'b'], 2, None),
  (['a', 'b'], -1, None), (['a', 'b'], 0.5, None),
  (['red', 'blue'], 'B', 1), (['red', 'blue'], 'b', 1), (['red', 'blue'], 'blue', 1),
  (['red', 'blue'], 'Blue', None), (['red', 'blue'], ' B', None), (['red', 'blue'], 'C', None),
  (['1', '2', '3'], 1, None), (['1', '2', '3'], '2', None), (['3', '4', '5'], '5', 2),
  (['0', '1'], 1, 1), (['B', 'A'], 'A', None), (['A', 'B'], 'A', 0),
  (['x', 'y', 'x'], 2, 0), (['x', 'y', 'x'], 'x', 0),
])
def test_an_answer_is_one_choice_or_is_refused(choices, answer, expected):
  if expected is not None:
    assert example('multiple_choice', question='q', choices=choices, answer=answer).reference == (
      expected)
    return
  with pytest.raises(ValueError, match="'answer'"):
    example('multiple_choice', question='q', choices=choices, answer=answer)


def test_choices_as_arc_has_them():
  arc = {'text': ['wood', 'iron', '1'], 'label': ['1', '2', '3']}
  for answer, expected in (('2', 1), (3, 2), ('wood', 0)):
    found = example('multiple_choice', question='q', choices=arc, answerKey=answer)
    assert found.choices == (' wood', ' iron', ' 1') and found.reference == expected
  pairs = [{'text': 'wood', 'label': 'A'}, {'text': 'iron', 'label': 'B'}]
  assert example('multiple_choice', question='q', choices=pairs, answerKey='B').reference == 1
  for choices, message in (('red;green', 'a list of at least two texts'),
                           (['one'], 'at least two'), ({'text': ['a', 'b']}, "field 'choices'"),
                           ({'text': ['a', 'b'], 'label': ['A']}, 'as many items')):
    with pytest.raises(ValueError, match=message):
      example('multiple_choice', question='q', choices=choices, answer=0)
  assert example('multiple_choice', question='q', choices='["a", "b"]', answer='b').reference == 1


@pytest.mark.parametrize('answers, expected', [
  ({'text': ['a', 'b'], 'answer_start': [0, 2]}, ['a', 'b']), ('a', ['a']), (['a'], ['a']),
  ({'text': [], 'answer_start': []}, []), ([], []), ('["a"]', ['a']), ('[sic] a', ['[sic] a']),
  ([{'text': 'a', 'answer_start': 0}], ['a']), (np.array(['a']), ['a']),
])
def test_answers(answers, expected):
  found = example('question_answering', question='q', answers=answers)
  assert found.reference == expected
  assert found.segments[2].text == ' ' + (expected[0] if expected else 'unanswerable')


@pytest.mark.parametrize('answers', ['', [''], True, 7, {'texts': ['a']}, [1], {'text': None}])
def test_answers_that_are_none_are_refused(answers):
  with pytest.raises(ValueError, match="field 'answers.*expected"):
    example('question_answering', question='q', answers=answers)


def test_a_context_may_be_left_out():
  for record in ({}, {'context': None}, {'context': ''}):
    found = example('question_answering', question='q', answers='a', **record)
    assert found.segments[1].text == 'Question: q\nAnswer:'


def test_of_several_references_the_first_is_trained_on():
  for kind, prompt, name in (('translation', 'source', 'target'),
                             ('summarization', 'document', 'summary')):
    found = example(kind, **{prompt: 'a', name: ['one cat', 'a cat']})
    assert found.segments[2].text == ' one cat' and found.reference == ['one cat', 'a cat']


@pytest.mark.parity
def test_all_of_several_references_are_scored():
  assert scores.score('rouge', ['a cat'], [['one cat', 'a cat']])['rouge1'] == 1
  assert scores.score('bleu', ['a cat is on the mat'], [['x', 'a cat is on the mat']])['bleu'] == (
    pytest.approx(100))


def test_translations_by_language():
  found = example('translation', translation={'en': 'dog', 'de': 'Hund', 'fr': 'chien'})
  assert found.segments[1:3] == (Segment('English: dog\nGerman:'), Segment(' Hund', 1.0))


CHAT = [user('a'), bot('b')]


@pytest.mark.parametrize('record', [
  {'messages': CHAT},
  {'messages': json.dumps(CHAT)},
  {'messages': [{**message, 'tool_calls': None, 'name': None} for message in CHAT], 'tools': None},
  {'messages': [user([{'type': 'text', 'text': 'a'}]), bot('b', weight=1)]},
  {'messages': [{'role': 'User', 'content': 'a'}, {'role': 'model', 'content': 'b'}]},
  {'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]},
  {'conversations': [{'from': 'human', 'value': 'a', 'weight': None},
                     {'from': 'gpt', 'value': 'b', 'weight': 1}], 'system': ''},
  {'conversation': CHAT},
  {'prompt': 'a', 'completion': 'b'},
  {'prompt': CHAT[:1], 'completion': CHAT[1:]},
  {'instruction': 'a', 'input': '', 'output': 'b'},
  {'instruction': 'a', 'output': 'b'},
], ids=lambda record: ' '.join(record))
def test_chats_in_every_form_are_the_same(record):
  found = example('chat', Chat(template=PLAIN), **record)
  assert found.segments == (CONVERSATION, Segment('User:\na\n\nAssistant:\n'),
                            Segment('b', 1.0), Segment('\n\n', 1.0))
  assert found.record == record


def spoken(found):
  return [segment.text for segment in found.segments if segment.weight and segment.text != '\n\n']


def test_systems_inputs_and_earlier_answers():
  config = Chat(template=PLAIN)
  text = ''.join(s.text for s in example(
    'chat', config, instruction='a', input='x', output='b', system='s').segments[1:])
  assert text == 'system:\ns\n\nUser:\na\n\nx\n\nAssistant:\nb\n\n'
  found = example('chat', config, system='s',
                  conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}])
  assert found.segments[1].text.startswith('system:\ns\n\nUser:')
  found = example('chat', config, prompt=[user('a'), bot('b'), user('c')], completion=[bot('d')])
  assert spoken(found) == ['d']


@pytest.mark.parametrize('off', [{'weight': 0}, {'train': False}, {'loss': False}, {'weight': 0.0}])
def test_a_turn_without_weight_is_not_trained_on(off):
  messages = [user('a', **off), bot('bad', **off), user('c'), bot('good', weight=1)]
  assert spoken(example('chat', Chat(template=PLAIN), messages=messages)) == ['good']
  half = example('chat', Chat(template=PLAIN), messages=[user('a'), bot('b', weight=0.5)])
  assert [s.weight for s in half.segments if s.weight] == [0.5, 0.5]


@pytest.mark.parametrize('messages, message', [
  ('hello', "field 'messages' is the text 'hello'; expected a list of messages"),
  ([], 'expected a list'), ({'role': 'user'}, 'expected a list'),
  (['a'], r'messages\[0\]'), ([{'role': 'user'}], r'messages\[0\].content. is null'),
  ([user('a'), bot(None, tool_calls=[{}])], r'messages\[1\].*without tool_calls'),
  ([user('a'), bot('b', reasoning='c')], 'without reasoning'),
  ([user('a', name='Ann'), bot('b')], 'without name'),
  ([user('a'), {'role': 'tool', 'content': 'b'}], r"messages\[1\].role. is the text 'tool'"),
  ([{'content': 'a'}], r'messages\[0\].role'), ([user('a'), bot('')], 'empty text'),
  ([user([{'type': 'image_url', 'image_url': 'x'}])], r'messages\[0\].content. is the list'),
  ([user([{'type': 'text', 'text': None}]), bot('b')], r'messages\[0\].content. is the list'),
  ([{**user('a'), 'from': 'gpt'}, bot('b')], r'messages\[0\].*expected one role'),
  ([{**user('a'), 'value': 'c'}, bot('b')], r'messages\[0\].*expected one role'),
  ([user('a'), bot('b', weight=1, train=False)], 'one weight'),
  (repr([user('a'), bot('b')]), 'is the text'),
  ([user('a', weight=1), bot('b')], 'who are not trained on'),
  ([user('a'), bot('b', weight=2)], 'weight'), ([user('a'), bot('b', weight='0')], 'weight'),
])
def test_what_a_chat_cannot_hold_is_refused(messages, message):
  with pytest.raises(ValueError, match=message):
    example('chat', messages=messages)
  with pytest.raises(ValueError, match="field 'tools'.*are not read"):
    example('chat', messages=CHAT, tools=[{'name': 'f'}])


@pytest.mark.parametrize('record', [
  {'prompt': 'p', 'chosen': 'c', 'rejected': 'r'},
  {'prompt': [user('p')], 'chosen': [bot('c')], 'rejected': [bot('r')]},
  {'prompt': 'p', 'chosen': [bot('c')], 'rejected': [bot('r')]},
  {'prompt': 'p', 'chosen': [user('p'), bot('c')], 'rejected': [user('p'), bot('r')]},
  {'chosen': [user('p'), bot('c')], 'rejected': [user('p'), bot('r')]},
  {'prompt': [user('p')], 'chosen': [user('p'), bot('c')], 'rejected': [user('p'), bot('r')]},
], ids=range(6))
def test_preferences_in_every_form_are_the_same(record):
  found = example('preference', **record)
  assert found.segments == (BOS, Segment('p\nAnswer:'), Segment(' c', 1.0), EOS)
  assert found.choices == (' c', ' r') and found.reference == 0
  assert rejected(found).segments == (BOS, Segment('p\nAnswer:'), Segment(' r', 1.0), EOS)
  found = example('preference', Preference(template=ChatTemplate()), **record)
  text = '<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n'
  for one, said in ((found, 'c'), (rejected(found), 'r')):
    assert ''.join(s.text for s in prompt_of(one.segments)[1:]) == text
    assert [s.text for s in one.segments if s.weight] == [said, '<|im_end|>']


def test_preferences_of_several_turns_need_a_template():
  before = [{'role': 'system', 'content': 's'}, user('a'), bot('b'), user('c')]
  record = {'chosen': [*before, bot('d')], 'rejected': [*before, bot('e')]}
  with pytest.raises(ValueError, match='system, user, assistant, user.*task.template'):
    example('preference', **record)
  found = example('preference', Preference(template=PLAIN), **record)
  assert found.choices == ('d', 'e') and spoken(found) == ['d']


@pytest.mark.parametrize('record, message', [
  ({'chosen': [user('p'), bot('c')], 'rejected': [user('q'), bot('r')]}, 'differ before'),
  ({'prompt': 'x', 'chosen': [user('p'), bot('c')], 'rejected': [user('p'), bot('r')]},
   "field 'prompt' is the text 'x'"),
  ({'chosen': [user('p')], 'rejected': [user('p'), bot('r')]}, 'role'),
  ({'prompt': 'p', 'chosen': [], 'rejected': [bot('r')]}, "field 'chosen' is the list"),
  ({'prompt': 'p', 'chosen': [user('p'), bot('c')], 'rejected': 'r'}, 'differ before'),
])
def test_preferences_that_do_not_fit_together_are_refused(record, message):
  with pytest.raises(ValueError, match=message):
    example('preference', **record)


def test_a_system_of_its_own_field_stands_first():
  messages = [user('a'), bot('b')]
  for name in ('system', 'system_prompt'):
    found = example('chat', Chat(template=PLAIN), messages=messages, **{name: 's'})
    assert found.segments[1].text.startswith('system:\ns\n\nUser:\na')
  same = example('chat', Chat(template=PLAIN), system='s', tools=[],
                 messages=[{'role': 'system', 'content': 's'}, user('a'), bot('b', tool_calls=[])])
  assert same.segments == found.segments
  config = TASKS['preference'].config(template=PLAIN)
  found = example('preference', config, system='s', prompt='a', chosen='b', rejected='c')
  assert found.segments[1].text.startswith('system:\ns\n\nUser:\na')
  with pytest.raises(ValueError, match="field 'history'.*are not read"):
    example('chat', instruction='a', output='b', history=[['c', 'd']])


def test_what_csv_writes_as_text_is_read_as_what_it_is():
  messages = {'chosen': [user('a'), bot('b')], 'rejected': [user('a'), bot('c')]}
  written = {name: json.dumps(value) for name, value in messages.items()}
  assert example('preference', **written).choices == example('preference', **messages).choices
  last = {name: value[-1] for name, value in messages.items()}
  assert example('preference', prompt='a', **last).choices == (' b', ' c')
  with pytest.raises(ValueError, match="field 'chosen' is the text"):
    example('preference', **{name: repr(value) for name, value in messages.items()})
  found = example('chat', Chat(template=PLAIN), prompt=json.dumps([user('a')]),
                  completion=json.dumps([bot('b')]))
  assert spoken(found) == ['b']
  answers = '{"text": ["b"], "answer_start": [1]}'
  assert example('question_answering', question='a', answers=answers).reference == ['b']
  for text in ("{'text': ['b'], 'answer_start': [1]}", "['b' 'c']"):
    with pytest.raises(ValueError, match='as JSON writes them'):
      example('question_answering', question='a', answers=text)
  found = example('multiple_choice', question='a', answerKey='B',
                  choices='{"text": ["b", "c"], "label": ["A", "B"]}')
  assert (found.choices, found.reference) == ((' b', ' c'), 1)


@pytest.mark.parametrize('answer', [None, ['x']])
def test_only_a_text_or_a_number_is_an_answer(answer):
  with pytest.raises(ValueError, match="field 'answer' is"):
    example('multiple_choice', question='q', choices=['None', "['x']"], answer=answer)
