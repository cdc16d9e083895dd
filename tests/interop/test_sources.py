"""Names of the hub: pinned to a commit, safetensors only, clear without a network; packages."""

import importlib
import sys
import types

import pytest
import small

from jaxllm import loading
from jaxllm.interop import sources


class Hub:
  """Stands for huggingface_hub; remembers what it was asked for."""

  def __init__(self, online=True, cached=None):
    self.online, self.cached, self.calls = online, cached, []

  def HfApi(self):  # noqa: N802
    def model_info(name, revision):
      if not self.online:
        raise ConnectionError('no route to host')
      return types.SimpleNamespace(sha={None: 'newest', 'v1': 'old'}[revision])
    return types.SimpleNamespace(model_info=model_info)

  def snapshot_download(self, name, revision, allow_patterns, local_files_only=False):
    self.calls.append((name, revision, tuple(allow_patterns), local_files_only))
    if local_files_only and self.cached is None:
      raise FileNotFoundError('not cached')
    return self.cached or '/models/fetched'


def test_a_name_is_pinned_to_a_commit(monkeypatch):
  fake = Hub()
  monkeypatch.setattr(sources.mistakes, 'package', lambda name: fake)
  assert str(sources.fetch('org/model')) == '/models/fetched'
  assert str(sources.fetch('org/model', 'v1')) == '/models/fetched'
  assert [call[1] for call in fake.calls] == ['newest', 'old']
  patterns = fake.calls[0][2]
  assert 'model*.safetensors' in patterns and 'config.json' in patterns
  assert not [pattern for pattern in patterns if '.bin' in pattern or '.py' in pattern]


def test_without_a_network(monkeypatch):
  cached = Hub(online=False, cached='/models/cached')
  monkeypatch.setattr(sources.mistakes, 'package', lambda name: cached)
  assert str(sources.fetch('gpt2')) == '/models/cached'
  monkeypatch.setattr(sources.mistakes, 'package', lambda name: Hub(online=False))
  with pytest.raises(ValueError, match='(?s)hf:gpt2 cannot be fetched.*no route.*give the path'):
    small.load('hf:gpt2')


@pytest.mark.parametrize('name', ['../gpt2', '/abs/path', 'a/b/c', 'org/../x', '', 'a b', './x',
                                  'https://example.org/x', 'model.gguf', '-x'])
def test_what_is_no_name(name):
  assert not sources.is_hub_name(name)
  with pytest.raises(ValueError, match='no name of a model'):
    sources.open_model(f'hf:{name}')


@pytest.mark.parametrize('path', ['gpt2', 'org/model', 'runs/quickstrat', './x', 'x.gguf', '~/x'])
def test_a_path_never_leaves_the_machine(path, monkeypatch, tmp_path):
  """Whatever is not written hf:NAME is a path: the hub is not asked, and the nearest is named."""
  monkeypatch.setattr(sources.mistakes, 'package', lambda name: pytest.fail('the hub was asked'))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs' / 'quickstart').mkdir(parents=True)
  near = 'did you mean runs/quickstart?' if 'quick' in path else 'no such file or directory'
  for ask in (loading.load, loading.describe, sources.open_model):
    with pytest.raises(ValueError, match='no such file or directory') as error:
      ask(path)
    assert repr(path) in str(error.value) and near in str(error.value)
  with pytest.raises(ValueError, match='hf:NAME'):
    loading.load(path)


def test_a_revision_is_of_the_hub(tmp_path):
  with pytest.raises(ValueError, match='revision'):
    sources.open_model(tmp_path, revision='main')


def test_a_name_in_a_file_is_of_the_hub_unless_it_lies_here(tmp_path, monkeypatch):
  """PEFT and older runs write hub names without hf:."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org' / 'here').mkdir(parents=True)
  assert sources.named('org/model') == 'hf:org/model' and sources.named('org/here') == 'org/here'
  assert sources.named('hf:org/model') == 'hf:org/model' and sources.named('/a/b') == '/a/b'


def test_what_exists_is_judged_by_what_it_holds(tmp_path):
  assert not sources.is_foreign(tmp_path)
  (tmp_path / 'config.json').write_text('{"model": {"vocab_size": 5}}')
  assert not sources.is_foreign(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  assert sources.is_foreign(tmp_path)
  (tmp_path / 'x.gguf').write_bytes(b'')
  assert sources.is_foreign(tmp_path / 'x.gguf')
  assert sources.is_foreign('hf:gpt2') and not sources.is_foreign('/nothing/here')


def test_the_file_of_the_package_or_the_name_of_the_hub(tmp_path, monkeypatch):
  """The package is not imported."""
  module = 'jaxllm_model_for_a_test'
  monkeypatch.setattr(sources, 'INSTALLED', {'small': (module, 'owner/name')})
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
  assert sources.find_installed('small') == 'hf:owner/name'
  folder = tmp_path / module
  (folder / 'weights').mkdir(parents=True)
  (folder / '__init__.py').write_text('raise RuntimeError')
  importlib.invalidate_caches()
  assert sources.find_installed('small') == 'hf:owner/name'
  (folder / 'weights' / 'a.gguf').touch()
  assert sources.find_installed('small') == str(folder / 'weights' / 'a.gguf')


def test_names_are_known():
  assert all(sources.is_hub_name(name) for _, name in sources.INSTALLED.values())
  with pytest.raises(ValueError, match="model 'gpt9': one of smollm2"):
    sources.find_installed('gpt9')
