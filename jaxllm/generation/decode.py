"""Continue prompts: `generate` returns whole continuations, `stream` yields tokens as they come.

The host's part of decoding: requests are checked, padded to buckets so that few programs are ever
compiled, and read back. `slots` is the device's part.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generation import sampling as sampling_lib
from jaxllm.generation import slots as slots_lib
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.generation.slots import NO_TOKEN, Slots, compilation_count
from jaxllm.models.decoder import Decoder, DecoderConfig, init_cache

__all__ = ['Generation', 'Piece', 'compilation_count', 'generate', 'stream']

FinishReason = Literal['stop', 'length']
LEAST_TOKENS, LEAST_STOP_IDS = 16, 4


@dataclasses.dataclass(frozen=True)
class Generation:
  """A finished continuation.

  Attributes:
    tokens: new ids, without the prompt and without the token that ended it.
    logprobs: natural log-probability of each under the model, before any sampling rule.
    finish_reason: 'stop' (a token of `eos_ids` came) or 'length'.
  """

  tokens: list[int]
  logprobs: list[float]
  finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one row gained since the last piece; `finish_reason` is set in its last one."""

  row: int
  tokens: list[int]
  logprobs: list[float]
  finish_reason: FinishReason | None


def generate(
  model: Decoder,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  eos_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
) -> list[Generation]:
  """Continue every prompt until it stops, has its number of tokens, or fills the context.

  A row gives what it would give alone: its draws depend on its seed and its own tokens.
  (Logits of different batch shapes may differ in the last bits; a tie that close can fall either
  way.) A program is compiled per power-of-two bucket of rows, prompt length and total length.

  Args:
    model: the decoder.
    variables: its variables; pass them through `decoder.unstack` once, which is faster.
    prompts: token ids, special tokens included.
    sampling: one config for all rows, or one per row. `max_new_tokens` beyond what the context
      holds means until the context is full.
    eos_ids: tokens that end a row.
    seeds: one per row; by default that of the row's config, plus the row's number where one config
      serves all.
    bos_id: what an empty prompt begins with.

  Returns:
    One continuation per prompt, in order.

  Raises:
    ValueError: a prompt is longer than the context, or empty while there is no `bos_id`; an id is
      not in the vocabulary; the numbers of prompts, configs and seeds differ.
  """
  tokens: list[list[int]] = [[] for _ in prompts]
  logprobs: list[list[float]] = [[] for _ in prompts]
  reasons: list[FinishReason] = ['length' for _ in prompts]
  num_steps = model.config.max_length
  for piece in stream(model, variables, prompts, sampling, eos_ids, seeds, bos_id, num_steps):
    tokens[piece.row] += piece.tokens
    logprobs[piece.row] += piece.logprobs
    reasons[piece.row] = piece.finish_reason or 'length'
  return list(map(Generation, tokens, logprobs, reasons))


def stream(
  model: Decoder,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingConfig | Sequence[SamplingConfig],
  eos_ids: Sequence[int] = (),
  seeds: Sequence[int] | None = None,
  bos_id: int | None = None,
  steps_per_piece: int = 1,
) -> Iterator[Piece]:
  """Yield the continuations piece by piece, while they grow; together they equal `generate`.

  Args:
    model: as in `generate`, like all arguments up to `bos_id`.
    variables: see there.
    prompts: see there.
    sampling: see there.
    eos_ids: see there.
    seeds: see there.
    bos_id: see there.
    steps_per_piece: decoding steps between two pieces of a row.

  Raises:
    ValueError: as `generate`, before this returns.
  """
  config = model.config
  prompts = [_check_prompt(config, row, prompt, bos_id) for row, prompt in enumerate(prompts)]
  _check_ids(config, 'eos_ids', eos_ids)
  configs, seeds = _per_row(len(prompts), sampling, seeds)
  return _stream(model, variables, prompts, configs, tuple(eos_ids), seeds, steps_per_piece)


def _stream(model, variables, prompts, configs, eos_ids, seeds, steps_per_piece):
  if not prompts:
    return
  slots = _start(model.config, prompts, configs, eos_ids, seeds, _is_stacked(variables))
  num_slots = slots.tokens_BS.shape[1] - 1
  length = min(_bucket(max(map(len, prompts)), LEAST_TOKENS), num_slots)
  slots = slots_lib.prefill(model, variables, slots, length)
  seen = [len(prompt) for prompt in prompts]
  live = set(range(len(prompts)))
  while live:
    yield from _read(slots, live, seen, frozenset(eos_ids))
    if live:
      slots = slots_lib.advance(model, variables, slots, jnp.int32(steps_per_piece))


