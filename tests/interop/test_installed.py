"""Models of installed packages are found without importing them, or named as the hub names them."""

import importlib
import sys

import pytest

from jaxllm.interop import sources


def test_the_file_of_the_package_or_the_name_of_the_hub(tmp_path, monkeypatch):
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
