"""Files and directories appear whole or not at all."""

import pytest

from jaxllm import storage


def test_a_failed_block_leaves_what_was_there(tmp_path):
  storage.write_file(tmp_path / 'a', 'old\n')
  with pytest.raises(RuntimeError), storage.replaced(tmp_path / 'a') as partial:
    partial.write_text('new')
    raise RuntimeError
  assert (tmp_path / 'a').read_bytes() == b'old\n'
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_directory_replaces_an_empty_one_alone(tmp_path):
  target = tmp_path / 'new' / 'folder'
  with storage.replaced(target) as partial:
    partial.mkdir()
    assert not target.exists()
  assert not list(target.iterdir())
  with storage.replaced(target) as partial:
    partial.mkdir()
    (partial / 'x').write_text('x')
  with pytest.raises(OSError, match='nothing half-written.*new'), \
       storage.replaced(target) as partial:
    partial.mkdir()
  assert [path.name for path in target.parent.rglob('*')] == ['folder', 'x']


def test_leftovers_of_a_killed_process_go_with_the_next_lock(tmp_path):
  with storage.locked(tmp_path):
    (tmp_path / f'{storage._PARTIAL}1' / 'x').mkdir(parents=True)
  with storage.locked(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']
