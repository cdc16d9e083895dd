"""Models of installed packages are found without importing them, or named as the hub names them."""

import importlib
import sys

import pytest

from jaxllm.interop import hub, installed


def test_the_file_of_the_package_or_the_name_of_the_hub(tmp_path, monkeypatch):
  module = 'jaxllm_model_for_a_test'
  monkeypatch.setattr(installed, 'MODELS', {'small': (module, 'owner/name')})
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
  assert installed.find('small') == 'hf:owner/name'
  folder = tmp_path / module
  (folder / 'weights').mkdir(parents=True)
  (folder / '__init__.py').write_text('raise RuntimeError')
  importlib.invalidate_caches()
  assert installed.find('small') == 'hf:owner/name'
  (folder / 'weights' / 'a.gguf').touch()
  assert installed.find('small') == str(folder / 'weights' / 'a.gguf')


def test_names_are_known():
  assert all(hub.is_name(name) for _, name in installed.MODELS.values())
  with pytest.raises(ValueError, match="model 'gpt9': one of smollm2"):
    installed.find('gpt9')
