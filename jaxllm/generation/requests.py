"""Requests to the decoder, checked before anything reaches a device."""

import dataclasses
from collections.abc import Sequence

from jaxllm.generation.sampling import MAX_SEED, SamplingConfig
from jaxllm.models.decoder import DecoderConfig


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
  config: DecoderConfig,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  eos_token_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
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