def _read(
  slots: Slots, live: set[int], seen: list[int], eos_ids: frozenset[int]
) -> Iterator[Piece]:
  """Fetch what the live rows gained; forget the rows that have finished."""
  tokens_BS, logprobs_BS, lengths_B, finished_B = jax.device_get(
    (slots.tokens_BS, slots.logprobs_BS, slots.lengths_B, slots.finished_B)
  )
  for row in sorted(live):
    start, stop = seen[row], int(lengths_B[row])
    reason: FinishReason | None = None
    seen[row] = stop
    if finished_B[row]:
      live.discard(row)
      reason = 'stop' if int(tokens_BS[row, stop - 1]) in eos_ids else 'length'
      stop -= reason == 'stop'
    yield Piece(
      row, tokens_BS[row, start:stop].tolist(), logprobs_BS[row, start:stop].tolist(), reason
    )


def _start(
  config: DecoderConfig,
  prompts: Sequence[Sequence[int]],
  configs: Sequence[SamplingConfig],
  eos_ids: Sequence[int],
  seeds: Sequence[int],
  stacked: bool,
) -> Slots:
  """Lay out the requests, padded to buckets; rows that only pad have finished already."""
  rows = _bucket(len(prompts))
  # The last token of a row is never fed, so it needs no slot in the cache.
  limits = [
    min(len(prompt) + row_config.max_new_tokens, config.max_length + 1)
    for prompt, row_config in zip(prompts, configs, strict=True)
  ]
  num_slots = min(_bucket(max(limits) - 1, LEAST_TOKENS), config.max_length)
  padding = rows - len(prompts)
  tokens_BS = np.zeros((rows, num_slots + 1), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BS[row, : len(prompt)] = prompt
  lengths_B = np.asarray([len(prompt) for prompt in prompts] + [1] * padding, np.int32)
  stop_ids = np.full(_bucket(len(eos_ids), LEAST_STOP_IDS), NO_TOKEN, np.int32)
  stop_ids[: len(eos_ids)] = eos_ids
  host = {
    'tokens_BS': tokens_BS,
    'logprobs_BS': np.zeros((rows, num_slots + 1), np.float32),
    'prompt_lengths_B': lengths_B,
    'lengths_B': lengths_B.copy(),
    'limits_B': np.asarray(limits + [1] * padding, np.int32),
    'finished_B': np.arange(rows) >= len(prompts),
    'stop_ids_BE': np.tile(stop_ids, (rows, 1)),
    'seeds_B': np.asarray(list(seeds) + [0] * padding, np.uint32),
    'values': sampling_lib.row_values([*configs, *[SamplingConfig()] * padding]),
  }
  return Slots(init_cache(config, rows, num_slots, stacked=stacked), **jax.device_put(host))


def _bucket(number: int, least: int = 1) -> int:
  """Return the next power of two, at least `least`."""
  return max(least, 1 << max(number - 1, 0).bit_length())


def _is_stacked(variables: Any) -> bool:
  return '0' not in variables['params']['layers']


def _per_row(
  rows: int,
  sampling: SamplingConfig | Sequence[SamplingConfig],
  seeds: Sequence[int] | None,
) -> tuple[list[SamplingConfig], list[int]]:
  if isinstance(sampling, SamplingConfig):
    configs = [sampling] * rows
    default_seeds = [(sampling.seed + row) % (sampling_lib.MAX_SEED + 1) for row in range(rows)]
  else:
    configs = list(sampling)
    default_seeds = [config.seed for config in configs]
  seeds = default_seeds if seeds is None else list(seeds)
  if len(configs) != rows or len(seeds) != rows:
    raise ValueError(
      f'{rows} prompts with {len(configs)} sampling configs and {len(seeds)} seeds; give one of '
      'each per prompt'
    )
  for row, seed in enumerate(seeds):
    if not 0 <= seed <= sampling_lib.MAX_SEED:
      raise ValueError(f'seeds[{row}]={seed}: a seed is between 0 and {sampling_lib.MAX_SEED}')
  return configs, seeds


def _check_prompt(
  config: DecoderConfig, row: int, prompt: Sequence[int], bos_id: int | None
) -> list[int]:
  if not len(prompt):
    if bos_id is None:
      raise ValueError(
        f'prompts[{row}] is empty and the tokenizer has no token to begin with; give at least one '
        'token, or bos_id'
      )
    prompt = [bos_id]
  if len(prompt) > config.max_length:
    raise ValueError(
      f'prompts[{row}] has {len(prompt)} tokens but the context of the model is '
      f'{config.max_length}; shorten it, or keep its last {config.max_length} tokens'
    )
  _check_ids(config, f'prompts[{row}]', prompt)
  return [int(token) for token in prompt]


def _check_ids(config: DecoderConfig, name: str, ids: Sequence[int]) -> None:
  for place, token in enumerate(ids):
    if int(token) != token or not 0 <= token < config.vocab_size:
      raise ValueError(
        f'{name}[{place}]={token} is no token id of the model (0 to {config.vocab_size - 1}); '
        'the prompt was made with another tokenizer'
      )
