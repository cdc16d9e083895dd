"""Pytrees as named leaves: the stored form of a state, and its comparison with another.

A state is stored as nested dicts of arrays, whatever containers it is made of, so that a leaf is
found by its path ('params/layers/mlp/up/kernel', 'opt_state/0/mu/...') and by nothing else.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

MAX_LINES = 30


def path_of(keys: Any) -> str:
  """Return a key path of JAX as text: 'params/layers/mlp/up/kernel'."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
  """Return path -> leaf in the order of `jax.tree.leaves`; refuse two of the same path."""
  pairs = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  leaves = dict(pairs)
  if len(leaves) != len(pairs):
    raise ValueError('two leaves of the state have the same path; rename one of them')
  return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Return nested dicts, one level for each part of a path."""
  return traverse_util.unflatten_dict(dict(leaves), sep='/')


def differences(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
  """Describe every leaf whose presence, shape or dtype differs; an empty list: all agree.

  Args:
    expected: path -> anything with shape and dtype.
    stored: the same, of the checkpoint.
  """
  lines = []
  for path, leaf in expected.items():
    if path not in stored:
      lines.append(f'{path}: not in the checkpoint, expected {describe(leaf)}')
    elif describe(leaf) != describe(stored[path]):
      lines.append(f'{path}: {describe(stored[path])} in the checkpoint, expected '
                   f'{describe(leaf)}')
  lines += [f'{path}: {describe(leaf)} in the checkpoint, not expected'
            for path, leaf in stored.items() if path not in expected]
  return lines


def listing(lines: list[str]) -> str:
  """Join lines for an error message, cut where it would scroll away."""
  more = len(lines) - MAX_LINES
  shown = [f'  {line}' for line in lines[:MAX_LINES]]
  return '\n'.join(shown + ([f'  ... and {more} more'] if more > 0 else []))


def describe(leaf: Any) -> str:
  """Return the dtype and shape of a leaf, such as 'float32[2, 3]'."""
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
