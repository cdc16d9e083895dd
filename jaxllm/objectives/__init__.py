"""Losses, one a file: each returns (sum, count, sums), divided once by the caller.

`OBJECTIVES` lists them, each with the facts that the rest of the package reads.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union

import pydantic

from jaxllm.config import Config
from jaxllm.objectives import classification, distillation, next_token, preference


class Head(NamedTuple):
  """Parameters that an objective adds to the decoder's.

  Attributes:
    init: (config, decoder's config, key) -> parameters.
    axes: their logical axes.
  """

  init: Callable[..., Any]
  axes: Mapping[str, Any]


class Objective(NamedTuple):
  """A loss and its facts.

  Attributes:
    config: its config class, with a `kind` of its own.
    loss: (config, model, variables, batch, dropout_key, **others) -> (loss_sum, weight_sum, sums).
      Sums are float32 scalars named '..._sum': `correct_sum`, `cross_entropy_sum` where it is not
      the loss itself, and others, each of which becomes a metric.
    examples: how the examples of a task are encoded: one of `training.examples.ENCODINGS`.
    by_token: whether its weight counts tokens; else it counts examples.
    reference: whether it compares with `init_from`. The loss is given the variables of that model
      as `reference` where adapters are trained; else the batch has `reference_log_probs`.
    teacher: whether its config names a teacher, whose variables the loss gets as `teacher`.
    head: its own parameters, at params/classifier; None: it has none.
  """

  config: type[Config]
  loss: Callable[..., Any]
  examples: Literal['tokens', 'pairs', 'labels'] = 'tokens'
  by_token: bool = True
  reference: bool = False
  teacher: bool = False
  head: Head | None = None


def _preference(config: type[Config], reference: bool) -> Objective:
  return Objective(config, preference.preference_loss, 'pairs', by_token=False, reference=reference)


OBJECTIVES: Mapping[str, Objective] = {
  'next_token': Objective(next_token.NextToken, next_token.next_token_loss),
  'dpo': _preference(preference.Dpo, reference=True),
  'ipo': _preference(preference.Ipo, reference=True),
  'orpo': _preference(preference.Orpo, reference=False),
  'simpo': _preference(preference.SimPo, reference=False),
  'classifier': Objective(
    classification.ClassifierConfig, classification.classification_loss, 'labels', by_token=False,
    head=Head(classification.init, classification.AXES)),
  'distillation': Objective(
    distillation.Distillation, distillation.distillation_loss, teacher=True),
}
"""The `kind` of an objective's config -> objective."""

if TYPE_CHECKING:
  AnyObjective = Any
else:
  AnyObjective = Annotated[Union[tuple(one.config for one in OBJECTIVES.values())],  # noqa: UP007
                           pydantic.Field(discriminator='kind')]
"""The config of any objective, by its `kind`."""
