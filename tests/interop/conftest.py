"""What needs torch and transformers is skipped without them."""

import importlib.util

import pytest

# Runs as Hugging Face would: without a network, and quietly.
import os  # isort: skip
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'warning')


def pytest_collection_modifyitems(items):
  if importlib.util.find_spec('torch') and importlib.util.find_spec('transformers'):
    return
  skip = pytest.mark.skip(reason='needs torch and transformers (make test-parity)')
  for item in items:
    if item.get_closest_marker('parity'):
      item.add_marker(skip)
