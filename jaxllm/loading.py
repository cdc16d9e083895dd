"""One way to get a model from a path, and what can be asked of it."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints import store
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment import Experiment
from jaxllm.generation import decode
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
  """A model ready to use.

  Attributes:
    config: sizes and switches of the decoder.
    variables: {'params': ...}, layers stacked on axis 0.
    tokenizer: text to ids and back.
    experiment: the run that made it, where jaxllm trained it.
    add_bos: whether prompts begin with BOS, as the training documents did.
  """

  config: DecoderConfig
  variables: Any
  tokenizer: Tokenizer
  experiment: Experiment | None = None
  add_bos: bool = True

  def hidden(self, ids: Sequence[int]) -> np.ndarray:
    """Return the final hidden states, (T, D), of token ids."""
    return np.asarray(_hidden(Decoder(self.config), self.variables, self._batch(ids))[0])

  def logits(self, ids: Sequence[int]) -> np.ndarray:
    """Return the float32 logits of the next token at each position, (T, vocab_size)."""
    logits_BTV = _logits(Decoder(self.config), self.variables, self._batch(ids))
    return np.asarray(logits_BTV[0, :, : self.config.vocab_size])

  def encode_prompt(self, prompt: str) -> list[int]:
    """Return the ids that a prompt begins with: BOS, where the model was trained with one."""
    bos_id = self.tokenizer.bos_id
    begin = [bos_id] if self.add_bos and bos_id is not None else []
    return begin + self.tokenizer.encode(prompt)

  def _batch(self, ids: Sequence[int]) -> jax.Array:
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1 or not ids.size or ids.size > self.config.max_length:
      raise ValueError(
        f'ids of shape {ids.shape}: expected 1 to {self.config.max_length} token ids'
      )
    if ids.min() < 0 or ids.max() >= self.config.vocab_size:
      raise ValueError(
        f'token id {ids.max() if ids.min() >= 0 else ids.min()} is not in the vocabulary '
        f'(0 to {self.config.vocab_size - 1})'
      )
    return jnp.asarray(ids[None], jnp.int32)

  @functools.cached_property
  def unstacked(self) -> Any:
    """The variables with one tree per layer, which decodes faster; made once."""
    return decoder.unstack(self.variables)


def load(path: str | os.PathLike[str]) -> LoadedModel:
  """Load a model with its tokenizer.

  Args:
    path: a workdir, its `checkpoints` directory, or one checkpoint in it.

  Raises:
    ValueError: there is no model at that path, or its files do not fit together.
    checkpoints.store.CheckpointError: the files are damaged.
  """
  path = pathlib.Path(path).expanduser()
  step = store.find_step(path)
  bundle = store.read_bundle(step)
  experiment = Experiment.from_json(bundle.config_json)
  # Trained wherever, used here: one device, plain attention, no recomputation.
  config = experiment.model.replace(attention='xla', remat='none')
  shapes, _ = decoder.abstract(config)
  params, _ = store.restore_params(step, shapes['params'])
  return LoadedModel(
    config=config,
    variables={'params': params},
    tokenizer=tokenizers.from_files(dict(bundle.tokenizer_files)),
    experiment=experiment,
    add_bos=experiment.data.add_bos,
  )


def generate(
  model: LoadedModel, prompts: str | Sequence[str], seeds: Sequence[int] | None = None,
  **sampling: Any,
) -> Any:
  """Continue prompts.

  Args:
    model: from `load`.
    prompts: one text or several; several are decoded as one batch.
    seeds: one per prompt.
    **sampling: fields of `SamplingConfig`: `max_new_tokens`, `temperature` (0 is greedy), `top_k`,
      `top_p`, `min_p`, `seed`.

  Returns:
    The continuation of one text, or a list of them, without the prompt.

  Raises:
    ValueError: a sampling field is not accepted, or a prompt is longer than the context.
  """
  single = isinstance(prompts, str)
  texts = [prompts] if single else list(prompts)
  tokenizer = model.tokenizer
  generations = decode.generate(
    Decoder(model.config), model.unstacked, [model.encode_prompt(text) for text in texts],
    SamplingConfig(**sampling), () if tokenizer.eos_id is None else (tokenizer.eos_id,), seeds,
    tokenizer.bos_id,
  )
  continued = [tokenizer.decode(generation.tokens) for generation in generations]
  return continued[0] if single else continued


@functools.partial(jax.jit, static_argnames='model')
def _hidden(model: Decoder, variables: Any, tokens_BT: jax.Array) -> jax.Array:
  return model.apply(variables, tokens_BT, method='hidden')


@functools.partial(jax.jit, static_argnames='model')
def _logits(model: Decoder, variables: Any, tokens_BT: jax.Array) -> jax.Array:
  return model.apply(variables, tokens_BT)
