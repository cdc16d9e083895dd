"""Where a token stands: learned position embeddings, rotary embeddings and their scalings.

Axis letters beyond the usual: P, the pairs of rotated dimensions (half the rotary dimension).
"""

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from jaxllm.config import Config


class LearnedPositions(Config):
  """A learned vector per position, added to the token embedding."""

  kind: Literal['learned'] = 'learned'


class LinearScaling(Config):
  """Positions divided by a factor.

  Reference:
    Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
    arXiv 2306.15595.
  """

  kind: Literal['linear'] = 'linear'
  factor: float = pydantic.Field(ge=1)
  """How many times longer the context gets."""


class Llama3Scaling(Config):
  """Low frequencies divided by a factor, high ones kept, a smooth ramp between.

  Reference:
    Dubey et al., "The Llama 3 Herd of Models", arXiv 2407.21783; Llama 3.1 model code.
  """

  kind: Literal['llama3'] = 'llama3'
  factor: float = pydantic.Field(default=8.0, ge=1)
  """Divisor of the low frequencies."""
  low_frequency_factor: float = pydantic.Field(default=1.0, gt=0)
  """Wavelengths longer than original_length / this are divided in full."""
  high_frequency_factor: float = pydantic.Field(default=4.0, gt=0)
  """Wavelengths shorter than original_length / this are kept."""
  original_length: int = pydantic.Field(default=8192, gt=0)
  """Context length of the training, in tokens."""


class YarnScaling(Config):
  """Pairs that turn often are kept, pairs that turn seldom are divided, and attention is sharpened.

  Reference:
    Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", arXiv
    2309.00071, sections 3.2 to 3.4.
  """

  kind: Literal['yarn'] = 'yarn'
  factor: float = pydantic.Field(ge=1)
  """Divisor of the low frequencies: how many times longer the context gets."""
  original_length: int = pydantic.Field(gt=0)
  """Context length of the training, in tokens."""
  fast_turns: float = pydantic.Field(default=32.0, gt=0, le=1e6)
  """Pairs that turn more often than this within the original length are kept."""
  slow_turns: float = pydantic.Field(default=1.0, gt=0, le=1e6)
  """Pairs that turn less often than this are divided in full."""
  whole_pairs: bool = True
  """Round the ends of the ramp between the two outwards to whole pairs."""
  attention_factor: float | None = pydantic.Field(default=None, gt=0)
  """Factor of the rotated queries and of the rotated keys; None: 0.1 ln(factor) + 1."""


class LongRopeScaling(Config):
  """Each pair has a divisor of its own, and another one in rows beyond the trained length.

  A row's divisors depend on its length in the same call. (Other implementations let the longest
  row of a batch decide for all.) Keys already cached keep those of the call that wrote them.

  Reference:
    Ding et al., "LongRoPE", arXiv 2402.13753.
  """

  kind: Literal['longrope'] = 'longrope'
  short_factors: tuple[float, ...]
  """Divisor of each pair's frequency in rows up to `original_length`."""
  long_factors: tuple[float, ...]
  """The same in longer rows."""
  original_length: int = pydantic.Field(gt=0)
  """Context length of the training, in tokens."""
  attention_factor: float = pydantic.Field(default=1.0, gt=0)
  """Factor of the rotated queries and of the rotated keys."""


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


class RotaryPositions(Config):
  """Queries and keys rotated by an angle proportional to their position.

  Reference:
    Su et al., "RoFormer", arXiv 2104.09864. Pairs are dimensions i and i + P, as in GPT-NeoX and
    Hugging Face's Llama; the paper pairs 2i and 2i + 1, which is a permutation of the kernels.
  """

  kind: Literal['rotary'] = 'rotary'
  base: float = pydantic.Field(default=10_000.0, gt=1)
  """Pair i turns by base ** (-i / P) radians per position."""
  fraction: float = pydantic.Field(default=1.0, gt=0, le=1)
  """Share of each head's dimensions that is rotated, from the first one on."""
  scaling: Annotated[Scaling, pydantic.Field(discriminator='kind')] | None = None
  """How frequencies change to reach beyond the trained length; None: not at all."""


