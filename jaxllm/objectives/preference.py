"""Learning from pairs of which one is preferred: DPO, IPO, ORPO and SimPO.

`FORMULAS` lists them, functions of a config and of the log-probabilities of both answers;
`preference_loss` computes these from a model, the reference's too where one is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pydantic

from jaxllm.config import Config
from jaxllm.models.decoder import Decoder
from jaxllm.models.log_probs import target_log_probs
from jaxllm.objectives.next_token import Batch, Sums, hidden_states, with_aux


class Pair(NamedTuple):
  """Log-probabilities in nats and numbers of tokens of preferred and other answers, (B,) each.

  Those under the reference are there where one is used.
  """

  chosen: jax.Array
  rejected: jax.Array
  chosen_count: jax.Array
  rejected_count: jax.Array
  reference_chosen: Any = None
  reference_rejected: Any = None


class Dpo(Config):
  """Direct preference optimization: Rafailov et al., arXiv 2305.18290, equation 7.

  Label smoothing: Mitchell, A Note on DPO with Noisy Preferences, 2023, equation 3.
  """

  kind: Literal['dpo'] = 'dpo'
  beta: float = pydantic.Field(default=0.1, gt=0)
  """How strongly the model is held to the reference."""
  label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
  """Share of pairs that are assumed to be the wrong way round."""


class Ipo(Config):
  """Identity preference optimization: Azar et al., arXiv 2310.12036, equation 17.

  On log-probabilities of whole answers, as in the paper.
  """

  kind: Literal['ipo'] = 'ipo'
  beta: float = pydantic.Field(default=0.1, gt=0)
  """How strongly the model is held to the reference (the paper's tau)."""


class Orpo(Config):
  """Odds ratio preference optimization: Hong et al., arXiv 2403.07691, equations 6 and 7."""

  kind: Literal['orpo'] = 'orpo'
  weight: float = pydantic.Field(default=0.1, gt=0)
  """Weight of the odds ratio (the paper's lambda)."""


class SimPo(Config):
  """Simple preference optimization: Meng et al., arXiv 2405.14734, equation 6."""

  kind: Literal['simpo'] = 'simpo'
  beta: float = pydantic.Field(default=2.0, gt=0)
  """Scale of the rewards."""
  margin: float = pydantic.Field(default=1.0, ge=0)
  """By how much the preferred reward should be larger (the paper's gamma)."""


def dpo(config: Dpo, pair: Pair) -> tuple[jax.Array, jax.Array]:
  """Return (loss_B, margin_B): the margin is the difference of the implicit rewards."""
  margin_B = config.beta * _log_ratio(pair)
  loss_B = -(1 - config.label_smoothing) * jax.nn.log_sigmoid(margin_B)
  return loss_B - config.label_smoothing * jax.nn.log_sigmoid(-margin_B), margin_B


def ipo(config: Ipo, pair: Pair) -> tuple[jax.Array, jax.Array]:
  """Return (loss_B, margin_B): the margin is the log-ratio that should become 1 / (2 beta)."""
  ratio_B = _log_ratio(pair)
  return jnp.square(ratio_B - 1 / (2 * config.beta)), ratio_B


def orpo(config: Orpo, pair: Pair) -> tuple[jax.Array, jax.Array]:
  """Return (loss_B, margin_B): the margin is the log of the odds ratio."""
  chosen_B, rejected_B = _means(pair)
  margin_B = chosen_B - rejected_B - _log_one_minus_exp(chosen_B) + _log_one_minus_exp(rejected_B)
  return -chosen_B - config.weight * jax.nn.log_sigmoid(margin_B), margin_B


def simpo(config: SimPo, pair: Pair) -> tuple[jax.Array, jax.Array]:
  """Return (loss_B, margin_B): the margin is the difference of the rewards."""
  chosen_B, rejected_B = _means(pair)
  margin_B = config.beta * (chosen_B - rejected_B)
  return -jax.nn.log_sigmoid(margin_B - config.margin), margin_B


FORMULAS: Mapping[str, Callable[[Any, Pair], tuple[jax.Array, jax.Array]]] = {
  'dpo': dpo, 'ipo': ipo, 'orpo': orpo, 'simpo': simpo,
}
"""`kind` of the config -> (config, pair) -> (loss_B, margin_B)."""


def preference_loss(
  config: Dpo | Ipo | Orpo | SimPo, model: Decoder, variables: Any, batch: Batch,
  dropout_key: jax.Array | None = None, reference: Any = None,
) -> tuple[jax.Array, jax.Array, Sums]:
  """Sum the loss of a batch of pairs.

  Args:
    variables: those of the policy, which is trained.
    batch: (B, T) arrays `tokens`, `targets`, `weights`, `segment_ids`, `positions` of the preferred
      answers, and the same with `rejected_` before the name. `reference_log_probs` (B, 2), of the
      preferred and the other answer, where they were computed before.
    dropout_key: None turns dropout off.
    reference: variables of the reference model; with adapters, `variables` without them. Not
      needed with `reference_log_probs`, nor for losses without a reference.

  Returns:
    The float32 sum of losses, the number of pairs (those with a weighted target), and sums over
    pairs: `correct_sum` (preferred the right answer), `margin_sum`.

  Raises:
    ValueError: the loss needs a reference and there is none.
  """
  theirs: tuple[Any, ...] = ()
  if reference is not None:
    theirs = _both(model, jax.lax.stop_gradient(reference), batch, None)[:2]
  elif 'reference_log_probs' in batch:
    theirs = batch['reference_log_probs'][:, 0], batch['reference_log_probs'][:, 1]
  elif isinstance(config, Dpo | Ipo):
    raise ValueError(f'{config.kind} compares with a reference: give its variables, or '
                     'reference_log_probs in the batch')
  *ours, aux = _both(model, variables, batch, dropout_key)
  pair = Pair(*ours, *jax.lax.stop_gradient(theirs))
  loss_B, margin_B = FORMULAS[config.kind](config, pair)
  real_B = (pair.chosen_count > 0).astype(jnp.float32)

  def add(x_B: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real_B > 0, x_B, 0))

  sums = {'correct_sum': add(margin_B > 0), 'margin_sum': add(margin_B)}
  return with_aux(add(loss_B), real_B.sum(), sums, aux)


