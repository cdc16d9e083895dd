"""The program: every way to decode, a conversation, and flags that are refused."""

import io
import sys
from unittest import mock

import pytest

from jaxllm import loading
from jaxllm.interop import huggingface
from tests import programs
from tests.interop import small

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PLAIN = ['--temperature=0', '--max_new_tokens=8']

REFUSED = {
  'twice': '--sampling: top_k has a flag of its own',
  'ways': '--chat with --num_beams: these are different ways',
  'useless': 'top_k works without num_beams only',
  'system': '--system works with --chat only',
}


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
  model = tmp_path_factory.mktemp('sample') / 'model'
  config = small.CONFIGS['llama']
  huggingface.save(model, config, small.variables(config), small.files(TEMPLATE),
                          model_type='llama')
  commands = {
    'plain': ([*PLAIN, '--prompt=ab'], ''),
    'two': ([*PLAIN, '--prompt=ab', '--prompt=c', '--num_samples=2'], ''),
    'lookup': ([*PLAIN, '--prompt=ab', '--num_drafted=2'], ''),
    'draft': ([*PLAIN, '--prompt=ab', f'--draft={model}'], ''),
    'beams': (['--max_new_tokens=8', '--prompt=ab', '--num_beams=2'], ''),
    'int8': ([*PLAIN, '--prompt=ab', '--quantize=int8', '--cache_dtype=int8'], ''),
    'longer': ([*PLAIN, '--prompt=ab', '--sampling={"min_new_tokens": 8}'], ''),
    'chat': ([*PLAIN, '--chat'], 'Hi\n/reset\nHi\n/quit\n'),
    'asked': ([*PLAIN, '--chat', '--prompt=Hi'], ''),
    'twice': ([*PLAIN, '--prompt=ab', '--sampling={"top_k": 5}'], ''),
    'ways': (['--chat', '--num_beams=2'], ''),
    'useless': (['--prompt=ab', '--num_beams=2', '--top_k=3'], ''),
    'system': (['--prompt=ab', '--system=Be brief.'], ''),
  }
  printed = {}
  for name, (flags, typed) in commands.items():
    with mock.patch.object(sys, 'stdin', io.StringIO(typed)):
      code, out, err = programs.run('sample', f'--model={model}', *flags)
    assert code == (2 if name in REFUSED else 0), err
    printed[name] = err if code else out
  return loading.load(model), printed


def test_greedy_text_is_what_the_library_gives(outputs):
  model, printed = outputs
  text = 'ab' + loading.generate(model, 'ab', temperature=0.0, max_new_tokens=8)
  assert printed['plain'] == text + '\n'
  assert printed['two'].count(f'{text}\n') == 2 and '--- 4 of 4' in printed['two']


def test_speculation_changes_nothing(outputs):
  _, printed = outputs
  assert printed['lookup'] == printed['draft'] == printed['plain']


def test_beams_are_what_the_library_gives(outputs):
  model, printed = outputs
  text = loading.generate(model, 'ab', num_beams=2, max_new_tokens=8)
  assert printed['beams'] == f'ab{text}\n'


def test_the_other_ways_say_something(outputs):
  _, printed = outputs
  for name in ('beams', 'int8', 'longer'):
    assert printed[name].startswith('ab') and len(printed[name]) > 3, name


def test_a_conversation_begins_again(outputs):
  _, printed = outputs
  before, _, after = printed['chat'].partition('(forgotten)\n')
  assert after and before.endswith(after)
  assert printed['asked'] == after


@pytest.mark.parametrize('name', REFUSED)
def test_flags_without_effect_are_refused(outputs, name):
  assert REFUSED[name] in outputs[1][name]
