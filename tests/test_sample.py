"""The program: every way to decode, a conversation, and flags that are refused."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm import loading
from jaxllm.interop import huggingface
from tests.interop import small

# Several commands in one process, which starts only once.
SCRIPT = """
import io, json, sys
from jaxllm import config, sample
for command, typed in json.loads(sys.argv[1]):
  sys.stdin = io.StringIO(typed)
  config.parse_flags(['sample', *command], sample.FLAGS)
  try:
    sample.main(None)
  except Exception as error:
    print('error:', error)
  print('---')
"""
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PLAIN = ['--temperature=0', '--max_new_tokens=8']


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
    'twice': ([*PLAIN, '--prompt=ab', '--sampling={"top_k": 5}'], ''),
    'ways': (['--chat', '--num_beams=2'], ''),
    'useless': (['--prompt=ab', '--num_beams=2', '--top_k=3'], ''),
    'system': (['--prompt=ab', '--system=Be brief.'], ''),
  }
  asked = [([f'--model={model}', *flags], typed) for flags, typed in commands.values()]
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, json.dumps(asked)], capture_output=True, text=True, check=False,
    env=os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('=8', '=1')})
  assert done.returncode == 0, done.stderr
  return loading.load(model), dict(zip(commands, done.stdout.split('---\n'), strict=False))


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


@pytest.mark.parametrize('name, said', [
  ('twice', '--sampling: top_k has a flag of its own'),
  ('ways', '--chat with --num_beams: these are different ways'),
  ('useless', '--top_k works without --num_beams only'),
  ('system', '--system works with --chat only'),
])
def test_flags_without_effect_are_refused(outputs, name, said):
  assert outputs[1][name].startswith(f'error: {said}')
