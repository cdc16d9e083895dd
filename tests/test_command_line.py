"""The command line: the list of programs, `--help`, `--version`, `--dry_run`, completion."""

import json
import pathlib
import shutil
import subprocess

import pytest

from jaxllm import __main__ as command_line
from jaxllm import config
from jaxllm.training import cost
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = f'--config={ROOT}/experiments/quickstart.py'
ALL = [*command_line.PROGRAMS, *(f'tools.{name}' for name in command_line.TOOLS)]


def jaxllm(monkeypatch, *arguments):
  monkeypatch.setattr('sys.argv', ['jaxllm', *arguments])
  command_line.main()


def test_alone_it_lists_every_program_there_is(monkeypatch, capsys):
  jaxllm(monkeypatch)
  listed = capsys.readouterr().out
  for name in (*command_line.PROGRAMS, *command_line.TOOLS):
    assert f'\n  {name} ' in listed, name
  written = {path.stem for path in (ROOT / 'jaxllm').glob('**/*.py')
             if 'config.run_program(main' in path.read_text()}
  assert written == {*command_line.PROGRAMS, *command_line.TOOLS}
  assert max(map(len, listed.split('\n'))) <= 80


def test_version(monkeypatch, capsys):
  jaxllm(monkeypatch, '--version')
  assert capsys.readouterr().out.startswith('jaxllm 0.')


@pytest.mark.parametrize('width', [80, 100])
@pytest.mark.parametrize('name', ALL)
def test_help_begins_with_what_is_needed_and_fits_the_terminal(name, width, monkeypatch):
  monkeypatch.setenv('COLUMNS', str(width))
  code, out, err = programs.run(name, '--help')
  lines = out.split('\n')
  assert (code, err) == (0, '') and lines[0] and not lines[0].startswith(' ')
  assert max(len(line) for line in lines if not line.startswith('  python')) <= width
  flags = [line.split()[0] for line in lines if line.startswith('  --')]
  needed = [line.startswith('  --') and 'Required. ' in line for line in lines
            if line.startswith('  --')]
  assert '   ' not in out.partition('Of every program:')[2].partition('\n\n')[2]
  assert needed == sorted(needed, reverse=True) and '--flagfile=FILE' in flags
  known = {flag.partition('=')[0].removeprefix('--') for flag in flags}
  own = programs.load(name).FLAGS.values
  assert all(own[flag].help.startswith('Alias') or {flag, f'no{flag}'} & known for flag in own)


def test_a_dry_run_prints_a_config_that_can_be_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  change = '--config.training.num_steps=50'
  code, out, err = programs.run('train', QUICKSTART, '--workdir=w', change, '--dry_run')
  assert code == 0 and not (tmp_path / 'w').exists()
  assert 'GiB' in err and err.count('\n') == 1
  (tmp_path / 'config.json').write_text(out)
  again = config.load(str(tmp_path / 'config.json'))
  assert again.to_json() == out and again.training.num_steps == 50
  assert programs.run('prepare', QUICKSTART, change, '--dry_run')[1] == out
  assert list(tmp_path.iterdir()) == [tmp_path / 'config.json']


def test_models(monkeypatch):
  monkeypatch.setattr('jaxllm.training.cost.local_chip', lambda _: cost.Chip('small', 2.0))
  code, out, _ = programs.run('tools.models', '--like=gpt2_1', '--json')
  small, large = json.loads(out)
  assert code == 0 and small['parameters'] == 124_439_808
  assert (small['here'], large['here']) == ('float32', 'int8')
  table = programs.run('tools.models', '--like=gpt2_124m')[1].split('\n')
  assert table[1].split()[:5] == ['gpt2_124m', '124M', '12', '1,024', '0.2']
  assert max(map(len, table)) <= 80
  code, _, err = programs.run('tools.models', '--like=llama9')
  assert code == 2 and '--like=llama9: no preset' in err


@pytest.mark.skipif(shutil.which('bash') is None, reason='needs bash')
def test_completion(tmp_path):
  script = tmp_path / 'jaxllm'
  script.write_text(programs.run('tools.completion')[1])

  def complete(*words):
    number = len(words) - 1
    done = subprocess.run(
      ['bash', '-c', f'source {script}; COMP_WORDS=("$@"); COMP_CWORD={number}; '
       f'_jaxllm jaxllm "{words[-1]}"; echo "${{COMPREPLY[@]}}"', 'bash', *words],
      capture_output=True, text=True, check=True)
    return done.stdout.split()

  assert complete('jaxllm', 'tr') == ['train']
  assert {'--workdir=', '--dry_run', '--config='} <= {*complete('jaxllm', 'train', '--')}
  assert complete('jaxllm', 'train', '--config.optimizer.learning') == [
    '--config.optimizer.learning_rate=']
  assert complete('jaxllm', 'sample', '--temp') == ['--temperature=']
  assert complete('jaxllm', 'sample', '--config') == []
