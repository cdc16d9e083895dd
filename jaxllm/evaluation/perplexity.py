"""Held-out loss, perplexity and bits per byte of a language model."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh

from jaxllm import sharding
from jaxllm.config import Config
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives.next_token import NextToken, next_token_loss
from jaxllm.sharding import MeshConfig

HELD_OUT = {'loss': True, 'perplexity': True, 'bits_per_byte': True, 'accuracy': False}
"""Score of held-out records -> whether smaller is better."""

EvalStep = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


class EvaluationConfig(Config):
  """Held-out evaluation and samples, during and after training."""

  every_steps: int = pydantic.Field(default=500, gt=0)
  """Steps between two evaluations on the validation records."""
  max_batches: int | None = pydantic.Field(default=None, gt=0)
  """Validation batches per evaluation during training, always the same ones of records that are
  drawn by the seed; None takes all. The last evaluation takes all."""
  batch_size: int | None = pydantic.Field(default=None, gt=0)
  """Records per validation batch; None takes the training batch size."""
  prompts: tuple[str, ...] = ()
  """Prompts that the finished run continues, for samples.jsonl and the report."""
  sample_every_steps: int | None = pydantic.Field(default=None, gt=0)
  """Steps between two times that they are continued before; None: only at the end."""
  prompt_tokens: int = pydantic.Field(default=128, gt=0)
  """Tokens generated for each prompt."""
  temperature: float = pydantic.Field(default=1.0, ge=0)
  """Temperature of these samples; 0 is greedy."""
  top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
  """Share of the probability mass that these samples are drawn from."""


def make_eval_step(
  model: DecoderConfig, chunk_size: int | None, mesh: Mesh, mesh_config: MeshConfig,
  border_ids: Iterable[int | None] = (),
) -> EvalStep:
  """Return the jitted `(variables, batch) -> sums`, float32 scalars to be added over batches.

  Args:
    chunk_size: positions of each sequence whose logits exist at once; None: all.
    mesh: from `sharding.make_mesh`.
    mesh_config: gives the rules.
    border_ids: BOS and EOS, which are predicted as any token but are no text for `bits_per_byte`.
  """
  borders = jnp.array([i for i in border_ids if i is not None], jnp.int32)

  def eval_step(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    is_text = ~jnp.isin(batch['targets'], borders)
    with sharding.active(sharding.Placement(mesh, mesh_config)):
      _, weight_sum, sums = next_token_loss(
        NextToken(chunk_size=chunk_size), Decoder(model), variables, {**batch, 'is_text': is_text})
    return {'loss_sum': sums['cross_entropy_sum'], 'weight_sum': weight_sum,
            'correct_sum': sums['correct_sum'], 'text_sum': sums['text_sum']}

  return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
  eval_step: EvalStep, variables: Any, batches: Iterable[Mapping[str, np.ndarray]],
  batch_sharding: Any, bytes_per_token: float,
) -> dict[str, float]:
  """Score a model over batches.

  Args:
    eval_step: from `make_eval_step`.
    batches: host batches with (B, T) arrays; padding has weight 0.
    batch_sharding: from `sharding.batch_sharding`.
    bytes_per_token: UTF-8 bytes of text per target token of these records.

  Returns:
    `loss` (nats per token), `perplexity`, `bits_per_byte` (of the text alone, as everywhere: the
    ends of documents are in the other scores), `accuracy` and `tokens`.

  Raises:
    ValueError: the batches hold no token with weight.
  """
  # Added on the host in float64: a float32 sum over millions of tokens loses digits.
  totals: dict[str, float] = {}
  steps = (eval_step(variables, sharding.put_batch(batch, batch_sharding)) for batch in batches)
  # A step is dispatched before the sums of the one before it are fetched.
  for sums, _ in itertools.pairwise(itertools.chain(steps, [{}])):
    for name, value in sums.items():
      totals[name] = totals.get(name, 0.0) + float(value)
  tokens = totals.get('weight_sum', 0.0)
  if not tokens:
    raise ValueError('the validation records hold no token to predict; enlarge the validation '
                     'split (config.data)')
  loss = totals['loss_sum'] / tokens
  return {
    'loss': loss,
    'perplexity': math.exp(min(loss, 700.0)),
    'bits_per_byte': totals['text_sum'] / math.log(2) / (tokens * bytes_per_token),
    'accuracy': totals['correct_sum'] / tokens,
    'tokens': tokens,
  }
