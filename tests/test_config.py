"""Configs: overriding, errors that name field, value and fix, JSON that reloads bit for bit."""

import subprocess
import sys

import pydantic
import pytest

from jaxllm import config as config_lib
from jaxllm.config import Config, ConfigError


class Inner(Config):
  rate: float = 1e-3
  """The rate."""
  name: str = 'x'
  shape: tuple[int, ...] = (1, 2)
  flag: bool = False


class Outer(Config):
  inner: Inner = Inner()
  other: Inner | None = None
  rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
  count: int | None = 3


@pytest.mark.parametrize('path, text, expected', [
  ('inner.rate', '1e-2', 0.01),
  ('inner.rate', '2', 2.0),
  ('inner.name', '123', '123'),
  ('inner.name', 'true', 'true'),
  ('inner.name', 'plain text', 'plain text'),
  ('inner.flag', 'true', True),
  ('inner.flag', 'False', False),
  ('inner.shape', '(3, 4)', (3, 4)),
  ('inner.shape', '[5]', (5,)),
  ('count', 'None', None),
  ('count', 'null', None),
  ('other', '{"rate": 0.5}', Inner(rate=0.5)),
  ('other', 'None', None),
  ('rules', '[["embed", ["data", "fsdp"]]]', (('embed', ('data', 'fsdp')),)),
])
def test_override_reads_the_value_the_field_accepts(path, text, expected):
  value = config_lib.override(Outer(), {path: text})
  for name in path.split('.'):
    value = getattr(value, name)
  assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize('path, text, parts', [
  ('inner.rat', '1', ['config.inner.rat', 'did you mean config.inner.rate']),
  ('iner.rate', '1', ['did you mean config.inner?']),
  ('count', 'many', ['config.count=many', 'integer']),
  ('inner.rate', 'nan', ['rate', 'finite']),
  ('other.rate', '1', ['other is None', 'JSON']),
  ('inner', '{"rat": 1}', ['rat', "did you mean 'rate'"]),
  ('inner.flag', '7', ['flag', '7']),
])
def test_a_bad_override_names_field_value_and_fix(path, text, parts):
  with pytest.raises(ConfigError) as error:
    config_lib.override(Outer(), {path: text})
  for part in parts:
    assert part in str(error.value)


def test_configs_are_frozen_hashable_and_reload_bit_for_bit():
  config = Outer(inner=Inner(rate=0.1 + 0.2, shape=()), other=Inner(name='ü\n'))
  assert Outer.from_json(config.to_json()) == config
  assert Outer.from_json(config.to_json()).to_json() == config.to_json()
  assert hash(config) == hash(Outer.from_json(config.to_json()))
  with pytest.raises(ValueError, match='frozen'):
    config.count = 1


def test_diff_names_the_leaves_that_differ():
  old = Outer()
  new = config_lib.override(old, {'inner.rate': '0.5', 'other': '{}'})
  changed = {path: (before, after) for path, before, after in config_lib.diff(old, new)}
  assert changed['inner.rate'] == (1e-3, 0.5)
  assert 'other.rate' in changed and 'count' not in changed


def test_from_json_refuses_what_is_not_a_config():
  for text in ('', '[]', '{"inner": 3}', '{"inner": {"rate": NaN}}'):
    with pytest.raises(ConfigError):
      Outer.from_json(text)


EXPERIMENT = '''
from jaxllm.config import Config
class Small(Config):
  size: int = 1
  """How large it is."""
def get_config(variant="small"):
  return Small(size={"small": 1, "large": 9}[variant])
'''
PROGRAM = '''
from jaxllm import config
FLAGS = config.Flags()
FLAG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
def main(_):
  print("size", config.from_flags(FLAG.value).size)
config.run_program(main, FLAGS)
'''


def _program(tmp_path, *arguments):
  (tmp_path / 'e.py').write_text(EXPERIMENT)
  (tmp_path / 'p.py').write_text(PROGRAM)
  done = subprocess.run(
    [sys.executable, 'p.py', *arguments], cwd=tmp_path, capture_output=True, text=True
  )
  return done.stdout + done.stderr


def test_flags_choose_variant_and_override_fields(tmp_path):
  assert 'size 9' in _program(tmp_path, '--config=e.py:large')
  assert 'size 5' in _program(tmp_path, '--config=e.py', '--config.size=5')
  assert 'size 6' in _program(tmp_path, '--config.size', '6', '--config', 'e.py')


def test_flags_errors_read_as_sentences(tmp_path):
  missing = _program(tmp_path, '--config=missing.py')
  assert missing.startswith('error:') and 'no such file' in missing and 'Traceback' not in missing
  unknown = _program(tmp_path, '--config=e.py', '--config.siz=5')
  assert "no field 'siz'; did you mean config.size" in unknown
  help_text = _program(tmp_path, '--config=e.py', '--help')
  assert '--config.size=1' in help_text and 'How large it is.' in help_text


class Range(Config):
  low: int = 0
  high: int = 1

  @pydantic.model_validator(mode='after')
  def _check(self):
    if self.low >= self.high:
      raise ValueError(f'low={self.low} is not below high={self.high}')
    return self


def test_overrides_are_checked_together():
  changed = config_lib.override(Range(), {'low': '5', 'high': '9'})
  assert (changed.low, changed.high) == (5, 9)
  with pytest.raises(ConfigError, match='low=5 is not below high=1'):
    config_lib.override(Range(), {'low': '5'})


def test_a_config_in_a_bucket_is_refused():
  for location in ('gs://bucket/x.py', 's3://bucket/run/config.json'):
    with pytest.raises(ConfigError, match=f'--config={location}: a config is a local file'):
      config_lib.load(location)
