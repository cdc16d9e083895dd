"""A model ready to use: the one thing that loading makes and that everything else takes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import sharding
from jaxllm.adapters.quantization import QuantizationConfig, quantize
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.objectives.classification import ClassifierConfig
from jaxllm.sharding import Placement

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
  """How conversations become token ids, and how an answer ends.

  Attributes:
    encode_all: conversations, lists of messages {'role', 'content'}, to token ids, each up to where
      the assistant begins; for a model's own template also `add_generation_prompt`, `tools`,
      `documents` and its variables.
    stop: texts that end the assistant's turn.
    find_ends: finds the tokens that end it.
  """

  encode_all: Callable[..., list[list[int]]]
  stop: tuple[str, ...]
  find_ends: Callable[[], tuple[int, ...]]

  def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Return the token ids of one conversation; see `encode_all`."""
    return self.encode_all([messages], **variables)[0]

  @functools.cached_property
  def eos_token_ids(self) -> tuple[int, ...]:
    """Tokens that end the assistant's turn."""
    return self.find_ends()


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model with its tokenizer and everything else that its use needs.

  Attributes:
    config: sizes and switches of the decoder.
    variables: {'params': ...}, layers stacked on axis 0; None where only the rest was read.
    tokenizer: text to ids and back.
    experiment: the run that made it, where jaxllm trained it.
    add_bos: whether prompts begin with BOS, as the training documents did.
    chat_format: how to talk to it; None: it has no chat template.
    family: its Hugging Face model_type, where it came from there.
    records: fingerprint of the records that it was trained on, where jaxllm trained it.
    placement: the devices that the variables are split over; None: one.
  """

  config: DecoderConfig
  variables: Any
  tokenizer: Tokenizer
  experiment: Any = None
  add_bos: bool = True
  chat_format: ChatFormat | None = None
  family: str | None = None
  records: str | None = None
  placement: Placement | None = None

  def __repr__(self) -> str:
    name = f' {self.experiment.name}' if self.experiment else ''
    return (f'<Model{name}: {decoder.parameter_count(self.config):,} parameters, '
            f'{self.config.num_layers} layers, {self.config.vocab_size:,} tokens, context '
            f'{self.config.max_length:,}>')

  @property
  def decoder(self) -> Decoder:
    """The module that `variables` belong to."""
    return Decoder(self.config, self.placement)

  @functools.cached_property
  def unstacked(self) -> Any:
    """The variables with one tree per layer, which decodes faster; made once."""
    return decoder.unstack(self.variables)

  @property
  def eos_token_ids(self) -> tuple[int, ...]:
    """The tokens that end a continuation, EOS among them."""
    return self.tokenizer.eos_token_ids

  @property
  def task(self) -> Any:
    """The config of the task that the model was fine-tuned on; None: it was not."""
    return self.experiment.task if self.experiment else None

  @property
  def classifier(self) -> ClassifierConfig | None:
    """The head at params/classifier, where the model has one."""
    return self.experiment.classifier if self.experiment else None

  @property
  def labels(self) -> tuple[Any, ...]:
    """The labels that the model was fine-tuned on, in the order of its classes."""
    return tuple(getattr(self.task, 'labels', ()))

  def hidden(self, ids: Sequence[int]) -> np.ndarray:
    """Return the final hidden states, (T, D), of token ids."""
    hidden_BTD, _ = _apply(self.decoder, self.variables, self.batch(ids), 'hidden')
    return np.asarray(hidden_BTD[0])

  def logits(self, ids: Sequence[int]) -> np.ndarray:
    """Return the float32 logits of the next token at each position, (T, vocab_size)."""
    logits_BTV = _apply(self.decoder, self.variables, self.batch(ids), '__call__')
    return np.asarray(logits_BTV[0, :, : self.config.vocab_size])

  def encode_prompt(self, prompt: str) -> list[int]:
    """Return the ids of a prompt, after BOS where the model was trained with one."""
    bos_id = self.tokenizer.bos_id
    begin = [bos_id] if self.add_bos and bos_id is not None else []
    return begin + self.tokenizer.encode(prompt)

  def quantized(self, kind: str) -> 'Model':
    """Return the model with 'int8' or 'int4' weights: see `adapters.quantization`."""
    smaller = quantize(self.variables, QuantizationConfig.model_validate({'kind': kind}))
    return dataclasses.replace(self, variables=smaller)

  def batch(self, ids: Sequence[int]) -> jax.Array:
    """Return checked token ids as tokens_BT, a batch of one row."""
    array = np.asarray(ids, np.int64)
    if array.ndim != 1 or not array.size or array.size > self.config.max_length:
      raise ValueError(
        f'ids of shape {array.shape}: expected 1 to {self.config.max_length} token ids')
    if array.min() < 0 or array.max() >= self.config.vocab_size:
      raise ValueError(
        f'token id {array.max() if array.min() >= 0 else array.min()} is not in the vocabulary '
        f'(0 to {self.config.vocab_size - 1})')
    return jnp.asarray(array[None], jnp.int32)


def make_placement(
  mesh: Any, config: DecoderConfig, rules: sharding.Rules = sharding.DEFAULT_RULES
) -> Placement | None:
  """Return where a model goes; arguments as in `sharding.make_placement`.

  Key and value heads that the mesh does not divide lie on all devices.
  """
  placement = sharding.make_placement(mesh, rules)
  if placement is None:
    return None
  splits = dict(placement.config.rules)
  parts = math.prod(placement.mesh.shape[axis] for axis in splits['kv_heads'])
  if config.kv_heads % parts == 0:
    return placement
  replicated = tuple((splits | {'kv_heads': ()}).items())
  return Placement(placement.mesh, placement.config.replace(rules=replicated))


@functools.partial(jax.jit, static_argnames=('model', 'method'))
def _apply(model: Decoder, variables: Any, tokens_BT: jax.Array, method: str) -> Any:
  return model.apply(variables, tokens_BT, method=method)