def rotary_dim(config: RotaryPositions, head_dim: int) -> int:
  """Return how many dimensions of a head are rotated."""
  return int(head_dim * config.fraction)


def rotations(
  config: RotaryPositions, head_dim: int, positions_BT: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return (cos_BTP, sin_BTP) of each position, float32, times the scaling's attention factor.

  Args:
    config: base, fraction and scaling.
    head_dim: H.
    positions_BT: int32, from 0.
    length_B: int32, how many positions each row spans; read by length-dependent scalings only.
  """
  frequencies_BP = _frequencies(config, rotary_dim(config, head_dim), length_B)
  angles_BTP = positions_BT[:, :, None].astype(jnp.float32) * frequencies_BP[:, None, :]
  magnitude = getattr(config.scaling, 'attention_factor', 1.0)
  if magnitude is None and isinstance(config.scaling, YarnScaling):
    magnitude = 0.1 * math.log(config.scaling.factor) + 1
  return jnp.cos(angles_BTP) * magnitude, jnp.sin(angles_BTP) * magnitude


def rotate(x_BTNH: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> jax.Array:
  """Rotate the first 2P dimensions of each head; the others pass. Keeps the dtype."""
  pairs = cos_BTP.shape[-1]
  cos, sin = cos_BTP[:, :, None, :], sin_BTP[:, :, None, :]
  first, second, rest = jnp.split(x_BTNH, (pairs, 2 * pairs), axis=-1)
  a, b = first.astype(jnp.float32), second.astype(jnp.float32)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], axis=-1)


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
  """Return positions (B, T) that restart at 0 where the segment id changes."""
  index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
  index_BT = jnp.broadcast_to(index_T[None], segment_ids_BT.shape)
  changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  starts_BT = jnp.pad(jnp.where(changed, index_BT[:, 1:], 0), ((0, 0), (1, 0)))
  return index_BT - jax.lax.cummax(starts_BT, axis=1)


def _frequencies(config: RotaryPositions, dim: int, length_B: jax.Array) -> jax.Array:
  """Return radians per position, (1, P) or, where they depend on the length, (B, P)."""
  exponents_P = np.arange(0, dim, 2, dtype=np.float64) / dim
  frequencies_P = config.base**-exponents_P
  scaling = config.scaling
  match scaling:
    case LinearScaling():
      frequencies_P = frequencies_P / scaling.factor
    case Llama3Scaling():
      turns_P = scaling.original_length * frequencies_P / (2 * math.pi)
      low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
      kept_P = np.clip((turns_P - low) / (high - low), 0, 1)
      frequencies_P = frequencies_P * (kept_P + (1 - kept_P) / scaling.factor)
    case YarnScaling():
      kept_P = _kept_by_yarn(scaling, config.base, dim // 2)
      frequencies_P = frequencies_P * (kept_P + (1 - kept_P) / scaling.factor)
    case LongRopeScaling():
      short_P, long_P = (
        jnp.asarray(frequencies_P / np.asarray(factors), jnp.float32)
        for factors in (scaling.short_factors, scaling.long_factors))
      is_long_B = length_B > scaling.original_length
      return jnp.where(is_long_B[:, None], long_P[None], short_P[None])
  return jnp.asarray(frequencies_P, jnp.float32)[None]


def _kept_by_yarn(scaling: YarnScaling, base: float, pairs: int) -> np.ndarray:
  # The (fractional) pairs that turn so often over the trained length.
  first, last = (
    pairs * math.log(scaling.original_length / (2 * math.pi * turns)) / math.log(base)
    for turns in (scaling.fast_turns, scaling.slow_turns))
  if scaling.whole_pairs:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, 2 * pairs - 1)
  return 1 - np.clip((np.arange(pairs) - first) / max(last - first, 1e-3), 0, 1)
