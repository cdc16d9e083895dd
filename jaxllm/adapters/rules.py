"""Which parameters move, and how fast, by rules on their paths; for any optax transform."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
import pydantic

from jaxllm.config import Config


class PathRule(Config):
  """A factor of the learning rate for some parameters."""

  pattern: str
  """Regular expression for the whole path of a parameter, such as 'layers/attention/.*'."""
  factor: float = pydantic.Field(default=0.0, ge=0)
  """Factor of the learning rate; 0 freezes: no update, no optimizer state."""


def factors(rules: Sequence[PathRule], params: Any) -> Any:
  """Return a tree of floats: the factor of each parameter, by the first rule that matches, else 1.

  Args:
    rules: in order of precedence.
    params: nested dict of arrays or shapes.

  Raises:
    ValueError: a rule matches no parameter.
  """
  leaves, structure = jax.tree.flatten_with_path(params)
  paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
  for rule in rules:
    if not any(re.fullmatch(rule.pattern, path) for path in paths):
      raise ValueError(f'rule {rule.pattern!r} matches no parameter (parameters: '
                       f'{", ".join(paths)})')
  return jax.tree.unflatten(structure, [
    next((rule.factor for rule in rules if re.fullmatch(rule.pattern, path)), 1.0)
    for path in paths])


def apply_rules(
  rules: Sequence[PathRule], tx: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
  """Restrict an optimizer to the parameters that the rules train, at their rates.

  Frozen parameters take no part in anything, the clipping of the gradient's norm included, and have
  no optimizer state.

  Args:
    rules: in order of precedence; none returns `tx`.
    tx: the optimizer, complete with learning rate and decay, made for all `params`.
    params: nested dict of arrays or shapes.

  Raises:
    ValueError: a rule matches no parameter.
  """
  if not rules:
    return tx
  by_path = factors(rules, params)
  labels = jax.tree.map(lambda factor: 'trained' if factor else 'frozen', by_path)
  scale = optax.stateless(
    lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, by_path))
  parts = {'trained': tx, 'frozen': optax.set_to_zero()}
  return optax.chain(optax.partition(parts, labels), scale)
