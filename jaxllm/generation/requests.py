"""What is asked of the decoder, checked before anything reaches a device."""

import dataclasses
from collections.abc import Sequence

from jaxllm.generation.sampling import MAX_SEED, SamplingConfig
from jaxllm.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt to continue.

  Attributes:
    prompt: token ids, at least one.
    sampling: how tokens are drawn, and how many.
    seed: of the draws, in place of the config's.
    stop_ids: tokens that end the continuation.
  """

  prompt: tuple[int, ...]
  sampling: SamplingConfig
  seed: int
  stop_ids: tuple[int, ...] = ()


def make_requests(
  config: DecoderConfig,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  eos_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
) -> list[Request]:
  """Check prompts and their options, and give each row its own.

  Args:
    config: of the model.
    prompts: token ids; an empty one becomes `bos_id`.
    sampling: one config for all rows, or one per row.
    eos_ids: tokens that end any row.
    seeds: one per row; by default that of the row's config, plus the row's number where one config
      serves all.
    bos_id: see `prompts`.

  Raises:
    ValueError: a prompt is longer than the context, or empty while there is no `bos_id`; an id is
      not in the vocabulary; the numbers of prompts, configs and seeds differ.
  """
  rows = len(prompts)
  if isinstance(sampling, SamplingConfig):
    configs = [sampling] * rows
    default_seeds = [(sampling.seed + row) % (MAX_SEED + 1) for row in range(rows)]
  else:
    configs = list(sampling)
    default_seeds = [row_config.seed for row_config in configs]
  seeds = default_seeds if seeds is None else list(seeds)
  if len(configs) != rows or len(seeds) != rows:
    raise ValueError(
      f'{rows} prompts with {len(configs)} sampling configs and {len(seeds)} seeds; give one of '
      'each per prompt'
    )
  for row, seed in enumerate(seeds):
    if not 0 <= seed <= MAX_SEED:
      raise ValueError(f'seeds[{row}]={seed}: a seed is between 0 and {MAX_SEED}')
  stop_ids = check_ids(config, 'eos_ids', eos_ids)
  for row, row_config in enumerate(configs):
    check_ids(config, f'sampling[{row}]', sorted(row_config.ids()))
  checked = [_check_prompt(config, row, prompt, bos_id) for row, prompt in enumerate(prompts)]
  return [
    Request(prompt, row_config, seed, stop_ids)
    for prompt, row_config, seed in zip(checked, configs, seeds, strict=True)
  ]


def _check_prompt(
  config: DecoderConfig, row: int, prompt: Sequence[int], bos_id: int | None
) -> tuple[int, ...]:
  if len(prompt) == 0:
    if bos_id is None:
      raise ValueError(
        f'prompts[{row}] is empty and the tokenizer has no token to begin with; give at least one '
        'token, or bos_id'
      )
    return check_ids(config, 'bos_id', [bos_id])
  if len(prompt) > config.max_length:
    raise ValueError(
      f'prompts[{row}] has {len(prompt)} tokens but the context of the model is '
      f'{config.max_length}; shorten it, or keep its last {config.max_length} tokens'
    )
  return check_ids(config, f'prompts[{row}]', prompt)


def check_ids(config: DecoderConfig, name: str, ids: Sequence[int]) -> tuple[int, ...]:
  """Return token ids, or raise a ValueError that names the place of one that the model lacks."""
  for place, token in enumerate(ids):
    if int(token) != token or not 0 <= token < config.vocab_size:
      raise ValueError(
        f'{name}[{place}]={token} is no token id of the model (0 to {config.vocab_size - 1}); '
        'it comes from another tokenizer'
      )
  return tuple(int(token) for token in ids)