def sequence_log_probs(
  model: Decoder, variables: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Sums]:
  """Sum the log-probabilities of each row's weighted targets.

  Returns:
    (log_probs_B in nats, counts_B: sums of the weights, the model's aux scalars), float32.
  """
  hidden_BTD, aux = hidden_states(model, variables, batch, dropout_key)
  logits_BTV: Any = model.apply(variables, hidden_BTD, method='logits')
  weights_BT = batch['weights']
  # A target that cannot be (a padding id) has infinite loss, and 0 * inf is NaN.
  log_probs_BT = jnp.where(
    weights_BT == 0, 0, target_log_probs(logits_BTV, batch['targets']))
  return jnp.sum(weights_BT * log_probs_BT, axis=1), jnp.sum(weights_BT, axis=1), aux


def _both(
  model: Decoder, variables: Any, batch: Batch, dropout_key: jax.Array | None
) -> tuple[Any, ...]:
  """Return log-probabilities and counts as in `Pair`, and aux, by one forward pass."""
  names = ('tokens', 'targets', 'weights', 'segment_ids', 'positions')
  joined = {name: jnp.concatenate([batch[name], batch[f'rejected_{name}']]) for name in names}
  log_probs_B, counts_B, aux = sequence_log_probs(model, variables, joined, dropout_key)
  return *jnp.split(log_probs_B, 2), *jnp.split(counts_B, 2), aux


def _log_ratio(pair: Pair) -> jax.Array:
  return (pair.chosen - pair.reference_chosen) - (pair.rejected - pair.reference_rejected)


def _means(pair: Pair) -> tuple[jax.Array, jax.Array]:
  return (pair.chosen / jnp.maximum(pair.chosen_count, 1),
          pair.rejected / jnp.maximum(pair.rejected_count, 1))


def _log_one_minus_exp(x: jax.Array) -> jax.Array:
  """Return log(1 - exp(x)) for x < 0; kept finite at 0, where a certain answer has infinite odds.

  Maechler, Accurately Computing log(1 - exp(-|a|)), 2012.
  """
  x = jnp.minimum(x, -1e-7)
  near = x > -0.6931472
  # Each branch is given what it can take, so that the gradient of the other stays finite.
  return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
                   jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
