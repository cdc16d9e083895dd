"""Files and directories appear whole or not at all."""

import datetime
import functools
import http.server
import pickle
import threading

import fsspec
import pytest

from jaxllm import storage
from jaxllm.data.documents import SourceConfig, documents, find, survey


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


def test_anything_that_fsspec_opens_may_be_read(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  memory = fsspec.filesystem('memory')
  memory.pipe({'/texts/a.txt': b'one', '/texts/deep/b.txt': b'two', '/texts/c.csv': b'text\nthree'})
  assert storage.local('memory://texts/a.txt').read_bytes() == b'one'
  assert storage.local('memory://texts/').name == 'texts'

  def texts(location):
    return [*documents(SourceConfig(location=location))]

  assert texts('memory://texts') == ['one', 'three', 'two']
  assert texts('memory://texts/**/*.txt') == ['one', 'two']
  memory.pipe('/texts/a.txt', b'new')
  assert texts('memory://texts/*.txt') == ['new']
  (tmp_path / 'x.txt').write_text('here')
  assert storage.local(f'file://{tmp_path}/x.txt') == tmp_path / 'x.txt'
  with pytest.raises(OSError, match='it cannot be used: there is no such'):
    texts('memory://texts/none.txt')


def test_what_lies_elsewhere_is_copied_when_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  memory = fsspec.filesystem('memory')
  memory.pipe({f'/many/{i}.txt': b'text %d' % i for i in range(3)} | {'/many/.hidden.txt': b'x'})
  source = SourceConfig(location='memory://many')
  counts, = survey([source], (), {})
  parts = find(source).parts
  assert counts.files == len(parts) == 3 and counts.file_bytes == 18 and not [*tmp_path.iterdir()]
  row, = pickle.loads(pickle.dumps(parts[1]))()
  assert (row.where, row.fields) == ('memory:///many/1.txt, text 1', {'text': 'text 1'})
  assert [path.name for path in tmp_path.rglob('*.txt')] == ['1.txt']
  for one in memory.find('/many', detail=True).values():  # Equal times are no equal contents.
    memory.store[one['name']].created = datetime.datetime(2026, 1, 1)
  survey([SourceConfig(location='memory://many/0.txt')],
         [SourceConfig(location='memory://many/1.txt')], {})
  memory.pipe('/many/2.txt', b'other2')
  assert survey([source], (), {})[0].sha256 != counts.sha256
  with pytest.raises(ValueError, match="same texts: 'memory:///many/1.txt'"):
    survey([source], [SourceConfig(location='memory://many/1.*')], {})


def test_a_file_of_the_web_is_read_once_it_changes(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'a.txt').write_text('of the web')
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
  monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/a.txt?download=true'
    copy = storage.local(url)
    assert copy.name == 'a.txt' and copy.read_text() == 'of the web' and storage.local(url) == copy
    (tmp_path / 'a.txt').write_text('another')
    assert storage.local(url).read_text() == 'another'
    with pytest.raises(OSError, match='it cannot be used'):
      storage.local(url.replace('a.txt', 'b.txt'))
    server.shutdown()


@pytest.mark.parametrize('location, package', [('az://box/a.txt', 'adlfs'), ('oss://a/b', 'ossfs')])
def test_what_needs_a_package_names_it(location, package):
  with pytest.raises(ImportError, match=f'data: {location}: .*{package}'):
    storage.local(location, 'data: ')
  with pytest.raises(ValueError, match='data: nosuch://a/b: a path is local, gs://'):
    storage.local('nosuch://a/b', 'data: ')
