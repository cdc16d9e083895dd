"""Which rows of the cache hold the beginning of a prompt, and in what chunks prompts are prefilled.

A prompt is prefilled on a grid: whole chunks from its first token on, then small ones for a short
rest. What a whole chunk leaves in the cache is a function of the tokens up to its end alone,
computed by one program at one place of the grid. So a prompt that shares whole chunks with a row
may take over its keys and values, and goes on exactly as if it had computed them.
"""

from collections.abc import Sequence


def chunk_size(length: int, prefilled: int, chunk: int, small: int) -> int:
  """Return the size of the program that prefills the next tokens of a prompt.

  Args:
    length: tokens of the prompt.
    prefilled: tokens that are in the cache.
    chunk: size of whole chunks.
    small: size for what is left where a whole chunk would be half empty.
  """
  on_grid = prefilled % chunk == 0
  return chunk if on_grid and 2 * (length - prefilled) > chunk else small


def shared(prompt: Sequence[int], held: Sequence[int], chunk: int) -> int:
  """Return how many tokens of a prompt whole chunks of the tokens `held` in the cache cover.

  At least one token is left over: what follows the prompt is predicted from it.
  """
  count, most = 0, min(len(prompt) - 1, len(held))
  while count + chunk <= most and prompt[count : count + chunk] == held[count : count + chunk]:
    count += chunk
  return count


def best(
  prompt: Sequence[int], held: Sequence[Sequence[int]], chunk: int, rows: Sequence[int]
) -> tuple[int, int]:
  """Return (row, number of tokens) of the row that holds most of a prompt; the first of equals."""
  counts = {row: shared(prompt, held[row], chunk) for row in rows}
  row = max(rows, key=lambda row: counts[row])
  return row, counts[row]


def choose(
  prompt: Sequence[int], held: Sequence[Sequence[int]], free: Sequence[int], chunk: int
) -> int:
  """Return the row, of those that are `free`, to which a prompt goes.

  It is the one that holds the prompt's beginning, unless more than half of what it holds would be
  lost; else the first.
  """
  row, count = best(prompt, held, chunk, free)
  return row if count and 2 * count >= len(held[row]) else free[0]
