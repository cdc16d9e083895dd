"""From logits to the next token: requests, their options, the rules that change logits, sampling.

The rules themselves are in `rules`. A new rule is a function and an entry of `RULES` there, and a
field of `SamplingConfig`; its values travel as arrays with a row per request: one batch mixes them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from jaxllm.config import Config
from jaxllm.generation.rules import BASIC, NO_TOKEN, RULES, Biases, History
from jaxllm.models.decoder import DecoderConfig

MAX_SEED = 2**32 - 1


class SamplingConfig(Config):
  """How the tokens of a continuation are sampled."""

  max_new_tokens: int = pydantic.Field(default=128, gt=0)
  """Tokens after which a row ends; it ends earlier where the context of the model is full."""
  temperature: float = pydantic.Field(default=1.0, ge=0)
  """Logits are divided by this; 0 always takes the most probable token. The default, everywhere:
  1, the distribution that the model has learned."""
  top_k: int = pydantic.Field(default=0, ge=0)
  """Sample from this many most probable tokens only (equals of the last one included); 0: all."""
  top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
  """Sample from the smallest set of most probable tokens whose probabilities add up to this."""
  min_p: float = pydantic.Field(default=0.0, ge=0, le=1)
  """Sample from tokens at least this fraction as probable as the most probable one."""
  repetition_penalty: float = pydantic.Field(default=1.0, gt=0)
  """Divide positive logits of tokens so far, in the prompt too, by this; multiply negative ones."""
  presence_penalty: float = 0.0
  """Subtracted from the logits of tokens that the continuation has."""
  frequency_penalty: float = 0.0
  """Subtracted from the logits of tokens for each time that the continuation has them."""
  no_repeat_ngram_size: int = pydantic.Field(default=0, ge=0)
  """No sequence of this many tokens comes twice; 0: it may."""
  logit_bias: tuple[tuple[int, float], ...] = ()
  """Pairs of a token id and what is added to its logit."""
  min_new_tokens: int = pydantic.Field(default=0, ge=0)
  """Tokens before which nothing ends a row but the number of tokens and the context."""
  seed: int = pydantic.Field(default=0, ge=0, le=MAX_SEED)
  """Of the random numbers: the same seed gives the same continuation."""

  @pydantic.model_validator(mode='before')
  @classmethod
  def _rename(cls, fields: Any) -> Any:
    if isinstance(fields, dict) and 'no_repeat_ngram' in fields:
      fields = {'no_repeat_ngram_size': fields['no_repeat_ngram'], **fields}
      del fields['no_repeat_ngram']
    return fields

  def ids(self) -> set[int]:
    """Return all token ids that the config names, for a check against a vocabulary."""
    return {token for token, _ in self.logit_bias}


def row_values(
  configs: Sequence[SamplingConfig], every_rule: bool = False, least_biases: int = 4
) -> dict[str, Any]:
  """Return the value of every rule for each row, name -> arrays whose first axis is the row.

  Args:
    configs: one per row.
    every_rule: whether rules that no row asks for get an entry too. By default only the basic ones
      do; any other one brings in all, so that a program has one of two sets of rules.
    least_biases: the least number of entries in the table of biases.
  """
  names = RULES if every_rule or any(map(_asks_for_more, configs)) else BASIC
  values: dict[str, Any] = {
    name: np.asarray([getattr(config, name) for config in configs],
                     np.float32 if isinstance(RULES[name].off, float) else np.int32)
    for name in names if name != 'biases'}
  if 'biases' in names:
    values['biases'] = _biases(configs, least_biases)
  return values


def apply_rules(
  logits_BV: jax.Array, values: Mapping[str, Any], history: History
) -> jax.Array:
  """Apply the rules in order; one that no row asks for costs nothing at run time.

  Args:
    logits_BV: float32.
    values: name of a rule -> its values (see `row_values`); a rule without an entry is left out.
      Rows with a rule's off value pass it unchanged.
  """
  for name, rule in RULES.items():
    if name not in values:
      continue
    value = values[name]
    settings = value.biases_BW if isinstance(value, Biases) else value
    active_B = (settings != rule.off).reshape(settings.shape[0], -1).any(axis=1)

    def change(logits_BV, rule=rule, value=value, active_B=active_B):
      return jnp.where(active_B[:, None], rule.apply(logits_BV, value, history), logits_BV)

    logits_BV = jax.lax.cond(active_B.any(), change, lambda logits_BV: logits_BV, logits_BV)
  return logits_BV


def row_keys(seeds_B: jax.Array, index_B: jax.Array) -> jax.Array:
  """Return the key of each row's new token number `index_B`, whatever the rest of the batch is."""
  # Threefry by name: other generators do not give under vmap what they give alone.
  return jax.vmap(
    lambda seed, index: jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), index)
  )(seeds_B, index_B)


