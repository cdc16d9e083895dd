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
  """'learned'."""


class LinearScaling(Config):
  """Positions divided by a factor.

  Reference:
    Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
    arXiv 2306.15595.
  """

  kind: Literal['linear'] = 'linear'
  """'linear'."""
  factor: float = pydantic.Field(ge=1)
  """How many times longer the context gets."""


class DynamicScaling(Config):
  """The base grows with the row's length once that exceeds the trained one (dynamic NTK).

  The frequencies depend on the length of the row in the same call. Keys already cached keep the
  frequencies of the call that wrote them, as in other implementations; hence beyond
  `original_length` cached decoding differs slightly from the full forward pass.
  """

  kind: Literal['dynamic'] = 'dynamic'
  """'dynamic'."""
  factor: float = pydantic.Field(ge=1)
  """Strength: 1 keeps the frequencies reaching exactly the row's length."""
  original_length: int = pydantic.Field(gt=0)
  """Context length of the training, in tokens."""


class Llama3Scaling(Config):
  """Low frequencies divided by a factor, high ones kept, a smooth ramp between.

  Reference:
    Dubey et al., "The Llama 3 Herd of Models", arXiv 2407.21783; Llama 3.1 model code.
  """

  kind: Literal['llama3'] = 'llama3'
  """'llama3'."""
  factor: float = pydantic.Field(8.0, ge=1)
  """Divisor of the low frequencies."""
  low_frequency_factor: float = pydantic.Field(1.0, gt=0)
  """Wavelengths longer than original_length / this are divided in full."""
  high_frequency_factor: float = pydantic.Field(4.0, gt=0)
  """Wavelengths shorter than original_length / this are kept."""
  original_length: int = pydantic.Field(8192, gt=0)
  """Context length of the training, in tokens."""


Scaling = LinearScaling | DynamicScaling | Llama3Scaling


class RotaryPositions(Config):
  """Queries and keys rotated by an angle proportional to their position.

  Reference:
    Su et al., "RoFormer", arXiv 2104.09864. Pairs are dimensions i and i + P, as in GPT-NeoX and
    Hugging Face's Llama; the paper pairs 2i and 2i + 1, which is a permutation of the kernels.
  """

  kind: Literal['rotary'] = 'rotary'
  """'rotary'."""
  base: float = pydantic.Field(10_000.0, gt=1)
  """Pair i turns by base ** (-i / P) radians per position."""
  fraction: float = pydantic.Field(1.0, gt=0, le=1)
  """Share of each head's dimensions that is rotated, from the first one on."""
  scaling: Annotated[Scaling, pydantic.Field(discriminator='kind')] | None = None
  """How frequencies change to reach beyond the trained length; None: not at all."""


def rotary_dim(config: RotaryPositions, head_dim: int) -> int:
  """Return how many dimensions of a head are rotated."""
  return int(head_dim * config.fraction)


def rotations(
  config: RotaryPositions, head_dim: int, positions_BT: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the rotation of each position.

  Args:
    config: base, fraction and scaling.
    head_dim: H.
    positions_BT: int32, from 0.
    length_B: int32, how many positions each row spans; read by length-dependent scalings only.

  Returns:
    (cos_BTP, sin_BTP), float32.
  """
  frequencies_BP = _frequencies(config, rotary_dim(config, head_dim), length_B)
  angles_BTP = positions_BT[:, :, None].astype(jnp.float32) * frequencies_BP[:, None, :]
  return jnp.cos(angles_BTP), jnp.sin(angles_BTP)


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
  if isinstance(scaling, DynamicScaling):
    length_B = jnp.maximum(length_B, scaling.original_length).astype(jnp.float32)
    growth_B = scaling.factor * length_B / scaling.original_length - (scaling.factor - 1)
    power_P = jnp.asarray(-exponents_P * dim / (dim - 2), jnp.float32)
    return jnp.asarray(frequencies_P, jnp.float32)[None] * growth_B[:, None] ** power_P[None]
  if isinstance(scaling, LinearScaling):
    frequencies_P = frequencies_P / scaling.factor
  elif isinstance(scaling, Llama3Scaling):
    frequencies_P = _llama3(scaling, frequencies_P)
  return jnp.asarray(frequencies_P, jnp.float32)[None]


def _llama3(scaling: Llama3Scaling, frequencies_P: np.ndarray) -> np.ndarray:
  turns_P = scaling.original_length * frequencies_P / (2 * math.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  kept_P = np.clip((turns_P - low) / (high - low), 0, 1)
  return frequencies_P * (kept_P + (1 - kept_P) / scaling.factor)