def sample(
  keys_B: jax.Array, logits_BV: jax.Array, values: Mapping[str, Any], history: History
) -> jax.Array:
  """Return the next token of every row, sampled, as ids_B int32.

  Args:
    keys_B: one key per row (see `row_keys`).
    logits_BV: float32 logits of the model.
    values: rule values (see `apply_rules`); temperature 0 takes the largest logit.
  """
  logits_BV = apply_rules(logits_BV, values, history)
  greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  is_random_B = values['temperature'] > 0 if 'temperature' in values else greedy_B >= 0

  def categorical(logits_BV):
    ids_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    return jnp.where(is_random_B, ids_B, greedy_B)

  return jax.lax.cond(is_random_B.any(), categorical, lambda _: greedy_B, logits_BV)


def _asks_for_more(config: SamplingConfig) -> bool:
  extra = RULES.keys() - {*BASIC, 'biases'}
  return bool(config.logit_bias) or any(
    getattr(config, name) != RULES[name].off for name in extra)


def _biases(configs: Sequence[SamplingConfig], least: int) -> Biases:
  """Put the biases of all rows into one table, whose width is a power of two."""
  tables: list[dict[int, float]] = []
  for config in configs:
    table: dict[int, float] = {}
    for token, bias in config.logit_bias:
      table[token] = table.get(token, 0.0) + bias
    tables.append(table)
  shape = len(configs), power_of_two(max(map(len, tables)), least)
  ids_BW, biases_BW = np.full(shape, NO_TOKEN, np.int32), np.zeros(shape, np.float32)
  for row, table in enumerate(tables):
    ids_BW[row, : len(table)] = [*table]
    biases_BW[row, : len(table)] = [*table.values()]
  return Biases(ids_BW, biases_BW)  # type: ignore[arg-type]


def power_of_two(number: int, least: int = 1) -> int:
  """Return the next power of two, at least `least`."""
  return max(least, 1 << max(number - 1, 0).bit_length())


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt to continue.

  Attributes:
    prompt: token ids, at least one.
    sampling: how tokens are sampled, and how many.
    seed: in place of the config's.
    stop_token_ids: tokens that end the continuation.
  """

  prompt: tuple[int, ...]
  sampling: SamplingConfig
  seed: int
  stop_token_ids: tuple[int, ...] = ()


def make_requests(
  config: DecoderConfig, prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig], eos_token_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None, bos_id: int | None = None,
) -> list[Request]:
  """Check prompts and their options, and give each row its own; see `decode.generate`."""
  rows = len(prompts)
  if isinstance(sampling, SamplingConfig):
    configs = [sampling] * rows
    default_seeds = [(sampling.seed + row) % (MAX_SEED + 1) for row in range(rows)]
  else:
    configs = list(sampling)
    default_seeds = [row_config.seed for row_config in configs]
  seeds = default_seeds if seeds is None else list(seeds)
  if len(configs) != rows or len(seeds) != rows:
    raise ValueError(f'{rows} prompts with {len(configs)} sampling configs and {len(seeds)} seeds; '
                     'give one of each per prompt')
  stop_token_ids = check_ids(config, 'eos_token_ids', eos_token_ids)
  requests = []
  for row, (prompt, row_config, seed) in enumerate(zip(prompts, configs, seeds, strict=True)):
    if not 0 <= seed <= MAX_SEED:
      raise ValueError(f'seeds[{row}]={seed}: a seed is between 0 and {MAX_SEED}')
    check_ids(config, f'sampling[{row}]', sorted(row_config.ids()))
    name = f'prompts[{row}]'
    if len(prompt) == 0:
      if bos_id is None:
        raise ValueError(f'{name} is empty and the tokenizer has no token to begin with; give at '
                         'least one token, or bos_id')
      name, prompt = 'bos_id', [bos_id]
    if len(prompt) > config.max_length:
      raise ValueError(
        f'{name} has {len(prompt)} tokens but the context of the model is {config.max_length}; '
        f'shorten it, or keep its last {config.max_length} tokens')
    requests.append(Request(check_ids(config, name, prompt), row_config, seed, stop_token_ids))
  return requests


def check_ids(config: DecoderConfig, name: str, ids: Sequence[int]) -> tuple[int, ...]:
  """Return token ids, or raise a ValueError that names the place of one that the model lacks."""
  for place, token in enumerate(ids):
    if int(token) != token or not 0 <= token < config.vocab_size:
      raise ValueError(
        f'{name}[{place}]={token} is no token id of the model (0 to {config.vocab_size - 1}); '
        'it comes from another tokenizer')
  return tuple(int(token) for token in ids)
